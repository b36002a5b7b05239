"""Compares the rows of a call with those that a tier has: a directory against a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from torchcache.engine.compute import Computed
from torchcache.engine.decision import Request
from torchcache.engine.tolerance import Tolerance, compare, dtypes_of
from torchcache.engine.verify import hexadecimal
from torchcache.tiers.tier import Rows, Tier


class Comparison(NamedTuple):
    """What comparing the rows of a call shows.

    Attributes:
        rows: of the call.
        found: how many of them the tier has.
        largest_error: the largest difference, relative to the norm of the row.
        wrong: the keys of the rows that differ by more than noise.
    """

    rows: int
    found: int
    largest_error: float
    wrong: list[str]


def compare_with(tier: Tier, request: Request, computed: Computed, modules: Sequence[nn.Module]) -> Comparison:
    """Compares rows that were just computed, all those of a call, with those that a tier has."""
    keys = request.keys()
    present = tier.lookup(keys).nonzero().squeeze(1)
    rows = tier.read(keys, computed.layout)
    positions = [] if rows is None else present.tolist() if rows.positions is None else rows.positions.tolist()
    # Rows of another layout are not what the module computes.
    wrong = [hexadecimal(keys[i]) for i in sorted({*present.tolist()} - {*positions})]
    largest = float("inf") if wrong else 0.0
    call = request.call
    tolerance = Tolerance.of(dtypes_of(call, computed.layout, modules), call.device_type, is_foreign=True)
    for number, position in enumerate(positions):
        assert isinstance(rows, Rows)
        kept = [t[number : number + 1] for t in rows.leaves]
        again = [t[position : position + 1] for t in computed.leaves]
        difference = compare(kept, again, computed.leaves, tolerance)
        largest = max(largest, difference.error)
        if difference.is_wrong:
            wrong.append(hexadecimal(keys[position]))
    return Comparison(call.batch, len(present), largest, wrong)
