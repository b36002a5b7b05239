"""Rows from several places → one output, in the order of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchcache.call import Call
from torchcache.memory import Found
from torchcache.rows import Layout, select


def output(layout: Layout, leaves: list[Tensor], call: Call) -> Any:
    """The output of a call from its leaves as they are kept."""
    if layout.verbatim and leaves[0].is_cpu and call.tensors[0].is_cpu:
        return layout.join(leaves)
    return layout.join([leaf.restore(rows, call.device) for leaf, rows in zip(layout.leaves, leaves)])


def gather(found: Found, parts: list[list[Tensor]], place: Tensor | None) -> list[Tensor]:
    """Leaves ``[B, …]`` of the batch from the rows in memory and the distinct missing ones.

    The j-th of those is row ``place[j]`` of the parts one behind the other, or row j where there is no place.
    """
    slots = found.slots
    hits = (slots >= 0).nonzero().squeeze(1)
    order = -1 - slots  # in the pools below; wrong for hits, which are set last
    if place is not None:
        order = place.index_select(0, order.clamp(min=0))
    gathered = [found.gather(slots.index_select(0, hits))] if len(hits) else []
    order[hits] = torch.arange(len(hits), device="cpu") + len(found.missing)
    pools = [_concatenate(p) for p in zip(*parts, *gathered)]
    return [select(pool, order.to(pool.device)) for pool in pools]


def others(some: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of the numbers 0 … count - 1 those that are not among `some`; and the place of each in `some` and then those."""
    place = torch.full((count,), -1, dtype=torch.int64, device="cpu")
    place[some] = torch.arange(len(some), device="cpu")
    others = (place < 0).nonzero().squeeze(1)
    place[others] = torch.arange(len(some), count, device="cpu")
    return others, place


def _concatenate(parts: tuple[Tensor, ...]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    device = next((p.device for p in parts if not p.is_cpu), parts[0].device)
    with torch.autocast(device.type, enabled=False):  # which would have cat change dtypes
        return torch.cat([p.to(device) for p in parts])
