"""Inspects and verifies the segments of cache directories, while other processes use them.

A cache directory holds a folder for each module hash. Functions accept either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchcache._native import ops
from torchcache.cli.progress import Progress
from torchcache.errors import MaintenanceError
from torchcache.tiers.meta import META_FILE, read_meta

_SEGMENT = re.compile(r"[0-9a-f]{32}\.seg")
PART = 64 << 20  # bytes between two reports of progress


def stores(directory: Path) -> list[Path]:
    """The folders of a cache directory that hold rows, by name; the directory itself if it is such a folder.

    Raises:
        MaintenanceError: it is not a cache directory, or cannot be read.
    """
    if not directory.exists():
        raise MaintenanceError(f"there is no directory {str(directory)!r}: name the persistent_cache_dir of a cache")
    if not directory.is_dir():
        raise MaintenanceError(f"{str(directory)!r} is a file: name the persistent_cache_dir of a cache")
    try:
        if _is_store(directory):
            return [directory]
        entries = sorted(directory.iterdir())
        folders = [path for path in entries if path.is_dir() and not path.is_symlink() and _is_store(path)]
    except OSError as error:
        raise MaintenanceError(f"{error.filename!r} cannot be read: {error.strerror}") from error
    if entries and not folders:
        raise MaintenanceError(
            f"{str(directory)!r} is not a cache directory: neither it nor a folder in it holds {META_FILE} or "
            "*.seg files; name the persistent_cache_dir of a cache"
        )
    return folders


def _is_store(directory: Path) -> bool:
    return (directory / META_FILE).is_file() or any(_SEGMENT.fullmatch(name) for name in os.listdir(directory))


def segments(directory: Path) -> list[Path]:
    """The segments of a folder, by name. Like readers, it ignores everything but regular files."""
    named = (path for path in directory.iterdir() if _SEGMENT.fullmatch(path.name))
    return sorted(path for path in named if path.is_file() and not path.is_symlink())


def native(operation: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a native operation.

    Raises:
        MaintenanceError: the operation could not read or write a file.
    """
    try:
        return operation(*arguments)
    except RuntimeError as error:
        raise MaintenanceError(str(error).partition("\n")[0]) from error


def read_report(operation: Callable[..., str], *arguments: Any) -> Any:
    """The result of a native operation that returns JSON: ``csrc/store/maintenance/report.h``."""
    return json.loads(native(operation, *arguments))


# ---- inspecting


@dataclasses.dataclass
class Group:
    """Rows of one layout and codec.

    Attributes:
        layout: as JSON.
        codec: ``raw`` or ``zstd``.
        rows: how many.
        bytes: their size before compression.
        stored_bytes: their size in the file.
    """

    layout: str
    codec: str
    rows: int = 0
    bytes: int = 0
    stored_bytes: int = 0


@dataclasses.dataclass
class Segment:
    """One segment file with its index. Sizes are in bytes, `modified` in seconds since the epoch.

    Attributes:
        state: ``sealed``: it has an index; ``left``: it has none and nobody writes it; ``written``: a process may
            still write it.
    """

    name: str
    state: str
    bytes: int
    index_bytes: int
    blocks: int
    rows: int
    modified: float
    groups: list[Group] = dataclasses.field(repr=False)

    @property
    def all_bytes(self) -> int:
        """The size of the segment and its index."""
        return self.bytes + self.index_bytes


@dataclasses.dataclass
class Summary:
    """One folder of a cache directory; `module` is the name of the class."""

    directory: Path
    module_hash: str
    module: str
    segments: list[Segment]

    @property
    def rows(self) -> int:
        """Rows of all segments, with duplicates."""
        return sum(segment.rows for segment in self.segments)

    @property
    def bytes(self) -> int:
        """The size of all segments and indexes."""
        return sum(segment.all_bytes for segment in self.segments)

    @property
    def modified(self) -> float | None:
        """When a segment was last written; None: there are no segments."""
        return max((segment.modified for segment in self.segments), default=None)

    def groups(self) -> list[Group]:
        """The groups of all segments, those with most rows first."""
        total: dict[tuple[str, str], Group] = {}
        for group in (group for segment in self.segments for group in segment.groups):
            merged = total.setdefault((group.layout, group.codec), Group(group.layout, group.codec))
            merged.rows += group.rows
            merged.bytes += group.bytes
            merged.stored_bytes += group.stored_bytes
        return sorted(total.values(), key=lambda group: (-group.rows, group.layout))


def summarize(directory: Path) -> Summary:
    """Inspects the segments of a folder.

    Raises:
        MaintenanceError: a segment cannot be read.
    """
    inspected = []
    for path in segments(directory):
        with contextlib.suppress(FileNotFoundError):  # another process compacted it
            inspected.append(_segment(path))
    return Summary(directory, directory.absolute().name, _module(directory), inspected)


def _segment(path: Path) -> Segment:
    modified = path.stat().st_mtime
    report = read_report(ops.segment_inspect, str(path.parent), path.stem)
    groups = [Group(**group) for group in report["groups"]]
    state = "written" if not report["idle"] else "sealed" if report["index_bytes"] else "left"
    rows = sum(group.rows for group in groups)
    return Segment(path.stem, state, report["bytes"], report["index_bytes"], report["blocks"], rows, modified, groups)


def _module(directory: Path) -> str:
    name = read_meta(directory).get("class")
    if not isinstance(name, str):
        return "?"
    return name if name.isprintable() else ascii(name)[1:-1]  # a terminal may show it


def duplicates(summary: Summary) -> int:
    """How many rows are copies of other rows of the folder."""
    names = [segment.name for segment in summary.segments]
    return sum(waste.duplicates for waste in find_waste(summary.directory, names))


@dataclasses.dataclass
class Waste:
    """What a compaction would drop from a segment: rows of earlier segments, and ranges without a block."""

    duplicates: int
    holes: int


def find_waste(directory: Path, names: list[str]) -> list[Waste]:
    """What a compaction would drop from each of these segments."""
    return [Waste(**waste) for waste in read_report(ops.segment_waste, str(directory), names)]


# ---- verifying


@dataclasses.dataclass
class Damage:
    """A damaged range of a segment; `offset` and `bytes` are in bytes."""

    segment: str
    kind: str
    offset: int
    bytes: int
    rows: int | None  # None: unknown

    def __str__(self) -> str:
        rows = "" if self.rows is None else f", {self.rows} row{'s' * (self.rows != 1)}"
        return f"{self.segment}: {self.kind} at offset {self.offset}, {self.bytes} bytes{rows}"


def verify(path: Path, progress: Progress = lambda n: None) -> tuple[int, list[Damage]]:
    """Checks every checksum of a segment and its index. What a writer has not finished does not count as damage.

    Args:
        path: the segment.
        progress: called with the bytes that were read since the last call.

    Returns:
        The number of checked rows, and the damaged ranges.

    Raises:
        MaintenanceError: the segment cannot be read.
    """
    position, done, rows = 64, False, 0
    damaged: list[Damage] = []
    while not done:
        report = read_report(ops.segment_verify, str(path.parent), path.stem, position, PART)
        rows += report["rows"]
        damaged += [Damage(path.name, **damage) for damage in report["damage"]]
        progress(report["position"] - position)
        position, done = report["position"], report["done"]
    return rows, damaged
