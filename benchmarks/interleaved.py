"""Runs rivals in turn, many times, and prints medians as ratios to the first: noise of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

Rival = tuple[str, Callable[[], object]]


def measure(rivals: Sequence[Rival], rounds: int) -> list[float]:
    """Median seconds of each rival over `rounds` rounds, after one that does not count."""
    seconds: list[list[float]] = [[] for _ in rivals]
    for r in range(rounds + 1):
        for (_, run), times in zip(rivals, seconds, strict=True):
            start = time.perf_counter()
            run()
            if r:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def table(title: str, rivals: Sequence[Rival], rounds: int, amount: float, unit: str) -> None:
    """Prints what each rival takes, how much a second that is, and its time as a ratio to the first one's."""
    medians = measure(rivals, rounds)
    print(f"\n{title}")
    for (name, _), median in zip(rivals, medians, strict=True):
        rate = amount / median
        print(f"  {name:42} {median * 1e6:12.1f} µs {rate:12.2f} {unit} {median / medians[0]:8.2f}×")
