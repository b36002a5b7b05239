"""Every private name of torch that torchcache uses. No other module uses one; `_native/build.py` stands alone.

A version of torch may lack any of them. The library then still gives right rows: where it cannot find out whether
caching would be wrong, it does not cache. One warning at import names what is missing, and the consequence.
"""

from __future__ import annotations

import functools
import operator
import os
import pkgutil
from collections.abc import Callable, Container
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from torchcache._utils.logs import logger

T = TypeVar("T")

# An unknown value. It differs from all that another process describes, so that no rows are shared.
UNKNOWN = os.urandom(16)
_NO_CALL = "no call is cached"
_NOT_SHARED = "rows are not shared with other processes, unless persistent_module_hash is given"
_MORE_BREAKS = "torch.compile breaks the graph more often"

names: dict[str, bool] = {}  # module:name → whether this torch has it


class _Absent:
    """No object is an instance of this class. It stands for a class that torch does not have."""


def _private(name: str, otherwise: Any, consequence: str) -> Any:
    """The value of a private name, given as ``module:name``; `otherwise` if torch does not have it."""
    try:
        value = pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        names[name] = False
        logger.warning("torch %s has no %s: %s", torch.__version__, name.replace(":", "."), consequence)
        return otherwise
    names[name] = True
    return value


# ---- What goes on around a call. Every call asks for all of it, so these are torch's functions without wrappers.

# A true value while torch.jit.trace records the call.
tracing_state: Callable[[], Any] = _private(
    "torch._C:_get_tracing_state",
    torch.jit.is_tracing,  # type: ignore[attr-defined]
    "torch.jit.is_tracing is asked instead",
)
# The innermost transform of torch.func, such as vmap, or None.
functorch_level: Callable[[], Any] = _private("torch._C._functorch:peek_interpreter_stack", lambda: UNKNOWN, _NO_CALL)
# How many TorchDispatchModes are active.
dispatch_modes: Callable[[], int] = _private("torch._C:_len_torch_dispatch_stack", lambda: 1, _NO_CALL)
# How many TorchFunctionModes are active, and those.
function_modes: Callable[[], int] = _private(
    "torch._C:_len_torch_function_stack", lambda: len(function_mode_stack()), "every call asks for all function modes"
)
function_mode_stack: Callable[[], list[Any]] = _private(
    "torch.overrides:_get_current_function_mode_stack", lambda: [UNKNOWN], "no call under a function mode is cached"
)
# The function mode of torch.set_default_device and of ``with torch.device(...)``. It does not change what a call gives.
DeviceContext: type = _private(
    "torch.utils._device:DeviceContext", _Absent, "no call is cached while there is a default device"
)
# Hooks that run in every module of the process.
global_forward_hooks: dict[int, Any] = _private("torch.nn.modules.module:_global_forward_hooks", {0: UNKNOWN}, _NO_CALL)
global_forward_pre_hooks: dict[int, Any] = _private(
    "torch.nn.modules.module:_global_forward_pre_hooks", {0: UNKNOWN}, _NO_CALL
)
# Sees the operators that one thread calls.
TorchDispatchMode: Any = _private(
    "torch.utils._python_dispatch:TorchDispatchMode",
    None,
    "no forward is cached during which another thread draws random numbers",
)
# The level of forward-mode AD, below 0 outside of it. Where torch does not tell, engine/bypass.py asks each tensor.
_private("torch.autograd.forward_ad:_current_level", 0, "each call takes a little longer")
forward_ad_level: Callable[[], Any] = functools.partial(vars(torch.autograd.forward_ad).get, "_current_level", 0)
# The base of all batch norms.
BatchNorm: type | tuple[type, ...] = _private(
    "torch.nn.modules.batchnorm:_BatchNorm",
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "only torch's own batch norms are noticed",
)

# ---- The precision of operators. Every call asks for it.

_NO_PRECISION = "rows do not depend on some of the precision settings of torch.backends"

# The precision of a kind of operators (matmul, conv, rnn) in a backend (cuda, mkldnn), such as "tf32".
fp32_precision: Callable[[str, str], str] = _private(
    "torch._C:_get_fp32_precision_getter", lambda backend, operator: torch.get_float32_matmul_precision(), _NO_PRECISION
)
# Whether torch.use_deterministic_algorithms is on.
is_deterministic: Callable[[], bool] = _private(
    "torch._C:_get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled, "each call takes longer"
)
reduced_precision_on_cpu: Callable[[], Any] = _private(
    "torch._C:_get_cpu_allow_fp16_reduced_precision_reduction", lambda: False, _NO_PRECISION
)
_in_cuda: list[Callable[[], Any]] = [
    _private(f"torch._C:{name}", lambda: None, _NO_PRECISION)
    for name in (
        "_get_cublas_allow_bf16_reduced_precision_reduction",
        "_get_cublas_allow_fp16_reduced_precision_reduction",
        "_get_cublas_allow_fp16_accumulation",
    )
]


def reduced_precision_in_cuda() -> tuple[Any, ...]:
    """What matrix products of 16-bit numbers in CUDA may round, in the order of torch.backends.cuda.matmul."""
    return tuple(get() for get in _in_cuda)


# ---- How often a tensor was changed in place.

_get_version = operator.attrgetter("_version")


