"""Compacts and prunes cache directories, while other processes use them.

This module decides, native code (csrc/store/maintenance) moves the bytes. No function changes a segment that a process
may still write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from torchcache._native import ops
from torchcache.cli.inspection import Segment, Summary, find_waste, native, read_report, segments, summarize, verify
from torchcache.cli.progress import Progress
from torchcache.errors import MaintenanceError
from torchcache.tiers.meta import META_FILE

_DERIVED = re.compile(r"([0-9a-f]{32})\.(idx|tmp)")
_LARGE = 512 << 20  # bytes; compact rewrites a segment of this size only if it wastes space


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
    waste = find_waste(directory, [segment.name for segment in ordered])
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
        return Compacted(**read_report(ops.compact_finish, compaction), left=left)
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
