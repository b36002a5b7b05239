"""Maintenance keeps every right row, whoever reads, writes or is killed meanwhile, and finds every flipped byte."""

from __future__ import annotations

import itertools
import os
import select
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from format_reader import ZSTD, Row, block_end, low, payload_start, read_store
from format_writer import write_segment
from hypothesis import given, settings
from hypothesis import strategies as st
from native_harness import store_program
from store_harness import DAMAGED, Store, batch, files, forked, reopened, succeeded, write

from torchcache import errors
from torchcache.cli import inspection, maintenance


@pytest.fixture(params=[False, True], ids=["raw", "zstd"])
def zstd(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def contents(directory: Path) -> dict[tuple[int, bytes], bytes]:
    return {(row.key, row.layout): row.data for row in read_store(directory)}


# ---- compacting


@given(
    counts=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=4),
    compressed=st.booleans(),
    width=st.sampled_from([0, 1, 50]),
)
@settings(max_examples=30)
def test_a_compacted_store_has_the_same_rows_once_and_few_segments(
    tmp_path_factory: pytest.TempPathFactory, counts: list[list[int]], compressed: bool, width: int
) -> None:
    directory = tmp_path_factory.mktemp("store")
    keys, rows = batch(40, 1, width)
    for number, blocks in enumerate(counts):
        write(directory, *((keys[-n:], rows[-n:]) for n in blocks), zstd=compressed and number % 2 == 0)
    before = contents(directory)
    maintenance.compact(directory)
    assert contents(directory) == before
    assert len(list(read_store(directory))) == len(before)
    assert len(files(directory, "seg")) == len(files(directory, "idx")) == 1
    assert not list(directory.glob("*.tmp"))
    most = max(max(blocks) for blocks in counts)
    assert reopened(directory, keys[-most:], rows[-most:]) == most


def test_rows_of_one_key_in_two_layouts_both_stay(tmp_path: Path) -> None:
    rows = [Row(7, b"one", b"12345678"), Row(7, b"two", b"87654321"), Row(8, b"one", b"abcdefgh")]
    for row in rows:
        write_segment(tmp_path, [(ZSTD, [row])])
    maintenance.compact(tmp_path)
    assert sorted(read_store(tmp_path)) == sorted(rows) and len(files(tmp_path, "seg")) == 1


def test_small_blocks_become_large_ones(tmp_path: Path) -> None:
    write(tmp_path, *(batch(3, seed) for seed in range(50)))
    write(tmp_path, *(batch(3, seed) for seed in range(50, 99)))
    maintenance.compact(tmp_path)
    (segment,) = inspection.summarize(tmp_path).segments
    assert (segment.blocks, segment.rows, segment.state) == (1, 297, "sealed")


def test_what_is_compact_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, batch(10, 1))
    before = files(tmp_path, "seg") + files(tmp_path, "idx")
    assert maintenance.compact(tmp_path) == maintenance.Compacted()
    assert files(tmp_path, "seg") + files(tmp_path, "idx") == before


def test_damaged_rows_and_blocks_are_left_out_and_right_copies_of_them_stay(tmp_path: Path, zstd: bool) -> None:
    first, second, third = batch(5, 1), batch(5, 2), batch(5, 3)
    write(tmp_path, first, second, third, zstd=zstd)
    (segment,) = files(tmp_path, "seg")
    data = bytearray(segment.read_bytes())
    data[data.index(first[1][2].numpy().tobytes())] ^= 1
    data[data.rindex(b"\x89TCB")] ^= 1
    segment.write_bytes(data)
    write(tmp_path / "other", (third[0][:2], third[1][:2]))
    for path in (tmp_path / "other").iterdir():
        path.rename(tmp_path / path.name)
    done = maintenance.compact(tmp_path)
    assert (done.rows, done.damaged) == (11, 2)
    assert [reopened(tmp_path, *rows) for rows in (first, second, third)] == [4, 5, 2]
    assert not any(inspection.verify(path)[1] for path in files(tmp_path, "seg"))


def test_segments_of_a_later_version_are_left_with_an_error(tmp_path: Path) -> None:
    write(tmp_path, batch(5, 1))
    write(tmp_path, batch(5, 2))
    later = files(tmp_path, "seg")[0]
    data = bytearray(later.read_bytes())
    data[8] = 2
    data[56:64] = low(bytes(data[:56])).to_bytes(8, "little")
    later.write_bytes(data)
    before = contents(tmp_path)
    with pytest.raises(errors.MaintenanceError, match="version 2"):
        maintenance.compact(tmp_path)
    assert contents(tmp_path) == before


def test_a_second_maintenance_at_the_same_time_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, batch(5, 1))
    with maintenance._locked(tmp_path), pytest.raises(errors.MaintenanceError, match="is running"):
        maintenance.compact(tmp_path)


