"""The cache of one module instance or function: look up, compute what is missing, keep it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchcache._native import ops
from torchcache._utils.lazy import lazy
from torchcache._utils.locks import lock
from torchcache._utils.logs import Once, logger
from torchcache.engine import bypass
from torchcache.engine.call import Binder, Call
from torchcache.engine.compute import Computer, Uncacheable
from torchcache.engine.counts import CacheInfo, Counts
from torchcache.engine.explain import Asked, Explanation, differing, key_parts, meta, since_directory
from torchcache.engine.keys import Keys, Kind, autocast
from torchcache.engine.mode import Mode
from torchcache.engine.outputs import output
from torchcache.identity.fingerprint import Fingerprint
from torchcache.identity.state import State, Uninitialized, Unwatchable
from torchcache.options import Options
from torchcache.tiers import staging, temporary
from torchcache.tiers.chain import Tiers, gather, others
from torchcache.tiers.disk import DiskTier
from torchcache.tiers.keeper import Keeper
from torchcache.tiers.layout import Layout
from torchcache.tiers.memory import Found, MemoryTier, RowView

Forward = Callable[..., Any]


class Cache:
    """What ``module.cache_instance`` is. Cheap to make: everything in it is made when first needed.

    Attributes that are not here are private. Thread-safe.
    """

    def __init__(
        self,
        target: nn.Module | Forward,
        forward: Forward,
        takes_self: bool,
        init: bytes,
        options: Callable[[], Options],
    ) -> None:
        self._target = target
        self._forward = forward
        self._takes_self = takes_self
        self._init = init
        self._options_now = options
        self._lock = lock(self)
        self._counts = Counts()
        self.filling = False  # rows are expected to be new
        self._last: Asked | None = None

    # ---- what it is

    @lazy
    def options(self) -> Options:
        return self._options_now()

    @lazy
    def _fingerprint(self) -> Fingerprint:
        return Fingerprint(self._target, self._forward, self._init, self.options)

    @property
    def module_hash(self) -> str:
        """Short name of code, init arguments and options; the name of the subdirectory on disk."""
        return self._fingerprint.module_hash

    @lazy
    def cache_dir(self) -> Path | None:
        """The directory of this module hash; None for a cache in memory only."""
        if not self.options.persistent:
            return None
        base = self.options.persistent_cache_dir
        return (temporary.directory() if base is None else Path(base)) / self.module_hash

    @property
    def persistent(self) -> bool:
        return self.options.persistent

    @property
    def cache(self) -> Mapping[int, Any]:
        """The rows in memory by the low 64 bits of their keys (as int64); values are copies of outputs ``[1, …]``."""
        staging.land()
        return RowView(self._memory)

    @property
    def is_memory_cache_full(self) -> bool:
        staging.land()
        return self._memory.full

    @property
    def is_persistent_cache_full(self) -> bool:
        staging.land()
        return self._disk is not None and self._disk.stats().full

    @property
    def memory_cache_size(self) -> int:
        """Bytes of rows in memory."""
        staging.land()
        return self._memory.bytes

    @property
    def persistent_cache_size(self) -> int:
        """Bytes of the files that this process has written, and of the rows that wait to be written."""
        staging.land()
        return 0 if self._disk is None else self._disk.stats().bytes_written

    def info(self) -> CacheInfo:
        """Counters, in the manner of ``functools.lru_cache``."""
        staging.land()
        counts = self._counts
        disk = None if self._disk is None else self._disk.stats()
        return CacheInfo(
            counts.memory,
            counts.disk,
            counts.misses,
            self._memory.rows,
            self._memory.bytes,
            disk.rows if disk else 0,
            disk.bytes_written if disk else 0,
            disk.damaged_rows if disk else 0,
            disk.dropped_rows if disk else 0,
            disk.queued_rows if disk else 0,
        )

    # ---- what can be done with it

    def hash_tensor(self, *args: Any, **kwargs: Any) -> Tensor:
        """The low 64 bits of the keys of a call's rows, int64 ``[B]``. The arguments are those of forward."""
        return self.keys(*args, **kwargs)[:, 0].clone()

    def keys(self, *args: Any, **kwargs: Any) -> Tensor:
        """The keys of a call's rows, int64 ``[B, 2]``. The arguments are those of forward."""
        return ops.keys(*self._key_parts(self._bound(args, kwargs))[:2])

    def tiers(self) -> Tiers:
        """The rows by key, without what computes them."""
        return Tiers(self._memory, self._disk, self.options)

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """Which tier has how many of a call's rows, and what has changed in their keys if some are missing.

        The arguments are those of forward; nothing is computed.
        """
        call = self._bound(args, kwargs)
        rows, digest, kind = self._key_parts(call)
        staging.land()
        found = self._memory.lookup(ops.keys(rows, digest))
        absent = found.keys[found.slots < 0]
        on_disk = 0 if self._disk is None or not len(absent) else self._disk.count(absent)
        return self._explanation(call, kind, call.batch - len(absent), on_disk)

    def rehash(self) -> None:
        """Looks at every byte of the state anew: for edits of single elements that bypass torch."""
        with self._lock:
            self.__dict__.pop("_state", None)

    def flush(self) -> None:
        """Returns when every row kept so far is in a file."""
        staging.land()
        if self._disk is not None:
            self._disk.flush()

    def clear(self, persistent: bool = False) -> None:
        """Forgets the rows in memory; with `persistent` also removes those of this module hash on disk."""
        staging.land()
        self._memory.clear()
        if persistent and self._disk is not None:
            self._disk.remove_rows()

    def close(self) -> None:
        """Flushes, and frees the memory. The cache can be used again: it then starts as a new one would."""
        self.flush()
        with self._lock:
            for name in ("_keeper", "_disk", "_memory", "_state"):
                self.__dict__.pop(name, None)

    # ---- one call

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of ``forward(*args, **kwargs)``, row by row from the cache where it has them."""
        if bypass.of_surroundings() is not None:
            return forward(*args, **kwargs)
        if (reason := bypass.of_hooks()) is not None:
            self._once.warn("hooks", "calls are not cached while %s", reason)
            return forward(*args, **kwargs)
        call = self._binder.bind(args, kwargs)
        if call is None or call.batch == 0 or bypass.of_call(call) is not None:
            return forward(*args, **kwargs)
        try:
            found, kind = self._take(call)
        except Uninitialized:
            return forward(*args, **kwargs)
        except Unwatchable as error:
            self._once.warn("unwatchable", "calls are not cached: %s", error)
            return forward(*args, **kwargs)
        if found is None:
            return forward(*args, **kwargs)
        if isinstance(found, Found):
            return _Assembly(self, forward, call, kind, found).output()
        if self._state is not None and self._state.live:
            self._warn_of_parameters()
        self._last = self._asked(call, kind)
        self._counts.memory += call.batch
        return output(*found, call)

    def _take(self, call: Call) -> tuple[tuple[Layout, list[Tensor]] | Found | None, Kind]:
        """What memory has of a call, and the kind of it; None for one that must not be cached.

        The look at the bytes of the state rides along; where they have changed, all is done again.
        """
        rows, digest, kind = self._key_parts(call, probe=False)
        staging.land()
        if self._computer.refuses(kind):
            return None, kind
        state = self._state
        watch = None if state is None else state.watch
        try:
            found, seen = self._memory.take(rows, digest, 0 if watch is None else watch.id)
            if state is not None and watch is not None and not state.still(seen):
                rows, digest, kind = self._key_parts(call)
                found, _ = self._memory.take(rows, digest)
        except (RuntimeError, ValueError) as error:  # a dtype without bytes, a tensor without a storage
            self._once.warn("unreadable", "calls are computed whose rows cannot be looked up: %s", error)
            return None, kind
        return found, kind

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        call = self._binder.bind(args, kwargs)
        if call is None:
            raise TypeError(
                f"this call has no keys: its arguments do not fit the signature of {self._fingerprint.name}, or one of "
                "them is a tensor subclass or nested"
            )
        return call

    def _key_parts(self, call: Call, probe: bool = True) -> tuple[list[Tensor], ops.Digest, Kind]:
        """See `Keys.parts` and `State.digest`; and the kind of the call."""
        with self._lock:
            state = self._state
            digest = b"" if state is None else state.digest(probe)
            mode = self._mode.flags(0 if state is None else state.generation)
            reason = self._mode.reason
        kind = (call.form.description, mode, autocast(call.device_type))
        if reason is not None:
            self._computer.refuse(kind, reason)
        return *self._keys.parts(call, kind, digest), kind

    def _explanation(self, call: Call, kind: Kind, in_memory: int, on_disk: int) -> Explanation:
        parts = key_parts(*self._asked(call, kind))
        return Explanation(
            call.batch,
            in_memory,
            on_disk,
            None if self._last is None else differing(parts, key_parts(*self._last)),
            None if self.cache_dir is None else since_directory(self.cache_dir, self._fingerprint, parts),
        )

    def _asked(self, call: Call, kind: Kind) -> Asked:
        """What the keys of a call were made of, without its rows."""
        state = {} if self._state is None else self._state.parts
        return call.form, kind, state

    def _meta(self) -> dict[str, Any]:
        return meta(self._fingerprint, self.options, {} if self._last is None else key_parts(*self._last))

    def _keep(self, keys: Tensor, layout: Layout, leaves: list[Tensor], on_disk: bool) -> None:
        self._warn_of_parameters()
        self._keeper.keep(keys, layout, leaves, on_disk)

    def _warn_of_parameters(self) -> None:
        if self._state is not None and (names := self._state.live_names):
            self._once.warn(
                "grad",
                "%s require grad: outputs come back detached, so these will not be trained, and every call hashes "
                "them in full; freeze them by requires_grad_(False), or leave what is trained out of the cached module",
                ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else ""),
            )

    def _count(self, memory: int, disk: int, misses: int) -> None:
        counts = self._counts
        counts.memory += memory
        counts.disk += disk
        counts.misses += misses
        if misses and not self.filling and counts.useless:
            self._once.warn(
                "useless",
                "of %d rows only %d were found: normal in a first pass over the data; if rows should repeat, is there "
                "random augmentation in front of the module?",
                counts.rows,
                counts.found,
            )

    # ---- what is made when first needed

    @lazy
    def _once(self) -> Once:
        return Once(self._fingerprint.name)

    @lazy
    def _computer(self) -> Computer:
        return Computer(self._once, self._lock, self.options.cache_dtype, self._fingerprint.generators)

    @lazy
    def _binder(self) -> Binder:
        return Binder(self._forward, self._takes_self)

    @lazy
    def _keys(self) -> Keys:
        return Keys(self.options.subsample_count if self.options.subsample else None)

    @lazy
    def _mode(self) -> Mode:
        return Mode(self._fingerprint.modules)

    @lazy
    def _state(self) -> State | None:
        return self._fingerprint.state()

    @lazy
    def _keeper(self) -> Keeper:
        return Keeper(self._memory, self._disk, self._once)

    @lazy
    def _memory(self) -> MemoryTier:
        return MemoryTier(self.options.memory_cache_device, self.options.max_memory_cache_size)

    @lazy
    def _disk(self) -> DiskTier | None:
        if self.cache_dir is None:
            return None
        return DiskTier(self.cache_dir, self.options, self._meta)


class _Assembly:
    """The output of one call whose rows come from several places."""

    def __init__(self, cache: Cache, forward: Forward, call: Call, kind: Kind, found: Found) -> None:
        self._cache = cache
        self._forward = forward
        self._call = call
        self._kind = kind
        self._found = found

    def output(self) -> Any:
        try:
            return self._from_everywhere()
        except _OtherLayout:
            return self._forward(*self._call.args, **self._call.kwargs)
        except Uncacheable as found:
            if found.output is not None:
                return found.output
            found.noise.rewind()
            return self._forward(*self._call.args, **self._call.kwargs)

    def _from_everywhere(self) -> Any:
        cache, found, call = self._cache, self._found, self._call
        if found.mixed:
            raise _OtherLayout
        missing = found.missing  # [M] distinct rows of the batch
        keys = found.keys.index_select(0, missing)
        layout = found.layout
        parts: list[list[Tensor]] = []  # leaves of the missing rows
        place: Tensor | None = None  # [M] of each of those in the parts; None: they are in order
        absent: Tensor | None = None  # those of them that no tier has; None: all
        on_disk = None if cache._disk is None else cache._disk.fetch(keys, layout, pin=call.device_type == "cuda")
        if on_disk is not None:
            where, layout, leaves = on_disk
            cache._keep(keys.index_select(0, where), layout, leaves, on_disk=True)
            parts.append(leaves)
            absent, place = others(where, len(missing))
        elif logger.isEnabledFor(logging.DEBUG):
            name = cache._fingerprint.name
            logger.debug("%s: %s", name, cache._explanation(call, self._kind, int((found.slots >= 0).sum()), 0))
        cache._last = cache._asked(call, self._kind)
        if absent is not None:
            missing, keys = missing.index_select(0, absent), keys.index_select(0, absent)
        if len(missing):
            computed, leaves = cache._computer.rows(self._forward, call, missing, self._kind, cache._state)
            if layout is not None and computed != layout:
                raise _OtherLayout
            layout = computed
            cache._keep(keys, layout, leaves, on_disk=False)
            parts.append(leaves)
        distinct = len(found.missing)
        cache._count(call.batch - distinct, distinct - len(missing), len(missing))
        assert layout is not None
        if len(parts) == 1 and distinct == call.batch:
            return output(layout, parts[0], call)
        kept = cache._memory.take_keys(found.keys)
        return output(*kept, call) if kept else output(layout, gather(found, parts, place), call)


class _OtherLayout(Exception):
    """Rows of one batch have outputs of different layouts: they are computed together, and not kept."""
