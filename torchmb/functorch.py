"""Leaves torch.func.vmap for one operation: the basis of rules and hooks.

Within vmap a tensor of M models is a wrapper around (…, M, …), with the models at any dimension. `lift` removes the
wrappers, runs a kernel on the tensors themselves, where autograd records it as usual, and wraps its outputs. The `vmap`
method of an autograd.Function does the same at six times the cost (126 instead of 20 µs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .torch_private import (
    add_batch_dim,
    current_level,
    get_unwrapped,
    maybe_get_bdim,
    maybe_get_level,
    pop_dynamic_layer_stack,
    push_dynamic_layer_stack,
    remove_batch_dim,
    set_vmap_fallback_warning,
    unsafe_view,
    vmap_level,
)

Dim = int | None  # the dimension of models; None: the same tensor for all of them
Batched = tuple[Tensor, Dim]


class _Quiet:
    """Turns off fused attention in eval mode, which vmap cannot run, and warnings of operations that vmap loops over.

    Both are settings of the process: the first of all concurrent runs turns them off, the last one on again.
    """

    def __init__(self) -> None:
        self._lock, self._runs, self._fused = Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            self._runs += 1
            if self._runs == 1:
                self._fused = torch.backends.mha.get_fastpath_enabled()
                self._turn(False, warnings=False)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._runs -= 1
            if not self._runs:
                self._turn(self._fused, warnings=True)  # torch's default; there is no getter

    def _turn(self, fused: bool, warnings: bool) -> None:
        torch.backends.mha.set_fastpath_enabled(fused)
        set_vmap_fallback_warning(warnings)


quiet = _Quiet()


@contextmanager
def under_vmap(batch: int) -> Iterator[int]:
    """Opens a level of vmap, for tensors that `wrap` has wrapped → the level. torch.func.vmap takes 100 µs longer."""
    _load_decompositions()
    with quiet, vmap_level(batch) as level:
        yield level


@cache
def _load_decompositions() -> None:
    """Runs torch.func.vmap once, which then registers its decompositions of losses."""
    torch.func.vmap(lambda x: x)(torch.zeros(1))


def wrap(x: Tensor, level: int) -> Tensor:
    """(M, …) → a tensor with the shape of one model's."""
    return add_batch_dim(x, 0, level)


def unwrap_output(x: Tensor, level: int, batch: int) -> Tensor:
    """A tensor with the shape of one model's → (M, …)."""
    return remove_batch_dim(x, level, batch, 0)


def is_batched(x: Any, level: int | None = None) -> bool:
    """Whether `x` differs between the models of the innermost (or given) vmap."""
    return isinstance(x, Tensor) and maybe_get_level(x) == (current_level() if level is None else level)


def unwrap(x: Any, level: int) -> tuple[Any, Dim]:
    """A tensor of the level without its wrapper, and its dimension of models; any other value and None."""
    if isinstance(x, Tensor) and maybe_get_level(x) == level:
        return get_unwrapped(x), maybe_get_bdim(x)
    return x, None


def is_transformed(x: Tensor) -> bool:
    """Whether `x` belongs to a transform of torch.func that still runs."""
    return maybe_get_level(x) != -1


def lift(kernel: Callable[..., Batched], *operands: Any) -> Tensor:
    """Runs kernel((tensor, dim), …) → (tensor, dim) outside the innermost vmap; other operands have dim None."""
    return lift_all(lambda *given: [kernel(*given)], *operands)[0]


def lift_all(kernel: Callable[..., list[Batched]], *operands: Any) -> list[Tensor]:
    """`lift` for a kernel with several outputs."""
    level = current_level()
    unwrapped = [unwrap(x, level) for x in operands]
    transform = pop_dynamic_layer_stack()
    try:
        outputs = kernel(*unwrapped)
    finally:
        push_dynamic_layer_stack(transform)
    return [x if dim is None else add_batch_dim(x, dim, level) for x, dim in outputs]


def models_first(x: Tensor, dim: Dim, batch: int) -> Tensor:
    """A tensor with the models first, (M, …): a view, or x itself."""
    if dim is None:
        return x.expand(batch, *x.shape)
    return x.movedim(dim, 0) if dim else x


def as_contiguous(x: Tensor) -> Tensor:
    """The contiguous tensor, like a single model's output; an expanded tensor stays as it is."""
    return x if 0 in x.stride() else x.contiguous()


def batch_size(*given: tuple[Any, Dim]) -> int:
    """M, from operands of which at least one is batched."""
    return next(int(x.shape[dim]) for x, dim in given if dim is not None)


def split_dim(x: Tensor, dim: int, batch: int) -> Tensor:
    """Splits `dim` into (batch, rest). Nobody else may hold x, since autograd does not know of the view."""
    return unsafe_view(x, (*x.shape[:dim], batch, x.shape[dim] // batch, *x.shape[dim + 1 :]))


def fold_models(x: Tensor, dim: int) -> tuple[Tensor, int]:
    """Joins models and rows into one dimension, in the order of memory → the result, and the former place of M."""
    place = 0 if x.stride(dim) >= x.stride(0 if dim else 1) else 1
    return x.movedim(dim, place).flatten(0, 1), place


def unfold_models(x: Tensor, place: int, batch: int) -> Batched:
    """Reverses `fold_models` → (M, B, …) or (B, M, …), and the place of M."""
    return split_dim(x, 0, batch if place == 0 else x.shape[0] // batch), place
