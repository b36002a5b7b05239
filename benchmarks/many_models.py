"""A training step of many small models: torchmb, vmap, by hand, one by one. One interleaved run, a process a rival.

A step is forward, cross entropy, backward and SGD. The public package torchmb 0.2 has this project's import name. What
cannot be installed, or fails, is printed as not measured, with the reason. Arguments choose works by their beginnings.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from many_models_worker import WORKS

HERE = Path(__file__).parent
ROUNDS, OF_PUBLIC = 15, 2  # the public package takes many seconds a round
PUBLIC = ("torchmb==0.2", "einops==0.8.2")


class Rival(NamedTuple):
    label: str
    name: str  # in many_models_worker.py
    only: str = ""  # works whose names begin so
    public: bool = False


RIVALS = (
    Rival("torchmb (this project)", "batch_module"),
    Rival("limit: matrix products and update", "products", "MLP"),
    Rival("limit: one linear layer, no loss", "one_product", "linear"),
    Rival("vmap(grad(functional_call))", "vmap_of_grad"),
    Rival("vmap(functional_call), then backward", "vmap_of_forward"),
    Rival("by hand: baddbmm", "baddbmm", "MLP"),
    Rival("torchmb 0.2 (PyPI)", "batch_module", public=True),
    Rival("one by one", "loop"),
)


class Failed(Exception):
    """Why a rival could not be measured."""


class Worker:
    """A rival's process, which has taken its first step."""

    def __init__(self, rival: Rival, work: str, packages: Path, mode: str = "time") -> None:
        first = [str(packages)] if rival.public else []
        path = os.pathsep.join([*first, *filter(None, [os.environ.get("PYTHONPATH")])])
        # Large blocks go back to the system at once, so that the size of the process is what is in use.
        memory = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"} if mode == "memory" else {}
        self._process = subprocess.Popen(
            [sys.executable, "-P", HERE / "many_models_worker.py", rival.name, work, mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **memory},
        )
        self.ready = self._answer()

    def round(self) -> float:
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout and self._process.stderr
        line = self._process.stdout.readline()
        if not line:
            lines = self._process.stderr.read().strip().splitlines()
            raise Failed(lines[-1] if lines else f"its process ended with status {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def install(folder: Path) -> str:
    """What went wrong, if anything."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    done = subprocess.run([*pip, "--target", folder, *PUBLIC], capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["pip failed"])[-1] if done.returncode else ""


def race(work: str, packages: Path, missing: str) -> None:
    print(f"\n{work}: {WORKS[work].models} × {WORKS[work].shape}{' shared' if WORKS[work].shared else ''}")
    rivals = [r for r in RIVALS if work.startswith(r.only)]
    seconds: dict[Rival, dict[int, float]] = {}
    grown: dict[Rival, int] = {}
    remarks: dict[Rival, str] = {}
    with ExitStack() as stack:
        workers: dict[Rival, Worker] = {}
        for rival in rivals:
            try:
                if rival.public and missing:
                    raise Failed(missing)
                with Worker(rival, work, packages, "memory") as worker:
                    grown[rival] = worker.ready
                workers[rival] = stack.enter_context(Worker(rival, work, packages))
                seconds[rival] = {}
            except Failed as why:
                remarks[rival] = f"not measured: {why}"
        for number in range(ROUNDS + 1):
            for rival, worker in random.sample(list(workers.items()), len(workers)):
                if not rival.public or number <= OF_PUBLIC:
                    took = worker.round()
                    if number:
                        seconds[rival][number] = took
    for rival in rivals:
        if rival in remarks:
            print(f"  {rival.label:40} {remarks[rival]}")
        else:
            print(f"  {rival.label:40} {report(seconds[rival], seconds[rivals[0]])} {grown[rival] / 1e6:10.1f} MB")


def report(own: dict[int, float], ours: dict[int, float]) -> str:
    """Of seconds by round."""
    ratio = statistics.median(took / ours[number] for number, took in own.items())
    return f"{ratio:7.2f}× {statistics.median(own.values()) * 1e3:10.2f} ms"


def main() -> None:
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, 1 thread")
    print("a step: times ours (median of the rounds' ratios), median, memory over what is held between steps")
    with tempfile.TemporaryDirectory(prefix="torchmb-peers-") as folder:
        missing = install(Path(folder))
        for work in WORKS:
            if work.startswith(tuple(sys.argv[1:] or [""])):
                race(work, Path(folder), missing)


if __name__ == "__main__":
    main()
