"""Parameters, buffers and other attributes of modules: stacked, exchanged for a run, compared and restored."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .base import AbstractBatchModule
from .pytree import extract_tensors, map_tensors
from .torch_private import FLAT_WEIGHTS, buffers_of, children_of, mark_as_parameter, parameters_of

AttributeName = tuple[int, str]  # the number of the module, and the name in it
TensorsOf = Callable[[nn.Module], dict[str, Any]]  # parameters_of or buffers_of
Stop = Callable[[nn.Module], Any]
_CONTAINERS = (list, tuple, dict)


class Slot(NamedTuple):
    """A place of a tensor in a module: the dict of its parameters or buffers, and the name there."""

    tensors: dict[str, Tensor | None]
    name: str

    @property
    def tensor(self) -> Tensor | None:
        """The tensor that is there now."""
        return self.tensors[self.name]

    def put(self, tensor: Tensor | None) -> None:
        """Replaces the tensor."""
        self.tensors[self.name] = tensor


def walk(root: nn.Module, stop: Stop, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of each place in the tree, without those below modules for which `stop` is true."""
    yield name, root
    if not stop(root):
        for child, module in children_of(root).items():
            if module is not None:
                yield from walk(module, stop, f"{name}.{child}" if name else child)


def unique_modules(root: nn.Module, stop: Stop) -> list[nn.Module]:
    """The modules that `walk` visits, each once."""
    return list({id(m): m for _, m in walk(root, stop)}.values())


def is_batch_module(module: nn.Module) -> bool:
    """Whether the module runs on merged data."""
    return isinstance(module, AbstractBatchModule)


def plain_modules(root: nn.Module) -> list[nn.Module]:
    """The modules that run on one model's shapes: all but batch modules and those inside them."""
    return [m for m in unique_modules(root, is_batch_module) if not is_batch_module(m)]


def slots_of(modules: Iterable[nn.Module], tensors_of: TensorsOf) -> list[Slot]:
    """Each place of a tensor or None; a tied parameter has several."""
    return [Slot(tensors_of(m), name) for m in modules for name in tensors_of(m)]


def named_tensors(root: nn.Module, stop: Stop = lambda _: False) -> dict[str, Tensor]:
    """Name → parameter or buffer, also of non-persistent ones; a tied tensor has several names."""
    return {
        f"{name}.{own}" if name else own: tensor
        for name, module in walk(root, stop)
        if not stop(module)
        for tensors_of in (parameters_of, buffers_of)
        for own, tensor in tensors_of(module).items()
        if tensor is not None
    }


def stack_tensors(modules: Sequence[nn.Module], stop: Stop = lambda _: False) -> dict[int, Tensor]:
    """Maps the id of each tensor of the first module to those of all modules of one architecture, stacked: (M, …).

    Raises:
        ValueError: A parameter is lazy and has no shape yet.
    """
    all_tensors = [named_tensors(m, stop) for m in modules]
    stacked: dict[int, Tensor] = {}
    for name, tensor in all_tensors[0].items():
        if is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet: run the lazy module once before it is batched")
        if id(tensor) not in stacked:
            stacked[id(tensor)] = _stack([tensors[name] for tensors in all_tensors])
    return stacked


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    values = torch.stack([t.detach() for t in tensors])
    return nn.Parameter(values, tensors[0].requires_grad) if isinstance(tensors[0], nn.Parameter) else values


