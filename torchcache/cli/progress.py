"""How far a long operation is: a bar of tqdm where that is installed, else one line that is overwritten."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Progress = Callable[[int], object]  # called with the number of bytes that were processed since the last call

_SECONDS_PER_LINE = 0.2


@contextlib.contextmanager
def byte_progress(name: str, total: int) -> Iterator[Progress]:
    """Shows on a terminal how many of `total` bytes are done; elsewhere nothing."""
    if not sys.stderr.isatty():
        yield lambda n: None
        return
    tqdm = _tqdm("tqdm")
    if tqdm is None:
        yield _Percentage(name, total)
        print(file=sys.stderr)
        return
    with tqdm(total=total, desc=name, unit="B", unit_scale=True) as bar:
        yield bar.update


class _Percentage:
    def __init__(self, name: str, total: int) -> None:
        self._name = name
        self._total = max(1, total)
        self._done = 0

    def __call__(self, n: int) -> None:
        self._done += n
        print(f"\r{self._name}: {100 * self._done // self._total} %", end="", file=sys.stderr, flush=True)


class BatchProgress:
    """Batches that are done, with their rows per second, hits and bytes.

    Args:
        name: of the operation.
        total: number of batches; None: unknown.
        size: gives the number of cached bytes.
    """

    def __init__(self, name: str, total: int | None, size: Callable[[], int]) -> None:
        self._name = name
        self._total = total
        self._size = size
        self._start = self._last_line = time.monotonic()
        self._batches = self._rows = self._hits = 0
        tqdm = _tqdm("tqdm.auto")
        self._bar = None if tqdm is None else tqdm(total=total, desc=name, unit="batch")

    def update(self, rows: int, hits: int) -> None:
        """Adds one batch of so many rows, of which so many were cached before."""
        self._batches += 1
        self._rows += rows
        self._hits += hits
        if self._bar is not None:
            self._bar.set_postfix_str(self._summary(), refresh=False)
            self._bar.update()
        elif time.monotonic() - self._last_line >= _SECONDS_PER_LINE:
            self._print_line("")

    def close(self) -> None:
        """Shows the final state."""
        if self._bar is not None:
            self._bar.close()
        else:
            self._print_line("\n")

    def _print_line(self, end: str) -> None:
        self._last_line = time.monotonic()
        of = f"/{self._total}" if self._total else ""
        line = f"\r\x1b[K{self._name}: {self._batches}{of} batches, {self._summary()}"
        print(line, end=end, file=sys.stderr, flush=True)

    def _summary(self) -> str:
        rate = self._rows / max(1e-9, time.monotonic() - self._start)
        return f"{rate:.0f} rows/s, {self._hits} of {self._rows} hits, {self._size() / 1e6:.1f} MB cached"


def is_interactive() -> bool:
    """Whether somebody watches standard error: on a terminal or in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _tqdm(module: str) -> Any:
    try:
        return importlib.import_module(module).tqdm
    except ImportError:
        return None
