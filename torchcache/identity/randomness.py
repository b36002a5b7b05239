"""Random numbers: whether a forward draws some, and how to draw the same once more."""

from __future__ import annotations

import contextlib
import functools
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Generators = dict[str, object]  # by the place where they are found


def generates(kind: type) -> bool:
    """Whether objects of this class are generators of random numbers, of torch, of Python or of NumPy."""
    return _generates(kind)


@functools.lru_cache(maxsize=4096)
def _generates(kind: type) -> bool:
    if issubclass(kind, (random.Random, torch.Generator)):
        return True
    return any(base.__module__.startswith("numpy.random") for base in kind.__mro__)


class Noise:
    """Whether random numbers were drawn since this was made.

    Args:
        own: gives the generators, besides the global ones, that may be drawn from at present.
    """

    def __init__(self, own: Callable[[], Generators]) -> None:
        self._list = own
        self._own = own()
        self._later: Generators | None = None
        self._states = {name: _state(generator) for name, generator in self._own.items()}
        self._torch = _torch_states()
        self._python = random.getstate()
        self._numpy = _numpy_state()
        self._imported = len(sys.modules)

    def imported(self) -> bool:
        """Whether modules were imported meanwhile: they may draw numbers, and NumPy's generator may be one of them."""
        return len(sys.modules) != self._imported

    def drawn(self) -> bool:
        now = _torch_states()
        return (
            any(not torch.equal(a, b) for a, b in zip(self._torch, now))
            or random.getstate() != self._python
            or _comparable(_numpy_state()) != _comparable(self._numpy)
            or self._drawn_from_own()
        )

    def made(self) -> bool:
        """Whether there are generators that were not there before: nobody knows yet what is drawn from them."""
        return bool(self._own_now().keys() - self._own.keys())

    def rewind(self) -> None:
        """Sets the generators back, so that a second forward draws what the first one drew."""
        torch.set_rng_state(self._torch[0])
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        if self._torch[1:]:
            torch.cuda.set_rng_state_all(self._torch[1:])
        for name, generator in self._own.items():
            _set_state(generator, self._states[name])

    def _drawn_from_own(self) -> bool:
        """By place, not by object: one that every forward makes anew with the same seed is no noise."""
        return any(
            name in self._states and _comparable(_state(generator)) != _comparable(self._states[name])
            for name, generator in self._own_now().items()
        )

    def _own_now(self) -> Generators:
        """Those after the forward."""
        if self._later is None:
            self._later = self._list()
        return self._later


def _torch_states() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *cuda]


def _numpy_state() -> Any:
    """Of NumPy's global generator; None where nobody has imported that."""
    generator = sys.modules.get("numpy.random")
    return None if generator is None else generator.get_state()


def _state(generator: Any) -> Any:
    """Of a generator; a new object where it has none, as that of the operating system, whose numbers never repeat."""
    try:
        if isinstance(generator, random.Random):
            return generator.getstate()
        if hasattr(generator, "get_state"):  # of torch, or of NumPy's older kind
            return generator.get_state()
        return getattr(generator, "bit_generator", generator).state
    except Exception:  # a class of the user's may raise what it likes
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
    """A state in which tensors and arrays, which do not compare as one, are bytes."""
    if isinstance(state, Tensor):
        return bytes(state.tolist())
    if isinstance(state, dict):
        return {name: _comparable(value) for name, value in state.items()}
    if isinstance(state, tuple):
        return tuple(map(_comparable, state)) if any(hasattr(value, "tobytes") for value in state) else state
    return state.tobytes() if hasattr(state, "tobytes") else state
