"""The library's only logger, named ``torchcache``, and its configuration.

The root logger belongs to the application: the library never changes it. Records propagate to it; while it has
handlers, the handler that the import of this module adds stays silent, so that no record appears twice.
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
    """Configures the logger of torchcache. What is not given comes from the environment, else from the default.

    Args:
        level: a number or name of ``logging`` (``TORCHCACHE_LOG_LEVEL``, default WARN). An unknown level gives a
            warning and means WARN.
        fmt: format of a record (``TORCHCACHE_LOG_FMT``).
        datefmt: format of its time (``TORCHCACHE_LOG_DATEFMT``).
        stream: where records go, default standard error.
        filename: a file that records are also appended to (``TORCHCACHE_LOG_FILE``, default none).

    Example:
        >>> import torchcache, sys
        >>> torchcache.set_logger_config(level="INFO", fmt="%(levelname)s %(message)s", stream=sys.stdout)
        >>> torchcache.set_logger_config()  # back to what the environment says
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
    problems: list[str] = []
    number = _level(level if level is not None else env("TORCHCACHE_LOG_LEVEL", "WARN"), problems)
    date_format = datefmt or env("TORCHCACHE_LOG_DATEFMT") or _DATE_FORMAT
    formatter = _formatter(fmt or env("TORCHCACHE_LOG_FMT") or _FORMAT, date_format, problems)
    handlers = [_Console(stream, yields), *_file_handlers(filename or env("TORCHCACHE_LOG_FILE"), problems)]
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    logger.setLevel(number)
    for problem in problems:
        logger.warning("%s", problem)


def _level(level: int | str, problems: list[str]) -> int:
    name = level.strip().upper() if isinstance(level, str) else str(level)
    number = int(level) if isinstance(level, int) or name.isdecimal() else logging.getLevelName(name)
    if isinstance(number, int):
        return number
    levels = "the levels are DEBUG, INFO, WARN, ERROR and CRITICAL"
    problems.append(f"unknown log level {level!r}: using WARN; {levels}")
    return logging.WARNING


def _formatter(fmt: str, datefmt: str, problems: list[str]) -> logging.Formatter:
    try:
        return logging.Formatter(fmt, datefmt)
    except ValueError as error:
        problems.append(f"the log format {fmt!r} is not one ({error}): using the default")
        return logging.Formatter(_FORMAT, datefmt)


def _file_handlers(file: str | os.PathLike[str] | None, problems: list[str]) -> list[logging.Handler]:
    if not file:
        return []
    try:
        return [logging.FileHandler(file, mode="a")]
    except OSError as error:
        problems.append(f"the log file {os.fspath(file)!r} cannot be opened ({error.strerror}): not logging to a file")
        return []


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


set_logger_config()
