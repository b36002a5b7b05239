"""torch.compile around a cached module: right results, one graph break, no recompile for a new batch size."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cache_harness import cache_of
from torch import Tensor, nn

from torchcache import torchcache


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


class Nested(nn.Sequential):
    pass


@torchcache()
def double(x: Tensor) -> Tensor:
    return x * 2


class WithFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return double(x) + 1


class Counter:
    """A backend that counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        self.graphs += 1
        return graph.forward


def graphs_of(backbone: nn.Module, plain: Backbone) -> int:
    """Graphs that a compiled model around the backbone has after batches of many sizes; checks what it gives."""
    torch._dynamo.reset()
    head = nn.Linear(8, 2)
    counter = Counter()

    @torch.compile(backend=counter)
    def model(x: Tensor) -> Tensor:
        return head(backbone(x * 2) + 1)

    for batch in (8, 8, 5, 7, 3, 11):
        x = torch.randn(batch, 4)
        right = head(plain(x * 2) + 1)
        assert torch.allclose(model(x), right) and torch.allclose(model(x), right)
    return counter.graphs


def test_a_cached_call_in_a_compiled_model_is_one_graph_break_and_compiles_nothing_anew_for_a_new_batch_size() -> None:
    plain = Backbone()
    cached, other = copy.deepcopy(plain), copy.deepcopy(plain)
    torchcache()(cached)
    other.forward = torch.compiler.disable(other.forward)  # type: ignore[method-assign]
    assert graphs_of(cached, plain) == graphs_of(other, plain)
    assert cache_of(cached).info().memory_hits >= 40


def test_other_instances_of_a_decorated_instances_class_are_compiled_without_a_break() -> None:
    torch._dynamo.reset()
    torchcache()(Backbone())
    counter = Counter()
    plain = Backbone()
    compiled = torch.compile(plain, backend=counter, fullgraph=True)
    x = torch.randn(3, 4)
    assert torch.allclose(compiled(x), plain(x)) and counter.graphs == 1


def test_a_module_compiled_before_it_is_decorated_computes_its_misses_compiled() -> None:
    torch._dynamo.reset()
    counter = Counter()
    plain = Backbone()
    module = torchcache()(torch.compile(plain, backend=counter))
    x = torch.randn(6, 4)
    for _ in range(3):
        assert torch.allclose(module(x), plain(x))
    assert counter.graphs == 1
    assert cache_of(module).info().memory_hits == 12


@pytest.mark.parametrize("outer", [nn.Sequential, Nested])
def test_a_cached_module_is_cached_inside_a_compiled_one_of_its_own_class(outer: Callable[..., nn.Module]) -> None:
    torch._dynamo.reset()
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU()).requires_grad_(False)
    head, cached = nn.Linear(8, 2), torchcache()(copy.deepcopy(plain))
    model = torch.compile(outer(cached, nn.Sequential(head)), backend="eager")
    for batch in (6, 6, 3):
        x = torch.randn(batch, 4)
        assert torch.allclose(model(x), head(plain(x))) and torch.allclose(model(x), head(plain(x)))
    assert cache_of(cached).info().memory_hits == cache_of(cached).info().misses == 15


def test_fullgraph_says_why_a_cached_module_is_a_graph_break() -> None:
    torch._dynamo.reset()
    for model in (nn.Sequential(torchcache()(Backbone()), nn.Linear(8, 2)), torchcache()(Backbone()), WithFunction()):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(
            Exception, match="a cached module or function is one graph break: compile without fullgraph"
        ):
            compiled(torch.randn(3, 4))
