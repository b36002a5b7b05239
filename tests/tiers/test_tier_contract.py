"""What every tier promises, whatever keeps its rows: one suite for memory, disk, and chains of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchcache._native import ops
from torchcache.options import Options
from torchcache.tiers.chain import Chain
from torchcache.tiers.disk import DiskTier
from torchcache.tiers.layout import Layout, Leaf
from torchcache.tiers.memory import MemoryTier
from torchcache.tiers.tier import Rows, Tier

OPTIONS = Options.checked(persistent=True)
LIMIT = 1 << 20

TIERS: dict[str, Callable[[Path], Tier]] = {
    "memory": lambda folder: MemoryTier("cpu", LIMIT),
    "disk": lambda folder: DiskTier(folder / "disk", OPTIONS),
    "chain of memory and disk": lambda folder: Chain.open(OPTIONS, folder / "chain"),
    "chain of memory": lambda folder: Chain.open(OPTIONS, None),
    "chain without memory": lambda folder: Chain.open(OPTIONS, folder / "without").without_memory(),
    "chain of three": lambda folder: Chain(
        MemoryTier("cpu", 64), [DiskTier(folder / "near", OPTIONS), DiskTier(folder / "far", OPTIONS)], OPTIONS, folder
    ),
}


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    made = TIERS[request.param](tmp_path)
    yield made
    made.close()


# Three layouts whose rows must never be confused: the second differs in the shape, the third in what comes back.
LAYOUTS = (
    Layout("*", (Leaf(torch.float32, torch.float32, (3,), None),)),
    Layout(("tuple", "*", "*"), (Leaf(torch.int64, torch.int64, (), None), Leaf(torch.half, torch.half, (2, 2), None))),
    Layout("*", (Leaf(torch.float64, torch.float32, (3,), None),)),
)


def keys_of(names: list[int]) -> Tensor:
    return ops.keys([torch.tensor(names, dtype=torch.int64)], (0, 0))


def leaves_of(names: list[int], layout: Layout) -> list[Tensor]:
    """The rows that belong to these names, whatever else is in the batch."""
    number = torch.tensor(names, dtype=torch.int64)
    return [
        (number.view(-1, *[1] * len(leaf.shape)).expand(-1, *leaf.shape) * (k + 1)).to(leaf.stored).contiguous()
        for k, leaf in enumerate(layout.leaves)
    ]


def write(tier: Tier, names: list[int], layout: Layout = LAYOUTS[0]) -> None:
    tier.write(keys_of(names), layout, leaves_of(names, layout))


def read(tier: Tier, names: list[int], layout: Layout | None = None) -> tuple[list[int], Layout] | None:
    """Names of the rows that were read, all of which are checked, and their layout."""
    rows = tier.read(keys_of(names), layout)
    if rows is None:
        return None
    assert isinstance(rows, Rows)
    found = names if rows.positions is None else [names[i] for i in rows.positions.tolist()]
    assert len(rows) == len(found) > 0
    for leaf, got, right in zip(rows.layout.leaves, rows.leaves, leaves_of(found, rows.layout)):
        assert got.dtype == leaf.stored and torch.equal(got, right)
    return found, rows.layout


def test_a_new_tier_has_nothing(tier: Tier) -> None:
    assert not tier.lookup(keys_of([1, 2, 3])).any()
    assert tier.read(keys_of([1, 2, 3])) is None
    stats = tier.stats()
    assert (stats.rows, stats.damaged_rows, stats.dropped_rows, stats.full) == (0, 0, 0, False)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["flat", "nested", "cast"])
def test_rows_come_back_in_any_order_as_often_as_they_are_asked_for(tier: Tier, layout: Layout) -> None:
    write(tier, [1, 2, 3, 4], layout)
    assert tier.lookup(keys_of([4, 9, 1])).tolist() == [True, False, True]
    assert read(tier, [3, 1, 1, 4]) == ([3, 1, 1, 4], layout)
    assert read(tier, [9, 2, 8, 2, 3]) == ([2, 2, 3], layout)


def test_rows_that_were_read_belong_to_the_caller(tier: Tier) -> None:
    write(tier, [1, 2])
    for _ in range(2):
        rows = tier.read(keys_of([1, 2]))
        assert rows is not None and torch.equal(rows.leaves[0], leaves_of([1, 2], LAYOUTS[0])[0])
        rows.leaves[0].zero_()


def test_edits_after_a_write_do_not_reach_the_rows(tier: Tier) -> None:
    leaves = leaves_of([1, 2], LAYOUTS[0])
    tier.write(keys_of([1, 2]), LAYOUTS[0], leaves)
    leaves[0].zero_()
    tier.flush()
    assert read(tier, [1, 2]) == ([1, 2], LAYOUTS[0])


def test_rows_that_are_there_stay_as_they_are(tier: Tier) -> None:
    write(tier, [1, 2])
    tier.write(keys_of([2, 3]), LAYOUTS[0], [t.add(t.eq(2)) for t in leaves_of([2, 3], LAYOUTS[0])])
    assert read(tier, [1, 2, 3]) == ([1, 2, 3], LAYOUTS[0])


def test_one_read_gives_rows_of_one_layout(tier: Tier) -> None:
    write(tier, [1, 2], LAYOUTS[0])
    write(tier, [3], LAYOUTS[1])
    assert tier.lookup(keys_of([1, 3, 2, 4])).tolist() == [True, True, True, False]
    assert read(tier, [1, 3, 2]) == ([1, 2], LAYOUTS[0])
    assert read(tier, [3, 1, 2]) == ([3], LAYOUTS[1])
    assert read(tier, [1, 3, 2], LAYOUTS[1]) == ([3], LAYOUTS[1])
    assert read(tier, [1, 3, 2], LAYOUTS[2]) is None


def test_an_empty_batch_is_not_an_error(tier: Tier) -> None:
    empty = torch.empty((0, 2), dtype=torch.int64)
    tier.write(empty, LAYOUTS[0], leaves_of([], LAYOUTS[0]))
    assert tier.lookup(empty).tolist() == [] and tier.read(empty) is None


def test_clear_removes_everything(tier: Tier) -> None:
    write(tier, [1, 2])
    write(tier, [3], LAYOUTS[1])
    tier.clear()
    assert not tier.lookup(keys_of([1, 2, 3])).any() and tier.stats().rows == 0
    write(tier, [1])
    assert read(tier, [1, 2]) == ([1], LAYOUTS[0])


def test_flush_leaves_nothing_queued(tier: Tier) -> None:
    write(tier, list(range(50)))
    tier.flush()
    assert tier.stats().queued_rows == 0
    assert read(tier, list(range(50))) == (list(range(50)), LAYOUTS[0])


def test_describe_may_come_before_any_row(tier: Tier) -> None:
    tier.describe({"class": "Backbone"})
    assert tier.is_described
    write(tier, [1])
    assert read(tier, [1]) == ([1], LAYOUTS[0])


def test_stats_grow_with_the_rows(tier: Tier) -> None:
    write(tier, [1, 2, 3])
    tier.flush()
    before = tier.stats()
    write(tier, [4])
    tier.flush()
    assert tier.stats().rows > before.rows >= 3 and tier.stats().bytes > before.bytes > 0


@pytest.mark.parametrize("name", ["memory", "disk"])
def test_a_full_tier_keeps_its_rows_and_reports_that_it_is_full(name: str, tmp_path: Path) -> None:
    options = Options.checked(persistent=True, max_persistent_cache_size=4096)
    tier: Tier = MemoryTier("cpu", 24) if name == "memory" else DiskTier(tmp_path / "d", options)
    write(tier, [1])
    write(tier, list(range(1, 2000)))
    tier.flush()
    assert tier.stats().full and 1 <= tier.stats().rows < 1999
    assert read(tier, [1]) == ([1], LAYOUTS[0])


def test_threads_read_what_others_write(tier: Tier) -> None:
    wrong: list[object] = []

    def work(first: int) -> None:
        for step in range(20):
            names = [(first * 7 + step + i) % 40 for i in range(8)]
            write(tier, names)
            found = read(tier, names)
            if found != (names, LAYOUTS[0]):
                wrong.append(found)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))  # raises what a thread raised
    assert not wrong


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "read", "lookup", "clear", "flush"]),
        st.lists(st.integers(0, 12), min_size=1, max_size=8),
        st.integers(0, 2),
    ),
    max_size=20,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(steps=STEPS)
def test_any_sequence_of_operations_is_that_of_a_dictionary(
    tier: Tier, steps: list[tuple[str, list[int], int]]
) -> None:
    tier.clear()
    right: dict[int, int] = {}  # name → number of its layout
    for operation, names, number in steps:
        names = [name + 100 * number for name in names] if operation == "write" else names + [n + 100 for n in names]
        if operation == "write":
            write(tier, list(dict.fromkeys(names)), LAYOUTS[number])
            right.update(dict.fromkeys(names, number))
        elif operation == "lookup":
            assert tier.lookup(keys_of(names)).tolist() == [name in right for name in names]
        elif operation == "read":
            layouts = [right[name] for name in names if name in right]
            expected = [name for name in names if right.get(name) == layouts[0]] if layouts else None
            assert read(tier, names) == (None if expected is None else (expected, LAYOUTS[layouts[0]]))
        elif operation == "clear":
            tier.clear()
            right.clear()
        else:
            tier.flush()
