"""The rows of a module or function are freed with it, at once, and no graph records that."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_harness import cache_of
from process_harness import run
from torch import Tensor, nn

from torchcache import torchcache

X = torch.arange(12.0).view(4, 3)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 2), nn.ReLU()).requires_grad_(False)
        self.names = ["a"]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers(x)
        return output


@torchcache()
class Decorated(Plain):
    pass


def patched() -> nn.Module:
    module: Any = nn.Identity()
    module.forward = lambda x: x * 2
    return torchcache()(module)


def function() -> Callable[[Tensor], Tensor]:
    weight = torch.ones(3)

    def double(x: Tensor) -> Tensor:
        return x * 2 * weight

    return torchcache()(double)


def on_disk() -> nn.Module:
    return torchcache(persistent=True)(Plain())


MAKERS: list[Callable[[], Any]] = [
    Decorated,
    lambda: torchcache()(Plain()),
    lambda: torchcache(frozen=True)(Plain()),
    lambda: torchcache()(torch.compile(Plain(), backend="eager")),
    patched,
    function,
    on_disk,
]


@pytest.fixture
def no_gc() -> Iterator[None]:
    """Nothing is freed but what nobody refers to."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def rows_of(cached: Any) -> weakref.ref[object]:
    """Dies with the rows in memory."""
    return weakref.ref(cache_of(cached).tiers().memory._contents)


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("make", MAKERS)
def test_the_rows_are_freed_with_the_last_user_of_what_is_cached(make: Callable[[], Any]) -> None:
    cached = make()
    for _ in range(2):
        cached(X)
    cache_of(cached).info(), cache_of(cached).keys(X), cache_of(cached).explain(X + 1), repr(cache_of(cached))
    module, rows = weakref.ref(cached), rows_of(cached)
    del cached
    assert rows() is None and module() is None


@pytest.mark.usefixtures("no_gc")
def test_a_cached_part_of_a_model_is_freed_with_the_model() -> None:
    model: Any = nn.Sequential(Decorated(), nn.Linear(2, 2))
    model.train()
    model(X).sum().backward()
    model[0].torchcache_max_memory_cache_size = 10**6
    model(X)
    model[0](X.clone().requires_grad_())
    model[0].layers[0].weight.mul_(2)
    model(X)
    rows = rows_of(model[0])
    del model
    assert rows() is None


@pytest.mark.usefixtures("no_gc")
def test_a_cache_that_a_user_holds_keeps_its_module() -> None:
    module: Any = Decorated()
    right = module(X)
    cache = cache_of(module)
    assert cache is module.cache_instance
    name, gone = module.layers[0], weakref.ref(module)
    del module
    assert torch.equal(cache.keys(X), cache.keys(X)) and len(cache.cache) == 4
    restored = gone()
    assert restored is not None and torch.equal(restored(X), right) and restored.layers[0] is name
    del restored, cache
    assert gone() is None


@pytest.mark.usefixtures("no_gc")
def test_a_dataset_of_rows_keeps_them_without_the_module() -> None:
    module = Decorated()
    right = module(X)
    tiers, keys = cache_of(module).tiers(), cache_of(module).keys(X)
    gone = weakref.ref(module)
    del module
    assert gone() is None and torch.equal(tiers.fetch(keys)[1][0], right)


def test_no_graph_records_that_rows_were_freed(tmp_path: Path) -> None:
    """Finalizers run anywhere: here while torch traces, exports or scripts a forward that collects garbage."""
    script = """
        import gc, weakref
        from torch.fx.experimental.proxy_tensor import make_fx

        class Collecting(nn.Module):
            def forward(self, x):
                y = x + 1
                gc.collect()
                return y

        def garbage():
            references = []
            for persistent in (False, True):
                module = torchcache(persistent=persistent)(Double())
                module(X)
                module.weight = nn.Parameter(torch.ones(3), False)
                module(X)
                module.itself = [module]
                references.append(weakref.ref(module.cache_instance.tiers().memory._contents.table))
            return references

        gc.disable()
        torch.export.export(Collecting(), (X,))  # imports what it needs
        for trace in (
            lambda: torch.export.export(Collecting(), (X,)).graph_module.code,
            lambda: make_fx(Collecting())(X).code,
            lambda: str(torch.jit.trace(Collecting(), X).graph),
        ):
            tables = garbage()
            assert all(table() is not None for table in tables)
            assert "torchcache" not in trace()
            assert all(table() is None for table in tables)
    """
    run(tmp_path, script)
