"""Maintenance of cache directories while other processes use them: inspects, verifies, compacts and prunes segments.

This module decides, native code (csrc/store/maintenance) moves the bytes. No function changes a segment that a process
may still write. A cache directory holds a folder for each module hash. Functions accept either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torchcache._native import ops
from torchcache.cli.progress import Progress
from torchcache.errors import MaintenanceError
from torchcache.tiers.meta import META_FILE, read_meta

_SEGMENT = re.compile(r"[0-9a-f]{32}\.seg")
_DERIVED = re.compile(r"([0-9a-f]{32})\.(idx|tmp)")
_LARGE = 512 << 20  # bytes; compact rewrites a segment of this size only if it wastes space
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


def _report(operation: Callable[..., str], *arguments: Any) -> Any:
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
    report = _report(ops.segment_inspect, str(path.parent), path.stem)
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
    return sum(waste.duplicates for waste in _waste(summary.directory, names))


@dataclasses.dataclass
class _Waste:
    """What a compaction would drop from a segment: rows of earlier segments, and ranges without a block."""

    duplicates: int
    holes: int


def _waste(directory: Path, names: list[str]) -> list[_Waste]:
    return [_Waste(**waste) for waste in _report(ops.segment_waste, str(directory), names)]


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
        report = _report(ops.segment_verify, str(path.parent), path.stem, position, PART)
        rows += report["rows"]
        damaged += [Damage(path.name, **damage) for damage in report["damage"]]
        progress(report["position"] - position)
        position, done = report["position"], report["done"]
    return rows, damaged


# ---- compacting


@dataclasses.dataclass
class Compacted:
    """The result of a compaction.

    Attributes:
        rows: rows of the new segments.
        duplicates: rows that were dropped because another segment has them.
        damaged: rows that were dropped because they failed their checksum.
        removed: segments that were removed.
        written: segments that were written.
        left: segments that stayed because a process may still write them.
    """

    rows: int = 0
    duplicates: int = 0
    damaged: int = 0
    removed: int = 0
    written: int = 0
    left: int = 0


def compact(directory: Path, progress: Progress = lambda n: None) -> Compacted:
    """Rewrites many segments into few, without duplicates and damage, while other processes read and write.

    It needs up to 64 bytes of memory for each row, and space on the disk for about two segments.

    Args:
        directory: a folder that holds segments.
        progress: called with the bytes that were processed since the last call.

    Raises:
        MaintenanceError: another compact or prune is running, or a file cannot be read or written.
    """
    with _locked(directory):
        _remove_leftovers(directory)
        inspected = summarize(directory).segments
        idle = [segment for segment in inspected if segment.state != "written"]
        rewritten, retained = _worth_rewriting(directory, idle, progress)
        result = _rewrite(directory, rewritten, retained, progress) if rewritten else Compacted()
        result.left += len(inspected) - len(idle)
        return result


def _worth_rewriting(directory: Path, idle: list[Segment], progress: Progress) -> tuple[list[Segment], list[Segment]]:
    """Segments to rewrite, the oldest first, and those that stay: without waste, and large or the only small one."""
    ordered = sorted(idle, key=lambda segment: (-segment.bytes, segment.name))
    waste = _waste(directory, [segment.name for segment in ordered])
    small = sum(segment.bytes < _LARGE for segment in ordered)
    rewritten: list[Segment] = []
    retained: list[Segment] = []
    for segment, wasted in zip(ordered, waste):
        wasteful = wasted.duplicates or wasted.holes or not segment.index_bytes or not segment.rows
        rewrite = (
            wasteful or (segment.bytes < _LARGE and small > 1) or bool(verify(_path(directory, segment), progress)[1])
        )
        (rewritten if rewrite else retained).append(segment)
    return sorted(rewritten, key=lambda segment: segment.modified), retained


def _path(directory: Path, segment: Segment) -> Path:
    return directory / f"{segment.name}.seg"


def _rewrite(directory: Path, rewritten: list[Segment], retained: list[Segment], progress: Progress) -> Compacted:
    compaction = native(ops.compact_open, str(directory), [segment.name for segment in retained])
    try:
        left = 0
        for segment in rewritten:
            left += not native(ops.compact_add, compaction, segment.name)
            progress(segment.bytes)
        return Compacted(**_report(ops.compact_finish, compaction), left=left)
    finally:
        ops.compact_close(compaction)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Excludes a second compact or prune. It would do no harm, so a file system without locks is fine."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise MaintenanceError(
            f"another compact or prune is running in {str(directory)!r}: wait until it ends"
        ) from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(directory: Path) -> None:
    """Removes unfinished folders and files of killed processes, and indexes without a segment."""
    for path in list(directory.iterdir()):
        if not _DERIVED.fullmatch(path.name) or path.is_symlink():
            continue
        if path.suffix == ".idx":
            if not path.with_suffix(".seg").exists():
                path.unlink(missing_ok=True)
        elif path.is_dir():
            _remove_leftover_folder(path)
        else:
            ops.segment_remove(str(path))


def _remove_leftover_folder(folder: Path) -> None:
    for path in segments(folder):
        if not ops.segment_remove(str(path)):
            return
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if _DERIVED.fullmatch(path.name):
                path.unlink()
        folder.rmdir()


# ---- pruning


def prunable(
    summaries: list[Summary], older_than: float | None = None, max_bytes: int | None = None
) -> list[tuple[Summary, Segment]]:
    """Segments that the rules remove, the oldest first; without a rule, all that no process may still write.

    Args:
        summaries: the folders.
        older_than: remove segments that were last written more than so many seconds ago.
        max_bytes: remove the oldest segments until all folders together have at most so many bytes.

    Returns:
        Each segment with the summary of its folder.
    """
    all_segments = [(summary, segment) for summary in summaries for segment in summary.segments]
    idle = [pair for pair in all_segments if pair[1].state != "written"]
    idle.sort(key=lambda pair: (pair[1].modified, pair[1].name))
    if older_than is None and max_bytes is None:
        return idle
    excess = -math.inf if max_bytes is None else sum(segment.all_bytes for _, segment in all_segments) - max_bytes
    oldest = -math.inf if older_than is None else time.time() - older_than
    chosen = []
    for summary, segment in idle:
        if segment.modified < oldest or excess > 0:
            chosen.append((summary, segment))
            excess -= segment.all_bytes
    return chosen


def prune(chosen: list[tuple[Summary, Segment]]) -> tuple[int, int]:
    """Removes segments, and folders that become empty.

    Returns:
        How many segments were removed, and their size in bytes.

    Raises:
        MaintenanceError: another compact or prune is running.
    """
    removed, freed = 0, 0
    for directory in {summary.directory for summary, _ in chosen}:
        with _locked(directory):
            for summary, segment in chosen:
                if summary.directory == directory and ops.segment_remove(str(_path(directory, segment))):
                    _path(directory, segment).with_suffix(".idx").unlink(missing_ok=True)
                    removed, freed = removed + 1, freed + segment.all_bytes
            _remove_leftovers(directory)
            _remove_if_empty(directory)
    return removed, freed


def _remove_if_empty(directory: Path) -> None:
    if segments(directory):
        return
    with contextlib.suppress(OSError):  # other files are in it
        (directory / META_FILE).unlink(missing_ok=True)
        directory.rmdir()
