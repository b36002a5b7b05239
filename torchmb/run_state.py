"""What one forward of a batch of models reads and writes: arguments, parameters, buffers and attributes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from .base import AbstractBatchModule
from .pytree import Placeholder, insert_tensors, map_tensors, stack
from .state import (
    Absent,
    AttributeName,
    AttributeSnapshot,
    Slot,
    copy_containers,
    is_batch_module,
    replace_contents,
    slots_of,
    unique_modules,
)
from .torch_private import buffers_of, parameters_of, version_of


class RunLock:
    """Lets one thread run at a time; a copy of the batch gets a lock of its own."""

    def __init__(self) -> None:
        self._lock = RLock()  # a hook or forward may call the batch that it belongs to

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[RunLock], tuple[()]]:
        return RunLock, ()


@dataclass
class Inputs:
    """Arguments of forward: `tensors` (M, B, …) differ between the models, `rest` is everything else."""

    tensors: list[Tensor] = field(default_factory=list)
    rest: Any = None

    def add(self, tensor: Tensor) -> Placeholder:
        """Appends a tensor → its placeholder in `rest`."""
        self.tensors.append(tensor)
        return Placeholder(len(self.tensors) - 1)

    def arguments(self, tensors: Sequence[Any]) -> Any:
        """(args, kwargs) with other tensors."""
        return insert_tensors(self.rest, tensors)


@dataclass
class StoredAttributes:
    """Attributes that forwards have set: each model finds its own share of them in its next forward."""

    values: dict[AttributeName, Any] = field(default_factory=dict)  # as the modules hold them: tensors (M, …)
    lists: set[AttributeName] = field(default_factory=set)  # values that could not be stacked: a list of M

    def current(self, modules: Sequence[nn.Module]) -> dict[AttributeName, Any]:
        """Those that nobody has replaced since."""
        return {
            (i, name): value
            for (i, name), value in self.values.items()
            if i < len(modules) and vars(modules[i]).get(name, Absent) is value
        }

    def of_model(self, modules: Sequence[nn.Module], index: int) -> dict[AttributeName, Any]:
        """One model's shares, copied; an object that several modules hold stays one object."""
        current = self.current(modules)
        shares: dict[int, Any] = {}
        for name, value in current.items():
            if id(value) not in shares:
                shares[id(value)] = self._share(name, value, index)
        return {name: shares[id(value)] for name, value in current.items()}

    def _share(self, name: AttributeName, value: Any, index: int) -> Any:
        if name in self.lists:
            return copy_containers(value[index])
        return map_tensors(lambda t: t[index].clone(), value)

    def store(self, modules: Sequence[nn.Module], new: dict[AttributeName, Any], lists: set[AttributeName]) -> None:
        """Sets attributes of the modules; a list or dict of the same type keeps its identity."""
        values = dict(new)
        for (i, name), value in new.items():
            attributes = vars(modules[i])
            old = attributes.get(name)
            if (i, name) not in lists and type(value) in (list, dict) and type(old) is type(value):
                replace_contents(old, value)
                values[i, name] = old
            else:
                attributes[name] = value
        current = self.current(modules)
        self.lists = (self.lists & (current.keys() - values.keys())) | lists
        self.values = current | values


class Models:
    """The modules of a batch of models, and where they hold tensors."""

    def __init__(self, root: nn.Module, batch: int, stored: StoredAttributes) -> None:
        self.root, self.batch, self.stored = root, batch, stored
        found = unique_modules(root, is_batch_module)
        self.batch_modules = [m for m in found if isinstance(m, AbstractBatchModule)]
        self.modules = [m for m in found if not isinstance(m, AbstractBatchModule)]
        self.parameters = slots_of(self.modules, parameters_of)
        self.buffers = slots_of(self.modules, buffers_of)
        self._names = [frozenset([*parameters_of(m), *buffers_of(m)]) for m in self.modules]

    @property
    def slots(self) -> list[Slot]:
        """Places of parameters, then of buffers."""
        return self.parameters + self.buffers

    def unshared_tensors(self, snapshot: AttributeSnapshot) -> dict[AttributeName, Tensor]:
        """Attributes that are one tensor for all models so far, which a forward may edit in place."""
        known = {id(slot.tensor) for slot in self.slots}
        stored = self.stored.current(self.modules)
        return {
            name: value
            for name, value in snapshot.plain.items()
            if isinstance(value, Tensor) and id(value) not in known and name not in stored
        }

    def new_buffers(self) -> dict[AttributeName, Tensor | None]:
        """Buffers that a forward has registered.

        Raises:
            RuntimeError: It has registered a parameter, whose gradient would be lost.
        """
        found: dict[AttributeName, Tensor | None] = {}
        for i, (module, names) in enumerate(zip(self.modules, self._names, strict=True)):
            registered = parameters_of(module) | buffers_of(module)
            for name in registered.keys() - names:
                if any(registered[name] is slot.tensor for slot in self.slots):
                    continue  # another name for a known tensor
                if name in parameters_of(module):
                    raise RuntimeError(
                        f"{name} is created by the first forward: run the module once before it is batched"
                    )
                found[i, name] = registered[name]
        return found

    def register_buffers(self, buffers: dict[AttributeName, Tensor | None]) -> None:
        """Registers buffers that the forwards have registered, with the tensors of all models."""
        for (i, name), tensor in buffers.items():
            buffers_of(self.modules[i])[name] = None if tensor is None else tensor.contiguous()

    def versions(self, inputs: Inputs) -> list[int]:
        """Versions of the tensors that a run must not edit if it is to be repeated."""
        tensors = [*inputs.tensors, *(s.tensor for s in self.parameters)]
        return [version_of(t) for t in tensors if t is not None and not t.is_inference()]


