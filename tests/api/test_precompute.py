"""precompute computes what is missing, tells inputs from extra columns, and can be stopped at any moment."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import rows_harness
import torch
from rows_harness import LABELS, Counting, N, X, assert_rows, cached, labelled
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from torchcache import precompute, torchcache


class Two(nn.Module):
    def forward(self, x: Tensor, scale: Tensor, power: int = 1) -> Tensor:
        return (x * scale) ** power


# ---- filling


def test_each_distinct_row_is_computed_once_and_rows_that_are_there_are_skipped(tmp_path: Path) -> None:
    module = cached(tmp_path)
    module(X[5:10])
    rows = precompute(module, [X[:20], X[10:], X[:5]])
    assert sorted(module.rows) == X[:, 0].tolist() and len(rows) == 55
    again = cached(tmp_path)
    assert torch.equal(precompute(again, [X]).keys, rows.keys[[*range(20), *range(30, 50)]])
    assert not again.rows


INTERRUPTED = """
    import os, sys
    from rows_harness import X, cached
    from torchcache import precompute

    def batches():
        yield from X[:24, :1].expand(-1, 500_000).split(8)  # 48 MB: not written in an instant
        raise KeyboardInterrupt

    try:
        precompute(cached(sys.argv[1]), batches())
    except KeyboardInterrupt:
        os._exit(7)
