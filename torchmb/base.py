"""What a batch of models is: merged data, state with a leading dimension of models, and the registry of batch modules.

M is the number of models, B the size of the batch that each of them sees. Batched data is (M, B, …), merged data
(B · M, …) in the order (image, model): row b * M + m is image b of model m.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .pytree import same, take
from .torch_private import EXTRA_STATE, copy_metadata

StateDict = Mapping[str, Any]
BatchClass = TypeVar("BatchClass", bound=type[nn.Module])


def integer(name: str, value: Any) -> int:
    """`value`, or ValueError if it is no integer; True is none."""
    with suppress(TypeError):
        if not isinstance(value, bool):
            return operator.index(value)
    raise ValueError(f"{name} must be an integer, got {value!r}")


def number_of_models(batch: Any) -> int:
    """`batch`, or ValueError if it is no integer of at least 1."""
    number = integer("batch, the number of models,", batch)
    if number < 1:
        raise ValueError(f"batch, the number of models, must be at least 1, got {number}")
    return number


def inner_batch_size(x: Tensor, batch: int) -> int:
    """B of merged data (B · batch, …). ValueError if the first dimension is no multiple of `batch`."""
    number_of_models(batch)
    if x.dim() < 1 or x.shape[0] % batch:
        raise ValueError(f"merged data of {batch} models needs a first dimension of B * {batch}, got {tuple(x.shape)}")
    return x.shape[0] // batch


def merge_batch(x: Tensor) -> Tensor:
    """(M, B, …) → (B · M, …), index b * M + m."""
    if x.dim() < 2:
        raise ValueError(f"data to merge must be (models, images, ...), got {tuple(x.shape)}")
    return x.transpose(0, 1).flatten(0, 1)


def split_batch(x: Tensor, batch: int) -> Tensor:
    """(B · M, …) → (M, B, …) for M = `batch`, a view."""
    return x.view(inner_batch_size(x, batch), batch, *x.shape[1:]).transpose(0, 1)


def check_state_dicts(given: StateDict | Sequence[StateDict], batch: int) -> Sequence[StateDict]:
    """One state dict for each model; one for all is repeated."""
    dicts = [given] * batch if isinstance(given, Mapping) else list(given)
    if len(dicts) != batch:
        raise ValueError(f"{batch} models need {batch} state dicts, or one for all, got {len(dicts)}")
    return dicts


def check_names(name: str, expected: set[str], given: set[str]) -> None:
    missing, unexpected = sorted(expected - given), sorted(given - expected)
    if missing or unexpected:
        raise ValueError(f"{name} does not fit: missing {missing}, unexpected {unexpected}; strict=False ignores that")


Shapes = Mapping[str, tuple[int, ...] | None]  # of one model's entries; None for what is no tensor


def is_extra_state(name: str) -> bool:
    """Whether an entry of a state dict is what a module's get_extra_state gives."""
    return name.rpartition(".")[2] == EXTRA_STATE


def entry_shapes(state: StateDict, models: bool) -> dict[str, tuple[int, ...] | None]:
    """The shapes of one model's entries, from those of all `models` (M, …) or from its own."""
    return {
        name: tuple(value.shape[models:]) if isinstance(value, Tensor) and not is_extra_state(name) else None
        for name, value in state.items()
    }


def check_entries(shapes: Shapes, dicts: Sequence[StateDict], strict: bool) -> None:
    """Whether a state dict for each model fits.

    ValueError if a shape differs, or, when `strict`, a name, or an extra state between the models, of which there is
    one for all; TypeError if a tensor is none.
    """
    for i, state in enumerate(dicts):
        if strict:
            check_names(f"state dict {i}", set(shapes), set(state))
        for name in state.keys() & shapes.keys():
            value, expected = state[name], shapes[name]
            if expected is not None and not isinstance(value, Tensor):
                raise TypeError(f"{name} of state dict {i} is a {type(value).__name__}, no tensor")
            if expected is not None and tuple(value.shape) != expected:
                raise ValueError(f"{name} of state dict {i} has shape {tuple(value.shape)}, expected {expected}")
    for name in filter(is_extra_state, shapes):
        for i, state in enumerate(dicts):
            if (name in state) != (name in dicts[0]) or (name in state and not _equal(state[name], dicts[0][name])):
                raise ValueError(f"{name} differs between state dicts 0 and {i}; all models of a batch have the same")


