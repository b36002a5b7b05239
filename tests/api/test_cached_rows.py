"""CachedRows gives the module's outputs, whatever order, process or tier, and says which rows are lost."""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cache_harness import cache_of
from hypothesis import given
from hypothesis import strategies as st
from rows_harness import LABELS, Counting, N, X, assert_rows, cached, labelled
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from torchcache import CachedRows, precompute, torchcache


class Both(NamedTuple):
    first: Tensor
    second: dict[str, Tensor | None]


class Nested(nn.Module):
    def forward(self, x: Tensor) -> Both:
        return Both(x / 7, {"sum": x.sum(1), "none": None, "count": x.long()})


# ---- rows


@given(st.lists(st.integers(0, N - 1), min_size=1, max_size=60), st.integers(0, 1500), st.integers(1, N))
def test_any_rows_in_any_order_are_the_module_s_from_whatever_tier(
    tmp_path_factory: pytest.TempPathFactory, indices: list[int], memory: int, size: int
) -> None:
    rows = precompute(cached(tmp_path_factory.mktemp("rows"), max_memory_cache_size=memory), labelled(size))
    outputs, labels = rows.collate(rows.__getitems__(indices))
    assert torch.equal(outputs, X[indices] * 2 + 1) and torch.equal(labels, LABELS[indices])


def test_an_item_is_one_row_of_the_output_with_its_extra_columns() -> None:
    rows = precompute(cached(), labelled())
    output, label = rows[3]
    assert torch.equal(output, X[3] * 2 + 1) and label == 30
    assert rows[-1][1] == LABELS[-1] and len(rows) == N
    assert len(list(rows)) == N  # type: ignore[call-overload]


@pytest.mark.parametrize("dtype", [None, torch.half])
def test_outputs_have_the_nesting_and_dtypes_that_the_module_gives(dtype: torch.dtype | None) -> None:
    module = torchcache(cache_dtype=dtype)(Nested())
    rows = precompute(module, X.split(16))
    batch, expected = rows.collate(rows.__getitems__([5, 2, 5])), module(X[[5, 2, 5]])
    assert type(batch) is Both and batch.second["none"] is None
    for a, b in [
        (batch.first, expected.first),
        (batch.second["sum"], expected.second["sum"]),
        (batch.second["count"], expected.second["count"]),
        (rows[5].first, expected.first[0]),
    ]:
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_numbers_of_rows_are_those_of_a_list() -> None:
    rows = precompute(cached(), labelled())
    assert rows.__getitems__([]) == []
    assert torch.equal(rows.__getitems__([-1])[0][0], rows[len(rows) - 1][0])
    for wrong in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError, match=f"row {wrong} is out of range: there are {len(rows)} rows"):
            rows.__getitems__([0, wrong])


def test_editing_an_output_does_not_change_the_row() -> None:
    rows = precompute(cached(), labelled())
    rows[3][0].zero_()
    rows.collate(rows.__getitems__([3, 4]))[0].zero_()
    assert torch.equal(rows[3][0], X[3] * 2 + 1)


@pytest.mark.parametrize("collate", [CachedRows.collate, None])
@pytest.mark.parametrize("start", [None, "fork", "spawn"])
def test_a_data_loader_gives_shuffled_batches_in_this_process_and_in_workers(
    tmp_path: Path, start: str | None, collate: Any
) -> None:
    module = cached(tmp_path)
    rows = precompute(module, labelled())
    module.rows.clear()
    workers = {"num_workers": 2, "multiprocessing_context": start} if start else {}
    assert_rows(rows, collate_fn=collate, **workers)
    assert not module.rows


def test_forked_workers_see_rows_that_are_in_memory_only() -> None:
    rows = precompute(cached(), labelled())
    assert_rows(rows, collate_fn=rows.collate, num_workers=2, multiprocessing_context="fork")


def test_rows_in_memory_only_say_how_they_reach_other_processes() -> None:
    with pytest.raises(TypeError, match=r"persistent=True.*fork"):
        pickle.dumps(precompute(cached(), labelled()))


@pytest.mark.parametrize("collate", [CachedRows.collate, None])
def test_outputs_alone_are_collated_to_one_tensor(collate: Any) -> None:
    rows = precompute(cached(), X.split(16))
    loader = DataLoader(rows, batch_size=8, collate_fn=collate)
    assert torch.equal(torch.cat(list(loader)), X * 2 + 1)


def test_a_subset_is_collated_as_the_whole_is() -> None:
    rows = precompute(cached(), labelled())
    ((outputs, labels),) = DataLoader(Subset(rows, [4, 9, 2]), batch_size=3, collate_fn=rows.collate)
    assert torch.equal(outputs, X[[4, 9, 2]] * 2 + 1) and labels.tolist() == [40, 90, 20]


def test_rows_do_not_keep_the_module_or_the_inputs_alive() -> None:
    module = cached()
    gone = weakref.ref(module)
    rows = precompute(module, labelled())
    del module
    gc.collect()
    assert gone() is None
    assert_rows(rows)


@pytest.mark.parametrize("persistent", [False, True])
def test_rows_of_different_shapes_are_refused_in_one_batch_but_given_alone(tmp_path: Path, persistent: bool) -> None:
    module = cached(tmp_path, max_memory_cache_size=0) if persistent else cached()
    rows = precompute(module, [X[:4], X[4:8, :2]])
    assert torch.equal(rows[1], X[1] * 2 + 1) and torch.equal(rows[5], X[5, :2] * 2 + 1)
    with pytest.raises(ValueError, match="cannot be one batch"):
        rows.__getitems__([1, 5])


