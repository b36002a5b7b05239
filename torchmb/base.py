"""The contract of batch modules: merged data, state with a leading dimension M, and their registry.

M is the number of models, B the number of rows of each. Batched data is (M, B, …), merged data (B · M, …): its row
b * M + m is row b of model m.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .pytree import equal, extract_tensors
from .torch_private import EXTRA_STATE, copy_metadata

StateDict = Mapping[str, Any]
BatchClass = TypeVar("BatchClass", bound=type[nn.Module])


def as_integer(name: str, value: Any) -> int:
    """`value` as an int. ValueError if it is not an integer, or a bool."""
    with suppress(TypeError):
        if not isinstance(value, bool):
            return operator.index(value)
    raise ValueError(f"{name} must be an integer, got {value!r}")


def check_number_of_models(batch: Any) -> int:
    """`batch` as an int. ValueError if it is not an integer of at least 1."""
    number = as_integer("batch, the number of models,", batch)
    if number < 1:
        raise ValueError(f"batch, the number of models, must be at least 1, got {number}")
    return number


def inner_batch_size(x: Tensor, batch: int) -> int:
    """Returns B of merged data.

    Args:
        x: Merged data (B · M, …).
        batch: M, the number of models.

    Raises:
        ValueError: The first dimension is not a multiple of `batch`.

    Example:
        >>> torchmb.inner_batch_size(torch.zeros(15, 4), batch=3)
        5
    """
    check_number_of_models(batch)
    if x.dim() < 1 or x.shape[0] % batch:
        raise ValueError(f"merged data of {batch} models needs a first dimension of B * {batch}, got {tuple(x.shape)}")
    return x.shape[0] // batch


def merge_batch(x: Tensor) -> Tensor:
    """Merges data of all models: (M, B, …) → (B · M, …), index b * M + m.

    Raises:
        ValueError: `x` has fewer than two dimensions.

    Example:
        >>> torchmb.merge_batch(torch.tensor([[1, 2, 3], [10, 20, 30]]))
        tensor([ 1, 10,  2, 20,  3, 30])
    """
    if x.dim() < 2:
        raise ValueError(f"data to merge must be (models, rows, ...), got {tuple(x.shape)}")
    return x.transpose(0, 1).flatten(0, 1)


def split_batch(x: Tensor, batch: int) -> Tensor:
    """Splits merged data: (B · M, …) → (M, B, …), a view.

    Args:
        x: Merged data, index b * M + m.
        batch: M, the number of models.

    Raises:
        ValueError: The first dimension is not a multiple of `batch`.

    Example:
        >>> torchmb.split_batch(torch.tensor([1, 10, 2, 20, 3, 30]), batch=2)
        tensor([[ 1,  2,  3],
                [10, 20, 30]])
    """
    return x.view(inner_batch_size(x, batch), batch, *x.shape[1:]).transpose(0, 1)


def check_state_dicts(given: StateDict | Sequence[StateDict], batch: int) -> Sequence[StateDict]:
    """One state dict for each model; one for all is repeated."""
    dicts = [given] * batch if isinstance(given, Mapping) else list(given)
    if len(dicts) != batch:
        raise ValueError(f"{batch} models need {batch} state dicts, or one for all, got {len(dicts)}")
    return dicts


def check_names(name: str, expected: set[str], given: set[str]) -> None:
    """ValueError if the names of a state dict are not the expected ones."""
    missing, unexpected = sorted(expected - given), sorted(given - expected)
    if missing or unexpected:
        raise ValueError(f"{name} does not fit: missing {missing}, unexpected {unexpected}; strict=False ignores that")


Shapes = Mapping[str, tuple[int, ...] | None]  # of one model's entries; None for an entry that is not a tensor


def is_extra_state(name: str) -> bool:
    """Whether an entry of a state dict is the result of a module's get_extra_state."""
    return name.rpartition(".")[2] == EXTRA_STATE


def entry_shapes(state: StateDict, models: bool) -> dict[str, tuple[int, ...] | None]:
    """The shapes of one model's entries; with `models`, from entries (M, …) of all models."""
    return {
        name: tuple(value.shape[models:]) if isinstance(value, Tensor) and not is_extra_state(name) else None
        for name, value in state.items()
    }


def check_entries(shapes: Shapes, dicts: Sequence[StateDict], strict: bool) -> None:
    """Checks a state dict for each model.

    Raises:
        TypeError: An entry for a tensor is not a tensor.
        ValueError: A shape differs, or, when `strict`, a name, or an extra state between the models: a batch has one.
    """
    for i, state in enumerate(dicts):
        if strict:
            check_names(f"state dict {i}", set(shapes), set(state))
        for name in state.keys() & shapes.keys():
            value, expected = state[name], shapes[name]
            if expected is not None and not isinstance(value, Tensor):
                raise TypeError(f"{name} of state dict {i} is a {type(value).__name__}, not a tensor")
            if expected is not None and tuple(value.shape) != expected:
                raise ValueError(f"{name} of state dict {i} has shape {tuple(value.shape)}, expected {expected}")
    for name in filter(is_extra_state, shapes):
        for i, state in enumerate(dicts):
            if (name in state) != (name in dicts[0]) or (name in state and not _equal(state[name], dicts[0][name])):
                raise ValueError(f"{name} differs between state dicts 0 and {i}; all models of a batch have the same")


