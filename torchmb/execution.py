"""One forward of all models: the template under vmap, or model by model where vmap refuses.

Both see one model's shapes, and both change what M separate models would change: buffers and attributes. A tensor that
a forward leaves in an attribute is (M, …) afterwards; as long as nobody replaces it, the next forward of each model
finds its own share there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from .base import AbstractBatchModule, merge_batch, split_batch
from .functorch import in_order, is_batched, models_of, under_vmap, wrap
from .hooks import outside_vmap
from .pytree import Place, map_tensors, put, stack, take
from .rules import Rules
from .rules.convolution import channels_last
from .state import (
    Absent,
    Attributes,
    Slot,
    is_batch_module,
    plain_attributes,
    refill,
    separated,
    slots,
    swapped,
    walk,
)
from .torch_private import buffers_of, parameters_of, version_of

Name = tuple[int, str]  # of an attribute: the number of its module, and its own


@dataclass
class Inputs:
    """Arguments of forward: `tensors` (M, B, …) differ between the models, `rest` is everything else."""

    tensors: list[Tensor] = field(default_factory=list)
    rest: Any = None

    def place(self, tensor: Tensor) -> Any:
        """Takes in a tensor → what stands for it in `rest`."""
        self.tensors.append(tensor)
        return Place(len(self.tensors) - 1)

    def filled(self, tensors: Sequence[Any]) -> Any:
        """(args, kwargs)"""
        return put(self.rest, tensors)


@dataclass
class Kept:
    """What forwards have left in attributes: name → the value as the module holds it, and one for each model."""

    attributes: dict[Name, Any] = field(default_factory=dict)
    lists: set[Name] = field(default_factory=set)  # values that could not be stacked: a list of M

    def held(self, modules: Sequence[nn.Module]) -> dict[Name, Any]:
        """Those that the modules still hold."""
        return {
            (i, name): value
            for (i, name), value in self.attributes.items()
            if i < len(modules) and modules[i].__dict__.get(name, Absent) is value
        }

    def shares(self, modules: Sequence[nn.Module], index: int) -> dict[Name, Any]:
        """What one model finds of those; what is one object for several modules stays one."""
        held = self.held(modules)
        found: dict[int, Any] = {}
        for name, value in held.items():
            if id(value) not in found:
                listed = name in self.lists
                found[id(value)] = separated(value[index]) if listed else map_tensors(lambda t: t[index].clone(), value)
        return {name: found[id(value)] for name, value in held.items()}


class Models:
    """The parts of a batch of models that a run needs."""

    def __init__(self, root: nn.Module, batch: int, kept: Kept) -> None:
        self.root, self.batch, self.kept = root, batch, kept
        found = list({id(m): m for _, m in walk(root, is_batch_module)}.values())
        self.batch_modules = [m for m in found if isinstance(m, AbstractBatchModule)]
        self.modules = [m for m in found if not isinstance(m, AbstractBatchModule)]
        self.parameters = slots(self.modules, parameters_of)
        self.buffers = slots(self.modules, buffers_of)
        self._names = [frozenset([*parameters_of(m), *buffers_of(m)]) for m in self.modules]

    @property
    def places(self) -> list[Slot]:
        return self.parameters + self.buffers

    def plain_tensors(self, attributes: Attributes) -> dict[Name, Tensor]:
        """Those that are a tensor of which models have no share yet: a forward may edit it in place."""
        known = {id(slot.tensor) for slot in self.places}
        held = self.kept.held(self.modules)
        return {
            name: value
            for name, value in attributes.plain.items()
            if isinstance(value, Tensor) and id(value) not in known and name not in held
        }

    def made(self) -> dict[Name, Tensor | None]:
        """Buffers that a forward has registered. RuntimeError for a parameter, whose gradient would be lost."""
        found: dict[Name, Tensor | None] = {}
        for i, (module, known) in enumerate(zip(self.modules, self._names, strict=True)):
            parameters, buffers = parameters_of(module), buffers_of(module)
            for name in [*(parameters.keys() - known), *(buffers.keys() - known)]:
                tensor = buffers.get(name, parameters.get(name))
                if any(tensor is slot.tensor for slot in self.places):
                    continue  # another name for it
                if name in parameters:
                    raise RuntimeError(
                        f"{name} is made by the first forward: let the module run once before it is batched"
                    )
                found[i, name] = tensor
        return found

    def register(self, buffers: dict[Name, Tensor | None]) -> None:
        for (i, name), tensor in buffers.items():
            buffers_of(self.modules[i])[name] = None if tensor is None else tensor.contiguous()

    def versions(self, inputs: Inputs) -> list[int]:
        """Of what a run must not have edited if it is to be repeated."""
        tensors = [*inputs.tensors, *(s.tensor for s in self.parameters)]
        return [version_of(t) for t in tensors if t is not None and not t.is_inference()]


class RunLock:
    """One run at a time. A copy of what it guards gets a lock of its own."""

    def __init__(self) -> None:
        self._lock = RLock()  # a hook or forward may call its own batch

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[RunLock], tuple[()]]:
        return RunLock, ()


class _Unique:
    """Tensors without repetitions, so that what is tied stays tied."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.tensors: list[Tensor] = []
        self._places: list[int | None] = []
        found: dict[int, int] = {}
        for tensor in tensors:
            if tensor is not None and id(tensor) not in found:
                found[id(tensor)] = len(self.tensors)
                self.tensors.append(tensor)
            self._places.append(None if tensor is None else found[id(tensor)])

    def spread(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """As many as were given, from other tensors in the place of the unique ones."""
        return [None if p is None else tensors[p] for p in self._places]


def _put_attributes(modules: Sequence[nn.Module], values: dict[Name, Any]) -> None:
    for (i, name), value in values.items():
        if value is Absent:
            modules[i].__dict__.pop(name, None)
        else:
            modules[i].__dict__[name] = value


@torch.no_grad()
def _commit(places: Sequence[Slot], buffers: _Unique, copies: Sequence[Tensor], after: Sequence[Tensor | None]) -> None:
    """Buffers after a run: edited in place where forward edited in place, replaced where it replaced."""
    for slot, new, own in zip(places, after, buffers.spread(copies), strict=True):
        old = slot.tensor
        if new is not own or old is None or new is None:
            slot.put(new)
        else:
            old.copy_(new)  # whether or not it was edited: batch_norm moves no version counter


def vectorised(models: Models, inputs: Inputs) -> Any:
    """All models in one run under vmap → output with tensors (M, …)."""
    parameters = _Unique([s.tensor for s in models.parameters])
    buffers = _Unique([s.tensor for s in models.buffers])
    copies = [b.clone() for b in buffers.tensors]
    held = models.kept.held(models.modules)
    kept, kept_rest = take({id(value): value for value in held.values()})
    counts = [len(parameters.tensors), len(copies), len(inputs.tensors), len(kept)]
    kept = [t.clone() for t in kept]  # may be edited in place, and is to be as it was if the run is refused
    with under_vmap(models.batch) as level:
        given = [wrap(t, level) for t in (*parameters.tensors, *copies, *inputs.tensors, *kept)]
        ours, buffer, tensors, attributes = _divided(given, counts)
        places = [*parameters.spread(ours), *buffers.spread(buffer)]
        with (
            swapped(models.modules, models.places, places),
            outside_vmap(models.modules, models.batch_modules, models.batch),
            channels_last(models.modules, given[0] if given else None),
        ):
            own = put(kept_rest, attributes)
            _put_attributes(models.modules, {name: own[id(value)] for name, value in held.items()})
            found, rest = take(_one_forward(models, inputs.filled(tensors), level))
        results = [models_of(t, level, models.batch) for t in found]
    output, left, replaced, made = put(rest, results)
    after = [replaced.get(i, copy) for i, copy in enumerate(buffers.spread(copies))]
    _commit(models.buffers, buffers, copies, after)
    models.register(made)
    _leave(models, left, set())
    return map_tensors(in_order, output)


def _one_forward(models: Models, arguments: Any, level: int) -> tuple[Any, ...]:
    """→ output, what it has left in attributes, the buffers that it has replaced, by number, and made, by name."""
    args, kwargs = arguments
    before = [s.tensor for s in models.buffers]
    with Rules(level) as rules:
        output = models.root(*args, **kwargs)
        rules.finish()
    left = {k: v for k, v in _held_attributes(models.modules) if _holds_batched(v, level)}
    after = [s.tensor for s in models.buffers]
    replaced = {i: now for i, (now, own) in enumerate(zip(after, before)) if now is not own}
    return output, left, replaced, models.made()


def _divided(tensors: list[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    parts, start = [], 0
    for count in counts:
        parts.append(tensors[start : start + count])
        start += count
    return parts


def _held_attributes(modules: Sequence[nn.Module]) -> Iterator[tuple[Name, Any]]:
    for i, module in enumerate(modules):
        for name, value in plain_attributes(module).items():
            yield (i, name), value


def _holds_batched(value: Any, level: int) -> bool:
    if isinstance(value, Tensor):
        return is_batched(value, level)
    return isinstance(value, (list, tuple, dict)) and any(is_batched(t, level) for t in take(value)[0])


def _leave(models: Models, left: dict[Name, Any], lists: set[Name]) -> None:
    """Puts what forward left in attributes there, and remembers that each model has a share in it."""
    for (i, name), value in left.items():
        attributes = vars(models.modules[i])
        if (i, name) not in lists and type(value) in (list, dict) and type(attributes.get(name)) is type(value):
            refill(attributes[name], value)
            left[i, name] = attributes[name]
        else:
            attributes[name] = value
    held = models.kept.held(models.modules)
    models.kept.lists = (models.kept.lists & (held.keys() - left.keys())) | lists
    models.kept.attributes = held | left


class Apart(list[Any]):
    """One output for each model, where they cannot be stacked."""


def one_by_one(models: Models, inputs: Inputs) -> Any:
    """Model after model, as M separate ones would run → output with tensors (M, …), or `Apart`."""
    parameters = _Unique([s.tensor for s in models.parameters])
    buffers = _Unique([s.tensor for s in models.buffers])
    copies = [b.clone() for b in buffers.tensors]
    shares = [_shares(t) for t in (*parameters.tensors, *copies, *inputs.tensors)]
    counts = [len(parameters.tensors), len(copies), len(inputs.tensors)]
    before = Attributes(models.modules)
    plain = models.plain_tensors(before)
    given = [models.kept.shares(models.modules, i) for i in range(models.batch)]
    outputs, afters, lefts, mades = [], [], [], []
    for i in range(models.batch):
        clones = {id(tensor): tensor.clone() for tensor in plain.values()}
        attributes = given[i] | {name: clones[id(tensor)] for name, tensor in plain.items()}
        ours, buffer, tensors = _divided([s[i] for s in shares], counts)
        own_buffers = buffers.spread(buffer)
        try:
            with swapped(models.modules, models.places, [*parameters.spread(ours), *own_buffers]):
                _put_attributes(models.modules, attributes)
                args, kwargs = inputs.filled(tensors)
                outputs.append(models.root(*args, **kwargs))
                now = [s.tensor for s in models.buffers]
                mades.append(models.made())
                afters.append({j: a for j, (a, own) in enumerate(zip(now, own_buffers)) if a is not own})
            left = before.changed()
            same = {name for name, t in plain.items() if left.get(name) is clones[id(t)] and not _edited(left[name], t)}
            lefts.append({name: value for name, value in left.items() if name not in same})
        finally:
            before.restore()
    replaced = {j: _stacked_or_none([a.get(j) for a in afters]) for j in set().union(*afters)}
    _commit(models.buffers, buffers, copies, [replaced.get(j, c) for j, c in enumerate(buffers.spread(copies))])
    models.register({name: _stacked_or_none([made.get(name) for made in mades]) for name in set().union(*mades)})
    _leave_each(models, lefts, given)
    output, stacks = stack(outputs)
    return output if stacks else Apart(output)


def _edited(clone: Tensor, tensor: Tensor) -> bool:
    return not clone.equal(tensor) if clone.is_inference() else version_of(clone) > 0


def _shares(tensor: Tensor) -> Sequence[Tensor]:
    """(M, …) → M of them. unbind has one backward for all, but its outputs must not be edited in place."""
    return tensor.unbind() if tensor.requires_grad else [tensor[i] for i in range(len(tensor))]


def _stacked_or_none(tensors: list[Tensor | None]) -> Tensor | None:
    found = [t for t in tensors if t is not None]
    return torch.stack(found) if len(found) == len(tensors) else None


def _leave_each(models: Models, lefts: Sequence[dict[Name, Any]], given: Sequence[dict[Name, Any]]) -> None:
    """What the models have left in attributes, one dict for each of them; where one left nothing, what it was given."""
    left, lists = {}, set()
    copies: list[dict[int, Any]] = [{} for _ in lefts]
    stacked: dict[tuple[int, ...], Any] = {}  # so that what is one object for several modules stays one
    for i, name in set().union(*lefts):
        attributes = vars(models.modules[i])
        before = attributes.get(name, Absent)
        values = [
            own.get((i, name), start.get((i, name), separated(before, copied)))
            for own, start, copied in zip(lefts, given, copies, strict=True)
        ]
        if all(value is Absent for value in values):
            attributes.pop(name, None)
            continue
        ids = tuple(map(id, values))
        if ids not in stacked:
            stacked[ids] = stack(values)
        left[i, name], stacks = stacked[ids]
        if not stacks:
            lists.add((i, name))
    _leave(models, left, lists)


def merged(batch_module: AbstractBatchModule, inputs: Inputs) -> Any:
    """A registered module on merged data → output with tensors (M, B, …)."""
    batch = batch_module.batch
    rest = map_tensors(lambda t: t.expand(batch, *t.shape), inputs.rest)
    args, kwargs = map_tensors(merge_batch, put(rest, inputs.tensors))
    return map_tensors(lambda t: split_batch(t, batch), batch_module(*args, **kwargs))