def copy_module(root: nn.Module, substitutes: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy, with `substitutes` for the objects with these ids."""
    memo = dict(substitutes or {})
    for module in root.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # weight_norm leaves one; deepcopy refuses it
                memo.setdefault(id(value), value.detach())
    return copy.deepcopy(root, memo)


@contextmanager
def swapped_tensors(
    modules: Sequence[nn.Module], slots: Sequence[Slot], tensors: Sequence[Tensor | None]
) -> Iterator[None]:
    """Puts `tensors` into `slots`, and wherever an attribute of a module refers to the same tensor.

    They count as parameters where the tensors before them do. Afterwards the tensors from before are in place again,
    whatever a forward has put there; what it has registered is gone, except further names of those tensors.
    """
    originals = [slot.tensor for slot in slots]
    pairs = [(old, new) for old, new in zip(originals, tensors, strict=True) if old is not None and new is not None]
    for old, new in pairs:
        if isinstance(old, nn.Parameter):
            mark_as_parameter(new)
    names = [(own, frozenset(own)) for m in modules for own in (parameters_of(m), buffers_of(m))]
    references = _references(modules, {id(old): new for old, new in pairs})
    try:
        _fill(slots, tensors)
        _set_all((module, name, new) for module, name, _, new in references)
        yield
    finally:
        _fill(slots, originals)
        _set_all((module, name, old) for module, name, old, _ in references)
        _unregister(names, {id(new): old for old, new in pairs})


def _references(
    modules: Sequence[nn.Module], substitutes: Mapping[int, Tensor]
) -> list[tuple[nn.Module, str, Any, Any]]:
    """Attributes that refer to tensors with substitutes: module, name, value, and the value with the substitutes."""
    return [
        (module, name, value, map_tensors(lambda t: substitutes.get(id(t), t), value))
        for module in modules
        for name, value in vars(module).items()
        if name not in _REGISTRIES and not substitutes.keys().isdisjoint(map(id, tensors_in(value)))
    ]


def tensors_in(value: Any) -> list[Tensor]:
    """The value itself if it is a tensor; the tensors in it if it is a list, tuple or dict."""
    if isinstance(value, Tensor):
        return [value]
    return extract_tensors(value)[0] if isinstance(value, _CONTAINERS) and value else []


def _fill(slots: Sequence[Slot], tensors: Sequence[Tensor | None]) -> None:
    for slot, tensor in zip(slots, tensors, strict=True):
        slot.put(tensor)


def _set_all(attributes: Iterable[tuple[nn.Module, str, Any]]) -> None:
    for module, name, value in attributes:
        vars(module)[name] = value


def _unregister(names: Sequence[tuple[dict[str, Any], frozenset[str]]], originals: Mapping[int, Tensor]) -> None:
    """Removes tensors that a forward has registered; a further name of a swapped tensor gets the original."""
    for tensors, known in names:
        for name in tensors.keys() - known:
            if (original := originals.get(id(tensors.pop(name)))) is not None:
                tensors[name] = original


_REGISTRIES = frozenset(vars(nn.Module()))
_TORCHS_OWN = _REGISTRIES | FLAT_WEIGHTS


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """A module's attributes besides parameters, buffers, submodules and those that torch itself sets."""
    return {name: value for name, value in vars(module).items() if name not in _TORCHS_OWN}


class Absent:
    """Stands, as a class, for the value of an attribute that a module does not have."""


def set_attributes(modules: Sequence[nn.Module], values: Mapping[AttributeName, Any]) -> None:
    """Sets attributes, and removes those whose value is `Absent`."""
    for (i, name), value in values.items():
        if value is Absent:
            vars(modules[i]).pop(name, None)
        else:
            vars(modules[i])[name] = value


class AttributeSnapshot:
    """The attributes of modules as they are now, to find and to undo what a forward changes."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._owners = modules
        self._before = [dict(vars(m)) for m in modules]
        self.plain = {(i, n): value for i, m in enumerate(modules) for n, value in plain_attributes(m).items()}
        self._contents = {
            id(container): (container, copy.copy(container))
            for value in self.plain.values()
            if type(value) in _CONTAINERS
            for container in _containers(value)
        }

    def restore(self) -> None:
        """Gives the modules the attributes, and lists and dicts the contents, that they had."""
        for module, before in zip(self._owners, self._before, strict=True):
            for name in vars(module).keys() - before.keys():
                del vars(module)[name]
            vars(module).update(before)
        for container, content in self._contents.values():
            replace_contents(container, content)

    def changed(self) -> dict[AttributeName, Any]:
        """Values of attributes that are new, replaced or have other contents; Absent for those that are gone.

        Lists and dicts are copies, since `restore` changes the contents of the originals.
        """
        copies: dict[int, Any] = {}
        changes: dict[AttributeName, Any] = {}
        for i, (module, before) in enumerate(zip(self._owners, self._before, strict=True)):
            for name, value in plain_attributes(module).items():
                if before.get(name, Absent) is not value or any(map(self._differs, _containers(value))):
                    changes[i, name] = copy_containers(value, copies)
            changes.update({(i, name): Absent for name in before.keys() - vars(module).keys()})
        return changes

    def _differs(self, container: Any) -> bool:
        """Whether a list or dict holds other objects than before."""
        if id(container) not in self._contents:
            return True
        before = self._contents[id(container)][1]
        if isinstance(container, dict):
            return before.keys() != container.keys() or any(before[k] is not v for k, v in container.items())
        return len(before) != len(container) or any(a is not b for a, b in zip(before, container))


def _children(value: Any) -> Iterable[Any]:
    """The values directly in a list, tuple or dict."""
    if type(value) is dict:
        return value.values()
    return value if type(value) in _CONTAINERS else ()


def _containers(value: Any) -> Iterator[Any]:
    """The lists and dicts of a value, outer ones first."""
    if type(value) in (list, dict):
        yield value
    for child in _children(value):
        yield from _containers(child)


def copy_containers(value: Any, copies: dict[int, Any] | None = None) -> Any:
    """The same objects in new lists and dicts. `copies`: id → copy of those that were copied before."""
    copies = {} if copies is None else copies
    kind = type(value)
    if kind not in _CONTAINERS:
        return value
    if id(value) not in copies:
        children = [copy_containers(child, copies) for child in _children(value)]
        copies[id(value)] = dict(zip(value, children)) if kind is dict else kind(children)
    return copies[id(value)]


def replace_contents(container: Any, content: Any) -> None:
    """Gives a list or dict other contents, for everybody who refers to it."""
    content = copy.copy(content)
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(content)
