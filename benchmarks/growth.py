"""How the cost of a full hit grows with the rows in the memory tier: 10³, 10⁵ and 10⁷ of them, in one interleaved run.

10⁷ rows of 768 f32 are 31 GB, so all have 4 f32 in one table; in the other the rows beyond 10⁵ do.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch
from interleaved import measure
from torch import Tensor, nn

from torchcache import torchcache
from torchcache._native import ops
from torchcache.tiers.layout import Layout, Leaf
from torchcache.tiers.memory import MemoryTier

BATCH, INPUTS = 256, 64  # 64 batches of 512 KB: every size reads its inputs from as far away
SIZES = (10**3, 10**5, 10**7)
ROUNDS = 400
WIDE = 10**5  # at most so many rows of 768


class Backbone(nn.Module):
    """[B, 512] → [B, width] f32; what it computes does not matter here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1].expand(-1, self.width).clone()


def fill(memory: MemoryTier, layout: Layout, rows: int) -> None:
    """Keeps rows under random keys, as inputs of other batches would have them."""
    if rows:
        keys = torch.randint(-(2**63), 2**63 - 1, (rows, 2))
        memory.write(keys, layout, [torch.zeros(rows, *leaf.shape) for leaf in layout.leaves])


def hits(rows: int, width: int) -> Callable[[], Tensor]:
    """A full hit on the next of 64 batches whose rows lie scattered among `rows` ones."""
    module: Any = torchcache(max_memory_cache_size=2 * 10**9)(Backbone(width))
    count = min(INPUTS, rows // BATCH)
    inputs = torch.randn(count * BATCH, 512)
    memory = module.cache_instance.tiers().memory
    others = rows - len(inputs)
    like = Layout("*", (Leaf(torch.float32, torch.float32, (width if rows <= WIDE else 4,), None),))
    for chunk in inputs.split(BATCH):
        module(chunk)
        fill(memory, like, others // count)
    fill(memory, like, others % count)
    assert memory.rows == rows and not memory.full
    shuffled = inputs[torch.randperm(len(inputs))].split(BATCH)
    turn = itertools.cycle([shuffled[i % count].clone() for i in range(INPUTS)])
    for _ in range(INPUTS):
        module(next(turn))
    assert module.cache_instance.info().misses == len(inputs)
    return lambda: module(next(turn))


def limit(rows: int, width: int) -> Callable[[], Tensor]:
    """Hash and gather of the same sizes: what the distance of the rows costs without any cache."""
    arena = torch.zeros(rows if width == 4 else min(rows, WIDE), width)
    turn = itertools.cycle([(torch.randn(BATCH, 512), torch.randint(0, len(arena), (BATCH,))) for _ in range(INPUTS)])

    def run() -> Tensor:
        x, order = next(turn)
        ops.keys([x], (0, 0))
        return arena.index_select(0, order)

    return run


def main() -> None:
    logging.getLogger("torchcache").setLevel(logging.ERROR)  # nothing but misses while it is filled
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for width in (4, 768):
        rivals = [("", make(rows, width)) for rows in SIZES for make in (limit, hits)]
        medians = measure(rivals, ROUNDS)
        print(f"\n(256, 512) f32 → {width} f32, 1 thread")
        print(f"  {'rows in memory':16} {'hash + gather':>24} {'full hit':>24} {'full hit / hash + gather':>26}")
        for rows, least, hit in zip(SIZES, medians[::2], medians[1::2], strict=True):
            cells = [f"{t * 1e6:12.1f} µs {t / first:7.2f}×" for t, first in zip((least, hit), medians, strict=False)]
            print(f"  {rows:<16,} {cells[0]:>24} {cells[1]:>24} {hit / least:25.2f}×")


if __name__ == "__main__":
    main()
