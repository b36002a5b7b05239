"""Where a snapshot found what it is made of: attributes, items of containers, variables of closures."""

from __future__ import annotations

import contextvars
import functools
import threading
import types
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchcache.identity.attributes import counted
from torchcache.identity.encoding import Unencodable, encode, is_builtin
from torchcache.identity.objects import is_without_value, what_thread_reads
from torchcache.identity.origin import attributes_of
from torchcache.identity.randomness import generates

ABSENT = object()
LENGTH = object()  # the key under which a list has its length
MAX_SLOTS = 2000  # of containers and objects that modules hold and code reaches; edits of others are not noticed
_MAX_DEPTH = 6
_NOT_OPENED = (type, nn.Module, Tensor, types.ModuleType, types.FunctionType, torch.ScriptObject)


class Slot(NamedTuple):
    """A place and what was there: an item of a dict or list, an attribute (of an object's ``__dict__``)."""

    container: Any
    key: Any
    value: Any

    @property
    def present(self) -> Any:
        """What is there now; ABSENT if nothing is."""
        try:
            is_cell = isinstance(self.container, types.CellType)
            return self.container.cell_contents if is_cell else self.container[self.key]
        except (LookupError, ValueError):
            return ABSENT


class Earlier:
    """What containers held before a forward changed them: that counts, instead of what they hold now. Immutable."""

    def __init__(self, items: dict[int, dict[Any, Any]], containers: dict[int, Any]) -> None:
        self._items = items  # by the id of the container: key → value before
        self._containers = containers  # kept alive, so that no id is used twice

    def __bool__(self) -> bool:
        return bool(self._items)

    def plus(self, slots: Iterable[Slot], own: nn.Module | None) -> Earlier:
        """With more slots; of one place the first value counts. The ``__dict__`` of `own` is not kept alive."""
        items, containers = {key: dict(held) for key, held in self._items.items()}, dict(self._containers)
        for container, key, value in slots:
            items.setdefault(id(container), {}).setdefault(key, value)
            if own is None or container is not own.__dict__:
                containers[id(container)] = container
        return Earlier(items, containers)

    def only(self, ids: Container[int]) -> Earlier:
        """Without the containers that are not among these."""
        items = {key: held for key, held in self._items.items() if key in ids}
        return Earlier(items, {key: c for key, c in self._containers.items() if key in ids})

    def item(self, container: Any, key: Any, present: Any) -> Any:
        """What was in one place; `present` where no forward changed it."""
        return self._items.get(id(container), {}).get(key, present)

    def contents(self, container: Any, present: Any = None) -> Any:
        """What a dict or list held; `present`, by default the container, if no forward changed it."""
        present = container if present is None else present
        changed = self._items.get(id(container))
        if changed is None:
            return present
        if isinstance(present, list):
            return [changed.get(i, item) for i, item in enumerate(present[: changed.get(LENGTH)])]
        return {key: item for key, item in {**present, **changed}.items() if item is not ABSENT}


class Slots:
    """Where a snapshot found what it is made of, apart from the tensors and submodules of modules.

    Args:
        classes: the ``__dict__`` of each class, which is another object each time that one asks for it; is added to.
    """

    def __init__(self, classes: dict[type, Any]) -> None:
        self._classes = classes
        self.slots: dict[tuple[int, Any], Slot] = {}
        self.sized: dict[int, Any] = {}  # by id: containers whose length counts
        self.cells: dict[int, Slot] = {}  # the variables of closures
        self.functions: dict[int, types.FunctionType] = {}
        self.lists: dict[int, tuple[list[Any], int]] = {}  # with their lengths
        self.reads: dict[int, tuple[Callable[[], Any], Any]] = {}  # what objects hold for this thread, and how to ask
        self._opened: dict[int, Any] = {}

    def add(self, container: Any, key: Any, value: Any) -> None:
        """Adds an item of a dict or list, or an attribute in a ``__dict__``."""
        self.slots.setdefault((id(container), key), Slot(container, key, value))

    def add_cell(self, cell: types.CellType, name: str, value: Any) -> None:
        """Adds a variable of a closure."""
        self.cells.setdefault(id(cell), Slot(cell, name, value))

    def add_function(self, function: types.FunctionType) -> None:
        """Adds the code and the defaults of a function."""
        self.functions.setdefault(id(function), function)

    def add_attribute(self, cls: type, name: str, value: Any) -> None:
        """Adds an attribute of a class."""
        self.add(self._classes.setdefault(cls, vars(cls)), name, value)

    def add_attributes(self, module: nn.Module, is_own: bool) -> None:
        """Adds the attributes of a module that count, but for the plain ones of torch's own layers (see `Watch`)."""
        for name, value in counted(module).items():
            if may_be_set_later(module, name) and (is_own or not (is_of_torch(module) and is_builtin(value))):
                self.add(module.__dict__, name, value)

    def add_contents(self, value: Any, depth: int = 0) -> None:
        """Adds what a container or object holds, at any depth that is not absurd."""
        if is_builtin(value) or id(value) in self._opened or depth > _MAX_DEPTH or is_without_value(value):
            return
        self._opened[id(value)] = value
        if isinstance(value, (threading.local, contextvars.ContextVar)):
            read = what_thread_reads(value)
            self.reads[id(value)] = read, read()
        for container, items in _opened(value):
            if len(self.slots) + len(items) > MAX_SLOTS:
                return
            if isinstance(container, dict):
                self.sized[id(container)] = container
            elif container is not None:
                self.lists[id(container)] = container, len(container)
            for key, item in items:
                if container is not None:
                    self.add(container, key, item)
                self.add_contents(item, depth + 1)


def _opened(value: Any) -> Iterator[tuple[Any, list[tuple[Any, Any]]]]:
    """Containers that a value is made of, with their items; None stands for one that is immutable."""
    if isinstance(value, types.MethodType):
        yield None, [("__self__", value.__self__)]
    elif isinstance(value, functools.partial):
        yield None, [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    elif isinstance(value, dict) and type(value).__getitem__ is dict.__getitem__ and len(value) <= MAX_SLOTS:
        yield value, list(value.items())
    elif isinstance(value, list) and len(value) <= MAX_SLOTS:
        yield value, list(enumerate(value))
    elif isinstance(value, (tuple, frozenset)):
        yield None, list(enumerate(value))
    if not isinstance(value, _NOT_OPENED) and isinstance(attributes := attributes_of(value), dict) and attributes:
        yield attributes, list(attributes.items())


def are_equal(slots: list[Slot]) -> bool:
    """Whether every place has the value that it had, or an equal plain one."""
    return all(is_same(s.present, s.value) for s in slots)


def is_same(a: Any, b: Any) -> bool:
    """Equal in type and value, for plain values; NaN is the same as itself."""
    return a is b or (is_builtin(a) and is_builtin(b) and encode(a) == encode(b))


def is_alike(a: Any, b: Any) -> bool:
    """Whether two values are the same, or containers of the same values, or both carry none."""
    if is_same(a, b) or (type(a) is type(b) and (generates(type(a)) or is_without_value(a))):
        return True
    try:
        return encode(a) == encode(b)
    except Unencodable:
        return False


def may_be_set_later(m: nn.Module, name: str) -> bool:
    """Not so private attributes of torch's own layers, which they set again themselves."""
    return not (name.startswith("_") and is_of_torch(m))


def is_of_torch(m: nn.Module) -> bool:
    """Whether the module is one of torch's own layers."""
    return type(m).__module__.startswith("torch.nn.")
