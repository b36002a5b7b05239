"""The command line shows what cache directories hold, asks before it removes, and says clearly what is wrong."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_harness import cache_of
from format_reader import ZSTD, Row, low
from format_writer import write_segment
from store_harness import Store, batch, files
from torch import Tensor

from torchcache import torchcache
from torchcache.cli.main import _age, _size, main

Output = pytest.CaptureFixture[str]


def compute(directory: Path, name: str, rows: Tensor) -> None:
    """What a user's process leaves in a cache directory."""

    @torchcache(persistent=True, persistent_cache_dir=directory, persistent_module_hash=name)
    def doubled(x: Tensor) -> dict[str, Tensor]:
        return {"twice": 2 * x, "sum": x.sum(1)}

    doubled(rows)
    cache_of(doubled).close()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache directory: folder `first` with 6 rows in two segments, folder `second` with 3 rows in one."""
    directory = tmp_path / "cache"
    compute(directory, "first", torch.arange(8.0).view(4, 2))
    compute(directory, "first", torch.arange(100.0, 104.0).view(2, 2))
    compute(directory, "second", torch.arange(6.0).view(3, 2))
    return directory


def flip(segment: Path, at: int) -> None:
    data = bytearray(segment.read_bytes())
    data[at] ^= 1
    segment.write_bytes(data)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def said(output: Output) -> Any:
    return json.loads(output.readouterr().out)


def test_without_a_command_it_says_what_is_installed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "torchcache"], cwd=tmp_path, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0 and done.stdout.startswith("torchcache ") and "library " in done.stdout


# ---- looking


def test_ls_shows_hash_class_rows_bytes_and_time_of_each_folder(cache: Path, capsys: Output) -> None:
    assert run("ls", cache) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["module", "hash", "class", "rows", "bytes", "last", "written"]
    assert [line.split()[0] for line in lines] == ["first", "second"] and "doubled" in lines[0]
    assert run("ls", cache, "--json") == 0
    first, second = said(capsys)
    assert (first["module_hash"], first["rows"], first["segments"]) == ("first", 6, 2)
    assert second["rows"] == 3 and "doubled" in second["class"]
    on_disk = [path for suffix in ("seg", "idx") for path in files(cache / "first", suffix)]
    assert first["bytes"] == sum(path.stat().st_size for path in on_disk)
    assert first["modified"] == max(path.stat().st_mtime for path in files(cache / "first", "seg"))


def test_stat_shows_layouts_codecs_segments_and_duplicates(cache: Path, capsys: Output) -> None:
    double = cache / "copy"
    compute(double, "first", torch.arange(8.0).view(4, 2))
    for path in files(double / "first", "seg"):
        path.rename(cache / "first" / path.name)
    assert run("stat", cache / "first", "--json") == 0
    (first,) = said(capsys)
    assert (first["rows"], first["duplicates"]) == (10, 4)
    (layout,) = first["layouts"]
    assert (layout["codec"], layout["rows"], layout["bytes"]) == ("raw", 10, 120)
    assert [leaf["shape"] for leaf in json.loads(layout["layout"])["leaves"]] == [[2], []]
    assert sorted(segment["state"] for segment in first["segments"]) == ["left", "sealed", "sealed"]
    assert run("stat", cache / "first") == 0
    assert "10, 4 of them duplicates" in capsys.readouterr().out


def test_a_segment_that_is_being_written_is_shown_so(tmp_path: Path, capsys: Output) -> None:
    store = Store(tmp_path, zstd=True)
    store.put(*batch(5, 1, 500))
    store.flush()
    assert run("stat", tmp_path, "--json") == 0
    ((segment,), (layout,)) = (said_once := said(capsys)[0])["segments"], said_once["layouts"]
    assert segment["state"] == "written" and layout["codec"] == "zstd" and layout["bytes"] == 10_000
    store.close()


# ---- checking


def test_verify_is_silent_about_what_is_right_and_ends_with_1_on_damage(cache: Path, capsys: Output) -> None:
    assert run("verify", cache) == 0
    assert capsys.readouterr().out == "9 rows in 3 segments: none damaged\n"
    (segment,) = files(cache / "second", "seg")
    at = segment.read_bytes().index(torch.tensor([4.0, 6.0]).numpy().tobytes())
    flip(segment, at)
    assert run("verify", cache) == 1
    line = capsys.readouterr().out.splitlines()[0]
    assert str(segment) in line and f"offset {at}" in line and "1 row" in line
    assert run("verify", cache, "--json") == 1
    found = said(capsys)
    assert (found["segments"], found["rows"]) == (3, 9)
    (damaged,) = found["damaged"]
    assert damaged["segment"] == segment.name
    assert damaged["damage"] == [{"segment": segment.name, "kind": "rows", "offset": at, "bytes": 12, "rows": 1}]


def test_compact_repairs_what_verify_finds(cache: Path, capsys: Output) -> None:
    flip(files(cache / "second", "seg")[0], 70)
    assert run("verify", cache) == 1
    assert run("compact", cache) == 0
    assert (
        "first: 2 segments became 1; 6 rows copied, 0 duplicates and 0 damaged rows dropped" in capsys.readouterr().out
    )
    assert run("verify", cache) == 0


# ---- removing


def test_prune_asks_and_removes_nothing_without_a_yes(
    cache: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for answer, status, left in (("\n", 1, ["first", "second"]), ("y\n", 0, ["second"])):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        assert run("prune", cache, "--module-hash", "first") == status
        assert "Remove 6 rows, 2 segments" in capsys.readouterr().out
        assert sorted(path.name for path in cache.iterdir()) == left


def test_prune_without_a_terminal_needs_yes(cache: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert run("prune", cache, "--max-bytes", "0") == 2
    assert "add --yes" in capsys.readouterr().err and len(list(cache.glob("*/*.seg"))) == 3


def test_prune_by_age_and_by_size(cache: Path, capsys: Output) -> None:
    for path in files(cache / "second", "seg"):
        os.utime(path, (1e9, 1e9))
    assert run("prune", cache, "--older-than", "30d", "--yes") == 0
    assert [path.name for path in cache.iterdir()] == ["first"]
    assert run("prune", cache, "--max-bytes", "1GB") == 0
    assert "nothing to remove" in capsys.readouterr().out
    assert run("prune", cache, "--max-bytes", "0", "--yes") == 0
    assert list(cache.iterdir()) == []
    assert run("ls", cache) == 0


def test_prune_by_size_stays_in_the_folder_that_is_named(cache: Path) -> None:
    assert run("prune", cache, "--module-hash", "second", "--max-bytes", "0", "--yes") == 0
    assert [path.name for path in cache.iterdir()] == ["first"]


def test_ages_and_sizes_have_the_usual_units() -> None:
    assert [_age(text) for text in ("30d", "12h", "1.5m", "2w")] == [2592000, 43200, 90, 1209600]
    sizes = ("50e9", "50GB", "50 gb", "1.5k", "40GiB", "7", "7B")
    assert [_size(text) for text in sizes] == [50e9, 50e9, 50e9, 1500, 40 * 2**30, 7, 7]


@pytest.mark.parametrize("wrong", [["--older-than", "30"], ["--max-bytes", "lots"], ["--max-bytes", "5i"]])
def test_a_wrong_age_or_size_says_how_to_write_it(cache: Path, wrong: list[str], capsys: Output) -> None:
    with pytest.raises(SystemExit) as ended:
        run("prune", cache, *wrong)
    assert ended.value.code == 2 and "such as" in capsys.readouterr().err


# ---- what is wrong


@pytest.mark.parametrize("command", ["ls", "stat", "verify", "compact"])
def test_a_wrong_directory_is_an_error_that_says_what_to_do(command: str, tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "missing", tmp_path / "file", tmp_path):
        assert run(command, wrong) == 2
        said = capsys.readouterr()
        assert not said.out and str(wrong) in said.err


def test_export_of_several_folders_names_them(cache: Path, tmp_path: Path, capsys: Output) -> None:
    assert run("export", cache, tmp_path / "rows") == 2
    assert "first, second" in capsys.readouterr().err


def test_prune_says_which_folders_there_are_and_that_it_needs_a_rule(cache: Path, capsys: Output) -> None:
    assert run("prune", cache, "--module-hash", "third", "--yes") == 2
    assert "first, second" in capsys.readouterr().err
    assert run("prune", cache, "--yes") == 2
    assert "--older-than" in capsys.readouterr().err


def test_verify_reports_an_unreadable_segment_as_damaged(tmp_path: Path, capsys: Output) -> None:
    write_segment(tmp_path, [(ZSTD, [Row(1, b"layout", b"12345678")])])
    (segment,) = files(tmp_path, "seg")
    header = segment.read_bytes()[:8] + (2).to_bytes(4, "little") + segment.read_bytes()[12:56]
    segment.write_bytes(header + low(header).to_bytes(8, "little"))
    assert run("verify", tmp_path) == 1
    assert f"{segment} is of version 2" in capsys.readouterr().out


def test_other_files_are_ignored(cache: Path, capsys: Output) -> None:
    (cache / "first" / f"{1:032x}.seg").mkdir()
    (cache / "first" / f"{2:032x}.seg").symlink_to("/dev/zero")
    os.mkfifo(cache / "first" / f"{3:032x}.seg")
    (cache / "notes").write_text("mine")
    for command in ("ls", "stat", "verify", "compact"):
        assert run(command, cache) == 0
    assert len(list((cache / "first").iterdir())) == 6 and (cache / "notes").exists()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", '{"class": 3}', '{"class": "a\\nZZ"}', '{"class": "\\ud800"}', "\0", None]
)
def test_whatever_is_in_a_meta_json_directories_are_listed(text: str | None, cache: Path, capsys: Output) -> None:
    for path in cache.glob("*/meta.json"):
        path.unlink()
        path.write_text(text) if text is not None else os.mkfifo(path)
    for command in ("ls", "stat"):
        assert run(command, cache) == 0
        lines = capsys.readouterr().out.encode().decode().splitlines()
        assert not any(line.startswith("ZZ") for line in lines)
