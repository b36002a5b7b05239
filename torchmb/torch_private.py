"""Every private name of torch that torchmb uses, and what happens where a version of torch lacks it.

- What torch stores in modules and tensors (`REQUIRED`) has no substitute: importing torchmb raises ImportError.
- Without one of the functions that vmap consists of (`VMAP`), `vmap_level` raises RuntimeError. A batch then runs
  model by model, with a warning; trees of torch's own layers run as before.
- Each of the other names has a fallback, which the comment at its definition describes.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

OPTIONAL: list[str] = []  # paths below torch of all names with a fallback


def _find(path: str, fallback: Any = None) -> Any:
    """The object at a path below torch, or the fallback."""
    OPTIONAL.append(path)
    try:
        return attrgetter(path)(torch)
    except AttributeError:
        return fallback


# What torch stores.

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_backward_pre_hooks",
    "_backward_hooks",
)
_CONTENTS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_METHODS = ("_apply", "_save_to_state_dict", "_load_from_state_dict")
REQUIRED = ("_version", *_CONTENTS, *_METHODS, *HOOKS)

_lacking = [name for name in REQUIRED if not hasattr(torch.empty(0) if name == "_version" else nn.Module(), name)]
if _lacking:
    raise ImportError(f"torchmb cannot run with torch {torch.__version__}, which lacks {', '.join(_lacking)}")

version_of: Callable[[Tensor], int] = attrgetter("_version")  # how often a tensor was edited in place
parameters_of: Callable[[nn.Module], dict[str, Any]] = attrgetter("_parameters")  # a module's own, by name
buffers_of: Callable[[nn.Module], dict[str, Any]] = attrgetter("_buffers")
children_of: Callable[[nn.Module], dict[str, nn.Module | None]] = attrgetter("_modules")
hooks_of: Callable[[nn.Module], tuple[dict[int, Any], ...]] = attrgetter(*HOOKS)


def share_contents(module: nn.Module, other: nn.Module) -> None:
    """Makes the parameters, buffers and submodules of `other` those of `module`, too."""
    vars(module).update({name: vars(other)[name] for name in _CONTENTS})


def apply_to_tensors(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> None:
    """What nn.Module.to and its relatives do with each parameter and buffer."""
    module._apply(function, recurse)  # type: ignore[no-untyped-call]


def save_own_entries(module: nn.Module, *args: Any) -> None:
    """The part of state_dict() that a class may override."""
    module._save_to_state_dict(*args)


def load_own_entries(module: nn.Module, *args: Any) -> None:
    """The part of load_state_dict() that a class may override."""
    module._load_from_state_dict(*args)


# Names that torch reads or writes here. Where it no longer does, they have no effect.

# Attributes in which a recurrent layer refers to its weights a second time.
FLAT_WEIGHTS = frozenset({"_flat_weights", "_flat_weight_refs"})
# Methods that initialise a module's parameters.
RESETS = ("reset_parameters", "_reset_parameters")
# The last part of the name under which a state dict has what get_extra_state returns.
EXTRA_STATE = "_extra_state"


def mark_as_parameter(tensor: Tensor) -> None:
    """Makes isinstance(tensor, nn.Parameter) true."""
    tensor._is_param = True


def copy_metadata(source: Any, target: Any) -> None:
    """Copies the versions of modules that a state dict carries as an attribute."""
    if hasattr(source, "_metadata"):
        target._metadata = source._metadata


# The functions that vmap consists of.

VMAP = (
    "_C._functorch._add_batch_dim",
    "_C._functorch._remove_batch_dim",
    "_C._functorch.get_unwrapped",
    "_C._functorch.maybe_current_level",
    "_C._functorch.maybe_get_bdim",
    "_C._functorch.maybe_get_level",
    "_C._functorch.pop_dynamic_layer_stack",
    "_C._functorch.push_dynamic_layer_stack",
    "_functorch.vmap.vmap_increment_nesting",
)
_vmap = {path.rpartition(".")[2]: _find(path) for path in VMAP}

add_batch_dim: Callable[[Tensor, int, int], Tensor] = _vmap["_add_batch_dim"]  # (M, …), dim, level → one model's
remove_batch_dim: Callable[[Tensor, int, int, int], Tensor] = _vmap["_remove_batch_dim"]  # …, level, M, dim → (M, …)
get_unwrapped: Callable[[Tensor], Tensor] = _vmap["get_unwrapped"]
maybe_get_bdim: Callable[[Tensor], int] = _vmap["maybe_get_bdim"]
maybe_get_level: Callable[[Tensor], int] = _vmap["maybe_get_level"]  # -1 for a tensor without a wrapper
pop_dynamic_layer_stack: Callable[[], Any] = _vmap["pop_dynamic_layer_stack"]
push_dynamic_layer_stack: Callable[[Any], int] = _vmap["push_dynamic_layer_stack"]


@contextmanager
def vmap_level(batch: int) -> Iterator[int]:
    """Opens a level of vmap over `batch` models → its number. RuntimeError if this torch lacks a name in `VMAP`."""
    if lacking := [name for name, found in _vmap.items() if found is None]:
        raise RuntimeError(f"torch {torch.__version__} lacks {', '.join(lacking)}")
    with _vmap["vmap_increment_nesting"](batch, "different") as level:
        yield level


_maybe_current_level: Callable[[], int | None] = _vmap["maybe_current_level"] or (lambda: 1)


def current_level() -> int:
    """The number of the innermost transform of torch.func; 0 if there is none.

    Where torch cannot say, 1: torch's own backward then takes the place of a faster one, which no transform can follow.
    """
    return _maybe_current_level() or 0


# Without it, vmap warns of operations that it runs model by model.
set_vmap_fallback_warning: Callable[[bool], None] = _find(
    "_C._functorch._set_vmap_fallback_warning_enabled", lambda enabled: None
)

# Without it, any process may have global hooks, so trees of torch's own layers run under vmap, too.
has_any_global_hook: Callable[[], bool] = _find("nn.modules.module._has_any_global_hook", lambda: True)

# Without it, torch.nn.utils.weight_norm must call something else, which vmap treats in its own way.
weight_norm: Callable[..., Tensor] | None = _find("_weight_norm")

# Without it, autograd sees a view, whose editing in place copies the tensor twice in the backward.
_unsafe_view = _find("ops.aten._unsafe_view")


def unsafe_view(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """x.view(sizes), which is not a view for autograd."""
    view: Tensor = x.view(sizes) if _unsafe_view is None else _unsafe_view.default(x, sizes)
    return view


def reversed_padding(layer: Any) -> Sequence[int]:
    """The padding of a convolution as F.pad expects it: last dimension first, before and after."""
    own: Sequence[int] | None = getattr(layer, "_reversed_padding_repeated_twice", None)
    if own is not None:
        return own
    if not isinstance(layer.padding, str):
        return [size for size in reversed(layer.padding) for _ in range(2)]
    totals = [(k - 1) * d if layer.padding == "same" else 0 for k, d in zip(layer.kernel_size, layer.dilation)]
    return [size for total in reversed(totals) for size in (total // 2, total - total // 2)]


_flatten = _find("utils._pytree.tree_flatten")
_unflatten = _find("utils._pytree.tree_unflatten")


def map_children(function: Callable[[Any], Any], value: Any) -> Any:
    """A container that torch knows as a pytree, with `function` of each child; any other value → NotImplemented.

    Without torch's pytrees only named tuples, torch.return_types and the containers of `collections` count.
    """
    if _flatten is None or _unflatten is None:
        return _map_collection(function, value)
    children, spec = _flatten(value, is_leaf=lambda x: x is not value)
    if len(children) == 1 and children[0] is value:
        return NotImplemented
    return _unflatten([function(child) for child in children], spec)


def _map_collection(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(function, value))
    if isinstance(value, tuple) and hasattr(value, "n_fields"):  # torch.return_types
        return type(value)(list(map(function, value)))
    if type(value) is deque:
        return deque(map(function, value), value.maxlen)
    if type(value) not in (OrderedDict, defaultdict):
        return NotImplemented
    new = copy(value)
    new.update({key: function(child) for key, child in value.items()})
    return new
