"""One rival of peers.py in a process of its own: says what it finds as lines of JSON, and times a round on "go"."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from peer_rivals import RIVALS, Names, Rival
from peer_work import WEIGHT, WORKS, Work, computed, features
from torch import Tensor

T = TypeVar("T")

# What a rival prints must not get between the lines for the parent.
_answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


def answer(value: Any) -> None:
    print(json.dumps(value), file=_answers)


def rounds() -> Any:
    """One item for each "go" of the parent."""
    for line in sys.stdin:
        assert line == "go\n", line
        yield


def names_of(x: Tensor, seed: int) -> Names:
    return [f"batch {seed}, row {i}" for i in range(len(x))]


def wrong_rows(out: Tensor, x: Tensor, weight: Tensor) -> int:
    """Rows that are not those of this input, whatever the dtype in which they come back."""
    right = features(x, weight).to(out.dtype)
    return int(((out - right).abs() > 1e-2).any(1).sum())


def hit(rival: Rival, x: Tensor, names: Names) -> Tensor:
    """The output of a call that must not compute anything."""
    before = computed[0]
    out = rival(x, names)
    assert computed[0] == before, f"{computed[0] - before} rows were computed, 0 expected"
    return out


def timed(run: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    out = run()
    return time.perf_counter() - start, out


def memory(rival: Rival, work: Work) -> None:
    x = work.batch(0)
    names = names_of(x, 0)
    rival(x, names)
    out = hit(rival, x, names)
    answer({"dtype": str(out.dtype).removeprefix("torch."), "wrong": wrong_rows(out, x, rival.weight), "rows": len(x)})
    for _ in rounds():
        answer(statistics.median(timed(lambda: rival(x, names))[0] for _ in range(work.calls)))


def fill(rival: Rival, work: Work) -> None:
    for seed in range(work.epoch):
        x = work.batch(seed)
        rival(x, names_of(x, seed))
    rival.flush()
    answer({})


def disk(make: type[Rival], folder: Path, work: Work) -> None:
    """An epoch of hits in a new process: a batch of it, and opening the cache with the first batch."""
    batches = [work.batch(seed) for seed in range(work.epoch)]
    names = [names_of(x, seed) for seed, x in enumerate(batches)]
    answer({})
    for _ in rounds():
        opening, rival = timed(lambda: make(folder, True))
        seconds, wrong = [], 0
        for x, n in zip(batches, names, strict=True):
            took, out = timed(partial(hit, rival, x, n))
            seconds.append(took)
            wrong += wrong_rows(out, x, WEIGHT)  # now: the next call may overwrite it
        answer(statistics.median(seconds[1:]))
        answer({"first": opening + seconds[0], "wrong": wrong, "rows": sum(map(len, batches))})


def check(rival: Rival, work: Work) -> None:
    """What comes back when something has changed since the rows were kept."""
    x = work.batch(0)
    names = names_of(x, 0)
    rival(x, names)

    def wrong(changed: Tensor) -> int:
        return wrong_rows(rival(changed, names), changed, rival.weight)

    rows = torch.arange(len(x))
    one_element = x.clone()
    where = torch.randint(0, x[0].numel(), (len(x),), generator=torch.Generator().manual_seed(1))
    one_element.view(len(x), -1)[rows, where] = work.batch(2).view(len(x), -1)[rows, where]
    found: dict[str, Any] = {"one element": wrong(one_element)}
    found["rolled"] = wrong(x.view(len(x), -1).roll(1, 1).view_as(x))
    earlier = rival(x, names)
    kept, before = earlier.clone(), computed[0]
    rival(x.flip(0), names[::-1])
    found["computed"] = computed[0] - before
    found["overwritten"] = int((earlier != kept).any(1).sum())
    rival.weight.mul_(2)
    found["weights"] = wrong(x)
    answer({"rows": len(x), **found})


def main(name: str, mode: str, work_name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    work = WORKS[work_name]
    if name == "limit":  # so that loading the native library, no part of the limit, is done
        RIVALS[name](folder, False)(work.batch(0), [])
    else:
        importlib.import_module(name)
    if mode == "disk":
        disk(RIVALS[name], folder, work)
    else:
        {"memory": memory, "fill": fill, "check": check}[mode](RIVALS[name](folder, mode == "fill"), work)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