class Rollback:
    """Undoes a forward under vmap that vmap refused."""

    def __init__(self, models: Models, inputs: Inputs) -> None:
        self._models, self._inputs = models, inputs
        self._versions = models.versions(inputs)
        self._snapshot = AttributeSnapshot(models.modules)
        tensors = models.unshared_tensors(self._snapshot).values()
        self._contents = [(t, t.clone(), version_of(t)) for t in tensors if not t.is_inference()]
        devices = {t.device for t in inputs.tensors if t.is_cuda}
        self._generators = torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}

    def __call__(self) -> bool:
        """Restores attributes and, if the forward can be repeated, random generators → whether it can.

        It cannot if it has edited an input or parameter in place, or may have run registered modules.
        """
        self._snapshot.restore()
        for tensor, content, version in self._contents:
            if version_of(tensor) != version:
                tensor.detach().copy_(content)
        if self._models.batch_modules or self._versions != self._models.versions(self._inputs):
            return False
        torch.set_rng_state(self._generators[0])
        for device, state in self._generators[1].items():
            torch.cuda.set_rng_state(state, device)
        return True


class UniqueTensors:
    """Tensors without repetitions, so that tied tensors stay tied."""

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        self.tensors: list[Tensor] = []
        self._indices: list[int | None] = []
        found: dict[int, int] = {}
        for tensor in tensors:
            if tensor is not None and id(tensor) not in found:
                found[id(tensor)] = len(self.tensors)
                self.tensors.append(tensor)
            self._indices.append(None if tensor is None else found[id(tensor)])

    def spread(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """As many as were given, with other tensors in place of the unique ones."""
        return [None if i is None else tensors[i] for i in self._indices]


class RunTensors:
    """Parameters and buffers for one run: buffers are clones, so that a refused run leaves none half updated."""

    def __init__(self, models: Models) -> None:
        self._slots = models.buffers
        self._own_parameters = UniqueTensors(s.tensor for s in models.parameters)
        self._own_buffers = UniqueTensors(s.tensor for s in models.buffers)
        self._clones = [b.clone() for b in self._own_buffers.tensors]

    @property
    def tensors(self) -> list[Tensor]:
        """Parameters, then clones of buffers, without repetitions: (M, …) each."""
        return [*self._own_parameters.tensors, *self._clones]

    def spread(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Parameters and buffers for all slots, from substitutes for `tensors`."""
        count = len(self._own_parameters.tensors)
        return self._own_parameters.spread(tensors[:count]), self._own_buffers.spread(tensors[count:])

    @torch.no_grad()
    def write_back(self, replaced: dict[int, Tensor | None]) -> None:
        """Updates the buffers: with the tensors that forward has put in their slots, or else with their clones."""
        for i, (slot, clone) in enumerate(zip(self._slots, self._own_buffers.spread(self._clones), strict=True)):
            old, new = slot.tensor, replaced.get(i, clone)
            if i in replaced or old is None or new is None:
                slot.put(new)
            else:
                old.copy_(new)  # whether it was edited or not: batch_norm does not change the version


def stack_all(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The tensors of all models, stacked; None if a model has none."""
    present = [t for t in tensors if t is not None]
    return torch.stack(present) if len(present) == len(tensors) else None


def merge_attributes(
    modules: Sequence[nn.Module], changes: Sequence[dict[AttributeName, Any]], given: Sequence[dict[AttributeName, Any]]
) -> tuple[dict[AttributeName, Any], set[AttributeName]]:
    """Attributes that the models have changed, one dict each → values for all models, and those that are lists of M.

    A model that left an attribute alone counts with what it was `given`. An attribute that no model has any more is
    removed from its module.
    """
    merged: dict[AttributeName, Any] = {}
    lists: set[AttributeName] = set()
    copies: list[dict[int, Any]] = [{} for _ in changes]
    stacked: dict[tuple[int, ...], tuple[Any, bool]] = {}  # so that an object that several modules hold stays one
    for i, name in set().union(*changes):
        before = vars(modules[i]).get(name, Absent)
        values = [
            own.get((i, name), start.get((i, name), copy_containers(before, copied)))
            for own, start, copied in zip(changes, given, copies, strict=True)
        ]
        if all(value is Absent for value in values):
            vars(modules[i]).pop(name, None)
            continue
        ids = tuple(map(id, values))
        if ids not in stacked:
            stacked[ids] = stack(values)
        merged[i, name], is_stacked = stacked[ids]
        if not is_stacked:
            lists.add((i, name))
    return merged, lists
