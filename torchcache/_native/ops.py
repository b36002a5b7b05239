"""The native operations, typed: the only file that names ``torch.ops.torchcache``.

The library is loaded at the first use, not at import: it may have to be compiled then (`torchcache._native.build`).
A digest or key in a tensor is int64 ``[2]``: low half, high half. Ids name native objects until they are closed.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, cast

import torch
from torch import Tensor

from torchcache._native import build
from torchcache._utils.logs import WarnOnce
from torchcache._utils.torch_private import without_frame

_warnings = WarnOnce()
_THROUGH_THE_HOST = (
    "tensors on a GPU are copied to the host to be hashed: torchcache's native library was built without CUDA; to "
    "have them hashed where they are, install torchcache again (pip install --force-reinstall --no-deps .) where "
    "CUDA_HOME is a CUDA toolkit %s; python -m torchcache says what is built in"
)

Digest = tuple[int, int]  # of something on the host: low half, high half, as int64


@functools.cache
def _native() -> Any:
    torch.ops.load_library(str(build.library()))  # type: ignore[no-untyped-call]
    return torch.ops.torchcache


@functools.cache
def _direct(name: str) -> Any:
    """An operation without the Python frame that torch puts around it: for those of every hit."""
    return without_frame(getattr(_native(), name).default)


def _close(kind: str, number: int) -> None:
    """Closes a native object by a plain C function: finalizers call this, also while torch records a graph.

    An operation would become a part of that graph, such as a program that torch.export saves.
    """
    _closer(kind)(number)


@functools.cache
def _closer(kind: str) -> Any:
    function = getattr(ctypes.CDLL(str(build.library())), f"torchcache_{kind}_close")
    function.argtypes, function.restype = [ctypes.c_int64], None
    return function


# torch's stable interface does not pass these: see `bits`.
FOREIGN_DTYPES = frozenset(
    getattr(torch, name) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2") if hasattr(torch, name)
)


def bits(t: Tensor) -> Tensor:
    """The tensor in a dtype that the native code takes, bits unchanged."""
    return t.view(torch.uint8) if t.dtype in FOREIGN_DTYPES else t


def hashable(t: Tensor) -> Tensor:
    """The same bytes where and as the native code takes them: on the CPU where it cannot read the tensor's device."""
    t = t.resolve_conj().resolve_neg()
    if not t.is_cpu and not (t.is_cuda and cuda_architectures()):
        if t.is_cuda and torch.version.cuda:
            _warnings.warn("host", _THROUGH_THE_HOST, torch.version.cuda.partition(".")[0])
        t = t.cpu()
    return bits(t)


@functools.cache
def cuda_architectures() -> tuple[int, ...]:
    """100 × the compute capabilities that the library has code for, such as 900; none if it is one for the CPU only."""
    return tuple(_native().cuda_architectures.default())


def keys(rows: list[Tensor], call: Digest) -> Tensor:
    """Keys of a batch: rows ``[B, …]`` each, call digest → int64 ``[B, 2]``.

    Rows may be on CUDA devices if there are `cuda_architectures` (see `hashable`); keys are on the CPU. What was queued
    on the current stream comes first; one transfer and one wait for each device.

    Raises:
        RuntimeError: the current stream captures a CUDA graph.
    """
    return cast(Tensor, _native().keys.default(rows, *call))


def digests(tensors: list[Tensor]) -> Tensor:
    """Digest of each tensor as if it were one row → int64 ``[N, 2]`` on the CPU, wherever the tensors are."""
    return cast(Tensor, _native().digests.default(tensors))


def probes(tensors: list[Tensor]) -> list[int]:
    """For each tensor a number that stays the same while its address, shape and some bytes do; 0 off the CPU."""
    return cast("list[int]", _native().probes.default(tensors).tolist())


def watch_open(tensors: list[Tensor]) -> int:
    """Registers tensors that are not expected to change; they are kept alive."""
    return cast(int, _native().watch_open.default(tensors))


