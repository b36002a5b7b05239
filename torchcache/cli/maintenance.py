"""Maintenance of cache directories, beside the processes that use them: what to look at, check, rewrite and remove.

Decisions stand here; bytes are moved natively (csrc/store/maintenance). No function touches a
segment that a process may still write. A cache directory holds a folder for each module hash; both are accepted.
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
_LARGE = 512 << 20  # bytes of a segment that is not worth rewriting unless something in it is waste
PART = 64 << 20  # bytes between two signs of progress


def stores(directory: Path) -> list[Path]:
    """The folders of a cache directory that hold rows, by name; the directory itself if it is such a folder."""
    if not directory.exists():
        raise MaintenanceError(f"there is no directory {str(directory)!r}: name the persistent_cache_dir of a cache")
    if not directory.is_dir():
        raise MaintenanceError(f"{str(directory)!r} is a file: name the persistent_cache_dir of a cache")
    try:
        if _is_store(directory):
            return [directory]
        inside = sorted(directory.iterdir())
        found = [path for path in inside if path.is_dir() and not path.is_symlink() and _is_store(path)]
    except OSError as error:
        raise MaintenanceError(f"{error.filename!r} cannot be read: {error.strerror}") from error
    if inside and not found:
        raise MaintenanceError(
            f"{str(directory)!r} is no cache directory: neither it nor a folder in it holds {META_FILE} or *.seg files"
        )
    return found


def _is_store(directory: Path) -> bool:
    return (directory / META_FILE).is_file() or any(_SEGMENT.fullmatch(name) for name in os.listdir(directory))


def segments(directory: Path) -> list[Path]:
    """The segments of a folder; as for readers, only regular files are."""
    found = (path for path in directory.iterdir() if _SEGMENT.fullmatch(path.name))
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


def native(operation: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a native operation; what it could not read or write is a MaintenanceError."""
    try:
        return operation(*arguments)
    except RuntimeError as error:
        raise MaintenanceError(str(error).partition("\n")[0]) from error


def _reported(operation: Callable[..., str], *arguments: Any) -> Any:
    """The result of a native operation that answers with JSON: ``csrc/store/maintenance/report.h``."""
    return json.loads(native(operation, *arguments))


# ---- what is there


@dataclasses.dataclass
class Group:
    """Rows of one layout and codec."""

    layout: str
    codec: str
    rows: int = 0
    bytes: int = 0
    stored_bytes: int = 0


@dataclasses.dataclass
class Segment:
    name: str
    state: str  # sealed: has an index; left: has none and nobody writes it; written: a process may write it
    bytes: int
    index_bytes: int
    blocks: int
    rows: int
    modified: float
    groups: list[Group] = dataclasses.field(repr=False)

    @property
    def all_bytes(self) -> int:
        return self.bytes + self.index_bytes


@dataclasses.dataclass
class Summary:
    """One folder of a cache directory."""

    directory: Path
    module_hash: str
    module: str
    segments: list[Segment]

    @property
    def rows(self) -> int:
        return sum(segment.rows for segment in self.segments)

    @property
    def bytes(self) -> int:
        return sum(segment.all_bytes for segment in self.segments)

    @property
    def modified(self) -> float | None:
        return max((segment.modified for segment in self.segments), default=None)

    def groups(self) -> list[Group]:
        """Layouts of all segments, those with most rows first."""
        total: dict[tuple[str, str], Group] = {}
        for group in (group for segment in self.segments for group in segment.groups):
            known = total.setdefault((group.layout, group.codec), Group(group.layout, group.codec))
            known.rows += group.rows
            known.bytes += group.bytes
            known.stored_bytes += group.stored_bytes
        return sorted(total.values(), key=lambda group: (-group.rows, group.layout))


def summarize(directory: Path) -> Summary:
    found = []
    for path in segments(directory):
        with contextlib.suppress(FileNotFoundError):  # somebody else's compaction
            found.append(_segment(path))
    return Summary(directory, directory.absolute().name, _module(directory), found)


def _segment(path: Path) -> Segment:
    modified = path.stat().st_mtime
    report = _reported(ops.segment_inspect, str(path.parent), path.stem)
    groups = [Group(**group) for group in report["groups"]]
    state = "written" if not report["idle"] else "sealed" if report["index_bytes"] else "left"
    rows = sum(group.rows for group in groups)
    return Segment(path.stem, state, report["bytes"], report["index_bytes"], report["blocks"], rows, modified, groups)


def _module(directory: Path) -> str:
    name = read_meta(directory).get("class")
    if not isinstance(name, str):
        return "?"
    return name if name.isprintable() else ascii(name)[1:-1]  # it goes to a terminal


