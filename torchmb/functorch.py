"""Leaving torch.func.vmap for one operation: what lies beneath the rules and the hooks.

Inside vmap a tensor of M models is a wrapper around (…, M, …), the dimension of models being anywhere. `lift` takes
the wrappers off, runs a kernel on the tensors themselves, where autograd records it as usual, and wraps its outputs.
torch does the same for an autograd.Function with a `vmap` method, at six times the cost (126 instead of 20 µs).
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

Dim = int | None  # where the models are; None: the same tensor for all of them
Batched = tuple[Tensor, Dim]


class _Quiet:
    """Without the fused attention of eval mode, which vmap cannot run, and without remarks on slow operations.

    Both are switches of the process: the first run of all threads turns them off, the last one on again.
    """

    def __init__(self) -> None:
        self._lock, self._runs, self._fused = Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            self._runs += 1
            if self._runs == 1:
                self._fused = torch.backends.mha.get_fastpath_enabled()
                self._turn(False, remarks=False)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._runs -= 1
            if not self._runs:
                self._turn(self._fused, remarks=True)  # as torch has it; there is no way to ask

    def _turn(self, fused: bool, remarks: bool) -> None:
        torch.backends.mha.set_fastpath_enabled(fused)
        set_vmap_fallback_warning(remarks)


quiet = _Quiet()


@contextmanager
def under_vmap(batch: int) -> Iterator[int]:
    """torch.func.vmap by its parts, for tensors that `wrap` has wrapped, without 100 µs of flattening → its level."""
    _load_decompositions()
    with quiet, vmap_level(batch) as level:
        yield level


@cache
def _load_decompositions() -> None:
    """torch.func.vmap itself registers decompositions of losses, when it first runs."""
    torch.func.vmap(lambda x: x)(torch.zeros(1))


def wrap(x: Tensor, level: int) -> Tensor:
    """(M, …) → what one model sees of it."""
    return add_batch_dim(x, 0, level)


def models_of(x: Tensor, level: int, batch: int) -> Tensor:
    """What one model sees → (M, …)."""
    return remove_batch_dim(x, level, batch, 0)


def is_batched(x: Any, level: int | None = None) -> bool:
    """Whether `x` differs between the models of the innermost (or given) vmap."""
    return isinstance(x, Tensor) and maybe_get_level(x) == (current_level() if level is None else level)


def unwrap(x: Any, level: int) -> tuple[Any, Dim]:
    if isinstance(x, Tensor) and maybe_get_level(x) == level:
        return get_unwrapped(x), maybe_get_bdim(x)
    return x, None


def is_transformed(x: Tensor) -> bool:
    """Whether `x` belongs to a transform of torch.func that still runs."""
    return maybe_get_level(x) != -1


def lift(kernel: Callable[..., Batched], *operands: Any) -> Tensor:
    """kernel((tensor, dim), …) → (tensor, dim) outside the innermost vmap; what is no tensor arrives with dim None."""
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
    """(M, …), a view or x itself."""
    if dim is None:
        return x.expand(batch, *x.shape)
    return x.movedim(dim, 0) if dim else x


def in_order(x: Tensor) -> Tensor:
    """x in the order of its dimensions, as a model's output lies in memory; not where one row stands for many."""
    return x if 0 in x.stride() else x.contiguous()


def batch_size(*given: tuple[Any, Dim]) -> int:
    """M, of operands at least one of which is batched."""
    return next(int(x.shape[dim]) for x, dim in given if dim is not None)


def split_dim(x: Tensor, dim: int, batch: int) -> Tensor:
    """x, that nobody else holds, with `dim` split into (batch, rest)."""
    return unsafe_view(x, (*x.shape[:dim], batch, x.shape[dim] // batch, *x.shape[dim + 1 :]))


def folded(x: Tensor, dim: int) -> tuple[Tensor, int]:
    """Models and images in one first dimension, in the order in which they lie in memory → that, and the place of M."""
    place = 0 if x.stride(dim) >= x.stride(0 if dim else 1) else 1
    return x.movedim(dim, place).flatten(0, 1), place


def unfolded(x: Tensor, place: int, batch: int) -> Batched:
    """The inverse of `folded`: (M, B, …) or (B, M, …)."""
    return split_dim(x, 0, batch if place == 0 else x.shape[0] // batch), place
