"""Whether the output of later calls may depend on what a forward has just set."""

from __future__ import annotations

import dis
import types
from collections.abc import Iterable, Iterator
from itertools import chain

from torch import Tensor

from torchcache.identity.origin import unwrap
from torchcache.identity.slots import ABSENT, Slot
from torchcache.identity.syntax import nested

# Methods that no forward runs by itself.
_NOT_RUN = frozenset(("__init__", "__repr__", "__str__", "__getstate__", "__setstate__", "__reduce__", "__del__"))
_DYNAMIC = frozenset(("getattr", "__getattribute__", "vars", "__dict__", "globals", "eval", "exec"))
_READS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF")
_WRITES = ("STORE_ATTR", "STORE_GLOBAL", "STORE_NAME", "STORE_DEREF")
_COPIES = ("COPY", "DUP_TOP", "DUP_TOP_TWO")
_TO_THE_SAME = 4  # instructions between a read and the write of ``self.n = self.n + 1``


class Reads:
    """The names that code reads, other than to write them again, as ``self.calls += 1`` does.

    Args:
        roots: functions that run.
        classes: of the modules, whose methods may run.
        functions: that code reaches.
    """

    def __init__(
        self, roots: Iterable[object], classes: Iterable[type], functions: Iterable[types.FunctionType]
    ) -> None:
        members = [item for c in set(classes) for base in c.__mro__ for item in vars(base).items() if _is_own(base)]
        methods: dict[str, list[types.FunctionType]] = {}
        for name, member in members:
            for function in _functions_in(member):
                methods.setdefault(name, []).append(function)
        inside = {id(f) for f in chain.from_iterable(methods.values())}
        todo = [*chain.from_iterable(map(_functions_in, roots)), *(f for f in functions if id(f) not in inside)]
        todo += [f for name, fs in methods.items() if name == "forward" or _runs_by_itself(name) for f in fs]
        self._names: set[object] = set()
        seen: set[int] = set()
        while todo:
            function = todo.pop()
            if id(function) not in seen:
                seen.add(id(function))
                names = set(_names_read(function.__code__))
                is_dynamic = not _DYNAMIC.isdisjoint(names)  # then any method may run
                called = methods.keys() - _NOT_RUN if is_dynamic else methods.keys() & (names - self._names)
                todo += [f for name in called for f in methods[name]]
                self._names |= names

    def may_depend_on(self, slot: Slot) -> bool:
        """Whether a place that a forward changed may matter to later calls.

        Args:
            slot: the place, with its value before.
        """
        if isinstance(slot.key, str) and slot.key in self._names:
            return True
        if slot.value is ABSENT:
            return False
        if isinstance(slot.present, Tensor):
            return True  # the caller may want it, and a hit would leave that of another batch
        return not isinstance(slot.key, str) and type(slot.value) is not int


def _is_own(cls: type) -> bool:
    return not cls.__module__.startswith(("torch.nn.", "builtins"))


def _runs_by_itself(name: str) -> bool:
    return name.startswith("__") and name.endswith("__") and name not in _NOT_RUN


def _functions_in(member: object) -> Iterator[types.FunctionType]:
    parts = [getattr(member, part, None) for part in ("__func__", "fget", "func", "original")]
    for part in (unwrap(member), *map(unwrap, parts)):
        if isinstance(part, types.FunctionType):
            yield part


def _names_read(code: types.CodeType) -> Iterator[object]:
    for inner in nested(code):
        steps = [s for s in dis.get_instructions(inner) if s.opname not in ("EXTENDED_ARG", "CACHE")]
        for i, step in enumerate(steps):
            if (step.opname in _READS and not _is_written_again(steps, i)) or (
                step.opname == "LOAD_CONST" and isinstance(step.argval, str) and not _is_stored_to(steps, i)
            ):
                yield step.argval


def _is_written_again(steps: list[dis.Instruction], i: int) -> bool:
    """Whether what is read is used for nothing but to compute the value that is written to the same place."""
    name = steps[i].argval
    if i and steps[i - 1].opname in _COPIES:  # self.n += …
        return True
    ahead = steps[i + 1 : i + 1 + _TO_THE_SAME]
    kinds = ("LOAD_CONST", "LOAD_SMALL_INT", "LOAD_FAST", "BINARY_OP", "BINARY_ADD", "INPLACE_ADD", "BINARY_SUBTRACT")
    for step in ahead:
        if step.opname in _WRITES:
            return bool(step.argval == name)
        if not step.opname.startswith(kinds):
            return False
    return False


def _is_stored_to(steps: list[dis.Instruction], i: int) -> bool:
    """Whether a key is used only to write an item, or to write it again, as in ``counts["calls"] += 1``."""
    following = steps[i + 1].opname if i + 1 < len(steps) else ""
    return following == "STORE_SUBSCR" or following in _COPIES
