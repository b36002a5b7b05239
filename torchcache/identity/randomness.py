"""Random numbers: whether a forward draws any, and how to draw the same ones again."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchcache.identity.mersenne import comparable, numpy_twister, python_twister

Generators = dict[str, object]  # by the name of what holds them


def generates(kind: type) -> bool:
    """Whether objects of this class are generators of random numbers, of torch, of Python or of NumPy."""
    return _generates(kind)


@functools.lru_cache(maxsize=4096)
def _generates(kind: type) -> bool:
    if issubclass(kind, (random.Random, torch.Generator)):
        return True
    return any(base.__module__.startswith("numpy.random") for base in kind.__mro__)


class GeneratorStates:
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
        self._python = python_twister().snapshot()
        numpy = numpy_twister()
        self._numpy = None if numpy is None else numpy.snapshot()
        self._imported = len(sys.modules)

    def modules_were_imported(self) -> bool:
        """Whether modules were imported meanwhile, which may draw numbers; numpy.random may be one of them."""
        return len(sys.modules) != self._imported

    def global_ones_have_drawn(self) -> bool:
        """Whether numbers were drawn meanwhile from the global generators, by whichever thread."""
        return (
            _as_bytes(_torch_states()) != _as_bytes(self._torch)
            or python_twister().snapshot() != self._python
            or self._drawn_from_numpy()
        )

    def held_ones_have_drawn(self) -> bool:
        """Whether numbers were drawn meanwhile from the other ones.

        Compares by name, not by object: a generator that every forward creates with the same seed is not random.
        """
        return any(
            name in self._states and comparable(_state(generator)) != comparable(self._states[name])
            for name, generator in self._generators_after().items()
        )

    def has_new_generators(self) -> bool:
        """Whether there are new generators, of which it is not known yet whether forwards draw from them."""
        return bool(self._generators_after().keys() - self._before.keys())

    def restore(self, with_global: bool) -> None:
        """Sets the generators back, so that a second forward draws what the first one drew.

        Args:
            with_global: also the global ones, from which other threads may have drawn as well.
        """
        for name, generator in self._before.items():
            _set_state(generator, self._states[name])
        if not with_global:
            return
        torch.set_rng_state(self._torch[0])
        python_twister().restore(self._python)
        if self._numpy is not None and (numpy := numpy_twister()) is not None:
            numpy.restore(self._numpy)
        if self._torch[1:]:
            torch.cuda.set_rng_state_all(self._torch[1:])

    def _drawn_from_numpy(self) -> bool:
        """Also true if the forward imported numpy.random, of which there is no earlier state."""
        numpy = numpy_twister()
        return numpy is not None and (self._numpy is None or numpy.has_drawn(self._numpy))

    def _generators_after(self) -> Generators:
        if self._after is None:
            self._after = self._find()
        return self._after


def global_states() -> object:
    """The states of the global generators, to compare."""
    numpy = numpy_twister()
    return _as_bytes(_torch_states()), python_twister().snapshot(), numpy and comparable(numpy.snapshot())


def of_numpy(function: object) -> bool:
    """Whether a function draws from the global generator of NumPy."""
    module = sys.modules.get("numpy.random")
    own = getattr(function, "__self__", None)
    return module is not None and own is not None and own is getattr(getattr(module, "seed", None), "__self__", module)


def _torch_states() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *cuda]


def _as_bytes(states: list[Tensor]) -> list[bytes]:
    return [ctypes.string_at(state.data_ptr(), state.numel()) for state in states]  # numpy() takes NumPy


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