def duplicates(summary: Summary) -> int:
    """Rows that are there more than once, apart from one of each."""
    names = [segment.name for segment in summary.segments]
    return sum(waste.duplicates for waste in _waste(summary.directory, names))


@dataclasses.dataclass
class _Waste:
    """What a compaction would leave out of a segment: rows of earlier segments, ranges without a block."""

    duplicates: int
    holes: int


def _waste(directory: Path, names: list[str]) -> list[_Waste]:
    return [_Waste(**waste) for waste in _reported(ops.segment_waste, str(directory), names)]


# ---- checking


@dataclasses.dataclass
class Damage:
    segment: str
    kind: str
    offset: int
    bytes: int
    rows: int | None  # None where it cannot be known

    def __str__(self) -> str:
        rows = "" if self.rows is None else f", {self.rows} row{'s' * (self.rows != 1)}"
        return f"{self.segment}: {self.kind} at offset {self.offset}, {self.bytes} bytes{rows}"


def verify(path: Path, progress: Progress = lambda n: None) -> tuple[int, list[Damage]]:
    """Checks every checksum of a segment and its index: rows that were looked at, and what is damaged.

    What a writer has not finished, or did not finish before it was killed, is no damage.
    """
    position, done, rows = 64, False, 0
    found: list[Damage] = []
    while not done:
        report = _reported(ops.segment_verify, str(path.parent), path.stem, position, PART)
        rows += report["rows"]
        found += [Damage(path.name, **damage) for damage in report["damage"]]
        progress(report["position"] - position)
        position, done = report["position"], report["done"]
    return rows, found


# ---- rewriting


@dataclasses.dataclass
class Compacted:
    """What a compaction did; `left` are segments that some process may still write."""

    rows: int = 0
    duplicates: int = 0
    damaged: int = 0
    removed: int = 0
    written: int = 0
    left: int = 0


def compact(directory: Path, progress: Progress = lambda n: None) -> Compacted:
    """Many segments into few, without duplicates and damage, while readers and writers go on.

    Takes up to 64 bytes of memory a row, and room on the disk for about two segments.
    """
    with _alone(directory):
        _sweep(directory)
        found = summarize(directory).segments
        idle = [segment for segment in found if segment.state != "written"]
        rewritten, retained = _worth_rewriting(directory, idle, progress)
        result = _rewrite(directory, rewritten, retained, progress) if rewritten else Compacted()
        result.left += len(found) - len(idle)
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
        return Compacted(**_reported(ops.compact_finish, compaction), left=left)
    finally:
        ops.compact_close(compaction)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keeps out a second compact or prune. It would do no harm, so file systems that cannot lock do not matter."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise MaintenanceError(f"another compact or prune is at work in {str(directory)!r}: wait for it") from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def _sweep(directory: Path) -> None:
    """Removes what killed processes left: unfinished folders and files, and indexes without a segment."""
    for path in list(directory.iterdir()):
        if not _DERIVED.fullmatch(path.name) or path.is_symlink():
            continue
        if path.suffix == ".idx":
            if not path.with_suffix(".seg").exists():
                path.unlink(missing_ok=True)
        elif path.is_dir():
            _sweep_folder(path)
        else:
            ops.segment_remove(str(path))


def _sweep_folder(folder: Path) -> None:
    for path in segments(folder):
        if not ops.segment_remove(str(path)):
            return
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if _DERIVED.fullmatch(path.name):
                path.unlink()
        folder.rmdir()


# ---- removing


def prunable(
    summaries: list[Summary], older_than: float | None = None, max_bytes: int | None = None
) -> list[tuple[Summary, Segment]]:
    """Segments to remove, the oldest first; all of them where there is no rule. None that may still be written.

    Args:
        older_than: seconds since a segment was last written.
        max_bytes: what may stay of all summaries together; the oldest segments go first.
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
    """Removes segments, and folders that have none left: how many, and their bytes."""
    removed, freed = 0, 0
    for directory in {summary.directory for summary, _ in chosen}:
        with _alone(directory):
            for summary, segment in chosen:
                if summary.directory == directory and ops.segment_remove(str(_path(directory, segment))):
                    _path(directory, segment).with_suffix(".idx").unlink(missing_ok=True)
                    removed, freed = removed + 1, freed + segment.all_bytes
            _sweep(directory)
            _remove_if_empty(directory)
    return removed, freed


def _remove_if_empty(directory: Path) -> None:
    if segments(directory):
        return
    with contextlib.suppress(OSError):  # something else is in it
        (directory / META_FILE).unlink(missing_ok=True)
        directory.rmdir()