def version(tensor: Tensor) -> object:
    """The version counter of a tensor; -1 for inference tensors, which have none.

    Where torch does not tell, each version differs from all others, so that the tensor counts as changed.
    """
    try:
        return tensor._version
    except RuntimeError:
        return -1
    except AttributeError:
        return object()


def versions(tensors: list[Tensor]) -> list[object]:
    """The `version` of each tensor, without a call for each."""
    try:
        return list(map(_get_version, tensors))
    except (RuntimeError, AttributeError):
        return list(map(version, tensors))


# ---- torch.compile. A cached call is one graph break. To import torch._dynamo costs seconds, so nothing here does.

_set_strategy = _private("torch._C._dynamo.eval_frame:set_code_exec_strategy", None, _MORE_BREAKS)
_Strategy = _private("torch._C._dynamo.eval_frame:_FrameExecStrategy", None, _MORE_BREAKS)
_Action = _private("torch._C._dynamo.eval_frame:_FrameAction", None, _MORE_BREAKS)


def untraced(function: T, reason: str = "") -> T:
    """Marks a function that torch.compile leaves alone, with all that it calls.

    torch.compiler.disable would do, but for its import, and for the microseconds of its wrapper.

    Args:
        function: is returned.
        reason: what torch.compile says with fullgraph=True.
    """
    if _set_strategy and _Strategy and _Action:
        _set_strategy(function.__code__, _Strategy(_Action.SKIP, _Action.SKIP))  # type: ignore[attr-defined]
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = reason or None  # type: ignore[attr-defined]
    return function


def compiled_module(module: nn.Module) -> nn.Module | None:
    """The module inside of one that torch.compile made, to which that passes attributes on; None for other modules."""
    inner = module.__dict__.get("_modules", {}).get("_orig_mod") if type(module).__name__ == "OptimizedModule" else None
    return inner if isinstance(inner, nn.Module) else None


def is_compiled(value: Any) -> bool:
    """Whether torch.compile made this module or function, or ``module.compile()`` was called."""
    names = ("_orig_mod", "_torchdynamo_orig_callable")
    value = getattr(value, "func", value)  # of a functools.partial
    return any(hasattr(value, name) for name in names) or getattr(value, "_compiled_call_impl", None) is not None


# ---- Operators that Python code defines with torch.library.custom_op.

CustomOpDef: type = _private("torch._library.custom_ops:CustomOpDef", _Absent, _NOT_SHARED)
_custom_operators: Any = _private("torch._library.custom_ops:OPDEFS", {}, _NOT_SHARED)


class Operator(NamedTuple):
    """An operator that Python code defines: its function for all devices, and those for one device each."""

    definition: object  # what torch.library.custom_op gave
    namespace: str
    name: str
    function: Any
    kernels: dict[Any, Callable[..., Any]]

    @property
    def qualified_name(self) -> str:
        """The name with its namespace, as ``namespace::name``."""
        return f"{self.namespace}::{self.name}"


def parts_of_operator(definition: Any) -> Operator | None:
    """The parts of a `CustomOpDef`; None where torch does not tell."""
    try:
        parts = definition._namespace, definition._name, definition._init_fn, definition._backend_fns
    except AttributeError:
        return None
    return Operator(definition, *parts)


def operators(names: Container[str]) -> list[Operator]:
    """The operators with one of these names that Python code has defined so far, as far as torch tells."""
    named = [item for item in list(_custom_operators.values()) if getattr(item, "_name", None) in names]
    return [parts for definition in named if (parts := parts_of_operator(definition))]


def operators_are_known() -> bool:
    """Whether torch tells what defined each of the operators."""
    definitions = list(_custom_operators.values())
    has_names = names["torch._library.custom_ops:CustomOpDef"] and names["torch._library.custom_ops:OPDEFS"]
    return has_names and None not in map(parts_of_operator, definitions)


def operator_definition(packet: Any) -> object | None:
    """The `CustomOpDef` of what ``torch.ops.namespace.name`` gives; None for an operator that C++ defines."""
    definition: object | None = _custom_operators.get(getattr(packet, "_qualified_op_name", None))
    return definition


def without_frame(overload: Any) -> Any:
    """An overload of an operator as a builtin function, without the Python frame that torch puts around it."""
    return getattr(overload, "_op", overload)


# ---- TorchScript.

# The type that a scripted module was compiled to, in one of its attributes.
ConcreteModuleType: type = _private("torch._C:ConcreteModuleType", _Absent, "rows of scripted modules are not shared")
# A method of a scripted module, whose program is described with the module.
ScriptMethod: type = _private("torch._C:ScriptMethod", _Absent, "rows of frozen scripted modules are not shared")


def compiled_forward(module: torch.jit.ScriptModule) -> Any:
    """The compiled forward of a scripted module; None if it has none, `UNKNOWN` where torch does not tell.

    It is not read through the attribute ``forward``, in whose place the decorator may stand.
    """
    try:
        compiled: Any = getattr(module, "_c")  # noqa: B009 - mypy takes it for a module
        return compiled._get_method("forward") if compiled._has_method("forward") else None
    except AttributeError:
        return UNKNOWN


def script_type_name(value: torch.ScriptObject) -> str:
    """The qualified name of the C++ or TorchScript class of an object.

    Raises:
        AttributeError: this torch does not tell.
    """
    return str(value._type().qualified_name())