def test_leftovers_of_killed_processes_are_removed_and_other_files_stay(tmp_path: Path) -> None:
    write(tmp_path, batch(5, 1))
    (index,) = files(tmp_path, "idx")
    work = tmp_path / f"{5:032x}.tmp"
    work.mkdir()
    shutil.copy(index, work / f"{6:032x}.idx")
    shutil.copy(files(tmp_path, "seg")[0], work / f"{6:032x}.seg")
    shutil.copy(index, tmp_path / f"{7:032x}.idx")
    shutil.copy(index, tmp_path / f"{8:032x}.tmp")
    strange = [tmp_path / name for name in ("meta.json", "notes.tmp", f"{'A' * 32}.idx")]
    for path in strange:
        path.write_text("{}")
    kept = {*strange, index, *files(tmp_path, "seg")}
    maintenance.compact(tmp_path)
    assert set(tmp_path.iterdir()) == kept


# ---- beside others


def test_a_segment_that_a_process_writes_is_left(tmp_path: Path) -> None:
    write(tmp_path, batch(5, 1))
    write(tmp_path, batch(5, 2))
    store = Store(tmp_path)
    store.put(*batch(5, 3))
    store.flush()
    done = maintenance.compact(tmp_path)
    assert (done.left, done.removed, done.written) == (1, 2, 1)
    store.put(*batch(5, 4))
    store.flush()
    assert all(store.right(*batch(5, seed)) == 5 for seed in (1, 2, 3, 4))
    store.close()
    assert all(reopened(tmp_path, *batch(5, seed)) == 5 for seed in (1, 2, 3, 4))


def test_a_killed_writers_segment_is_compacted(tmp_path: Path) -> None:
    def put_and_die() -> None:
        store = Store(tmp_path)
        store.put(*batch(5, 1))
        store.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(forked(put_and_die), 0)
    write(tmp_path, batch(5, 2))
    assert maintenance.compact(tmp_path).removed == 2
    assert reopened(tmp_path, *batch(5, 1)) == reopened(tmp_path, *batch(5, 2)) == 5


def test_compacting_beside_writers_and_readers_costs_no_row(tmp_path: Path) -> None:
    for seed in range(10):
        write(tmp_path, batch(20, seed, 30))
    reading, writing = os.pipe()  # closed by the parent when it has compacted enough
    ready, is_ready = os.pipe()

    def stopped() -> bool:
        return bool(select.select([reading], [], [], 0)[0])

    def read() -> None:
        os.close(writing)
        store = Store(tmp_path)
        rounds = 0
        while not stopped() or rounds < 3:
            for seed in range(10):
                keys, rows = batch(20, seed, 30)
                assert store.found(keys) == store.right(keys, rows) == 20
            rounds += 1
            os.write(is_ready, b".") if rounds == 1 else None
        assert store.stats()[DAMAGED] == 0
        store.close()

    def write_on(number: int) -> None:
        os.close(writing)
        for seed in itertools.count(1000 * number):
            store = Store(tmp_path)
            store.put(*batch(20, seed, 30))
            store.flush()
            assert store.right(*batch(20, seed, 30)) == 20
            store.close()
            if seed == 1000 * number:
                os.write(is_ready, b".")
            if stopped() or seed == 1000 * number + 999:
                (tmp_path / f"last-{number}").write_text(str(seed))
                return

    pids = [forked(read), forked(read), forked(lambda: write_on(1)), forked(lambda: write_on(2))]
    for _ in pids:
        os.read(ready, 1)
    removed = 0
    while removed < 50:
        removed += maintenance.compact(tmp_path).removed
    os.close(writing)
    assert [succeeded(pid) for pid in pids] == [True] * 4
    maintenance.compact(tmp_path)
    written = [seed for n in (1, 2) for seed in range(1000 * n, 1 + int((tmp_path / f"last-{n}").read_text()))]
    assert all(reopened(tmp_path, *batch(20, seed, 30)) == 20 for seed in [*range(10), *written])


@pytest.mark.slow
def test_a_kill_at_any_step_of_a_compaction_costs_no_row(tmp_path: Path) -> None:
    """tests/native/compaction_test.cpp: the n-th call that changes a file kills, for every n."""
    program = store_program("compaction_test.cpp", tmp_path)
    subprocess.run([program, tmp_path / "store"], check=True)


# ---- checking


def counted_bytes(segment: Path) -> list[int]:
    """Offsets of all bytes that a check covers: all but the padding behind payloads."""
    data, counted = segment.read_bytes(), list(range(64))
    at = 64
    while at < len(data):
        end = block_end(data, at, bytes.fromhex(segment.stem))
        assert end is not None
        n, size, payload = (int.from_bytes(data[at + o : at + o + w], "little") for o, w in ((8, 4), (12, 4), (24, 8)))
        counted += range(at, payload_start(at, data[at + 6], n, size) + payload)
        at = end
    return counted


def test_any_flipped_byte_of_a_segment_is_found(tmp_path: Path, zstd: bool) -> None:
    write(tmp_path, batch(3, 1), batch(2, 2), zstd=zstd)
    (segment,) = files(tmp_path, "seg")
    assert inspection.verify(segment) == (5, [])
    counted = counted_bytes(segment)
    data = bytearray(segment.read_bytes())
    for at in counted:
        data[at] ^= 1 << at % 8
        segment.write_bytes(data)
        (damage, *more) = inspection.verify(segment)[1]
        assert not more and damage.offset <= at < damage.offset + damage.bytes, (at, damage)
        data[at] ^= 1 << at % 8


