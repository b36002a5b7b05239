"""Raises an exception at a chosen line of the library while it runs."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torchcache

PACKAGE = str(Path(torchcache.__file__).parent)

Line = tuple[str, int]


class AtLine:
    """Counts the lines of the library that a function executes, and raises at one of them.

    Args:
        line: file and number; None: only count.
        error: what is raised when the line is first executed.
    """

    def __init__(self, line: Line | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.seen: dict[Line, None] = {}
        self._line = line
        self._error = error

    def run(self, function: Callable[[], Any]) -> Any:
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            return function()
        finally:
            sys.settrace(before)

    def _trace(self, frame: types.FrameType, event: str, argument: object) -> Any:
        return self._trace_lines if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _trace_lines(self, frame: types.FrameType, event: str, argument: object) -> Any:
        if event == "line":
            line = frame.f_code.co_filename, frame.f_lineno
            self.seen[line] = None
            if line == self._line:
                self._line = None
                raise self._error
        return self._trace_lines


def lines_of(function: Callable[[], Any]) -> list[Line]:
    """Every line of the library that a function executes."""
    counter = AtLine()
    counter.run(function)
    return list(counter.seen)
