"""A full hit here and in the public packages for the same purpose: one interleaved run, each in its own process.

A package that cannot be installed, or that fails, is printed as not measured, with the reason.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peer_work import WORKS

HERE = Path(__file__).parent
MEMORY_ROUNDS, DISK_ROUNDS = 9, 3


class Peer(NamedTuple):
    label: str
    module: str  # how it is imported, and its name in peer_rivals.py
    packages: tuple[str, ...] = ()  # installed without their dependencies
    names_rows: bool = False  # the caller does, so it cannot mistake one input for another


PEERS = (
    Peer("limit: hash + gather", "limit"),
    Peer("torchcache (this project)", "torchcache"),
    Peer("torchcache 0.6.0 (PyPI)", "torchcache", ("torchcache==0.6.0", "zstd==1.5.7.2")),
    Peer("torch-module-cache 0.1.4 (PyPI)", "torch_module_cache", ("torch-module-cache==0.1.4",), True),
    Peer("joblib 1.6.0 (PyPI), on disk only", "joblib", ("joblib==1.6.0",)),
)


class Failed(Exception):
    """Why a rival could not be measured."""


class Worker:
    """A rival's process (see peer_worker.py), which has said that it is ready."""

    def __init__(self, peer: Peer, root: Path, mode: str, work: str) -> None:
        folder = root / "caches" / f"{PEERS.index(peer)}-{work}-{'disk' if mode == 'fill' else mode}"
        folder.mkdir(parents=True, exist_ok=True)
        self._errors = folder.with_suffix(".errors")
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", HERE / "peer_worker.py", peer.module, mode, work, folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": python_path(peer, root)},
            )
        self.ready = self.answer()

    def round(self) -> float:
        assert self._process.stdin
        with suppress(BrokenPipeError):  # the answer says why
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        return float(self.answer())

    def answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        lines = self._errors.read_text().strip().splitlines()
        raise Failed(lines[-1] if lines else f"its process ended with status {self._process.returncode}")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def packages(peer: Peer, root: Path) -> Path:
    return root / "packages" / str(PEERS.index(peer))


def python_path(peer: Peer, root: Path) -> str:
    """The peer's own packages come first: one of them has this project's name."""
    own = [str(packages(peer, root))] if peer.packages else []
    return os.pathsep.join([*own, str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])


def install(peer: Peer, root: Path) -> None:
    if not peer.packages:
        return
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    done = subprocess.run([*pip, "--target", packages(peer, root), *peer.packages], capture_output=True, text=True)
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["pip failed"])[-1])


class Race:
    """Rivals of one table; who fails leaves it, with the reason."""

    def __init__(self, peers: list[Peer]) -> None:
        self.peers = peers
        self.seconds: dict[Peer, list[float]] = {peer: [] for peer in peers}
        self.remarks: dict[Peer, str] = {}

    def attempt(self, peer: Peer, action: Any) -> Any:
        if peer not in self.seconds:
            return None
        try:
            return action()
        except Failed as why:
            del self.seconds[peer]
            self.remarks[peer] = f"not measured: {why}"

    def remark(self, peer: Peer, found: dict[str, Any]) -> None:
        remarks = [f"opening and first batch: {found['first'] * 1e3:.1f} ms"] if "first" in found else []
        remarks += ["the caller names the rows: no look at the input"] if peer.names_rows else []
        if found["wrong"]:
            remarks.append(f"{found['wrong']} of {found['rows']} rows are wrong")
        if found.get("dtype", "float32") != "float32":
            remarks.append(f"float32 comes back as {found['dtype']}")
        self.remarks[peer] = "; ".join(remarks)

    def print(self, title: str) -> None:
        print(f"\n{title}")
        limit = statistics.median(self.seconds[self.peers[0]])
        for peer in self.peers:
            if peer in self.seconds:
                median = statistics.median(self.seconds[peer])
                remark = self.remarks.get(peer, "")
                print(f"  {peer.label:36} {median / limit:9.2f}× {median * 1e6:12.1f} µs  {remark}".rstrip())
            else:
                print(f"  {peer.label:36} {self.remarks[peer]}")


def memory(peers: list[Peer], root: Path, work: str) -> None:
    race = Race(peers)
    with ExitStack() as stack:
        workers: dict[Peer, Worker] = {}
        for peer in peers:
            worker = race.attempt(peer, lambda peer=peer: Worker(peer, root, "memory", work))
            if worker is not None:
                workers[peer] = stack.enter_context(worker)
                race.remark(peer, worker.ready)
        for number in range(MEMORY_ROUNDS + 1):
            for peer, worker in workers.items():
                seconds = race.attempt(peer, worker.round)
                if number and seconds is not None:
                    race.seconds[peer].append(seconds)
    race.print(f"full hit, {WORKS[work].title} → 768 f32, 1 thread")


def disk(peers: list[Peer], root: Path, work: str) -> None:
    def fill(peer: Peer) -> None:
        with Worker(peer, root, "fill", work):
            pass

    def read(peer: Peer) -> None:
        with Worker(peer, root, "disk", work) as worker:
            race.seconds[peer].append(worker.round())
            race.remark(peer, worker.answer())

    race = Race(peers)
    for action, times in ((fill, 1), (read, DISK_ROUNDS)):
        for _ in range(times):
            for peer in peers:
                race.attempt(peer, lambda action=action, peer=peer: action(peer))
    epoch = WORKS[work].epoch
    race.print(
        f"full hit from disk in a new process, {WORKS[work].title} → 768 f32, a later batch of {epoch}, 1 thread"
    )


# What a check finds (see peer_worker.py), and over which column it is printed.
CHECKS = {
    "one element": "one element changed",
    "rolled": "rolled by one",
    "weights": "weights doubled",
    "overwritten": "overwritten by next call",
    "computed": "computed, other order",
}


def checks(peers: list[Peer], root: Path, work: str) -> None:
    print(f"\nof {WORKS[work].shape[0]} rows, how many are wrong after a change; {WORKS[work].title}")
    print(f"  {'':36} {'  '.join(CHECKS.values())}")
    for peer in peers[1:]:
        try:
            with Worker(peer, root, "check", work) as worker:
                found = worker.ready
        except Failed as why:
            print(f"  {peer.label:36} not measured: {why}")
            continue
        if peer.names_rows:
            found["one element"] = found["rolled"] = "caller's names"
        print(f"  {peer.label:36} {'  '.join(f'{found[name]!s:>{len(title)}}' for name, title in CHECKS.items())}")


def main() -> None:
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(prefix="torchcache-peers-") as folder:
        root = Path(folder)
        peers = []
        for peer in PEERS:
            try:
                install(peer, root)
                peers.append(peer)
            except Failed as why:
                print(f"{peer.label}: not measured: {why}")
        for work in WORKS:
            memory(peers, root, work)
        for work in ("images", "vectors"):
            disk(peers, root, work)
        for work in ("images", "vectors"):
            checks(peers, root, work)


if __name__ == "__main__":
    main()
