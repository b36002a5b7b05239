"""The models' parameters, buffers and other attributes as one module's: stacked, and swapped in for a run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .base import AbstractBatchModule
from .pytree import map_tensors, take
from .torch_private import FLAT_WEIGHTS, buffers_of, children_of, mark_as_parameter, parameters_of


class Slot(NamedTuple):
    """A place of a tensor in a module: the dict of its parameters or buffers, and the name there."""

    tensors: dict[str, Tensor | None]
    name: str

    @property
    def tensor(self) -> Tensor | None:
        return self.tensors[self.name]

    def put(self, tensor: Tensor | None) -> None:
        self.tensors[self.name] = tensor


Stop = Callable[[nn.Module], Any]
TensorsOf = Callable[[nn.Module], dict[str, Any]]  # parameters_of or buffers_of


def walk(root: nn.Module, stop: Stop, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of each place in the tree, without what lies below modules for which `stop` is true."""
    yield name, root
    if not stop(root):
        for child, module in children_of(root).items():
            if module is not None:
                yield from walk(module, stop, f"{name}.{child}" if name else child)


def is_batch_module(module: nn.Module) -> bool:
    return isinstance(module, AbstractBatchModule)


def plain_modules(root: nn.Module, stop: Stop = is_batch_module) -> list[nn.Module]:
    """The modules that run on one model's shapes: all but batch modules and what is in them."""
    return [m for m in {id(m): m for _, m in walk(root, stop)}.values() if not stop(m)]


def slots(modules: Iterable[nn.Module], tensors_of: TensorsOf) -> list[Slot]:
    """Each place of a tensor or None; a tied parameter has several."""
    return [Slot(tensors_of(m), name) for m in modules for name in tensors_of(m)]


def named_tensors(root: nn.Module, stop: Stop) -> dict[str, Tensor]:
    """Name → parameter or buffer; a tied tensor has several names."""
    return {
        f"{name}.{own}" if name else own: tensor
        for name, module in walk(root, stop)
        if not stop(module)
        for tensors_of in (parameters_of, buffers_of)
        for own, tensor in tensors_of(module).items()
        if tensor is not None
    }


def stack_tensors(modules: Sequence[nn.Module], stop: Stop) -> dict[int, Tensor]:
    """id of each tensor of the first module → that of all modules, (M, …); they are alike. ValueError if it is lazy."""
    all_tensors = [named_tensors(m, stop) for m in modules]
    found: dict[int, Tensor] = {}
    for name, tensor in all_tensors[0].items():
        if is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet: run the lazy module once before it is batched")
        if id(tensor) not in found:
            found[id(tensor)] = _stacked([tensors[name] for tensors in all_tensors])
    return found


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    values = torch.stack([t.detach() for t in tensors])
    return nn.Parameter(values, tensors[0].requires_grad) if isinstance(tensors[0], nn.Parameter) else values


