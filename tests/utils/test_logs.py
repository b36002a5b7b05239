"""torchcache logs on its own logger, as the four environment variables and set_logger_config say."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchcache import set_logger_config
from torchcache._utils.logs import WarnOnce

LOGGER = logging.getLogger("torchcache")


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    yield
    set_logger_config()


def stream_handler() -> logging.StreamHandler[io.StringIO]:
    (handler,) = (h for h in LOGGER.handlers if type(h) is not logging.FileHandler)
    assert isinstance(handler, logging.StreamHandler)
    return handler


def test_defaults_are_the_documented_ones() -> None:
    set_logger_config()
    formatter = stream_handler().formatter
    assert LOGGER.level == logging.WARNING and len(LOGGER.handlers) == 1
    assert formatter is not None
    assert formatter._fmt == "[torchcache] - %(asctime)s - %(name)s - %(levelname)s - %(message)s"
    assert formatter.datefmt == "%Y-%m-%d %H:%M:%S"


def test_the_root_logger_is_left_alone() -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    set_logger_config(level="DEBUG", stream=io.StringIO())
    assert (root.level, root.handlers) == before


def test_arguments_set_level_format_stream_and_file(tmp_path: Path) -> None:
    stream = io.StringIO()
    file = tmp_path / "log.txt"
    file.write_text("before\n")
    set_logger_config(
        level=logging.INFO,
        fmt="%(asctime)s|%(message)s",
        datefmt="%Y",
        stream=stream,
        filename=file,
    )
    LOGGER.info("hello")
    LOGGER.debug("not this")
    year, text = stream.getvalue().strip().split("|")
    assert len(year) == 4 and text == "hello"
    assert file.read_text() == "before\n" + stream.getvalue()


def test_a_wrong_format_is_reported_and_the_default_is_used() -> None:
    stream = io.StringIO()
    set_logger_config(fmt="%(asctime)", stream=stream)
    assert "'%(asctime)'" in stream.getvalue() and stream.getvalue().startswith("[torchcache] - ")


@pytest.mark.parametrize("level", ["INFO", "info", logging.INFO, "20"])
def test_levels_may_be_names_or_numbers(level: int | str) -> None:
    set_logger_config(level=level)
    assert LOGGER.level == logging.INFO


def test_the_environment_sets_what_no_argument_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHCACHE_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("TORCHCACHE_LOG_FMT", "%(message)s")
    monkeypatch.setenv("TORCHCACHE_LOG_DATEFMT", "%H")
    monkeypatch.setenv("TORCHCACHE_LOG_FILE", str(tmp_path / "log"))
    set_logger_config()
    formatter = stream_handler().formatter
    assert LOGGER.level == logging.DEBUG and formatter is not None
    assert (formatter._fmt, formatter.datefmt) == ("%(message)s", "%H")
    LOGGER.debug("written")
    assert (tmp_path / "log").read_text() == "written\n"
    set_logger_config(level="ERROR")
    assert LOGGER.level == logging.ERROR


def test_an_unknown_level_warns_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setenv("TORCHCACHE_LOG_LEVEL", "LOUD")
    set_logger_config(stream=stream)
    assert LOGGER.level == logging.WARNING
    assert "unknown log level 'LOUD'" in stream.getvalue() and "DEBUG, INFO" in stream.getvalue()


def test_a_log_file_that_cannot_be_opened_is_a_warning(tmp_path: Path) -> None:
    stream = io.StringIO()
    set_logger_config(stream=stream, filename=tmp_path / "none" / "log")
    assert "cannot be opened" in stream.getvalue()


def run(folder: Path, script: str, **env: str) -> subprocess.CompletedProcess[str]:
    file = folder / "script.py"
    file.write_text(script)
    return subprocess.run(
        [sys.executable, file],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=True,
    )


SCRIPT = """
import torch
from torchcache import torchcache
f = torchcache()(lambda x: x + 1)
f(torch.ones(2, 2))
print(f.cache_instance.module_hash)
"""


def test_nothing_is_printed_by_default(tmp_path: Path) -> None:
    done = run(tmp_path, SCRIPT)
    assert done.stderr == "" and len(done.stdout.split()) == 1


def test_the_module_hash_is_logged_at_info(tmp_path: Path) -> None:
    done = run(tmp_path, SCRIPT, TORCHCACHE_LOG_LEVEL="INFO")
    assert done.stdout.strip() in done.stderr and "INFO" in done.stderr


def test_an_application_that_configures_logging_gets_each_record_once(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "import logging; logging.basicConfig(level='INFO')\n" + SCRIPT,
        TORCHCACHE_LOG_LEVEL="INFO",
    )
    assert done.stderr.count(done.stdout.strip()) == 1


def test_each_subject_is_logged_once_for_each_object(caplog: pytest.LogCaptureFixture) -> None:
    first, second = WarnOnce("Net"), WarnOnce()
    with caplog.at_level(logging.INFO, logger="torchcache"):
        for once in (first, second, first):
            once.warn("disk", "the disk is %s", "full")
            once.log(logging.INFO, ("a", 1), "an %s", "object")
            once.warn(("a", 1), "the level makes no difference")
    messages = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert messages == [
        ("WARNING", "Net: the disk is full"),
        ("INFO", "Net: an object"),
        ("WARNING", "the disk is full"),
        ("INFO", "an object"),
    ]
