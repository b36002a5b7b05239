"""A tier that the engine has never heard of: whatever has the methods of one can stand in a chain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from cache_harness import cache_of
from torch import Tensor, nn

from torchcache import torchcache
from torchcache.tiers.chain import Chain
from torchcache.tiers.layout import Layout
from torchcache.tiers.memory import MemoryTier
from torchcache.tiers.tier import Rows, Tier, TierStats

X = torch.arange(12.0).view(4, 3)


class DictionaryTier:
    """Rows in a dictionary, as plainly as can be."""

    name = "dictionary"
    is_on_host = True
    is_described = True

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], tuple[Layout, list[Tensor]]] = {}

    def lookup(self, keys: Tensor) -> Tensor:
        return torch.tensor([tuple(key) in self.rows for key in keys.tolist()], dtype=torch.bool)

    def read(self, keys: Tensor, layout: Layout | None = None, pin: bool = False) -> Rows | None:
        found = [(i, self.rows[tuple(key)]) for i, key in enumerate(keys.tolist()) if tuple(key) in self.rows]
        layout = layout or next((of_row for _, (of_row, _) in found), None)
        found = [(i, row) for i, row in found if row[0] == layout]
        if layout is None or not found:
            return None
        leaves = [torch.stack(rows) for rows in zip(*(row for _, (_, row) in found), strict=True)]
        return Rows(torch.tensor([i for i, _ in found]), layout, leaves)

    def write(self, keys: Tensor, layout: Layout, leaves: list[Tensor]) -> None:
        for i, key in enumerate(keys.tolist()):
            self.rows.setdefault(tuple(key), (layout, [leaf[i].clone() for leaf in leaves]))

    def describe(self, meta: Mapping[str, Any]) -> None: ...

    def stats(self) -> TierStats:
        return TierStats(rows=len(self.rows))

    def flush(self) -> None: ...

    def clear(self) -> None:
        self.rows.clear()

    def close(self) -> None: ...


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return x * 2


def cached(tier: Tier, memory: int = 1 << 20) -> Double:
    module: Double = torchcache(max_memory_cache_size=memory)(Double())
    cache = cache_of(module)
    cache.__dict__["_tiers"] = Chain(MemoryTier("cpu", memory), [tier], cache.options, None)
    return module


def test_rows_of_a_tier_that_nobody_knows_are_found_counted_and_kept_in_memory() -> None:
    tier = DictionaryTier()
    assert torch.equal(cached(tier)(X), X * 2) and len(tier.rows) == 4
    module = cached(tier)
    assert torch.equal(module(X.flip(0)[:3]), X.flip(0)[:3] * 2)
    assert torch.equal(module(X), X * 2) and module.rows == 0
    info = cache_of(module).info()
    assert info.hits == {"memory": 3, "disk": 0, "dictionary": 4} and info.misses == 0
    assert info.tiers["dictionary"].rows == 4 and info.memory_rows == 4


def test_one_batch_is_put_together_from_memory_another_tier_and_the_forward() -> None:
    tier = DictionaryTier()
    cached(tier)(X[1:3])
    module = cached(tier)
    module(X[2:3])
    x = X[[0, 2, 1, 0, 3, 2]]
    assert torch.equal(module(x), x * 2) and module.rows == 2
    assert cache_of(module).info().hits["dictionary"] == 2


def test_explain_counts_rows_of_every_tier() -> None:
    tier = DictionaryTier()
    cached(tier)(X[:3])
    module = cached(tier)
    module(X[:1])
    why = cache_of(module).explain(X)
    assert (why.rows, why.in_memory, why.on_disk) == (4, 1, 2)