def copied(root: nn.Module, instead: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy, with other objects in the place of those with these ids."""
    memo = dict(instead or {})
    for module in root.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # as weight_norm leaves one; torch copies leaves alone
                memo.setdefault(id(value), value.detach())
    return copy.deepcopy(root, memo)


@contextmanager
def swapped(modules: Sequence[nn.Module], places: Sequence[Slot], tensors: Sequence[Tensor | None]) -> Iterator[None]:
    """`tensors` in `places`, and in lists, dicts and attributes that hold the same, as recurrent layers do.

    They pass for parameters where those before are some. Afterwards what was there before is there again, whatever
    forward has put there. What it has registered is gone, but for another name of what was there before.
    """
    registered: list[tuple[dict[str, Any], frozenset[str]]] = [
        (own, frozenset(own)) for m in modules for own in (parameters_of(m), buffers_of(m))
    ]
    before = [slot.tensor for slot in places]
    for old, new in zip(before, tensors, strict=True):
        if new is not None and isinstance(old, nn.Parameter):
            mark_as_parameter(new)
    now = {id(old): new for old, new in zip(before, tensors, strict=True) if old is not None}
    aliases = [
        (m, name, value)
        for m in modules
        for name, value in vars(m).items()
        if name not in _REGISTRIES and _mentions(value, now)
    ]
    try:
        for slot, tensor in zip(places, tensors, strict=True):
            slot.put(tensor)
        for module, name, value in aliases:
            module.__dict__[name] = map_tensors(lambda t: now.get(id(t), t), value)
        yield
    finally:
        for slot, old in zip(places, before, strict=True):
            slot.put(old)
        for module, name, value in aliases:
            module.__dict__[name] = value
        was = {id(new): old for old, new in zip(before, tensors) if new is not None}
        for own, known in registered:
            for name in own.keys() - known:
                if (tied := was.get(id(own.pop(name)))) is not None:
                    own[name] = tied


def _mentions(value: Any, tensors: dict[int, Any]) -> bool:
    if isinstance(value, Tensor):
        return id(value) in tensors
    if type(value) not in (list, tuple, dict) or not value:
        return False
    return any(id(t) in tensors for t in take(value)[0])


_REGISTRIES = frozenset(vars(nn.Module()))
_TORCHS_OWN = _REGISTRIES | FLAT_WEIGHTS


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds besides parameters, buffers, modules and what torch itself keeps."""
    return {name: value for name, value in vars(module).items() if name not in _TORCHS_OWN}


class Absent:
    """Stands, as a class, for the value of an attribute that a module does not have."""


class Attributes:
    """What modules hold besides parameters, buffers and modules, as it was: to see and undo what a forward does."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._owners = modules
        self._before = [dict(m.__dict__) for m in modules]
        self.plain = {(i, n): value for i, m in enumerate(modules) for n, value in plain_attributes(m).items()}
        self._contents = {
            id(part): (part, copy.copy(part))
            for value in self.plain.values()
            if type(value) in (list, tuple, dict)
            for part in _containers(value)
        }

    def restore(self) -> None:
        for module, before in zip(self._owners, self._before, strict=True):
            for name in module.__dict__.keys() - before.keys():
                del module.__dict__[name]
            module.__dict__.update(before)
        for part, content in self._contents.values():
            refill(part, content)

    def changed(self) -> dict[tuple[int, str], Any]:
        """(number of the module, name) → value, of attributes that are new or replaced or have other contents.

        Absent for those that are gone. Lists and dicts are copies: the contents of the others are about to go.
        """
        copies: dict[int, Any] = {}
        found = {}
        for i, (module, before) in enumerate(zip(self._owners, self._before, strict=True)):
            now = plain_attributes(module)
            for name, value in now.items():
                if name not in before or before[name] is not value or any(map(self._differs, _containers(value))):
                    found[i, name] = separated(value, copies)
            found.update(((i, name), Absent) for name in before.keys() - vars(module).keys())
        return found

    def _differs(self, part: Any) -> bool:
        """Whether a list or dict holds other objects than before."""
        if id(part) not in self._contents:
            return True
        before = self._contents[id(part)][1]
        if isinstance(part, dict):
            return before.keys() != part.keys() or any(before[k] is not v for k, v in part.items())
        return len(before) != len(part) or any(a is not b for a, b in zip(before, part))


def _parts(value: Any) -> Iterable[Any]:
    """What is directly in a list, tuple or dict."""
    if type(value) is dict:
        return value.values()
    return value if type(value) in (list, tuple) else ()


def _containers(value: Any) -> Iterator[Any]:
    """The lists and dicts of a value, outer ones first."""
    if type(value) in (list, dict):
        yield value
    for part in _parts(value):
        yield from _containers(part)


def separated(value: Any, copies: dict[int, Any] | None = None) -> Any:
    """The same objects in lists and dicts of their own. `copies`: those made before, by the id of what they are of."""
    copies = {} if copies is None else copies
    kind = type(value)
    if kind not in (list, tuple, dict):
        return value
    if id(value) not in copies:
        parts = [separated(part, copies) for part in _parts(value)]
        copies[id(value)] = dict(zip(value, parts)) if kind is dict else kind(parts)
    return copies[id(value)]


def refill(value: Any, content: Any) -> None:
    """Gives a list or dict other contents, for all who hold it."""
    content = copy.copy(content)
    value.clear()
    (value.extend if isinstance(value, list) else value.update)(content)