def _equal(a: Any, b: Any) -> bool:
    (tensors, rest), (others, other_rest) = take(a), take(b)
    return a is b or (
        same(rest, other_rest)
        and len(tensors) == len(others)
        and all(t.shape == o.shape and bool((t == o).all()) for t, o in zip(tensors, others))
    )


@torch.no_grad()
def load_entries(module: nn.Module, own: StateDict, dicts: Sequence[StateDict]) -> None:
    """Copies entry `name` of the i-th dict, all of which fit, into own[name][i]; extra states go to their modules."""
    for i, state in enumerate(dicts):
        for name, value in state.items():
            if name in own and isinstance(own[name], Tensor) and not is_extra_state(name):
                own[name][i].copy_(value)
    for name, value in dicts[0].items():
        if name in own and is_extra_state(name):
            module.get_submodule(name.rpartition(".")[0]).set_extra_state(value)


def unstacked(state: StateDict, index: int) -> OrderedDict[str, Any]:
    """The state dict of one model, copied: a view would be saved to a file with all models behind it."""
    one = OrderedDict(
        (k, v[index].clone() if isinstance(v, Tensor) and not is_extra_state(k) else v) for k, v in state.items()
    )
    copy_metadata(state, one)
    return one


class AbstractBatchModule(nn.Module):
    """`batch` models of `base_class` as one module that runs on merged data.

    A subclass names its `base_class`, makes itself from one in `from_module`, and computes in `forward` from tensors
    (B · M, …), index b * M + m, tensors in the same order. Parameters and buffers that carry the names of the base
    class and a leading dimension M need nothing more; others need their own `load_state_dicts` and `state_dicts`.
    """

    base_class: type[nn.Module] = nn.Module

    @classmethod
    def from_module(cls, module: nn.Module, batch: int) -> AbstractBatchModule:
        """A batch of modules like `module`. Its state is loaded by the caller, not here."""
        return cls(batch)

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = number_of_models(batch)

    def load_state_dicts(self, state_dicts: StateDict | Sequence[StateDict], strict: bool = True) -> None:
        """Loads state dicts of `base_class`, one for each model or one for all.

        Nothing is loaded if one does not fit: ValueError if their number, a shape or an extra state differs, or, when
        `strict`, a name; TypeError if a tensor is none.
        """
        dicts, own = check_state_dicts(state_dicts, self.batch), self.state_dict()
        check_entries(entry_shapes(own, models=True), dicts, strict)
        load_entries(self, own, dicts)

    def state_dicts(self) -> list[OrderedDict[str, Any]]:
        """State dicts of the models, copies, each of which loads into `base_class`."""
        state = self.state_dict()
        return [unstacked(state, i) for i in range(self.batch)]

    def extra_repr(self) -> str:
        return f"batch={self.batch}"


_REGISTERED: dict[type[nn.Module], type[AbstractBatchModule]] = {}


def register_batch_module(cls: BatchClass) -> BatchClass:
    """Runs modules of exactly the base class by their batch class wherever they occur in a BatchModule.

    `cls` is the batch class, or the base class whose batch class has been defined last. Also a decorator.
    ValueError if no batch class is known.
    """
    batch_class = cls if issubclass(cls, AbstractBatchModule) else _latest_batch_class(cls)
    if batch_class is None or batch_class.base_class is nn.Module:
        raise ValueError(f"no AbstractBatchModule with base_class = {cls.__name__} to register; define it first")
    _REGISTERED[batch_class.base_class] = batch_class
    return cls


def _latest_batch_class(base: type[nn.Module]) -> type[AbstractBatchModule] | None:
    found = [c for c in _subclasses(AbstractBatchModule) if c.base_class is base]
    return found[-1] if found else None


def _subclasses(cls: type[AbstractBatchModule]) -> Iterator[type[AbstractBatchModule]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def registered(module: nn.Module) -> type[AbstractBatchModule] | None:
    """The batch class that was registered for exactly this type of module."""
    return _REGISTERED.get(type(module))
