"""Rows from several places → one output, in the order of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchcache.call import Call
from torchcache.memory import Found
from torchcache.rows import Layout


def output(layout: Layout, leaves: list[Tensor], call: Call) -> Any:
    """The output of a call from its leaves as they are kept."""
    if layout.verbatim and all(t.is_cpu for t in (leaves[0], call.tensors[0])):
        return layout.join(leaves)
    return layout.join([leaf.restore(rows, call.device) for leaf, rows in zip(layout.leaves, leaves)])


def gather(found: Found, parts: list[list[Tensor]], place: Tensor) -> list[Tensor]:
    """Leaves ``[B, …]`` of the batch from the missing rows in `parts` and the rows in memory."""
    slots = found.slots
    batch = len(slots)
    in_memory = slots >= 0
    if not in_memory.any():
        order = place.index_select(0, -1 - slots)
        whole = len(parts) == 1 and len(place) == batch and bool((order == torch.arange(batch, device="cpu")).all())
        if whole:
            return parts[0]
        pools = [_concatenate(p) for p in zip(*parts)]
    else:
        hits = in_memory.nonzero().squeeze(1)
        gathered = found.gather(slots.index_select(0, hits))
        order = torch.empty(batch, dtype=torch.int64, device="cpu")
        others = (~in_memory).nonzero().squeeze(1)
        order[others] = place.index_select(0, -1 - slots.index_select(0, others))
        order[hits] = torch.arange(len(hits), device="cpu") + len(place)
        pools = [_concatenate(p) for p in zip(*parts, gathered)]
    return [pool.index_select(0, order.to(pool.device)) for pool in pools]


def _concatenate(parts: tuple[Tensor, ...]) -> Tensor:
    device = parts[-1].device
    return parts[0] if len(parts) == 1 else torch.cat([p.to(device) for p in parts])
