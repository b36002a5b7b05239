"""Compares a batch of a module with separate modules, to see that and where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batch_module import BatchModule
from .pytree import map_tensors, put, take
from .state import copied


def check(
    module: nn.Module, *inputs: Any, batch: int = 3, rtol: float = 1e-4, atol: float = 1e-5, **kwargs: Any
) -> list[str]:
    """Runs `batch` models like `module`, with weights moved apart, batched and each on its own → what differs.

    inputs, kwargs: arguments of one `module`; model m gets their rows rolled by m. One line for each submodule whose
    output is not that of the separate models, in the order in which they ran, then for the output of the whole, for
    gradients of parameters and for buffers. The first line is where to look: others may only pass the difference on.
    No line: all are equal, no value being further away than atol + rtol times the largest. Random layers differ by
    their nature: set them to eval. `module` is left alone.
    """
    models = [_moved_apart(module, seed) for seed in range(batch)]
    batched = BatchModule.from_modules(models)
    arguments = [map_tensors(lambda t, m=m: t.roll(m, 0) if t.dim() else t, (inputs, kwargs)) for m in range(batch)]  # type: ignore[misc]
    separate = [_run(m, *given) for m, given in zip(models, arguments, strict=True)]
    args, named = _stacked(arguments)
    seen = _run(batched, args, named)
    lines = []
    for name, tensors in seen.items():
        others = [one.get(name, []) for one in separate]
        if len({len(tensors), *map(len, others)}) > 1:
            lines.append(f"{name}: {len(tensors)} tensors instead of {[len(o) for o in others]}")
            continue
        for i, tensor in enumerate(tensors):
            lines += _difference(name, tensor, [o[i] for o in others], rtol, atol)
    return lines


def _moved_apart(module: nn.Module, seed: int) -> nn.Module:
    one = copied(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in one.parameters():
            if p.is_floating_point():
                p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.1)
    return one


def _stacked(arguments: Sequence[Any]) -> Any:
    columns = zip(*(take(a)[0] for a in arguments))
    return put(take(arguments[0])[1], [torch.stack(column) for column in columns])


def _run(model: nn.Module, args: Any, kwargs: Any) -> dict[str, list[Tensor]]:
    """What a forward and a backward of the sum of all outputs leave to be compared, by name."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for name, submodule in model.named_modules():
        if name:

            def hook(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                found.setdefault(f"output of {name}", []).extend(t.detach().clone() for t in take(output)[0])

            handles.append(submodule.register_forward_hook(hook))
    tensors = take(model(*args, **kwargs))[0]
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


def _difference(name: str, tensor: Tensor, others: Sequence[Tensor], rtol: float, atol: float) -> list[str]:
    shapes = [tuple(o.shape) for o in others]
    if any(tuple(tensor.shape[1:]) != s for s in shapes):
        return [f"{name}: shape {tuple(tensor.shape)} instead of {len(others)} of {shapes[0]}"]
    distances = [_distance(tensor[m], other) for m, other in enumerate(others)]
    far = [m for m, other in enumerate(others) if not distances[m] <= atol + rtol * _distance(other, None)]
    return [f"{name}: differs by up to {max(distances[m] for m in far):.2g} in models {far}"] if far else []


def _distance(a: Tensor, b: Tensor | None) -> float:
    """The largest difference (or, without `b`, the largest value), where NaN and infinity are equal to themselves."""
    b = torch.zeros_like(a) if b is None else b
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0, (a.double() - b.double()).abs())
    return float(apart.max()) if apart.numel() else 0.0
