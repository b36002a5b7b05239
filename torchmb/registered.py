"""Registered modules within a BatchModule: batched from plain ones, and the names of their entries in state dicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .base import AbstractBatchModule, StateDict
from .state import named_tensors
from .torch_private import apply_to_tensors


def batch_of(cls: type[AbstractBatchModule], modules: Sequence[nn.Module]) -> AbstractBatchModule:
    """The modules of all models as one batch module, with their state, mode, devices, dtypes and requires_grad."""
    batch_module = cls.from_module(modules[0], len(modules)).train(modules[0].training)
    _convert(batch_module, modules[0])
    copy_requires_grad(modules[0], batch_module)
    if states := [m.state_dict() for m in modules if m.state_dict()]:
        batch_module.load_state_dicts(states)
    return batch_module


def _convert(batch_module: nn.Module, module: nn.Module) -> None:
    """Gives a batch module the devices and dtypes of `module`: by names, and those of its first tensor to the rest."""
    given = named_tensors(module)
    if not given:
        return
    first = next((t for t in given.values() if t.is_floating_point()), next(iter(given.values())))
    like = {id(tensor): given.get(name, first) for name, tensor in named_tensors(batch_module).items()}

    def converted(tensor: Tensor) -> Tensor:
        other = like.get(id(tensor), first)
        dtype = other.dtype if other.is_floating_point() == tensor.is_floating_point() else tensor.dtype
        return tensor.to(other.device, dtype)

    apply_to_tensors(batch_module, converted)


def copy_requires_grad(source: nn.Module, target: nn.Module) -> None:
    """Copies the flags by name; parameters of other names are frozen if all of the source are."""
    flags = {name: p.requires_grad for name, p in source.named_parameters()}
    trained = any(flags.values()) or not flags
    for name, p in target.named_parameters():
        p.requires_grad_(flags.get(name, p.requires_grad and trained))


def join_names(outer: str, inner: str) -> str:
    """The name of a part of a submodule."""
    return f"{outer}.{inner}" if outer else inner


def entries_below(state: StateDict, name: str) -> dict[str, Any]:
    """The entries of a submodule, under the names that they have in it."""
    prefix = join_names(name, "")
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
