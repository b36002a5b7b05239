"""The library's logger: everything it says, it says here, on the logger named ``torchcache``.

The root logger is the application's and is never touched. Records propagate to it; while it has
handlers of its own, the handler that is set up at import stays silent, so nothing is said twice.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Hashable
from typing import IO, Any

logger = logging.getLogger(__name__.partition(".")[0])

_FORMAT = "[torchcache] - %(asctime)s - %(name)s - %(levelname)s - %(message)s"
_DATE_FORMAT = "%Y-%m-%d %H:%M:%S"


class _Console(logging.StreamHandler[Any]):
    """Writes to the given stream, or to whatever ``sys.stderr`` is at that moment."""

    def __init__(self, stream: IO[str] | None, yields: bool) -> None:
        super().__init__(stream)
        self._fixed = stream
        self._yields = yields

    def emit(self, record: logging.LogRecord) -> None:
        if self._yields and logging.getLogger().handlers:
            return
        if self._fixed is None:
            self.stream = sys.stderr
        super().emit(record)


def set_logger_config(
    level: int | str | None = None,
    fmt: str | None = None,
    datefmt: str | None = None,
    stream: IO[str] | None = None,
    filename: str | os.PathLike[str] | None = None,
) -> None:
    """Sets how torchcache logs. What is not given comes from the environment, else from the default.

    Args:
        level: a number or name of ``logging`` (``TORCHCACHE_LOG_LEVEL``, default WARN). An unknown
            one is reported and WARN is used.
        fmt: format of a record (``TORCHCACHE_LOG_FMT``).
        datefmt: format of its time (``TORCHCACHE_LOG_DATEFMT``).
        stream: where to write, default standard error.
        filename: a file to append to as well (``TORCHCACHE_LOG_FILE``, default none).
    """
    given = any(x is not None for x in (level, fmt, datefmt, stream, filename))
    _configure(level, fmt, datefmt, stream, filename, yields=not given)


def _configure(
    level: int | str | None,
    fmt: str | None,
    datefmt: str | None,
    stream: IO[str] | None,
    filename: str | os.PathLike[str] | None,
    yields: bool,
) -> None:
    env = os.environ.get
    problems = []
    wanted, date_format = fmt or env("TORCHCACHE_LOG_FMT") or _FORMAT, datefmt or env("TORCHCACHE_LOG_DATEFMT")
    try:
        formatter = logging.Formatter(wanted, date_format or _DATE_FORMAT)
    except ValueError as error:
        problems.append(f"the log format {wanted!r} is not one ({error}): using the default")
        formatter = logging.Formatter(_FORMAT, date_format or _DATE_FORMAT)
    handlers: list[logging.Handler] = [_Console(stream, yields)]
    file = filename or env("TORCHCACHE_LOG_FILE")
    if file:
        try:
            handlers.append(logging.FileHandler(file, mode="a"))
        except OSError as error:
            problems.append(
                f"the log file {os.fspath(file)!r} cannot be opened ({error.strerror}): not logging to a file"
            )
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    number = _number(level if level is not None else env("TORCHCACHE_LOG_LEVEL", "WARN"))
    logger.setLevel(logging.WARNING if number is None else number)
    if number is None:
        wrong = level if level is not None else env("TORCHCACHE_LOG_LEVEL")
        logger.warning(
            "unknown log level %r: using WARN; the levels are DEBUG, INFO, WARN, ERROR and CRITICAL",
            wrong,
        )
    for problem in problems:
        logger.warning("%s", problem)


def _number(level: int | str) -> int | None:
    if isinstance(level, int):
        return level
    name = level.strip().upper()
    if name.isdecimal():
        return int(name)
    number = logging.getLevelName(name)
    return number if isinstance(number, int) else None


class WarnOnce:
    """Logs one message about each subject for as long as this object lives.

    Args:
        name: what every message starts with, if it is not empty.
    """

    def __init__(self, name: str = "") -> None:
        self._prefix = f"{name}: " if name else ""
        self.subjects: set[Hashable] = set()  # those that a message was logged about

    def warn(self, subject: Hashable, message: str, *args: object) -> None:
        """Logs a warning, unless a message about the subject was logged before."""
        self.log(logging.WARNING, subject, message, *args)

    def log(self, level: int, subject: Hashable, message: str, *args: object) -> None:
        """Logs a message at a level of ``logging``, unless one about the subject was logged before."""
        if subject not in self.subjects:
            self.subjects.add(subject)
            logger.log(level, self._prefix + message, *args)


Once = WarnOnce  # the former name, until engine/ and tiers/ use the new one

set_logger_config()
