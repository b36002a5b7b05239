"""Views: copies where the models are between the dimensions that a view would join."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ..functorch import Batched, is_batched, is_transformed, lift, models_first, unwrap
from ..torch_private import current_level, version_of

# Functions that may return a view of one model's tensor.
VIEWING = frozenset(
    {
        *(Tensor.view, Tensor.view_as, Tensor.reshape, Tensor.reshape_as, Tensor.flatten, Tensor.ravel),
        *(Tensor.contiguous, torch.reshape, torch.flatten, torch.ravel),
    }
)


def edits(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call changes its first argument, by torch's conventions."""
    name = getattr(function, "__name__", "")
    by_name = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
    return by_name or bool(kwargs.get("inplace"))


@dataclass
class _Copy:
    """Two tensors that would share memory for one model."""

    wrapped: tuple[ref[Tensor], ref[Tensor]]  # as the forward holds them
    tensors: tuple[Tensor, Tensor]
    versions: tuple[int, int]

    def edited(self) -> bool:
        """Whether one of the two has been edited in place since."""
        return self.versions != tuple(map(version_of, self.tensors))


class Views:
    """The views of one run.

    A tensor whose memory is contiguous for one model may be interleaved with those of others; a view of it is then a
    copy. The forward can notice only if it edits one of the two in place while it still holds the other.
    """

    def __init__(self) -> None:
        self._copies: list[_Copy] = []

    def call(self, function: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a function in `VIEWING`, and remembers the result if it is a copy."""
        if not is_batched(x):
            return NotImplemented
        if function is Tensor.view_as:
            function, args = Tensor.view, (args[0].shape,)
        if function is Tensor.view:
            if kwargs or not args or isinstance(args[0], torch.dtype):
                return NotImplemented
            output = _view(x, args[0] if isinstance(args[0], (tuple, list)) else args)
        else:
            output = function(x, *args, **kwargs)
        self._watch(x, output)
        return output

    def _watch(self, x: Tensor, output: Tensor) -> None:
        tensors = tuple(unwrap(t, current_level())[0] for t in (x, output))
        if any(is_transformed(t) or t.is_inference() for t in tensors):
            return
        if len({t.untyped_storage().data_ptr() for t in tensors}) == 2:
            versions = version_of(tensors[0]), version_of(tensors[1])
            self._copies.append(_Copy((ref(x), ref(output)), (tensors[0], tensors[1]), versions))

    def after_edit(self) -> None:
        """Checks the copies after an edit in place. RuntimeError if the forward could notice a difference."""
        edited = [c for c in self._copies if c.edited()]
        if any(all(wrapper() is not None for wrapper in c.wrapped) for c in edited):
            raise RuntimeError("a view is edited in place")
        self._copies = [c for c in self._copies if not c.edited()]

    def finish(self) -> None:
        """RuntimeError if a tensor was edited without a call of `after_edit`."""
        if any(c.edited() for c in self._copies):
            raise RuntimeError("a view is edited in place")


def _view(x: Tensor, sizes: Any) -> Tensor:
    def kernel(given: Batched) -> Batched:
        tensor, dim = given
        assert dim is not None
        first = models_first(tensor, dim, tensor.shape[dim])
        try:
            return first.view(len(first), *sizes), 0
        except RuntimeError:
            return first.reshape(len(first), *sizes), 0

    return lift(kernel, x)
