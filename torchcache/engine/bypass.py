"""When a call is computed as if there were no cache, and why.

Silent reasons are normal: a call under vmap, say. The others mean that a cached row would be wrong, or would change
what is trained, so they are worth a warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchcache._utils.torch_private import (
    BatchNorm,
    DeviceContext,
    dispatch_modes,
    forward_ad_level,
    function_mode_stack,
    function_modes,
    functorch_level,
    global_forward_hooks,
    global_forward_pre_hooks,
    tracing_state,
)
from torchcache.engine.call import Call

_grad_enabled = torch.is_grad_enabled
_strided = torch.strided
_is_compiling = torch.compiler.is_compiling


class Bypassed(NamedTuple):
    """A call that is computed as if there were no cache.

    Attributes:
        reason: in words, after "calls are not cached: ".
        is_silent: whether the caller asked for something that a cache cannot give, so that no warning is due.
        details: of this call, after the reason.
    """

    reason: str
    is_silent: bool = False
    details: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.details}" if self.details else self.reason


_TRACED = Bypassed("the call is being traced", is_silent=True)
_FUNCTORCH = Bypassed("the call runs under a functorch transform", is_silent=True)
_DISPATCH_MODE = Bypassed("a torch dispatch mode is active", is_silent=True)
_FUNCTION_MODE = Bypassed("a torch function mode is active", is_silent=True)
_GLOBAL_HOOKS = Bypassed(
    "forward hooks for all modules are registered (torch.nn.modules.module.register_module_forward_hook)"
)
_EMPTY = Bypassed("the batch is empty", is_silent=True)
_REQUIRES_GRAD = Bypassed("an input requires grad", is_silent=True)
_TANGENT = Bypassed("an input carries a forward-mode tangent", is_silent=True)


def of_surroundings() -> Bypassed | None:
    """What goes on around the call."""
    if tracing_state() or _is_compiling():
        return _TRACED
    if functorch_level() is not None:
        return _FUNCTORCH
    if dispatch_modes() > 0:
        return _DISPATCH_MODE
    if function_modes() > 0 and not all(isinstance(mode, DeviceContext) for mode in function_mode_stack()):
        return _FUNCTION_MODE
    return _GLOBAL_HOOKS if global_forward_hooks or global_forward_pre_hooks else None


def of_call(call: Call) -> Bypassed | None:
    """What the inputs are."""
    if call.batch == 0:
        return _EMPTY
    grad = _grad_enabled()
    for t in call.tensors:
        if grad and t.requires_grad:
            return _REQUIRES_GRAD
        if t.layout is not _strided or t.is_quantized or t.is_meta:
            return Bypassed("an input has no plain bytes", True, f"{t.layout}, {t.device}")
    return _TANGENT if forward_ad_level() >= 0 and any(map(_is_dual, call.tensors)) else None


def _is_dual(t: Tensor) -> bool:
    return torch.autograd.forward_ad.unpack_dual(t).tangent is not None  # type: ignore[no-untyped-call]


def of_modules(modules: Sequence[nn.Module]) -> Bypassed | None:
    """Modules whose rows depend on their neighbours, or that wait for other ranks."""
    for m in modules:
        kind = type(m).__name__
        if isinstance(m, nn.SyncBatchNorm) or kind in (
            "FullyShardedDataParallel",
            "DistributedDataParallel",
        ):
            return Bypassed(f"{kind} talks to other processes, which would wait for ranks without misses")
        if isinstance(m, BatchNorm) and m.running_mean is None:
            return Bypassed(
                f"{_place(m, modules)} always uses the statistics of the batch, for it has no running ones, so rows "
                "depend on their neighbours; leave it out of the cached module"
            )
        if isinstance(m, BatchNorm) and m.training:
            return Bypassed(
                f"{_place(m, modules)} is in train mode and uses the statistics of the batch, so rows depend on their "
                f"neighbours; {KEEP_IN_EVAL_MODE}"
            )
    return None


KEEP_IN_EVAL_MODE = (
    "decorate the module with torchcache(frozen=True), which keeps it in eval mode, or call its eval() after every "
    "model.train()"
)


def training_modules(named_modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """The modules in train mode that compute something else there, as "name (class)", for messages.

    Where torchcache knows of none that does, the outermost modules in train mode.

    Args:
        named_modules: as ``named_modules()`` of a module gives them.
    """
    training = [(name, m) for name, m in named_modules if getattr(m, "training", False)]
    inner = {id(child) for _, m in training for child in m.modules() if child is not m}
    found = [item for item in training if _differs_in_train_mode(item[1])]
    return [_described(name, m) for name, m in found or [item for item in training if id(item[1]) not in inner]]


def _differs_in_train_mode(m: nn.Module) -> bool:
    """Whether a class is one of batch statistics or dropout, by what it is, is called or is told."""
    rates = (getattr(m, name, None) for name in ("dropout", "p", "drop_prob"))
    if isinstance(m, BatchNorm):
        return True
    has_rate = any(isinstance(rate, float) and 0 < rate <= 1 for rate in rates)
    return has_rate or isinstance(m, nn.RReLU) or ("drop" in type(m).__name__.lower() and not list(m.children()))


def _place(module: nn.Module, modules: Sequence[nn.Module]) -> str:
    """The name of a module in the first one that contains it, and its class."""
    names = (name for root in modules for name, m in root.named_modules() if m is module)
    return _described(next(names, ""), module)


def _described(name: str, module: nn.Module) -> str:
    return f"{name} ({type(module).__name__})" if name else type(module).__name__
