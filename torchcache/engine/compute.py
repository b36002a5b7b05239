"""Computes missing rows with the forward, and sees whether they may be kept."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchcache._utils.logs import Once
from torchcache.engine.call import Call, Indivisible
from torchcache.engine.keys import Kind
from torchcache.engine.outputs import UnsupportedOutput, split
from torchcache.identity.randomness import Generators, Noise
from torchcache.identity.state import State
from torchcache.tiers.layout import Layout, select

_NOISE = "the forward draws random numbers (dropout, drop path, sampling?): is a submodule in train mode?"
_OWN_STATE = "the forward changes the module's own state (buffers, tensors, submodules)"


class Uncacheable(Exception):
    """Rows that were computed but must not be kept; `output` is the whole batch's, where that was computed."""

    def __init__(self, output: Any, noise: Noise) -> None:
        super().__init__()
        self.output = output
        self.noise = noise


class Computer:
    """Remembers which kinds of calls must not be kept."""

    def __init__(
        self,
        once: Once,
        lock: threading.RLock,
        cache_dtype: torch.dtype | None,
        generators: Callable[[State | None], Generators],
    ) -> None:
        self._once = once
        self._generators = generators
        self._lock = lock
        self._cache_dtype = cache_dtype
        self._refused: set[Kind] = set()
        self._leave_inputs: set[Kind] = set()  # kinds of calls that have been seen not to edit their inputs
        self._changed: set[Kind] = set()  # kinds of calls that have changed the state once
        self._running = 0  # forwards, in all threads
        self._started = 0

    def refuses(self, kind: Kind) -> bool:
        return kind in self._refused

    def refuse(self, kind: Kind, reason: str) -> None:
        """Such calls are not kept from now on; the reason is said once."""
        self._refused.add(kind)
        self._once.warn(reason, "calls are not cached: %s", reason)

    def rows(
        self, forward: Callable[..., Any], call: Call, rows: Tensor, kind: Kind, state: State | None
    ) -> tuple[Layout, list[Tensor]]:
        """Layout and leaves of these rows of the call (int64 ``[M]``). Raises Uncacheable if they must not be kept."""
        noise = Noise(functools.partial(self._generators, state))
        before = None if state is None else state.before_forward()
        everything = len(rows) == call.batch
        args, kwargs = call.args, call.kwargs
        if not everything:
            try:
                args, kwargs = call.take(rows, copy=kind not in self._leave_inputs)
            except Indivisible:
                everything = True
        versions = call.versions() if everything else None
        output, alone = self._run(forward, args, kwargs)
        if versions is not None and versions == call.versions():
            self._leave_inputs.add(kind)
        changed = noise.made()
        if state is not None and before is not None:
            with self._lock:
                changed |= not state.after_forward(before)
        drawn = noise.drawn()
        if drawn and noise.imported():
            pass  # it may have been the import, as that of torch._dynamo by a checkpoint: the next time will tell
        elif drawn:
            self.refuse(kind, _NOISE)
        elif changed and not alone:
            pass  # nobody knows which forward it was
        elif changed and kind in self._changed:
            self.refuse(kind, _OWN_STATE)
        elif changed:
            self._changed.add(kind)  # it may have set something up that stays: the next time will tell
        else:
            try:
                layout, leaves = split(output, call.batch if everything else len(rows), call.tensors, self._cache_dtype)
                return layout, leaves if len(rows) == len(leaves[0]) else [select(t, rows) for t in leaves]
            except UnsupportedOutput as error:
                self._once.warn("output", "outputs are not cached: %s", error)
        raise Uncacheable(output if everything else None, noise)

    def _run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
        """The output, and whether no other forward of this cache ran at the same time."""
        with self._lock:
            self._running += 1
            self._started += 1
            first, number = self._running == 1, self._started
        try:
            output = forward(*args, **kwargs)
        finally:
            with self._lock:
                self._running -= 1
                alone = first and self._started == number
        return output, alone
