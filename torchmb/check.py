"""Compares a batch of a module with separate modules, and names where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .batch_module import BatchModule
from .pytree import extract_tensors, insert_tensors, map_tensors
from .state import copy_module


def check(
    module: nn.Module, *inputs: Any, batch: int = 3, rtol: float = 1e-4, atol: float = 1e-5, **kwargs: Any
) -> list[str]:
    """Compares `batch` models like `module`, with different weights, in a batch and separately.

    Random layers differ by their nature: set them to eval. `module` stays as it is.

    Args:
        module: The module to batch.
        *inputs: Arguments for one `module`; model m gets their rows rolled by m.
        batch: The number of models.
        rtol: The largest difference that counts as equal, relative to the largest value.
        atol: A difference that always counts as equal.
        **kwargs: Further arguments for one `module`.

    Returns:
        One line for each difference: submodules whose output differs, in the order in which they ran, then the output
        of the whole, gradients of parameters, and buffers. Look at the first line: the others may only pass its
        difference on. The list is empty if nothing differs.

    Example:
        >>> torchmb.check(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 4))
        []
    """
    models = [_perturbed_copy(module, seed) for seed in range(batch)]
    batched = BatchModule.from_modules(models)
    arguments = [map_tensors(lambda t, m=m: t.roll(m, 0) if t.dim() else t, (inputs, kwargs)) for m in range(batch)]  # type: ignore[misc]
    separate = [_run(m, *given) for m, given in zip(models, arguments, strict=True)]
    args, named = _stacked(arguments)
    found = _run(batched, args, named)
    return [
        line
        for name, tensors in found.items()
        for line in _differences(name, tensors, [one.get(name, []) for one in separate], rtol, atol)
    ]


def _differences(
    name: str, tensors: Sequence[Tensor], others: Sequence[Sequence[Tensor]], rtol: float, atol: float
) -> list[str]:
    if any(len(other) != len(tensors) for other in others):
        return [f"{name}: {len(tensors)} tensors instead of {[len(other) for other in others]}"]
    pairs = enumerate(tensors)
    return [line for i, tensor in pairs for line in _difference(name, tensor, [o[i] for o in others], rtol, atol)]


def _perturbed_copy(module: nn.Module, seed: int) -> nn.Module:
    one = copy_module(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in one.parameters():
            if p.is_floating_point():
                p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.1)
    return one


def _stacked(arguments: Sequence[Any]) -> Any:
    columns = zip(*(extract_tensors(a)[0] for a in arguments))
    return insert_tensors(extract_tensors(arguments[0])[1], [torch.stack(column) for column in columns])


def _run(model: nn.Module, args: Any, kwargs: Any) -> dict[str, list[Tensor]]:
    """Name → tensors to compare after a forward, and a backward from the sum of all outputs."""
    found: dict[str, list[Tensor]] = {}
    handles = [_record_output(name, module, found) for name, module in model.named_modules() if name]
    tensors = extract_tensors(model(*args, **kwargs))[0]
    for handle in handles:
        handle.remove()
    found["output"] = [t.detach() for t in tensors]
    total = sum(t.sum() for t in tensors if t.requires_grad)
    if isinstance(total, Tensor):
        total.backward()  # type: ignore[no-untyped-call]
    for name, p in model.named_parameters():
        found[f"gradient of {name}"] = [] if p.grad is None else [p.grad]
    for name, b in model.named_buffers():
        found[f"buffer {name}"] = [b]
    return found


def _record_output(name: str, module: nn.Module, found: dict[str, list[Tensor]]) -> RemovableHandle:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        tensors = extract_tensors(output)[0]
        found.setdefault(f"output of {name}", []).extend(t.detach().clone() for t in tensors)

    return module.register_forward_hook(hook)


def _difference(name: str, tensor: Tensor, others: Sequence[Tensor], rtol: float, atol: float) -> list[str]:
    shapes = [tuple(o.shape) for o in others]
    if any(tuple(tensor.shape[1:]) != s for s in shapes):
        return [f"{name}: shape {tuple(tensor.shape)} instead of {len(others)} of {shapes[0]}"]
    distances = [_largest_difference(tensor[m], other) for m, other in enumerate(others)]
    far = [m for m, other in enumerate(others) if not distances[m] <= atol + rtol * _largest_difference(other, None)]
    return [f"{name}: differs by up to {max(distances[m] for m in far):.2g} in models {far}"] if far else []


def _largest_difference(a: Tensor, b: Tensor | None) -> float:
    """The largest difference (or, without `b`, the largest value), where NaN and infinity are equal to themselves."""
    b = torch.zeros_like(a) if b is None else b
    differences = torch.where((a == b) | (a.isnan() & b.isnan()), 0, (a.double() - b.double()).abs())
    return float(differences.max()) if differences.numel() else 0.0
