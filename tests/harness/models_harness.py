"""M separate models: what a batch of them is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from torchmb import BatchModule

Make = Callable[[], nn.Module]
Draw = Callable[..., Tensor]  # shape → one model's input


class Own(nn.Module):
    """A custom forward, forward(self, *args), on layers that are attributes."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Wrapped(nn.Module):
    """A layer behind a class of the user's own: the same layer, run under vmap."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Any:
        return self.layer(*args)


class LeNet(nn.Module):
    """(B, 1, 28, 28) → (B, 10)"""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(256, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, 256)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet18(nn.Module):
    """(B, 3, 16, 16) → (B, 10), of `width` channels at first"""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        widths = [width * 2**i for i in range(4)]
        pairs = zip([width, *widths], widths)
        self.blocks = nn.Sequential(
            *(Block(i if not j else o, o, 2 if o > width and not j else 1) for i, o in pairs for j in (0, 1))
        )
        self.linear = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def separate(make: Make, models: int) -> list[Any]:
    """Models with other weights and other buffers each."""
    made = [make() for _ in range(models)]
    with torch.no_grad():
        for module in made:
            for p in module.parameters():
                p.add_(torch.randn_like(p) * 0.2)
            for b in module.buffers():
                if b.is_floating_point():
                    b.add_(torch.rand_like(b) * 0.2)
    return made


def tensors(value: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def close(batched: Tensor | None, others: Sequence[Tensor | None], what: str, scale: float = 1e-4) -> None:
    """Equal to the others, stacked, up to rounding: relative to the largest value, as sums round."""
    expected = torch.stack([other for other in others if other is not None])
    assert batched is not None, what
    assert batched.shape == expected.shape, f"{what}: {tuple(batched.shape)} instead of {tuple(expected.shape)}"
    assert batched.dtype == expected.dtype, what
    size = float(expected.detach().nan_to_num().abs().max()) if expected.numel() else 0.0
    scale = 1e-9 if expected.dtype == torch.double else scale
    torch.testing.assert_close(
        batched, expected, rtol=scale, atol=scale * max(size, 1.0), equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def weighted(outputs: list[Tensor], weights: list[Tensor | None]) -> Tensor:
    """A loss to which every output counts that can have a gradient."""
    return sum(((t * w).sum() for t, w in zip(outputs, weights) if w is not None), torch.zeros(()))


def run_alike(
    batch: BatchModule, models: Sequence[nn.Module], x: Tensor, call: Callable[..., Any] = lambda m, x: m(x)
) -> None:
    """One forward and backward of both: outputs, gradients of inputs and parameters, buffers."""
    own, others = x.clone(), [one.clone() for one in x]
    if x.is_floating_point():
        own.requires_grad_()
        for one in others:
            one.requires_grad_()
    output, expected = call(batch, own), [call(m, one) for m, one in zip(models, others)]
    weights = [torch.randn_like(t) if t.is_floating_point() else None for t in tensors(output)]
    per_model = [tensors(e) for e in expected]
    for i, t in enumerate(tensors(output)):
        close(t, [e[i] for e in per_model], f"output {i}")
    batch.zero_grad()
    loss = weighted(tensors(output), weights)
    if not loss.requires_grad:
        return compare_buffers(batch, models)
    loss.backward()
    for m, (model, out) in enumerate(zip(models, per_model)):
        model.zero_grad()
        weighted(out, [w if w is None else w[m] for w in weights]).backward()
    if own.grad is not None:
        close(own.grad, [o.grad for o in others], "gradient of the input")
    for name, p in batch.named_parameters():
        grads = [model.get_parameter(name).grad for model in models]
        if grads[0] is None:
            assert p.grad is None or not p.grad.any(), name
        else:
            close(p.grad, grads, f"gradient of {name}")
    compare_buffers(batch, models)


def compare_buffers(batch: BatchModule, models: Sequence[nn.Module]) -> None:
    for name, buffer in batch.named_buffers():
        close(buffer, [dict(m.named_buffers())[name] for m in models], f"buffer {name}")


def assert_alike(
    make: Make,
    *shape: int,
    models: int = 3,
    rows: int = 6,
    training: bool = True,
    draw: Draw = torch.randn,
    call: Callable[..., Any] = lambda m, x: m(x),
    steps: int = 2,
) -> None:
    """A batch of models made by `make` does what they do separately on inputs (rows, *shape), twice."""
    made = [m.train(training) for m in separate(make, models)]
    batch = BatchModule.from_modules(made)
    for _ in range(steps):
        run_alike(batch, made, torch.stack([draw(rows, *shape) for _ in range(models)]), call)


def indices(rows: int) -> Draw:
    """Draws numbers of rows of an embedding."""
    return lambda *shape: torch.randint(rows, shape)
