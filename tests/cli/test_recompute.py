"""The command line compares the rows of a directory with what a module computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = """
import os, torch
from torchcache import torchcache

DATA = torch.arange(24.0).view(12, 2)

@torchcache(persistent=True, persistent_cache_dir="rows", persistent_module_hash="scaled")
def scaled(x):
    return x * float(os.environ["SCALE"])

def factory():
    return scaled, DATA.split(5)

def uncached():
    return torch.nn.Linear(2, 2), DATA.split(5)

def nothing():
    return None

if __name__ == "__main__":
    for batch in DATA[:8].split(4):
        scaled(batch)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a module of the user's, and a cache directory with 8 of its 12 rows."""
    (tmp_path / "job.py").write_text(SOURCE)
    subprocess.run([sys.executable, "job.py"], cwd=tmp_path, check=True, env={**os.environ, "SCALE": "2"})
    return tmp_path


def verify(folder: Path, factory: str, scale: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torchcache", "verify", "--recompute", factory, *arguments, "rows"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, "SCALE": scale})


def test_rows_that_the_module_computes_are_counted(folder: Path) -> None:
    done = verify(folder, "job:factory", "2")
    assert done.returncode == 0 and "12 rows, 8 of them stored: none differ, largest relative error 0" in done.stdout


def test_rows_of_another_computation_are_named_and_the_status_is_1(folder: Path) -> None:
    done = verify(folder, "job:factory", "3", "--json")
    recomputed = json.loads(done.stdout)["recomputed"]
    assert done.returncode == 1 and recomputed["found"] == 8 and recomputed["rows"] == 12
    assert len(set(recomputed["wrong"])) == 8
    assert recomputed["largest_error"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("job", "--recompute must be MODULE:FACTORY"),
        ("job:missing", "'job:missing' cannot be imported"),
        ("job:nothing", "must return a tuple (module, batches)"),
        ("job:uncached", "has no cache"),
    ],
)
def test_a_factory_that_does_not_fit_is_an_error(folder: Path, factory: str, message: str) -> None:
    done = verify(folder, factory, "2")
    assert done.returncode == 2 and message in done.stderr
