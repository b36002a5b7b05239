"""Random numbers: whether a forward draws any, and how to draw the same ones again."""

from __future__ import annotations

import contextlib
import functools
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Generators = dict[str, object]  # by the name of what holds them


def generates(kind: type) -> bool:
    """Whether objects of this class are generators of random numbers, of torch, of Python or of NumPy."""
    return _generates(kind)


@functools.lru_cache(maxsize=4096)
def _generates(kind: type) -> bool:
    if issubclass(kind, (random.Random, torch.Generator)):
        return True
    return any(base.__module__.startswith("numpy.random") for base in kind.__mro__)


class Noise:
    """The states of all generators before a forward, to compare with those after it.

    Args:
        generators: gives the generators, besides the global ones, that the forward may use at present.
    """

    def __init__(self, generators: Callable[[], Generators]) -> None:
        self._find = generators
        self._before = generators()
        self._after: Generators | None = None
        self._states = {name: _state(generator) for name, generator in self._before.items()}
        self._torch = _torch_states()
        self._python = random.getstate()
        self._numpy = _numpy_state()
        self._imported = len(sys.modules)

    def imported(self) -> bool:
        """Whether modules were imported meanwhile, which may draw numbers; numpy.random may be one of them."""
        return len(sys.modules) != self._imported

    def drawn(self) -> bool:
        """Whether random numbers were drawn meanwhile."""
        now = _torch_states()
        return (
            any(not torch.equal(a, b) for a, b in zip(self._torch, now))
            or random.getstate() != self._python
            or _comparable(_numpy_state()) != _comparable(self._numpy)
            or self._drawn_from_others()
        )

    def made(self) -> bool:
        """Whether there are new generators, of which it is not known yet whether forwards draw from them."""
        return bool(self._generators_after().keys() - self._before.keys())

    def rewind(self) -> None:
        """Sets the generators back, so that a second forward draws what the first one drew."""
        torch.set_rng_state(self._torch[0])
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        if self._torch[1:]:
            torch.cuda.set_rng_state_all(self._torch[1:])
        for name, generator in self._before.items():
            _set_state(generator, self._states[name])

    def _drawn_from_others(self) -> bool:
        """Compares by name, not by object: a generator that every forward creates with the same seed is not random."""
        return any(
            name in self._states and _comparable(_state(generator)) != _comparable(self._states[name])
            for name, generator in self._generators_after().items()
        )

    def _generators_after(self) -> Generators:
        if self._after is None:
            self._after = self._find()
        return self._after


def _torch_states() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *cuda]


def _numpy_state() -> Any:
    """The state of NumPy's global generator; None if nothing has imported numpy.random."""
    generator = sys.modules.get("numpy.random")
    return None if generator is None else generator.get_state()


def _state(generator: Any) -> Any:
    """The state of a generator; a new object if it has none, as the operating system's, whose numbers never repeat."""
    try:
        if isinstance(generator, random.Random):
            return generator.getstate()
        if hasattr(generator, "get_state"):  # of torch, or of NumPy's older kind
            return generator.get_state()
        return getattr(generator, "bit_generator", generator).state
    except Exception:  # a class of the user's may raise anything
        return object()


def _set_state(generator: Any, state: Any) -> None:
    with contextlib.suppress(Exception):
        if isinstance(generator, random.Random):
            generator.setstate(state)
        elif hasattr(generator, "set_state"):
            generator.set_state(state)
        else:
            getattr(generator, "bit_generator", generator).state = state


def _comparable(state: Any) -> Any:
    """The state with bytes instead of tensors and arrays, whose == gives no bool."""
    if isinstance(state, Tensor):
        return bytes(state.tolist())
    if isinstance(state, dict):
        return {name: _comparable(value) for name, value in state.items()}
    if isinstance(state, tuple):
        return tuple(map(_comparable, state)) if any(hasattr(value, "tobytes") for value in state) else state
    return state.tobytes() if hasattr(state, "tobytes") else state