def test_the_repr_says_how_many_rows_where_and_which_columns(tmp_path: Path) -> None:
    assert repr(precompute(cached(), X.split(16))) == "<CachedRows: 40 rows in memory>"
    module = cached(tmp_path)
    rows = precompute(module, [{"x": X, "id": LABELS, "more": {"name": ["a"] * N, "box": X}}])
    columns = "{'id': torch.int64 [B], 'more': {'name': list, 'box': torch.float32 [B, 3]}}"
    directory = cache_of(module).cache_dir
    assert repr(rows) == f"<CachedRows: 40 rows in memory and {directory}, extra columns {columns}>"


# ---- lost rows


def test_a_lost_row_is_an_error_that_names_it_also_from_a_worker() -> None:
    module = cached()
    rows = precompute(module, labelled())
    cache_of(module).clear()
    low, high = (int(half) % 2**64 for half in rows.keys[5])
    with pytest.raises(LookupError, match=f"rows 5 .key {high:016x}{low:016x}., 2 .*precompute") as found:
        rows.__getitems__([5, 2, 5])
    assert found.value.positions == (5, 2)  # type: ignore[attr-defined]
    with pytest.raises(LookupError, match="precompute"):
        list(DataLoader(rows, batch_size=N, num_workers=1, multiprocessing_context="fork"))
    precompute(module, labelled())
    assert_rows(rows)


# ---- files

READER = """
    import sys, torch
    from torchcache import CachedRows

    rows = CachedRows.load(sys.argv[1])
    outputs, labels, names, more = rows.collate(rows.__getitems__([3, 0, 3]))
    assert labels.tolist() == [30, 0, 30] and names == ["row 3", "row 0", "row 3"]
    assert more["weights"].dtype == torch.half
    print(outputs.tolist())
"""


def saved(directory: Path, **options: Any) -> Path:
    names = [f"row {i}" for i in range(N)]
    batches = [
        (X[i : i + 16], LABELS[i : i + 16], names[i : i + 16], {"weights": LABELS[i : i + 16].half()})
        for i in range(0, N, 16)
    ]
    path = directory / "rows.safetensors"
    precompute(cached(directory / "cache", **options), batches).save(path)
    return path


@pytest.mark.parametrize("options", [{}, {"zstd_compression": True}])
def test_another_process_needs_neither_inputs_nor_module(tmp_path: Path, options: dict[str, Any]) -> None:
    command = [sys.executable, "-c", textwrap.dedent(READER), str(saved(tmp_path, **options))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str((X[[3, 0, 3]] * 2 + 1).tolist())


def test_what_was_saved_is_what_is_loaded(tmp_path: Path) -> None:
    rows = precompute(cached(tmp_path), [{"x": X, "a": LABELS, "b": {"c": ["ü", None, 1.5, [2]] * 10}}])
    rows.save(tmp_path / "rows")
    loaded = CachedRows.load(tmp_path / "rows")
    assert torch.equal(loaded.keys, rows.keys) and isinstance(loaded.rest, dict)
    assert torch.equal(loaded.rest["a"], LABELS) and loaded.rest["b"] == {"c": ["ü", None, 1.5, [2]] * 10}
    assert sorted(p.name for p in tmp_path.glob("rows*")) == ["rows"]


def test_rows_that_were_moved_are_read_where_they_are_now(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (subdirectory,) = (tmp_path / "cache").iterdir()
    moved = subdirectory.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="directory="):
        CachedRows.load(path)
    assert torch.equal(CachedRows.load(path, directory=moved)[8][0], X[8] * 2 + 1)


def test_rows_that_were_read_once_are_in_memory(tmp_path: Path) -> None:
    rows = CachedRows.load(saved(tmp_path))
    assert torch.equal(rows[8][0], X[8] * 2 + 1)
    for segment in tmp_path.glob("cache/*/*.seg"):
        os.truncate(segment, 0)
    assert torch.equal(rows[8][0], X[8] * 2 + 1)
    with pytest.raises(LookupError, match=r"rows 9 .*damaged"):
        rows[9]


def test_rows_that_do_not_last_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"memory of this process only.*persistent=True"):
        precompute(cached(), labelled()).save(tmp_path / "rows")
    temporary = torchcache(persistent=True)(Counting())
    with pytest.raises(ValueError, match=r"temporary directory.*persistent_cache_dir"):
        precompute(temporary, labelled()).save(tmp_path / "rows")
    full = precompute(cached(tmp_path / "cache", max_persistent_cache_size=1000), labelled(1))
    with pytest.raises(ValueError, match=r"of 40 rows are not in .*raise max_persistent_cache_size"):
        full.save(tmp_path / "rows")
    assert not (tmp_path / "rows").exists()


def test_values_that_a_file_cannot_hold_are_refused(tmp_path: Path) -> None:
    rows = precompute(cached(tmp_path), [(X, [object()] * N)])
    with pytest.raises(ValueError, match=r"rest\[0\] is a list of object, which JSON cannot hold"):
        rows.save(tmp_path / "rows")


def test_another_file_is_refused(tmp_path: Path) -> None:
    importlib.import_module("safetensors.torch").save_file({"keys": torch.zeros(1, 2)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"must be a file that CachedRows\.save wrote"):
        CachedRows.load(tmp_path / "other")


def test_without_safetensors_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = precompute(cached(tmp_path), labelled())
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        rows.save(tmp_path / "rows")
