"""Attributes of modules that are set after rows were cached count, those that a forward sets do not."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from cache_harness import cache_of
from torch import Tensor, nn

from torchcache import torchcache

X = torch.linspace(-2, 2, 24).view(6, 4)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act: Any = torch.relu
        self.factor: Any = 1
        self.table: Any = [1.0]
        self.calls = 0

    def helper(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.helper(self.act(x)) * float(self.factor) + self.table[0]


class Other(Part):
    def helper(self, x: Tensor) -> Tensor:
        return x + 9


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Part()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


VALUES: dict[str, tuple[str, Any, Any]] = {
    "a function": ("act", torch.sigmoid, torch.tanh),
    "a lambda": ("act", lambda x: x + 1, lambda x: x + 2),
    "a partial": (
        "act",
        functools.partial(nn.functional.leaky_relu, negative_slope=0.1),
        functools.partial(nn.functional.leaky_relu, negative_slope=0.9),
    ),
    "a method": ("helper", lambda x: x * 3, lambda x: x * 4),
    "forward": ("forward", lambda x: x * 3, lambda x: x * 4),
    "a number of NumPy": ("factor", numpy.float32(0.5), numpy.float32(2.5)),
    "a fraction": ("factor", Fraction(1, 3), Fraction(1, 2)),
    "a list": ("table", [2.0], [3.0]),
    "an object": ("table", Other().table, [5.0, 6.0]),
}


# The forward of the module itself is what is cached.
@pytest.mark.parametrize(
    ("what", "inside"), [(what, inside) for what in VALUES for inside in (False, True) if inside or what != "forward"]
)
def test_an_attribute_that_is_set_again_counts_and_its_way_back_too(what: str, inside: bool) -> None:
    name, first, second = VALUES[what]
    module: Any = torchcache()(Whole() if inside else Part())
    part = module.part if inside else module
    rows = []
    for value in (first, second, first):
        setattr(part, name, value)
        rows.append(module(X))
        module.torchcache_enabled = False
        assert torch.equal(rows[-1], module(X))
        module.torchcache_enabled = True
    assert not torch.equal(rows[0], rows[1])
    assert cache_of(module).info().misses == 12


def test_another_class_of_a_part_counts() -> None:
    module = torchcache()(Whole())
    first = module(X)
    module.part.__class__ = Other
    assert torch.allclose(module(X), first + 9)
    module.part.__class__ = Part
    assert torch.equal(module(X), first) and cache_of(module).info().misses == 12


def test_weights_that_are_loaded_into_a_quantised_module_count() -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)

    module, other = torchcache()(make(0)), make(1)
    first = module(X)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(X), other(X))
    module.load_state_dict(make(0).state_dict())
    assert torch.equal(module(X), first)


def leave_list(m: Part, x: Tensor) -> None:
    m.seen = [len(x)]  # type: ignore[assignment]


def leave_function(m: Part, x: Tensor) -> None:
    m.last = lambda: x  # type: ignore[assignment]


def replace_list(m: Part, x: Tensor) -> None:
    m.table = [*m.table]


@pytest.mark.parametrize("leave", [leave_list, leave_function, replace_list])
@pytest.mark.parametrize("inside", [False, True])
def test_what_a_forward_sets_does_not_count(
    leave: Callable[[Part, Tensor], None], inside: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "torchcache")

    class Leaving(Part):
        def forward(self, x: Tensor) -> Tensor:
            leave(self, x)
            return super().forward(x)

    part = Leaving()
    module: Any = Whole() if inside else part
    if inside:
        module.part = part
    torchcache()(module)
    for step in range(4):
        module(X[step:])
        module(X + step)
    assert cache_of(module).info().misses == 6 * 4
    act, part.act = part.act, torch.sigmoid
    module(X)
    part.act = act
    module(X)
    assert cache_of(module).info().misses == 6 * 5
    assert caplog.records == []


class Scale(nn.Module):
    def __init__(self, factor: Any) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        self.factor = float(self.factor)
        return x * self.factor


def test_what_the_forward_of_a_replaced_part_set_does_not_count_for_its_successors() -> None:
    module = torchcache()(nn.Sequential(Scale(0)))
    for factor in range(1, 200):
        module[0] = Scale(factor)  # soon at the address of one that is gone
        assert torch.equal(module(X), X * factor)


class Late(nn.Module):
    """Makes what it needs when it first sees an input."""

    late: Any

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.other = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            size = x.shape[1]
            if self.kind == "buffer":
                self.register_buffer("late", torch.ones(size))
            elif self.kind == "parameter":
                self.late = nn.Parameter(torch.ones(size), requires_grad=False)
            else:
                self.late = nn.LayerNorm(size).requires_grad_(False)
        return self.late(x) if isinstance(self.late, nn.Module) else self.other(x) * self.late


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["buffer", "parameter", "module"])
def test_what_a_first_forward_makes_is_watched_from_then_on(kind: str, inside: bool) -> None:
    module: Any = torchcache()(nn.Sequential(Late(kind)) if inside else Late(kind))
    for _ in range(4):
        module(X)
    assert cache_of(module).info().memory_hits == 12
    first = module(X)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for state in ({name: torch.randn_like(tensor) for name, tensor in before.items()}, before):
        module.load_state_dict(state)
        now = module(X)
        module.torchcache_enabled = False
        assert torch.equal(now, module(X))
        module.torchcache_enabled = True
    assert torch.equal(now, first) and cache_of(module).info().misses == 12
