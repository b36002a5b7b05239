"""The temporary directory of caches that were given none: it lives as long as its process, and no longer."""

from __future__ import annotations

import signal
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
from cache_harness import cache_of
from process_harness import run
from torch import nn

from torchcache import torchcache


@pytest.mark.parametrize("ending", ["", "raise RuntimeError", "sys.exit(1)"])
def test_a_temporary_directory_goes_with_the_process_also_after_an_exception(tmp_path: Path, ending: str) -> None:
    script = f"m = cached(); m(X); d = m.cache_instance.cache_dir; assert d.is_dir(); print(d, flush=True)\n{ending}"
    done = run(tmp_path, script, check=False, TMPDIR=str(tmp_path))
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)
    assert not list(tmp_path.glob("torchcache-*"))


@pytest.mark.parametrize("how", ["os.fork()", "multiprocessing"])
def test_a_forked_child_never_deletes_the_temporary_directory_of_its_parent(tmp_path: Path, how: str) -> None:
    fork = """
        pid = os.fork()
        if pid == 0:
            m(X[2:]); sys.exit(0)
        os.waitpid(pid, 0)
    """
    process = """
        p = multiprocessing.get_context("fork").Process(target=m, args=(X[2:],))
        p.start(); p.join()
    """
    done = run(
        tmp_path,
        "torch.set_num_threads(1)\nm = cached(); m(X[:2])\n"
        + textwrap.dedent(fork if how == "os.fork()" else process)
        + "print(m.cache_instance.cache_dir.is_dir())",
        TMPDIR=str(tmp_path),
    )
    assert done.stdout.split() == ["True"] and done.stderr == ""
    assert not list(tmp_path.glob("torchcache-*"))


def test_a_temporary_directory_left_by_a_kill_is_swept_by_the_next_run(tmp_path: Path) -> None:
    script = "m = cached(); m(X); print(m.cache_instance.cache_dir, flush=True)"
    killed = run(
        tmp_path,
        script + "\nos.kill(os.getpid(), signal.SIGKILL)",
        check=False,
        TMPDIR=str(tmp_path),
    )
    assert killed.returncode == -signal.SIGKILL and Path(killed.stdout.strip()).is_dir()
    run(tmp_path, script, TMPDIR=str(tmp_path))
    assert not list(tmp_path.glob("torchcache-*"))


def test_a_living_process_keeps_its_temporary_directory(tmp_path: Path) -> None:
    module = torchcache(persistent=True)(nn.Identity())
    module(torch.ones(2, 3))
    directory = cache_of(module).cache_dir
    assert directory is not None and directory.is_relative_to(tempfile.gettempdir())
    run(tmp_path, "m = cached(); m(X)")
    assert directory.is_dir()
