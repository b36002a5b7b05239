"""The disk tier: the native store of one directory, shared by all caches of a process that use the directory.

A failure here is a miss and a warning, never an exception in a training step.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import weakref
from collections.abc import Callable, Mapping
from multiprocessing import util
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from torchcache._native import ops
from torchcache._utils.locks import lock, module_lock
from torchcache._utils.logs import WarnOnce
from torchcache.options import Options
from torchcache.tiers.layout import Layout
from torchcache.tiers.meta import META_FILE, write_meta
from torchcache.tiers.tier import Rows, TierStats

T = TypeVar("T")

QUEUE_BYTES = 64 << 20  # rows that wait to be written
_MAX_ROW_BYTES = 1 << 30  # docs/format.md

_FULL = "the disk cache is full: new rows are computed but not stored; raise max_persistent_cache_size to store more"


class DiskTier:
    """Rows on disk. A thread writes them; lookups already find rows that wait to be written."""

    name = "disk"
    is_on_host = True

    def __init__(self, directory: Path, options: Options, warnings: WarnOnce | None = None) -> None:
        self.directory = directory
        self._meta: Mapping[str, Any] | None = None
        self._meta_file = os.path.join(directory, META_FILE)
        self._warnings = WarnOnce("disk cache") if warnings is None else warnings
        self._disk_warnings = WarnOnce("disk cache")
        self._store = _shared_store(directory, options)
        self._layouts: dict[str, Layout | None] = {}
        self._last_read: Layout | None = None  # a guess of the layout of the next rows
        self._report()

    @property
    def is_described(self) -> bool:
        """Whether `describe` was called."""
        return self._meta is not None

    def lookup(self, keys: Tensor) -> Tensor:
        """Which of these rows the store has: bool ``[B]``."""
        present: Tensor = self._store.call(ops.store_lookup, keys)[0]
        while True:  # once for each layout
            absent = (~present).nonzero().squeeze(1)
            if absent.shape[0] == 0:
                return present
            others = self._store.call(ops.store_lookup, keys.index_select(0, absent))[0]
            if not others.any():
                return present
            present[absent] = others

    def read(self, keys: Tensor, layout: Layout | None = None, pin: bool = False) -> Rows | None:
        """See `Tier.read`. Rows that cannot be read are missing."""
        try:
            return self._read(keys, layout, pin)
        except (RuntimeError, OSError, MemoryError, ValueError) as error:
            self._disk_warnings.warn("read", "reading failed, so the rows are computed again: %s", error)
            return None

    def _read(self, keys: Tensor, required: Layout | None, pin: bool) -> Rows | None:
        layout = required or self._last_read
        rows, stored = self._read_layout(keys, layout, required is not None, pin)
        if rows is None and required is None and stored and (layout is None or stored != layout.json):
            layout = self._layout(stored)
            rows, _ = self._read_layout(keys, layout, True, pin) if layout is not None else (None, "")
        self._last_read = layout
        return rows

    def _read_layout(self, keys: Tensor, layout: Layout | None, only: bool, pin: bool) -> tuple[Rows | None, str]:
        """The rows, if they have this layout, and the JSON of the layout that they have.

        Args:
            keys: int64 ``[B, 2]``.
            layout: a guess; None: no rows are read.
            only: ignore rows of other layouts.
            pin: read into pinned memory.
        """
        layout_json, empty = ("", []) if layout is None else (layout.json, [ops.bits(t) for t in layout.no_rows])
        positions, leaves, stored, alerts = self._store.call(
            ops.store_lookup_and_read, keys, layout_json, only, empty, pin
        )
        if alerts & ops.WARNINGS:
            self._report()
        if not leaves or layout is None:
            return None, stored
        leaves = [t if t.dtype is leaf.stored else t.view(leaf.stored) for t, leaf in zip(leaves, layout.leaves)]
        return Rows(None if positions.shape[0] == keys.shape[0] else positions, layout, leaves), stored

    def write(self, keys: Tensor, layout: Layout, leaves: list[Tensor]) -> None:
        """Queues copies of the rows, as far as the limit of the directory allows."""
        try:
            self._write(keys, layout, leaves)
        except (RuntimeError, OSError, MemoryError, ValueError) as error:
            self._disk_warnings.warn("write", "writing failed, so the rows are not stored: %s", error)

    def _write(self, keys: Tensor, layout: Layout, leaves: list[Tensor]) -> None:
        if layout.row_bytes > _MAX_ROW_BYTES:
            self._disk_warnings.warn(
                "row",
                "rows of %d bytes are not stored on disk: the limit is 1 GiB, so cache smaller outputs",
                layout.row_bytes,
            )
            return
        self._layouts.setdefault(layout.json, layout)
        on_host = [ops.bits(t.cpu().contiguous()) for t in leaves]
        written, alerts = self._store.call(ops.store_write, keys.contiguous(), layout.json, on_host)
        # Asked every time, for 2 µs: the directory may have been deleted, and begun again by this write.
        if written and self._meta is not None and not os.path.exists(self._meta_file):
            with contextlib.suppress(OSError):
                write_meta(self.directory, self._meta)
        if alerts & ops.WARNINGS:
            self._report()
        if alerts & ops.FULL:
            self._warnings.warn("disk full", _FULL)

    def describe(self, meta: Mapping[str, Any]) -> None:
        """Sets the content of ``meta.json``, which is written with the first rows if the directory has none."""
        self._meta = meta

    def stats(self) -> TierStats:
        """The counters of the store: `Stats` in csrc/store/options.h."""
        rows, written, queued, _, damaged, dropped, full = self._store.call(ops.store_stats)
        return TierStats(rows, written, queued, damaged, dropped, bool(full))

    def flush(self) -> None:
        """Waits until every row is in a file, or was dropped with a warning."""
        self._store.call(ops.store_flush)
        self._report()

    def clear(self) -> None:
        """Removes every row of the directory, also those of other processes.

        Raises:
            OSError: a file cannot be removed.
        """
        self._store.remove_rows()

    def close(self) -> None:
        """Flushes. The store is closed when the last cache of the process that uses it is deleted."""
        self.flush()

    def _layout(self, layout_json: str) -> Layout | None:
        if layout_json not in self._layouts:
            layout = Layout.from_json(layout_json)
            if layout is not None and layout.row_bytes > _MAX_ROW_BYTES:
                layout = None
            if layout is None:
                self._disk_warnings.warn(
                    layout_json,
                    "rows are computed again, because this process cannot rebuild their layout (was a class of the "
                    "output not imported?): %s",
                    layout_json,
                )
            self._layouts[layout_json] = layout
        return self._layouts[layout_json]

    def _report(self) -> None:
        for message in self._store.call(ops.store_warnings):
            self._disk_warnings.warn(message, "%s", message)


class _Store:
    """A native store. It is flushed and closed when nobody uses it any more, or at a normal exit of the process."""

    def __init__(self, directory: Path, options: Options) -> None:
        self._directory = directory
        self._options = options
        self._lock = lock(self)  # held while rows are removed
        self._ids = [self._open()]  # only the last one is open
        close = functools.partial(_close_all, self._ids)
        weakref.finalize(self, _close_early, close).atexit = False
        # The atexit of finalize would run after the temporary directory is deleted.
        atexit.register(close)
        # Children that multiprocessing forks exit without atexit and without their parent's finalizers.
        _close_at_child_exit(close)
        util.register_after_fork(close, _close_at_child_exit)

    def call(self, operation: Callable[..., T], *args: Any) -> T:
        """Calls an operation of the store, which is opened again if `remove_rows` has closed it."""
        number = self._ids[-1]
        try:
            return operation(number, *args)
        except ValueError:
            if _is_open(number):
                raise
            return operation(self._open_again(), *args)

    def _open_again(self) -> int:
        """The id of the open store. A call opens it, not `remove_rows`, which may be interrupted anywhere."""
        with self._lock:
            if not _is_open(self._ids[-1]):
                self._ids.append(self._open())
            return self._ids[-1]

    def remove_rows(self) -> None:
        """Removes every row of the directory, also those of other processes, for which they are then missing.

        Raises:
            OSError: a file cannot be removed; the others are removed first.
        """
        errors = []
        with self._lock:
            ops.store_close(self._ids[-1])
            for path in (p for suffix in (".seg", ".idx") for p in self._directory.glob("?" * 32 + suffix)):
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    def _open(self) -> int:
        options = self._options
        return ops.store_open(
            str(self._directory),
            options.max_persistent_cache_size,
            options.zstd_compression,
            options.zstd_compression_level,
            options.zstd_compression_threads,
            options.use_mmap_on_load,
            QUEUE_BYTES,
        )


def _is_open(number: int) -> bool:
    try:
        ops.store_stats(number)
    except ValueError:
        return False
    return True


def _close_all(ids: list[int]) -> None:
    for number in ids:
        ops.store_close(number)


def _close_early(close: functools.partial[None]) -> None:
    atexit.unregister(close)
    close()


def _close_at_child_exit(close: functools.partial[None]) -> None:
    util.Finalize(None, close, exitpriority=10)


_stores: weakref.WeakValueDictionary[tuple[object, ...], _Store] = weakref.WeakValueDictionary()
_stores_lock = module_lock(__name__, "_stores_lock")


def _shared_store(directory: Path, options: Options) -> _Store:
    key = (
        os.path.realpath(directory),
        options.max_persistent_cache_size,
        options.zstd_compression,
        options.zstd_compression_level,
        options.zstd_compression_threads,
        options.use_mmap_on_load,
    )
    with _stores_lock:
        store = _stores.get(key)
        if store is None:
            store = _stores[key] = _Store(directory, options)
        return store