"""


def test_an_interrupted_run_is_taken_up_where_it_stopped(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(rows_harness.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(tmp_path)]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode == 7
    module = cached(tmp_path)
    wide = X[:, :1].expand(-1, 500_000)
    rows = precompute(module, wide.split(8))
    assert module.rows == X[24:, 0].tolist()
    assert all(torch.equal(rows[i], wide[i] * 2 + 1) for i in range(0, N, 3))


def test_a_forward_that_initialises_something_is_cached_from_the_second_time_on() -> None:
    class Lazy(Counting):
        offset: Tensor

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "offset"):
                self.register_buffer("offset", torch.ones(()))
            return super().forward(x) + self.offset

    rows = precompute(torchcache()(Lazy()), X.split(8))
    assert torch.equal(rows.collate(rows.__getitems__(range(N))), X * 2 + 2)


def test_functions_are_filled_too() -> None:
    @torchcache()
    def double(x: Tensor) -> Tensor:
        return x * 2

    assert torch.equal(precompute(double, [X])[7], X[7] * 2)


def test_the_first_pass_gives_no_warning_of_inputs_that_never_repeat(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="torchcache")
    module = cached()
    precompute(module, torch.arange(11_000.0).view(-1, 1).split(5_500))
    assert not caplog.records
    module(-torch.arange(1, 2000.0).view(-1, 1))
    assert "augmentation" in caplog.text


def test_a_damaged_row_is_computed_again_by_a_new_process(tmp_path: Path) -> None:
    precompute(cached(tmp_path), labelled())
    (segment,) = tmp_path.glob("*/*.seg")
    content = segment.read_bytes()
    row = bytes((X[17] * 2 + 1).numpy())
    assert content.count(row) == 1
    segment.write_bytes(content.replace(row, bytes(len(row))))
    module = cached(tmp_path)
    rows = precompute(module, labelled())
    assert module.rows == [X[17, 0].item()]
    assert_rows(rows)


# ---- inputs and extra columns

ONES = torch.ones(4, 3)
NAMES = ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("batch", "rest"),
    [
        ({"x": ONES, "scale": ONES * 3, "id": NAMES}, {"id": NAMES}),
        ({"scale": ONES * 3, "x": ONES}, {}),
        (((ONES, ONES * 3), NAMES), (NAMES,)),
        ([[ONES, ONES * 3], NAMES, {"box": LABELS[:4]}], (NAMES, {"box": LABELS[:4]})),
        (({"x": ONES, "scale": ONES * 3},), ()),
        (({"x": ONES, "scale": ONES * 3}, tuple(NAMES)), (NAMES,)),
    ],
)
def test_inputs_are_told_apart_from_extra_columns(batch: Any, rest: Any) -> None:
    rows = precompute(torchcache()(Two()), [batch, batch])
    expected = rest if isinstance(rest, dict) else {str(i): column for i, column in enumerate(rest)}
    got = rows.rest if isinstance(rows.rest, dict) else {str(i): column for i, column in enumerate(rows.rest)}
    assert list(got) == list(expected)
    for name, column in expected.items():
        if isinstance(column, dict):
            assert torch.equal(got[name]["box"], torch.cat([column["box"]] * 2))
        else:
            assert got[name] == column * 2
    item = rows[6]
    output = item[0] if rest else item
    assert torch.equal(output, ONES[2] * 3)
    assert not isinstance(rest, dict) or not rest or item[1] == {"id": "c"}


def test_plain_arguments_are_arguments() -> None:
    rows = precompute(torchcache()(Two()), [{"x": ONES * 2, "scale": ONES, "power": 3}])
    assert torch.equal(rows[0], ONES[0] * 8)


def test_arrays_become_tensors_and_empty_batches_add_nothing() -> None:
    rows = precompute(cached(), [(X[:0], LABELS[:0].numpy()), (X, LABELS.numpy())])
    assert len(rows) == N and rows[3][1] == 30
    assert isinstance(rows.rest, tuple) and isinstance(rows.rest[0], Tensor)


def test_arrays_of_strings_become_lists() -> None:
    names = numpy.array([f"row {i}" for i in range(N)])
    rows = precompute(cached(), [(X, names), (X, names.astype(object))])
    assert isinstance(rows.rest, tuple) and rows.rest[0] == [*names.tolist(), *names.tolist()] and rows[3][1] == "row 3"


def test_extra_columns_are_copied() -> None:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        label = torch.zeros(4)
        for value in (1.0, 2.0):
            yield ONES, label.fill_(value)

    rows = precompute(cached(), batches())
    assert isinstance(rows.rest, tuple) and rows.rest[0].tolist() == [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("batches", "error", "says"),
    [
        (X, TypeError, "DataLoader"),
        (TensorDataset(X), TypeError, "DataLoader"),
        ([], ValueError, "used up"),
        ([{"y": X}], ValueError, r"parameter of forward \(x\), got y"),
        (["text"], ValueError, "got str"),
        ([(X, LABELS[:3])], ValueError, r"the batch\[1\].*each of 40 rows, got a tensor of shape \(3,\)"),
        ([(X, 5)], ValueError, "got a int"),
        ([{"x": X, "id": ["a"]}], ValueError, r"the batch\['id'\].*got a list of 1"),
        (
            [(X, X), (X, X[:, 0])],
            ValueError,
            r"batch 1 has \(torch.float32 \[B\],\)",
        ),
        ([(X, X), X], ValueError, "batch 1 has"),
    ],
)
def test_batches_that_do_not_fit_are_refused_with_what_to_do(batches: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        precompute(cached(), batches)


def test_a_module_without_a_cache_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear has no cache: decorate"):
        precompute(nn.Linear(3, 3), [X])


def test_a_module_with_hooks_is_refused_since_they_would_not_run_for_cached_rows() -> None:
    module = cached()
    module.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="Counting has forward hooks"):
        precompute(module, [X])


def test_rows_that_do_not_fit_are_an_error_that_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"rows of batch 0.*raise max_memory_cache_size"):
        precompute(cached(max_memory_cache_size=100), labelled(20))
    with pytest.raises(RuntimeError, match="raise max_persistent_cache_size"):
        precompute(cached(tmp_path, max_memory_cache_size=0, max_persistent_cache_size=1000), labelled(1))


def test_a_module_whose_calls_are_not_cached_is_an_error() -> None:
    module = torchcache()(nn.Dropout())
    with pytest.raises(RuntimeError, match="not cached: a warning"):
        precompute(module, [X])


# ---- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], progress: bool
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    terminal = stream()
    monkeypatch.setattr(sys, "stderr", terminal)
    precompute(cached(), [X, X], progress=progress)
    shown = terminal.getvalue()
    if progress and stream is Terminal:
        assert "2/2 batches" in shown and "40 of 80 hits, 0.0 MB" in shown and shown.endswith("\n")
    else:
        assert not shown


def test_progress_is_a_bar_of_tqdm_where_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    precompute(cached(), X.split(10))
    assert "4/4" in terminal.getvalue() and "0 of 40 hits" in terminal.getvalue()