def watch_probe(watch: int) -> int:
    """A number that stays the same while addresses, shapes and some bytes of the tensors do.

    One wait for each CUDA device with tensors of the watch; none
    where `table_hash_and_read` probes it together with rows on that device.
    """
    return cast(int, _native().watch_probe.default(watch))


def watch_close(watch: int) -> None:
    _close("watch", watch)


def table_open() -> int:
    """A new key table: key → (layout, slot)."""
    return cast(int, _native().table_open.default())


def table_lookup(table: int, keys: Tensor) -> tuple[Tensor, Tensor, int]:
    """Slots int64 ``[B]`` (``-1 - j`` for the j-th distinct missing row), first rows of those ``[M]``, layout.

    The layout is -1 where nothing was found and -2 where rows of several layouts were.
    """
    return cast("tuple[Tensor, Tensor, int]", _native().table_lookup.default(table, keys))


def table_hash_and_read(
    table: int, rows: list[Tensor], call: Digest, watch: int
) -> tuple[bool, list[Tensor], int, int]:
    """True and the leaves ``[B, …]`` of a batch of which every row is there and in chunks that native code can read.

    Else false and `keys` and `table_lookup` of the batch: keys, slots, first rows of the distinct missing ones. Then
    the layout, and `watch_probe` of the watch, or 0 where that is 0.
    """
    taken: tuple[bool, list[Tensor], int, int] = _direct("table_hash_and_read")(table, rows, *call, watch)
    return taken


def table_read(table: int, keys: Tensor) -> tuple[list[Tensor], int]:
    """The leaves ``[B, …]`` of the rows with these keys, as `table_hash_and_read` gives them; and the layout."""
    return cast("tuple[list[Tensor], int]", _native().table_read.default(table, keys))


def table_add_chunk(table: int, layout: int, first: int, leaves: list[Tensor]) -> None:
    """Makes known where the rows of a layout from slot `first` on lie: contiguous ``[rows, …]``, one for each leaf."""
    _native().table_add_chunk.default(table, layout, first, leaves)


def table_write(
    table: int, keys: Tensor, layout: int, first: int, leaves: list[Tensor], max_rows: int
) -> tuple[int, int]:
    """Copies the distinct new rows of leaves ``[B, …]``, at most `max_rows`, to the slots from `first` on.

    Returns:
        How many were written, -1 if native code cannot write there (on a GPU, in a chunk that has too little room);
        and how many are new.
    """
    written: tuple[int, int] = _direct("table_write")(table, keys, layout, first, leaves, max_rows)
    return written


def table_insert(table: int, keys: Tensor, layout: int, first: int) -> None:
    """Gives the keys the slots ``first``, ``first + 1`` and so on."""
    _native().table_insert.default(table, keys, layout, first)


def table_find(table: int, low: int) -> tuple[int, int]:
    """Layout and slot of the key with that low half; layout -1 if there is none."""
    return cast("tuple[int, int]", _native().table_find.default(table, low))


def table_low_keys(table: int) -> Tensor:
    """Low halves of all keys, int64 ``[N]``, in no order."""
    return cast(Tensor, _native().table_low_keys.default(table))


def table_close(table: int) -> None:
    _close("table", table)


WARNINGS = 1  # there are `store_warnings`
FULL = 2  # `store_stats` says so, too


def store_open(
    directory: str,
    max_bytes: int,
    zstd: bool,
    level: int,
    threads: int,
    mmap: bool,
    queue_bytes: int,
) -> int:
    """Opens the store of a directory; damage or a missing directory is an empty store and a warning."""
    return cast(
        int,
        _native().store_open.default(directory, max_bytes, zstd, level, threads, mmap, queue_bytes),
    )


def store_lookup(store: int, keys: Tensor) -> tuple[Tensor, str]:
    """Which rows are there: bool ``[B]``, and the layout of those ("" if none)."""
    return cast("tuple[Tensor, str]", _native().store_lookup.default(store, keys))