def test_any_flipped_byte_of_an_index_is_found(tmp_path: Path) -> None:
    write(tmp_path, batch(3, 1), batch(200, 2))
    (segment,), (index,) = files(tmp_path, "seg"), files(tmp_path, "idx")
    data = bytearray(index.read_bytes())
    for at in range(len(data)):
        data[at] ^= 1 << at % 8
        index.write_bytes(data)
        assert [damage.kind for damage in inspection.verify(segment)[1]] == ["index"]
        data[at] ^= 1 << at % 8


def test_a_segment_that_was_cut_is_damaged_and_an_unfinished_one_is_not(tmp_path: Path) -> None:
    write(tmp_path, batch(3, 1), batch(2, 2))
    (segment,) = files(tmp_path, "seg")
    os.truncate(segment, segment.stat().st_size - 64)
    (damage,) = inspection.verify(segment)[1]
    assert (damage.kind, damage.rows) == ("cut off", 2)
    segment.with_suffix(".idx").unlink()
    assert inspection.verify(segment) == (3, [])


def test_neighbouring_damaged_rows_are_one_damage_that_says_where_and_how_many(tmp_path: Path) -> None:
    keys, rows = batch(6, 1)
    write(tmp_path, (keys, rows))
    (segment,) = files(tmp_path, "seg")
    data = bytearray(segment.read_bytes())
    start = data.index(rows.numpy().tobytes())
    data[start + 16] ^= 1
    data[start + 32] ^= 1
    segment.write_bytes(data)
    (damage,) = inspection.verify(segment)[1]
    assert (damage.kind, damage.offset, damage.bytes, damage.rows) == ("rows", start + 16, 32, 2)


# ---- removing


def aged(directory: Path, seed: int, modified: float) -> Path:
    """A segment that was last written then."""
    before = set(files(directory, "seg"))
    write(directory, batch(10, seed))
    (segment,) = set(files(directory, "seg")) - before
    os.utime(segment, (modified, modified))
    return segment


def test_pruning_by_size_removes_the_oldest_segments_and_no_more_than_needed(tmp_path: Path) -> None:
    old, older, new = (aged(tmp_path, seed, time) for seed, time in ((1, 2e9 - 5), (2, 2e9 - 9), (3, 2e9)))
    summary = inspection.summarize(tmp_path)
    one = summary.bytes // 3
    for most, gone in ((3 * one, []), (3 * one - 1, [older]), (2 * one - 1, [older, old]), (0, [older, old, new])):
        chosen = maintenance.prunable([summary], max_bytes=most)
        assert [f"{segment.name}.seg" for _, segment in chosen] == [path.name for path in gone]
    assert maintenance.prune(maintenance.prunable([summary], max_bytes=one)) == (2, 2 * one)
    assert files(tmp_path, "seg") == [new] and files(tmp_path, "idx") == [new.with_suffix(".idx")]


def test_pruning_by_age_removes_what_is_older(tmp_path: Path) -> None:
    old, new = aged(tmp_path, 1, 1e9), aged(tmp_path, 2, 4e9)
    maintenance.prune(maintenance.prunable([inspection.summarize(tmp_path)], older_than=3600))
    assert files(tmp_path, "seg") == [new] and not old.with_suffix(".idx").exists()


def test_rows_are_as_old_after_a_compaction_as_before(tmp_path: Path) -> None:
    for seed, modified in ((1, 1e9), (2, 1e9 + 0.5), (3, 1e9 - 5)):
        aged(tmp_path, seed, modified)
    maintenance.compact(tmp_path)
    assert inspection.summarize(tmp_path).modified == 1e9 + 0.5


def test_a_segment_that_a_process_writes_is_never_pruned(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(*batch(5, 1))
    store.flush()
    summary = inspection.summarize(tmp_path)
    assert maintenance.prunable([summary]) == []
    assert maintenance.prune([(summary, summary.segments[0])]) == (0, 0)
    assert store.right(*batch(5, 1)) == 5
    store.close()


def test_a_folder_without_segments_goes_unless_something_else_is_in_it(tmp_path: Path) -> None:
    for name in ("bare", "notes"):
        write(tmp_path / name, batch(5, 1))
        (tmp_path / name / "meta.json").write_text("{}")
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    for name in ("bare", "notes"):
        maintenance.prune(maintenance.prunable([inspection.summarize(tmp_path / name)]))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine.txt", "notes"]


def test_a_live_store_goes_on_after_everything_was_pruned(tmp_path: Path) -> None:
    write(tmp_path / "store", batch(5, 1))
    store = Store(tmp_path / "store")
    assert store.right(*batch(5, 1)) == 5
    maintenance.prune(maintenance.prunable([inspection.summarize(tmp_path / "store")]))
    store.put(*batch(5, 2))
    store.flush()
    assert store.right(*batch(5, 2)) == 5
    store.close()
    assert reopened(tmp_path / "store", *batch(5, 2)) == 5