def _equal(a: Any, b: Any) -> bool:
    (tensors, rest), (others, other_rest) = extract_tensors(a), extract_tensors(b)
    return a is b or (
        equal(rest, other_rest)
        and len(tensors) == len(others)
        and all(t.shape == o.shape and bool((t == o).all()) for t, o in zip(tensors, others))
    )


@torch.no_grad()
def load_entries(module: nn.Module, own: StateDict, dicts: Sequence[StateDict]) -> None:
    """Copies entry `name` of state dict i into own[name][i]; modules of extra states get those of the first."""
    for i, state in enumerate(dicts):
        for name, value in state.items():
            if name in own and isinstance(own[name], Tensor) and not is_extra_state(name):
                own[name][i].copy_(value)
    for name, value in dicts[0].items():
        if name in own and is_extra_state(name):
            module.get_submodule(name.rpartition(".")[0]).set_extra_state(value)


def model_state_dict(state: StateDict, index: int) -> OrderedDict[str, Any]:
    """The state dict of one model, copied: torch.save would write a view with the tensor of all models."""
    one = OrderedDict(
        (k, v[index].clone() if isinstance(v, Tensor) and not is_extra_state(k) else v) for k, v in state.items()
    )
    copy_metadata(state, one)
    return one


class AbstractBatchModule(nn.Module):
    """The base class of modules that run `batch` models of `base_class` at once, on merged data.

    A subclass sets `base_class`, overrides `from_module`, and has a `forward` from tensors (B · M, …), index b * M + m,
    to tensors in the same order. If its parameters and buffers have the names of the base class and a leading dimension
    M, it inherits the rest; otherwise it overrides `load_state_dicts` and `state_dicts`.

    Args:
        batch: M, the number of models.

    Raises:
        ValueError: `batch` is not an integer of at least 1.

    Example:
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.factor = nn.Parameter(torch.ones(1))
        ...
        ...     def forward(self, x):
        ...         return x * self.factor
        >>> class BatchScale(torchmb.AbstractBatchModule):
        ...     base_class = Scale
        ...
        ...     def __init__(self, batch):
        ...         super().__init__(batch)
        ...         self.factor = nn.Parameter(torch.ones(batch, 1))
        ...
        ...     def forward(self, x):
        ...         return x * self.factor.repeat(len(x) // self.batch, 1)
        >>> torchmb.register_batch_module(BatchScale).__name__
        'BatchScale'
        >>> batch = torchmb.BatchModule(nn.Sequential(Scale(), nn.Linear(4, 2)), batch=3)
        >>> batch(torch.zeros(3, 5, 4)).shape
        torch.Size([3, 5, 2])
    """

    base_class: type[nn.Module] = nn.Module

    @classmethod
    def from_module(cls, module: nn.Module, batch: int) -> AbstractBatchModule:
        """Returns a batch of modules like `module`. The caller loads the state.

        Args:
            module: A module of the base class.
            batch: M, the number of models.
        """
        return cls(batch)

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = check_number_of_models(batch)

    def load_state_dicts(self, state_dicts: StateDict | Sequence[StateDict], strict: bool = True) -> None:
        """Loads state dicts of `base_class`; if one does not fit, none is loaded.

        Args:
            state_dicts: One for each model, or one for all.
            strict: Whether every state dict must have exactly the names of this module's own.

        Raises:
            TypeError: An entry for a tensor is not a tensor.
            ValueError: Their number, a shape or an extra state differs, or, when `strict`, a name.

        Example:
            >>> layer = torchmb.BatchLinear(4, 2, batch=3)
            >>> layer.load_state_dicts([nn.Linear(4, 2).state_dict() for _ in range(3)])
        """
        dicts, own = check_state_dicts(state_dicts, self.batch), self.state_dict()
        check_entries(entry_shapes(own, models=True), dicts, strict)
        load_entries(self, own, dicts)

    def state_dicts(self) -> list[OrderedDict[str, Any]]:
        """Returns a state dict for each model, copied, that loads into `base_class`.

        Example:
            >>> nn.Linear(4, 2).load_state_dict(torchmb.BatchLinear(4, 2, batch=3).state_dicts()[0])
            <All keys matched successfully>
        """
        state = self.state_dict()
        return [model_state_dict(state, i) for i in range(self.batch)]

    def extra_repr(self) -> str:
        """The number of models."""
        return f"batch={self.batch}"


_REGISTERED: dict[type[nn.Module], type[AbstractBatchModule]] = {}


def register_batch_module(cls: BatchClass) -> BatchClass:
    """Lets every BatchModule made from now on run modules of exactly the base class by their batch class.

    Args:
        cls: The batch class, or the base class, which then gets the batch class that was defined last. So it can be
            used as a decorator of either.

    Returns:
        `cls`.

    Raises:
        ValueError: There is no batch class for `cls`.

    Example:
        >>> @torchmb.register_batch_module
        ... class BatchIdentity(torchmb.AbstractBatchModule):
        ...     base_class = nn.Identity
        ...
        ...     def forward(self, x):
        ...         return x
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


def batch_class_of(module: nn.Module) -> type[AbstractBatchModule] | None:
    """The batch class registered for exactly this type of module, or None."""
    return _REGISTERED.get(type(module))
