"""Computes missing rows with the forward, and says whether they may be kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchcache._utils.locks import lock
from torchcache.engine.bypass import Bypassed
from torchcache.engine.call import Call, Indivisible
from torchcache.engine.decision import Request
from torchcache.engine.keys import CallVariant
from torchcache.engine.outputs import UnsupportedOutput, split
from torchcache.identity.randomness import Generators, GeneratorStates
from torchcache.identity.state import State
from torchcache.tiers.layout import Layout, select

_RANDOM = Bypassed("the forward draws random numbers (dropout, drop path, sampling?): is a submodule in train mode?")
_CHANGES_STATE = Bypassed("the forward changes the module's own state (buffers, tensors, submodules)")
# These tell nothing of the next call.
_IMPORTED = Bypassed("the forward imported modules, which may have drawn random numbers", is_silent=True)
_SET_UP = Bypassed("the forward changed the module's state, perhaps only to set it up", is_silent=True)
_NOT_ALONE = Bypassed("the module's state changed while several threads ran the forward", is_silent=True)

Forward = Callable[..., Any]


class Computed(NamedTuple):
    """Rows that may be kept."""

    layout: Layout
    leaves: list[Tensor]  # [M, …] each


class Uncached(NamedTuple):
    """The output of the whole call, whose rows must not be kept, and why."""

    output: Any
    why: Bypassed


class MissComputer:
    """Runs forwards, and remembers of which variants of calls the rows must not be kept.

    Args:
        is_unchanged: says whether a forward left the state as it was (see `Decider.is_unchanged`).
        cache_dtype: the option.
        generators: gives the generators that a forward may draw from (see `Fingerprint.generators`).
        refused: gets an entry for each variant that must not be cached from then on.
    """

    def __init__(
        self,
        is_unchanged: Callable[[State, Any], bool],
        cache_dtype: torch.dtype | None,
        generators: Callable[[State | None], Generators],
        refused: dict[CallVariant, Bypassed],
    ) -> None:
        self._lock = lock(self)
        self._is_unchanged = is_unchanged
        self._cache_dtype = cache_dtype
        self._generators = generators
        self._refused = refused
        self._leave_inputs: set[CallVariant] = set()  # whose forwards have been seen not to edit their inputs
        self._changed_once: set[CallVariant] = set()  # whose forwards have changed the state
        self._running: set[object] = set()  # forwards, in all threads
        self._started = 0

    def compute(self, forward: Forward, request: Request, rows: Tensor) -> Computed | Uncached:
        """Computes these rows of a call.

        Args:
            forward: of the module.
            request: the call.
            rows: int64 ``[M]``, positions in the batch, ascending.
        """
        call = request.call
        arguments = self._some_arguments(request, rows)
        args, kwargs = (call.args, call.kwargs) if arguments is None else arguments
        generators = GeneratorStates(functools.partial(self._generators, request.state))
        before = None if request.state is None else request.state.before_forward()
        versions = call.versions() if arguments is None else None
        output, is_alone = self._run(forward, args, kwargs)
        if versions is not None and versions == call.versions():
            self._leave_inputs.add(request.variant)
        why = self._objection(request, generators, before, is_alone)
        computed = why or self._split(output, call, rows, whole=arguments is None)
        if isinstance(computed, Computed):
            return computed
        if arguments is not None:
            generators.restore()
            output = forward(*call.args, **call.kwargs)
        return Uncached(output, computed)

    def recompute(self, forward: Forward, request: Request, rows: Tensor) -> Computed | Bypassed:
        """Computes rows of a call once more, on copies of them, for a comparison.

        Generators are set back if the forward moved them; what it changes in the state counts like any forward.

        Args:
            forward: of the module.
            request: the call.
            rows: int64 ``[M]``, positions in the batch: ascending and consecutive, or with the last one not above the
                first one.

        Raises:
            Exception: what the forward raises for such a batch, or Indivisible.
        """
        args, kwargs = request.call.select(rows, copy=True)
        generators = GeneratorStates(functools.partial(self._generators, request.state))
        before = None if request.state is None else request.state.before_forward()
        try:
            with torch.no_grad():
                output, is_alone = self._run(forward, args, kwargs)
            why = self._objection(request, generators, before, is_alone)
            return why or self._split(output, request.call, rows, whole=False)
        finally:
            torch.clear_autocast_cache()  # it has weights without grad now, which a forward may be about to train
            if generators.numbers_were_drawn():
                generators.restore()

    def _some_arguments(self, request: Request, rows: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments with these rows alone; None: the whole batch is to be computed."""
        if rows.shape[0] == request.call.batch:
            return None
        try:
            return request.call.select(rows, copy=request.variant not in self._leave_inputs)
        except Indivisible:
            return None

    def _run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
        """The output, and whether no other forward of this cache ran at the same time."""
        this = object()
        try:
            with self._lock:
                self._running.add(this)
                self._started += 1
                is_first, number = len(self._running) == 1, self._started
            output = forward(*args, **kwargs)
            with self._lock:
                return output, is_first and self._started == number
        finally:
            with self._lock:
                self._running.discard(this)

    def _objection(self, request: Request, generators: GeneratorStates, before: Any, is_alone: bool) -> Bypassed | None:
        """Why rows that were just computed must not be kept."""
        has_changed = generators.has_new_generators()
        if request.state is not None:
            has_changed |= not self._is_unchanged(request.state, before)
        if generators.numbers_were_drawn():
            return _IMPORTED if generators.modules_were_imported() else self._refuse(request.variant, _RANDOM)
        if not has_changed:
            return None
        if not is_alone:
            return _NOT_ALONE
        if request.variant in self._changed_once:
            return self._refuse(request.variant, _CHANGES_STATE)
        self._changed_once.add(request.variant)
        return _SET_UP

    def _refuse(self, variant: CallVariant, why: Bypassed) -> Bypassed:
        self._refused[variant] = why
        return why

    def _split(self, output: Any, call: Call, rows: Tensor, whole: bool) -> Computed | Bypassed:
        count = rows.shape[0]
        try:
            layout, leaves = split(output, call.batch if whole else count, call.tensors, self._cache_dtype)
        except UnsupportedOutput as error:
            return Bypassed("the output cannot be kept", details=str(error))
        return Computed(layout, leaves if count == leaves[0].shape[0] else [select(t, rows) for t in leaves])
