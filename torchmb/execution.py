"""One forward of all models: the template under vmap, or model by model where vmap refuses.

Both show the template one model's shapes, and both update buffers and attributes as M separate models would. A tensor
that a forward stores in an attribute is (M, …) afterwards; until somebody replaces it, the next forward of each model
finds its own share there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .base import AbstractBatchModule, merge_batch, split_batch
from .functorch import as_contiguous, is_batched, under_vmap, unwrap_output, wrap
from .hooks import outside_vmap
from .pytree import extract_tensors, insert_tensors, map_tensors, stack
from .rules import Rules
from .rules.convolution import channels_last
from .run_state import Inputs, Models, RunTensors, merge_attributes
from .state import (
    AttributeName,
    AttributeSnapshot,
    plain_attributes,
    set_attributes,
    swapped_tensors,
    tensors_in,
)
from .torch_private import version_of


def run_under_vmap(models: Models, inputs: Inputs) -> Any:
    """All models in one run under vmap → output with tensors (M, …)."""
    run = RunTensors(models)
    stored = models.stored.current(models.modules)
    own, own_rest = extract_tensors({id(value): value for value in stored.values()})
    own = [t.clone() for t in own]  # a forward may edit them in place before vmap refuses
    with under_vmap(models.batch) as level:
        given = [wrap(t, level) for t in (*run.tensors, *inputs.tensors, *own)]
        tensors, arguments, attributes = _split(given, [len(run.tensors), len(inputs.tensors), len(own)])
        parameters, buffers = run.spread(tensors)
        with (
            swapped_tensors(models.modules, models.slots, [*parameters, *buffers]),
            outside_vmap(models.modules, models.batch_modules, models.batch),
            channels_last(models.modules, given[0] if given else None),
        ):
            values = insert_tensors(own_rest, attributes)
            set_attributes(models.modules, {name: values[id(value)] for name, value in stored.items()})
            results, rest = extract_tensors(_forward(models, inputs.arguments(arguments), buffers, level))
        outputs = [unwrap_output(t, level, models.batch) for t in results]
    output, replaced, new_buffers, left = insert_tensors(rest, outputs)
    run.write_back(replaced)
    models.register_buffers(new_buffers)
    models.stored.store(models.modules, left, set())
    return map_tensors(as_contiguous, output)


def _forward(models: Models, arguments: Any, buffers: Sequence[Tensor | None], level: int) -> tuple[Any, ...]:
    """→ output, replaced buffers by slot, new buffers by name, attributes that hold tensors of the models."""
    args, kwargs = arguments
    with Rules(level) as rules:
        output = models.root(*args, **kwargs)
        rules.finish()
    after = [slot.tensor for slot in models.buffers]
    replaced = {i: new for i, (new, old) in enumerate(zip(after, buffers, strict=True)) if new is not old}
    left = {
        (i, name): value
        for i, module in enumerate(models.modules)
        for name, value in plain_attributes(module).items()
        if any(is_batched(t, level) for t in tensors_in(value))
    }
    return output, replaced, models.new_buffers(), left


def _split(tensors: list[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    parts, start = [], 0
    for count in counts:
        parts.append(tensors[start : start + count])
        start += count
    return parts


def refusal(error: Exception, template: nn.Module) -> str:
    """The module whose code was running, and the first line of the error."""
    names = {id(module): name for name, module in template.named_modules()}
    where, frame = "", error.__traceback__
    while frame is not None:
        where = names.get(id(frame.tb_frame.f_locals.get("self")), where)
        frame = frame.tb_next
    message = (str(error).strip().splitlines() or [""])[0]
    return f"{where or 'its forward'}: {type(error).__name__}: {message}"


class PerModelOutputs(list[Any]):
    """One output for each model, where they cannot be stacked."""


def run_one_by_one(models: Models, inputs: Inputs) -> Any:
    """Model after model, as M separate ones would run → output with tensors (M, …), or `PerModelOutputs`."""
    runs = _SeparateRuns(models, inputs)
    output, is_stacked = stack([runs.run(i) for i in range(models.batch)])
    runs.write_back()
    return output if is_stacked else PerModelOutputs(output)


class _Changes(NamedTuple):
    """What the forward of one model has changed."""

    buffers: list[tuple[Tensor | None, bool]]  # of each slot: the tensor, and whether it replaced the one before
    new_buffers: dict[AttributeName, Tensor | None]
    attributes: dict[AttributeName, Any]


class _SeparateRuns:
    """Runs the models of a batch separately, each on its own share of every tensor."""

    def __init__(self, models: Models, inputs: Inputs) -> None:
        self._models, self._inputs = models, inputs
        self._tensors = RunTensors(models)
        self._shares = [_per_model(t) for t in (*self._tensors.tensors, *inputs.tensors)]
        self._snapshot = AttributeSnapshot(models.modules)
        self._unshared = models.unshared_tensors(self._snapshot)
        self._given = [models.stored.of_model(models.modules, i) for i in range(models.batch)]
        self._changes: list[_Changes] = []

    def run(self, index: int) -> Any:
        """The output of one model, whose changes of buffers and attributes are noted and undone."""
        modules = self._models.modules
        clones = {id(t): t.clone() for t in self._unshared.values()}
        shares = [share[index] for share in self._shares]
        tensors, arguments = _split(shares, [len(self._tensors.tensors), len(self._inputs.tensors)])
        parameters, buffers = self._tensors.spread(tensors)
        try:
            with swapped_tensors(modules, self._models.slots, [*parameters, *buffers]):
                set_attributes(modules, self._given[index])
                set_attributes(modules, {name: clones[id(t)] for name, t in self._unshared.items()})
                args, kwargs = self._inputs.arguments(arguments)
                output = self._models.root(*args, **kwargs)
                after = [slot.tensor for slot in self._models.buffers]
                new_buffers = self._models.new_buffers()
            replaced = [(new, new is not old) for new, old in zip(after, buffers, strict=True)]
            self._changes.append(_Changes(replaced, new_buffers, self._changed_attributes(clones)))
        finally:
            self._snapshot.restore()
        return output

    def _changed_attributes(self, clones: dict[int, Tensor]) -> dict[AttributeName, Any]:
        """Without clones of tensors that the forward has not edited."""
        changed = self._snapshot.changed()
        for name, tensor in self._unshared.items():
            clone = clones[id(tensor)]
            if changed.get(name) is clone and not _is_edited(clone, tensor):
                del changed[name]
        return changed

    def write_back(self) -> None:
        """Updates buffers and attributes with the changes of all models."""
        slots = zip(*(changes.buffers for changes in self._changes), strict=True)
        replaced = {
            i: _stack_all([tensor for tensor, _ in slot]) for i, slot in enumerate(slots) if any(new for _, new in slot)
        }
        self._tensors.write_back(replaced)
        names = set().union(*(changes.new_buffers for changes in self._changes))
        self._models.register_buffers(
            {name: _stack_all([changes.new_buffers.get(name) for changes in self._changes]) for name in names}
        )
        attributes = [changes.attributes for changes in self._changes]
        self._models.stored.store(
            self._models.modules, *merge_attributes(self._models.modules, attributes, self._given)
        )


def _is_edited(clone: Tensor, tensor: Tensor) -> bool:
    return not clone.equal(tensor) if clone.is_inference() else version_of(clone) > 0


def _per_model(tensor: Tensor) -> Sequence[Tensor]:
    """(M, …) → M of them. unbind has one backward for all, but its outputs must not be edited in place."""
    return tensor.unbind() if tensor.requires_grad else [tensor[i] for i in range(len(tensor))]


def _stack_all(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The tensors of all models, stacked; None if a model has none."""
    present = [t for t in tensors if t is not None]
    return torch.stack(present) if len(present) == len(tensors) else None


def run_merged(batch_module: AbstractBatchModule, inputs: Inputs) -> Any:
    """A registered module on merged data → output with tensors (M, B, …)."""
    batch = batch_module.batch
    rest = map_tensors(lambda t: t.expand(batch, *t.shape), inputs.rest)
    args, kwargs = map_tensors(merge_batch, insert_tensors(rest, inputs.tensors))
    return map_tensors(lambda t: split_batch(t, batch), batch_module(*args, **kwargs))
