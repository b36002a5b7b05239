"""The identity of a module or function: its module hash, and the state that its keys depend on.

The module hash names the directory. It stands for code, init arguments, and the options that change what
is stored. The state (weights, buffers, configuration, what code reaches) is part of every key: a snapshot, and a watch
that says on every call, cheaply, whether the snapshot still holds.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from torchcache._utils.lazy import lazy
from torchcache._utils.locks import lock
from torchcache._utils.logs import logger
from torchcache._utils.torch_private import UNKNOWN, operators_are_known
from torchcache.identity.code import describe, describe_value
from torchcache.identity.encoding import Unencodable, encode
from torchcache.identity.randomness import Generators
from torchcache.identity.reads import Reads
from torchcache.identity.slots import is_alike
from torchcache.identity.snapshot import Kept, Snapshot, Survey, Target, held_generators, nothing_kept
from torchcache.identity.tensors import tensor_bytes
from torchcache.identity.watch import Watch
from torchcache.options import Options

FINGERPRINT_FORMAT = 2
_MAX_STATES = 4  # that a switch may go back to without work


class State(NamedTuple):
    """A snapshot, and what says whether it still holds."""

    watch: Watch
    snapshot: Snapshot


class _First(NamedTuple):
    """What the module hash needs of the first look, and calls with a given module hash."""

    code: bytes
    others: list[nn.Module]
    generators: Generators


class _Published(NamedTuple):
    """All that changes, so that it is replaced by one assignment."""

    kept: Kept
    states: tuple[State, ...]  # the present one first, then those that may come back


class Identity:
    """What makes two calls of one module (with the forward that is cached) or function the same computation.

    Thread-safe. An error or Ctrl-C anywhere leaves it as it was, and the next call looks again.

    Args:
        module: the module, which is not kept alive; None: it is a function.
        forward: the undecorated forward of the module, or the function.
        init: encoded init arguments.
        options: the options in force.
    """

    def __init__(self, module: nn.Module | None, forward: Callable[..., Any], init: bytes, options: Options) -> None:
        self.name = forward.__qualname__ if module is None else type(module).__qualname__
        self._lock = lock(self)
        self._module = (lambda: None) if module is None else weakref.ref(module)
        self._forward = forward
        self._init = init
        self._options = options
        self._published = _Published(nothing_kept(), ())

    # ---- the module hash

    @lazy
    def parts(self) -> dict[str, bytes]:
        """What the module hash is made of."""
        return {
            "code": self._first.code,
            "init arguments": self._init,
            **{f"option {name}": encode(value) for name, value in self._options.stored().items()},
            **({} if operators_are_known() else {"operators": UNKNOWN}),
        }

    @lazy
    def module_hash(self) -> str:
        """The name of the directory."""
        hashed = encode((FINGERPRINT_FORMAT, self.parts))
        name = self._options.persistent_module_hash or hashlib.blake2b(hashed, digest_size=16).hexdigest()
        logger.info("%s: module hash %s", self.name, name)
        return name

    @lazy
    def _first(self) -> _First:
        survey = Survey(self._target, self._published.kept)
        return _First(survey.code, [m for _, m in survey.named if m is not survey.target.module], survey.generators)

    def classes(self) -> dict[str, bytes]:
        """Name of each class of a module → its code, to say which one changed."""
        kinds = {type(m).__qualname__: type(m) for m in self.modules(None)}
        return {name: describe(kind, tensors=tensor_bytes) for name, kind in sorted(kinds.items())}

    # ---- the state

    def state(self, probe: bool = True) -> State | None:
        """The state at present; None if the user gave a module hash, which stands for everything.

        Args:
            probe: whether to probe the tensors natively. Else the caller does, and compares with `native.first`.

        Raises:
            Unwatchable: a tensor of the state has no readable bytes.
        """
        if self._options.persistent_module_hash is not None:
            return None
        module = self._module()
        states = self._published.states
        if states and states[0].watch.holds(module, probe):
            return states[0]
        with self._lock:
            return self._present_state(module, probe)

    def _present_state(self, module: nn.Module | None, probe: bool) -> State:
        kept, states = self._published
        for state in states:
            if state.watch.holds(module, probe):
                self._published = _Published(kept, (state, *(s for s in states if s is not state)))
                return state
        if states:
            kept = kept._replace(earlier=kept.earlier.plus(states[0].watch.appended(), module))
        survey = Survey(self._target, kept)
        state = State(*survey.snapshot())
        may_return = [s for s in states if s.watch.may_hold_again(state.watch)]
        self._published = _Published(survey.kept(), (state, *may_return[: _MAX_STATES - 1]))
        return state

    def forget(self) -> None:
        """Has the next call look at every byte again."""
        with self._lock:
            self._published = _Published(nothing_kept(), ())

    def modules(self, state: State | None) -> list[nn.Module]:
        """Every module that the forward may use."""
        others = self._first.others if state is None else state.snapshot.others
        module = self._module()
        return others if module is None else [module, *others]

    def generators(self, state: State | None) -> Generators:
        """The generators of random numbers that the forward may use: those that code reaches or modules hold."""
        reached = self._first.generators if state is None else state.snapshot.generators
        return {**reached, **held_generators(self.modules(state))}

    @property
    def _target(self) -> Target:
        return Target(self.name, self._module(), self._forward)

    # ---- what a forward did

    def after_forward(self, before: State) -> str | None:
        """What a forward changed that later calls may depend on; None: nothing.

        What it sets, and no code that it may run reads, does not count from then on, as counters do not and lists of
        results: the value before counts.

        Args:
            before: the state when the forward began.
        """
        module = self._module()
        on_gpu = any(t.is_cuda for t in before.watch.tensors)
        # A probe on a GPU would wait for the forward. What only the probe would find counts from the next call on.
        if before.watch.holds(module, probe=not on_gpu):
            return None
        with self._lock:
            return self._changed(module, before, probe=not on_gpu)

    def _changed(self, module: nn.Module | None, before: State, probe: bool) -> str | None:
        kept, states = self._published
        changes = [s for s in before.watch.changes(module) if not is_alike(s.present, s.value)]
        reads = Reads([self._forward], [type(m) for m in self.modules(before)], before.watch.functions)
        relevant = [s for s in changes if reads.may_depend_on(s)]
        if relevant:
            return ", ".join(sorted({str(s.key) for s in relevant}))
        watch = before.watch.after(changes, module)
        if not watch.holds(module, probe):
            return "its buffers, parameters or submodules"
        kept = kept._replace(earlier=kept.earlier.plus(changes, module))
        self._published = _Published(kept, (State(watch, before.snapshot), *(s for s in states if s is not before)))
        return None


def init_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Encodes init arguments, the same in every process; modules without their weights, which belong to the state.

    If an argument has no such encoding, the result is random, so that rows are not shared with other processes, and
    one warning says so.
    """
    try:
        return describe_value((args, kwargs), tensors=tensor_bytes, weights=_shape, name="init arguments")
    except Unencodable as error:
        logger.warning(
            "%s: an init argument has no encoding that is the same in every process (%s): its rows are "
            "not shared with other processes; give persistent_module_hash to share them",
            name,
            error,
        )
        return os.urandom(16)


def _shape(tensor: Tensor) -> bytes:
    return encode((tensor.dtype, tuple(tensor.shape)))
