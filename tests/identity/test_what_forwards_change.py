"""What a forward changes and reads is state: such calls are not cached. Switches that are set back cost no hashing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_harness import cache_of
from torch import Tensor, nn

from torchcache import torchcache
from torchcache._native import ops

X = torch.arange(6.0).view(3, 2)
MEAN = 0.0


class Changing(nn.Module):
    """Its output depends on something that it changes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.mean, self.step = 0.0, 0
        self.prompt: Any = 3.0
        self.stats: Any = {"mean": 0.0}
        self.means = [0.0]
        self.hidden: Any = torch.zeros(())

    def forward(self, x: Tensor) -> Any:
        return getattr(self, self.kind)(x)

    def running(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * float(x.mean())
        return x - self.mean

    def counted(self, x: Tensor) -> Tensor:
        self.step += 1
        return x * self.step

    def used_up(self, x: Tensor) -> Tensor:
        if self.prompt is None:
            return x
        x, self.prompt = x + self.prompt, None
        return x

    def in_dict(self, x: Tensor) -> Tensor:
        self.stats["mean"] = 0.5 * self.stats["mean"] + 1
        return x - float(self.stats["mean"])

    def in_list(self, x: Tensor) -> Tensor:
        self.means[0] = 0.5 * self.means[0] + 1
        return x - self.means[0]

    def recurrent(self, x: Tensor) -> Any:
        self.hidden = self.hidden + x.sum()
        return x + self.hidden

    def globally(self, x: Tensor) -> Tensor:
        global MEAN
        MEAN = 0.5 * MEAN + 1
        return x - MEAN


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["running", "counted", "used_up", "in_dict", "in_list", "recurrent", "globally"])
def test_a_forward_that_reads_what_it_changes_gives_what_it_gives_without_the_cache(kind: str, inside: bool) -> None:
    global MEAN
    part, plain = Changing(kind), Changing(kind)
    module: Any = torchcache()(nn.Sequential(part) if inside else part)
    MEAN = 0.0
    expected = []
    for step in range(6):
        if step == 3:
            plain.prompt = 5.0
        expected.append(plain(X))
    MEAN = 0.0
    for step in range(6):
        if step == 3:
            part.prompt = 5.0
        assert torch.equal(module(X), expected[step])


@pytest.mark.parametrize("replaced_by", ["feature", "map"])
def test_a_tensor_that_a_forward_leaves_for_the_caller_is_that_of_the_last_batch(
    replaced_by: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Leaving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.feature: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.feature = x * 2 if replaced_by == "feature" else {"map": x * 2}["map"]
            return x + 1

    module = torchcache()(Leaving())
    for x in (X, X + 1, X, X + 1):
        module(x)
        assert torch.equal(module.feature, x * 2)
    assert "feature" in caplog.text and "return what the caller needs" in caplog.text


def toggles(module: Any) -> dict[str, Callable[[bool], None]]:
    return {
        "an adapter": lambda on: setattr(module[0], "off", on),
        "requires_grad": lambda on: module.requires_grad_(on),
        "a layer's attribute": lambda on: setattr(module[1], "negative_slope", 0.5 if on else 0.25),
        "an item": lambda on: module[0].scaling.update(default=2.0 if on else 1.0),
    }


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.off, self.scaling = False, {"default": 1.0}
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        return x if self.off else self.linear(x) * self.scaling["default"]


@pytest.mark.parametrize("what", ["an adapter", "requires_grad", "a layer's attribute", "an item"])
def test_a_switch_that_alternates_reads_no_weight_again(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = torchcache()(nn.Sequential(Adapter(), nn.LeakyReLU(0.25)).requires_grad_(False))
    switch = toggles(module)[what]
    for on in (False, True, False, True):
        switch(on)
        module(X)
    before = cache_of(module).info()
    read: list[int] = []
    digests = ops.digests
    monkeypatch.setattr(ops, "digests", lambda tensors: read.append(len(tensors)) or digests(tensors))  # type: ignore[func-returns-value]
    for on in (False, True) * 3:
        switch(on)
        rows = module(X)
        module.torchcache_enabled = False
        assert torch.equal(rows, module(X))
        module.torchcache_enabled = True
    assert cache_of(module).info().misses == before.misses
    assert sum(read) == len(read)  # call digests only, of one tensor of bytes each


def test_an_optimizer_of_other_parameters_costs_no_reading_and_one_of_these_is_noticed() -> None:
    module: Any = torchcache()(nn.Linear(2, 2))
    head = nn.Linear(2, 1)
    others = torch.optim.SGD(head.parameters(), lr=0.1, fused=True)
    own = torch.optim.SGD(module.parameters(), lr=0.1, fused=True)
    module(X)
    for optimizer, parameters in ((others, head), (own, module), (others, head)):
        for p in parameters.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert torch.allclose(module(X), nn.functional.linear(X, module.weight, module.bias))
    assert cache_of(module).info().misses == 6
