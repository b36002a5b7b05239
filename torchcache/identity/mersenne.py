"""The global generators of Python and NumPy, both Mersenne twisters: their states, read from memory.

A snapshot is needed before and after every forward. ``getstate`` makes 625 integers each time, which takes 9 µs, and
``numpy.random.get_state`` 39 µs; copying the same 2,500 bytes takes one. Where the bytes turn out not to be
what those functions say, or the generator is another one, snapshots are what those functions return.
"""

from __future__ import annotations

import ctypes
import functools
import random
import struct
import sys
from typing import Any

from torch import Tensor

_WORDS = 624
_BYTES = 4 * (_WORDS + 1)  # and the position

State = tuple[Any, ...]


class PythonTwister:
    """The generator behind the functions of ``random``."""

    def __init__(self) -> None:
        self._generator: Any = random.getstate.__self__  # type: ignore[attr-defined]
        # CPython: the position, then the words, behind the head of the object.
        self._address = id(self._generator) + object.__basicsize__
        _, words, _ = random.getstate()
        in_memory = sys.implementation.name == "cpython" and type(self._generator).__basicsize__ > _BYTES
        self._is_readable = in_memory and _position_first(ctypes.string_at(self._address, _BYTES)) == words

    def snapshot(self) -> State:
        """What changes with every number that is drawn; with `gauss` the half of a pair that is left over."""
        if not self._is_readable:
            return random.getstate()
        return ctypes.string_at(self._address, _BYTES), self._generator.gauss_next

    def restore(self, snapshot: State) -> None:
        """Sets the generator back to a snapshot."""
        if len(snapshot) == 2:
            words, gauss_next = snapshot
            snapshot = random.getstate()[0], _position_first(words), gauss_next
        random.setstate(snapshot)


class NumpyTwister:
    """The generator behind the functions of ``numpy.random``.

    One part of its state is nowhere to be read but in `get_state`: the half of a pair of normally distributed numbers
    that is left over. It comes only with new words, so a state without one is the same as long as its words are.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._address: tuple[Any, int] = None, 0  # of the state of that bit generator; 0: it is not a Mersenne Twister

    def snapshot(self) -> dict[str, Any]:
        """The whole state."""
        state: dict[str, Any] = self._module.get_state(legacy=False)
        return state

    def has_drawn(self, before: dict[str, Any]) -> bool:
        """Whether numbers were drawn since a snapshot."""
        is_whole = before["bit_generator"] == "MT19937" and not before["has_gauss"]
        words = self._words() if is_whole else b""
        if words:
            return words != _numpy_words(before)
        return bool(comparable(self.snapshot()) != comparable(before))

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Sets the generator back to a snapshot."""
        self._module.set_state(snapshot)

    def _words(self) -> bytes:
        """The words and the position; nothing if they cannot be read."""
        get = getattr(self._module, "get_bit_generator", None)  # of NumPy 1.24 and newer
        bit_generator = None if get is None else get()
        known, address = self._address
        if bit_generator is not known:
            address = self._find_address(bit_generator)
            self._address = bit_generator, address
        return ctypes.string_at(address, _BYTES) if address else b""

    def _find_address(self, bit_generator: Any) -> int:
        if type(bit_generator).__name__ != "MT19937":
            return 0
        address = int(bit_generator.ctypes.state_address)
        right = ctypes.string_at(address, _BYTES) == _numpy_words(self._module.get_state(legacy=False))
        return address if right else 0


def _numpy_words(state: dict[str, Any]) -> bytes:
    twister = state["state"]
    return bytes(twister["key"].tobytes()) + struct.pack("=i", twister["pos"])


def _position_first(words: bytes) -> tuple[int, ...]:
    """The state as ``random.getstate`` gives it: the words, then the position."""
    position, *rest = struct.unpack(f"=i{_WORDS}I", words)
    return (*rest, position)


def comparable(state: Any) -> Any:
    """The state with bytes instead of tensors and arrays, whose == gives no bool."""
    if isinstance(state, Tensor):
        return bytes(state.tolist())
    if isinstance(state, dict):
        return {name: comparable(value) for name, value in state.items()}
    if isinstance(state, tuple):
        return tuple(map(comparable, state)) if any(hasattr(value, "tobytes") for value in state) else state
    return state.tobytes() if hasattr(state, "tobytes") else state


@functools.cache
def python_twister() -> PythonTwister:
    """The one object for the generator of Python."""
    return PythonTwister()


@functools.cache
def _numpy_twister(module: Any) -> NumpyTwister:
    return NumpyTwister(module)


def numpy_twister() -> NumpyTwister | None:
    """None as long as nothing has imported numpy.random."""
    module = sys.modules.get("numpy.random")
    return None if module is None else _numpy_twister(module)