def store_read(store: int, keys: Tensor, layout: str, leaves: list[Tensor]) -> Tensor:
    """Reads rows into contiguous CPU tensors, one for each leaf → bool ``[B]``: read and verified."""
    return cast(Tensor, _native().store_read.default(store, keys, layout, leaves))


def store_lookup_and_read(
    store: int, keys: Tensor, layout: str, only: bool, templates: list[Tensor], pinned: bool
) -> tuple[Tensor, list[Tensor], str, int]:
    """Reads the rows that are there if they have this layout; with `only` rows of other layouts count as missing.

    Args:
        store: an id.
        keys: int64 ``[B, 2]``.
        layout: that of the rows, as far as it is known; an empty string reads nothing.
        only: look for rows of this layout alone.
        templates: the leaves of the layout as CPU tensors ``[0, …]``.
        pinned: read into pinned memory.

    Returns:
        Positions in `keys` of the rows that were read and verified (int64 ``[F]``), their leaves ``[F, …]`` (none if
        there are no such rows), the layout of the rows that are there (an empty string if there are none), and alerts:
        `WARNINGS` and `FULL`, or'ed.
    """
    found: tuple[Tensor, list[Tensor], str, int] = _direct("store_lookup_and_read")(
        store, keys, layout, only, templates, pinned
    )
    return found


def store_write(store: int, keys: Tensor, layout: str, leaves: list[Tensor]) -> tuple[int, int]:
    """Queues copies of the rows for writing → how many of the first ones were admitted, and alerts as above."""
    written: tuple[int, int] = _direct("store_write")(store, keys, layout, leaves)
    return written


def store_flush(store: int) -> None:
    """Returns when everything queued is written or given up."""
    _native().store_flush.default(store)


def store_stats(store: int) -> list[int]:
    """In the order of ``csrc/store/options.h``'s Stats."""
    return cast("list[int]", _native().store_stats.default(store))


def store_warnings(store: int) -> list[str]:
    """What has gone wrong since the last time, each thing once."""
    return cast("list[str]", _native().store_warnings.default(store))


def store_close(store: int) -> None:
    _close("store", store)


def segment_inspect(directory: str, name: str) -> str:
    """What is in a segment, as JSON; the fields of this and the next ones: ``csrc/store/maintenance/report.h``."""
    return cast(str, _native().segment_inspect.default(directory, name))


def segment_verify(directory: str, name: str, position: int, bytes: int) -> str:
    """Checks so many bytes of a segment from a position on → JSON: the next position, rows, damage."""
    return cast(str, _native().segment_verify.default(directory, name, position, bytes))


def segment_waste(directory: str, names: list[str]) -> str:
    """Duplicate rows and ranges without a block, for each segment → JSON."""
    return cast(str, _native().segment_waste.default(directory, names))


def segment_keys(directory: str, name: str, layout: str) -> Tensor:
    """Keys of the rows of one layout, int64 ``[N, 2]``, in the order of the file."""
    return cast(Tensor, _native().segment_keys.default(directory, name, layout))


def segment_remove(path: str) -> bool:
    """Removes a file that no process writes any more; False if one may."""
    return cast(bool, _native().segment_remove.default(path))


def compact_open(directory: str, retained: list[str]) -> int:
    """A compaction; rows of the retained segments are not copied from others."""
    return cast(int, _native().compact_open.default(directory, retained))


def compact_add(compaction: int, name: str) -> bool:
    """Copies the rows of a segment; False if a process may still write it."""
    return cast(bool, _native().compact_add.default(compaction, name))


def compact_finish(compaction: int) -> str:
    """Puts the new segments into place and removes the old ones → counts as JSON."""
    return cast(str, _native().compact_finish.default(compaction))


def compact_close(compaction: int) -> None:
    _close("compaction", compaction)
