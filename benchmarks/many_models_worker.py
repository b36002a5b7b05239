"""One rival of many_models.py in a process of its own: times training steps on "go", as lines of JSON."""

from __future__ import annotations

import copy
import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Step = Callable[[], Any]
LR = 0.01

# What a rival prints must not get between the lines for the parent.
_answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(384, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)))


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(256, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2), Block(16, 32, 2))
        self.linear = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Work(NamedTuple):
    make: Callable[[], nn.Module]
    models: int
    shape: tuple[int, ...]  # of one model's input
    shared: bool = False

    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs and class numbers of all models, or the ones that they share."""
        torch.manual_seed(0)
        leading = () if self.shared else (self.models,)
        return torch.randn(*leading, *self.shape), torch.randint(10, (*leading, self.shape[0]))


def tree() -> nn.Module:
    return nn.Sequential(nn.Linear(384, 128), nn.ReLU(), nn.Linear(128, 10))


WORKS = {
    "MLP, 32 models": Work(tree, 32, (64, 384)),
    "MLP, 100 models": Work(tree, 100, (64, 384)),
    "MLP with an own forward, 32 models": Work(MLP, 32, (64, 384)),
    "LeNet, 32 models": Work(LeNet, 32, (32, 1, 28, 28)),
    "LeNet, 100 models": Work(LeNet, 100, (32, 1, 28, 28)),
    "small ResNet, 32 models": Work(ResNet, 32, (16, 3, 32, 32)),
    "linear heads on one input, 32 models": Work(lambda: nn.Linear(1280, 10), 32, (1797, 1280), shared=True),
}


def training(parameters: Iterable[Tensor], loss: Callable[[], Tensor]) -> Step:
    optimizer = torch.optim.SGD(parameters, LR)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def batch_module(work: Work) -> Step:
    """torchmb, whichever is imported."""
    from torchmb import BatchModule
    from torchmb.functional import batch_loss

    x, targets = work.data()
    if work.shared:
        from torchmb import shared

        x, targets = shared(x), shared(targets)
    batch = BatchModule(work.make(), work.models, False)

    def loss() -> Tensor:
        return batch_loss(batch(x), targets, work.models, F.cross_entropy, "mean").sum()

    return training(batch.parameters(), loss)


def _stacked(work: Work) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    net = work.make()
    parameters, buffers = (
        {name: torch.stack([t.detach()] * work.models) for name, t in named}
        for named in (net.named_parameters(), net.named_buffers())
    )
    return net, parameters, buffers


def vmap_of_grad(work: Work) -> Step:
    net, parameters, buffers = _stacked(work)
    x, targets = work.data()

    def loss(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, (p, b), (x,)), t)

    gradients = vmap(grad(loss), in_dims=(0, 0, None, None) if work.shared else 0)

    @torch.no_grad()
    def step() -> None:
        for name, g in gradients(parameters, buffers, x, targets).items():
            parameters[name].sub_(g, alpha=LR)

    return step


def vmap_of_forward(work: Work) -> Step:
    net, stacked, buffers = _stacked(work)
    parameters: dict[str, Tensor] = {name: nn.Parameter(t) for name, t in stacked.items()}
    x, targets = work.data()

    def loss(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, (p, b), (x,)), t)

    losses = vmap(loss, in_dims=(0, 0, None, None) if work.shared else 0)

    return training(parameters.values(), lambda: losses(parameters, buffers, x, targets).sum())


def loop(work: Work) -> Step:
    models = [copy.deepcopy(work.make()) for _ in range(work.models)]
    x, targets = work.data()
    rows = [(x, targets)] * work.models if work.shared else list(zip(x, targets))
    optimizer = torch.optim.SGD([p for m in models for p in m.parameters()], LR)

    def step() -> None:
        for model, (a, b) in zip(models, rows, strict=True):
            F.cross_entropy(model(a), b).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def baddbmm(work: Work) -> Step:
    """The MLP by hand, weights (M, inputs, outputs)."""
    x, targets = work.data()
    sizes = ((384, 128), (128, 10))
    w1, w2 = (nn.Parameter(torch.randn(work.models, *s) / s[0] ** 0.5) for s in sizes)
    b1, b2 = (nn.Parameter(torch.zeros(work.models, 1, s[1])) for s in sizes)

    def loss() -> Tensor:
        logits = torch.baddbmm(b2, F.relu(torch.baddbmm(b1, x, w1)), w2)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(work.models, -1).mean(1).sum()

    return training([w1, b1, w2, b2], loss)


def one_product(work: Work) -> Step:
    """The heads as one linear layer: its product, the two of its backward and its update, without a loss."""
    x, _ = work.data()
    layer = nn.Linear(x.shape[1], 10 * work.models)
    return training(layer.parameters(), lambda: layer(x).sum())


def products(work: Work) -> Step:
    """The matrix products of a step of the MLP, and the update, alone."""
    x, _ = work.data()
    w1, w2 = torch.randn(work.models, 384, 128), torch.randn(work.models, 128, 10)

    def step() -> None:
        hidden = torch.bmm(x, w1)
        out = torch.bmm(hidden, w2)
        g2, back = torch.bmm(hidden.mT, out), torch.bmm(out, w2.mT)
        w1.add_(torch.bmm(x.mT, back), alpha=-1e-9)
        w2.add_(g2, alpha=-1e-9)

    return step


RIVALS: dict[str, Callable[[Work], Step]] = {
    f.__name__: f for f in (products, one_product, batch_module, vmap_of_grad, vmap_of_forward, baddbmm, loop)
}


def peak_bytes(step: Step) -> int:
    """How far the process grows within a step over what it holds between steps. Large blocks must come from mmap."""
    grown = []
    for _ in range(3):
        step()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        rest = _status("VmRSS")
        step()
        grown.append(_status("VmHWM") - rest)
    return int(statistics.median(grown))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main(rival: str, work: str, mode: str) -> None:
    torch.set_num_threads(1)
    step = RIVALS[rival](WORKS[work])
    step()
    print(json.dumps(peak_bytes(step) if mode == "memory" else "ready"), file=_answers)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(json.dumps(time.perf_counter() - start), file=_answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
