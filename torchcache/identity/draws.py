"""Whether this thread draws from the global generators of random numbers, which all threads share."""

from __future__ import annotations

import contextlib
import random
import sys
import types
from contextlib import AbstractContextManager
from typing import Any

import torch

from torchcache._utils.torch_private import TorchDispatchMode
from torchcache.identity.randomness import generates, global_states, of_numpy

_seeded = torch.Tag.nondeterministic_seeded


class ThreadDraws:
    """Notes numbers that one thread draws, from the operators and functions that it calls.

    Attributes:
        have_happened: whether it has drawn any.
    """

    def __init__(self) -> None:
        self.have_happened = TorchDispatchMode is None  # then nobody can tell
        self._before: Any = None

    def of_torch(self) -> AbstractContextManager[Any]:
        """While it is entered, operators of torch are watched in the thread that entered it."""
        return contextlib.nullcontext() if TorchDispatchMode is None else _mode(self)

    def call(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Calls an operator."""
        if not _may_draw(function):
            return function(*args, **kwargs)
        before = global_states()
        output = function(*args, **kwargs)
        self.have_happened |= before != global_states()
        return output

    def note(self, frame: types.FrameType, event: str, value: Any) -> None:
        """Takes an event of `sys.setprofile`."""
        if event == "return":
            self.have_happened |= "numpy.random" in sys.modules and _uses_numpy(frame)
        elif event == "c_call" and _is_of_generator(value):
            self._before = global_states()
        elif event == "c_return" and _is_of_generator(value):
            self.have_happened |= self._before != global_states()


def _may_draw(operator: Any) -> bool:
    """Whether an operator is said to draw numbers, or is not torch's, so that nobody says what it does."""
    return _seeded in getattr(operator, "tags", ()) or getattr(operator, "namespace", "aten") not in ("aten", "prims")


def _is_of_generator(function: Any) -> bool:
    return generates(type(getattr(function, "__self__", None))) or function is random.seed


def _uses_numpy(frame: types.FrameType) -> bool:
    """Whether code that has run can reach the functions of numpy.random, which no profiler sees."""
    module = sys.modules["numpy.random"]
    names = frame.f_code.co_names
    values = [frame.f_globals[name] for name in names if name in frame.f_globals] + list(frame.f_locals.values())
    values += [value for held in values[:] for value in getattr(held, "__dict__", {}).values() if callable(value)]
    has_random = "random" in names
    return any(value is module or of_numpy(value) or (has_random and value is sys.modules["numpy"]) for value in values)


def _mode(draws: ThreadDraws) -> Any:
    class Mode(TorchDispatchMode):  # type: ignore[misc]
        supports_higher_order_operators = True

    def dispatch(mode: Any, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return draws.call(operator, args, kwargs or {})

    Mode.__torch_dispatch__ = dispatch  # in the body of the class, it would import torch._dynamo, which takes seconds
    return Mode()
