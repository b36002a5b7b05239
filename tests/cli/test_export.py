"""`torchcache export` writes what safetensors reads, whole or not at all, and holds only a part in memory."""

from __future__ import annotations

import itertools
import json
import os
import resource
import stat
import struct
from pathlib import Path

import pytest
import torch
from cache_harness import cache_of
from format_reader import RAW, Row
from format_writer import write_segment
from golden_rows import golden_rows as rows_of_every_layout
from golden_rows import keys_tensor
from safetensors import safe_open
from safetensors.torch import load_file
from store_harness import files, forked, succeeded

from torchcache import torchcache
from torchcache._native import ops
from torchcache.cli.export import export
from torchcache.cli.main import main
from torchcache.errors import MaintenanceError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """What a user's process leaves: six rows of two leaves, in two segments, two of them twice."""
    for first in (100, 104):

        @torchcache(persistent=True, persistent_cache_dir=tmp_path / f"{first}", persistent_module_hash="hash")
        def doubled(x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"twice": 2 * x, "sum": x.sum(1)}

        doubled(torch.arange(first, first + 8.0).view(4, 2))
        cache_of(doubled).close()
    for path in (tmp_path / "104" / "hash").iterdir():
        path.rename(tmp_path / "100" / "hash" / path.name)
    return tmp_path / "100" / "hash"


INPUTS = [(float(a), a + 1.0) for a in range(100, 112, 2)]


def exported(file: Path) -> dict[tuple[float, ...], float]:
    tensors = load_file(file)
    assert tensors["keys"].dtype == torch.int64 and tensors["keys"].shape == (len(tensors["rows.0"]), 2)
    assert len(tensors["keys"].unique(dim=0)) == len(tensors["keys"])
    return {tuple(row.tolist()): float(total) for row, total in zip(tensors["rows.0"], tensors["rows.1"])}


@pytest.mark.parametrize("part", [1, 30, 10**6])
def test_safetensors_reads_every_row_once_in_whatever_parts_it_was_written(
    directory: Path, tmp_path: Path, part: int
) -> None:
    assert export(directory, tmp_path / "file", part=part) == 6
    assert exported(tmp_path / "file") == {(2 * a, 2 * b): a + b for a, b in INPUTS}


def test_the_metadata_says_what_the_rows_are(directory: Path, tmp_path: Path) -> None:
    assert main(["export", str(directory), str(tmp_path / "file")]) == 0
    with safe_open(tmp_path / "file", framework="pt") as file:
        about = file.metadata()
    (layout,) = json.loads(about["layouts"])
    assert about["module_hash"] == "hash" and "doubled" in about["class"]
    assert [leaf["shape"] for leaf in json.loads(layout)["leaves"]] == [[2], []]


@pytest.mark.parametrize("part", [1, 10**6])
def test_damaged_rows_are_left_out_unless_another_copy_is_right(directory: Path, tmp_path: Path, part: int) -> None:
    for number, damaged in enumerate([INPUTS[0], INPUTS[2]]):  # the one is there once, the other twice
        twice = torch.tensor([2 * value for value in damaged]).numpy().tobytes()
        segment = next(path for path in files(directory, "seg") if twice in path.read_bytes())
        data = bytearray(segment.read_bytes())
        data[data.index(twice)] ^= 1
        segment.write_bytes(data)
        assert export(directory, tmp_path / f"file{number}", part=part) == 5
        assert exported(tmp_path / f"file{number}") == {(2 * a, 2 * b): a + b for a, b in INPUTS[1:]}


def test_every_layout_and_dtype_that_safetensors_has_is_exported_bit_for_bit(tmp_path: Path) -> None:
    rows = [row for row in rows_of_every_layout("raw") if "complex128" not in row.layout]
    write_segment(tmp_path, [(RAW, [Row(row.key, row.layout.encode(), row.data)]) for row in rows])
    assert export(tmp_path, tmp_path / "file") == len(rows)
    tensors = load_file(tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        layouts = json.loads(file.metadata()["layouts"])
    for row in rows:
        number = layouts.index(row.layout)
        place = tensors[f"{number}.keys"].tolist().index(keys_tensor([row.key])[0].tolist())
        names = ["rows"] if len(row.leaves) == 1 else [f"rows.{i}" for i in range(len(row.leaves))]
        for name, leaf, about in zip(names, row.leaves, json.loads(row.layout)["leaves"]):
            got = tensors[f"{number}.{name}"][place]
            assert str(got.dtype) == f"torch.{about['stored']}" and list(got.shape) == about["shape"]
            assert torch.equal(got.reshape(-1).view(torch.uint8), leaf)


def test_tensors_stand_one_after_another_and_aligned(directory: Path, tmp_path: Path) -> None:
    export(directory, tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    ranges = sorted(tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__")
    assert size % 8 == 0 and ranges[0][0] == 0 and 8 + size + ranges[-1][1] == len(data)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))


@pytest.mark.parametrize("layout", ["no JSON", "{}", '{"leaves":[{"stored":"complex128","shape":[1]}]}'])
def test_rows_that_safetensors_cannot_hold_are_an_error_that_leaves_no_file(tmp_path: Path, layout: str) -> None:
    write_segment(tmp_path, [(RAW, [Row(1, layout.encode(), bytes(16))])])
    with pytest.raises(MaintenanceError, match="cannot be exported"):
        export(tmp_path, tmp_path / "file")
    assert [path.suffix for path in tmp_path.iterdir()] == [".seg"]


def test_a_file_that_is_there_stays_where_the_export_fails(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")

    def fail(done: int) -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        export(directory, tmp_path / "file", fail)
    assert (tmp_path / "file").read_text() == "before"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_memory_is_bounded_by_the_part(tmp_path: Path) -> None:
    layout = '{"leaves":[{"dtype":"uint8","shape":[1000000],"stored":"uint8"}],"tree":"*"}'
    store = ops.store_open(str(tmp_path), 10**9, False, 3, 1, False, 16 << 20)
    for number in range(64):
        keys = torch.tensor([[number, number]])
        ops.store_write(store, keys, layout, [torch.full((1, 1_000_000), number, dtype=torch.uint8)])
    ops.store_close(store)

    def take_little_memory() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert export(tmp_path, tmp_path / "file", part=4_000_000) == 64
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 24 * 1024  # kibibytes; the rows are 64 MB

    assert succeeded(forked(take_little_memory))
    assert torch.equal(load_file(tmp_path / "file")["rows"][:, -1].sort().values, torch.arange(64).to(torch.uint8))


def test_only_a_regular_file_is_replaced(directory: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "folder", "."):
        with pytest.raises(MaintenanceError, match="is not a regular file"):
            export(directory, tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def test_a_link_stays_and_its_target_gets_the_rows(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    export(directory, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and len(exported(tmp_path / "target")) == 6
