"""The cache of one module instance or function: looks rows up, computes what is missing, and keeps it."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from torchcache._native.ops import Digest
from torchcache._utils.lazy import lazy
from torchcache._utils.locks import lock
from torchcache._utils.logs import WarnOnce, logger
from torchcache.engine.bypass import Bypassed
from torchcache.engine.compute import Computed, MissComputer, Uncached
from torchcache.engine.counts import CacheInfo, Counts
from torchcache.engine.decision import Decider, Request
from torchcache.engine.explain import CallParts, Explanation, by_name, call_parts, differing, meta, since_directory
from torchcache.engine.keys import CallVariant
from torchcache.engine.outputs import output
from torchcache.engine.recheck import Comparison, compare_with
from torchcache.engine.verify import Sample, Verifier
from torchcache.errors import WrongRow
from torchcache.options import Options
from torchcache.tiers import temporary
from torchcache.tiers.batch import Batch
from torchcache.tiers.chain import Chain
from torchcache.tiers.tier import Rows, Tier

Forward = Callable[..., Any]

_SEVERAL_LAYOUTS = Bypassed("the rows of the batch have outputs of different shapes or types", is_silent=True)


def _unhashable(error: Exception) -> Bypassed:
    return Bypassed("their rows cannot be hashed", details=str(error))


class Cache:
    """The cache of a module or function: ``module.cache_instance``. Its parts are created when they are first needed.

    All methods are thread-safe. Attributes without a docstring are private.

    Example:
        >>> import torch
        >>> from torchcache import torchcache
        >>> module = torchcache()(torch.nn.Linear(4, 2).requires_grad_(False))
        >>> x = torch.eye(4)
        >>> first, again = module(x), module(x[:3])
        >>> cache = module.cache_instance
        >>> cache
        <cache of Linear: 3 of 7 rows were found; memory: 4 rows, 0.0 MB>
        >>> cache.info().memory_hits, cache.info().misses
        (3, 4)
        >>> print(cache.explain(x.clone().requires_grad_()))
        this call is not cached: an input requires grad
    """

    __slots__ = ("__dict__", "__weakref__", "_module")  # see `held_with`, whose object shares only the __dict__
    _module: nn.Module

    def __init__(
        self,
        target: nn.Module | Forward,
        forward: Forward,
        takes_self: bool,
        init: bytes,
        options: Callable[[], Options],
    ) -> None:
        self._lock = lock(self)
        self._refused: dict[CallVariant | Digest, Bypassed] = {}
        self._whole: set[CallVariant] = set()  # whose rows are only right if the whole batch is computed
        self._decider = Decider(target, forward, takes_self, init, options, self._refused)
        self._held: Callable[[], Cache | None] = lambda: None
        self._counts = Counts()
        self.filling = False  # rows are expected to be new
        self._last: CallParts | None = None

    def held_with(self, module: nn.Module) -> Cache:
        """The same cache for a user, which keeps its module alive. The module's own does not, and is freed with it."""
        held = self._held()
        if held is None or held._module is not module:
            held = object.__new__(Cache)
            held.__dict__ = self.__dict__
            held._module = module
            self._held = weakref.ref(held)
        return held

    def __repr__(self) -> str:
        """Describes the cache without creating any part of it."""
        state = self.__dict__
        name = self._decider.name
        if "_tiers" not in state:
            return f"<cache of {name}: not used yet>"
        counts, stats = self._counts, self._tiers.stats_by_tier()
        tiers = "; ".join(f"{tier}: {s.rows} rows, {s.bytes / 1e6:.1f} MB" for tier, s in stats.items())
        return f"<cache of {name}: {counts.found} of {counts.rows} rows were found; {tiers}>"

    # ---- properties

    @property
    def options(self) -> Options:
        """The options in force: those of the decorator, changed by ``torchcache_`` attributes."""
        return self._decider.options

    @property
    def module_hash(self) -> str:
        """Short name of code, init arguments and options; the name of the subdirectory on disk."""
        return self._decider.identity.module_hash

    @lazy
    def cache_dir(self) -> Path | None:
        """The directory of this module hash; None for a cache in memory only."""
        if not self.options.persistent:
            return None
        base = self.options.persistent_cache_dir
        return (temporary.directory() if base is None else Path(base)) / self.module_hash

    @property
    def persistent(self) -> bool:
        """Whether rows outlive the process."""
        return self.options.persistent

    @property
    def cache(self) -> Mapping[int, Any]:
        """The rows in memory by the low 64 bits of their keys (as int64); values are copies of outputs ``[1, …]``."""
        return self._tiers.view()

    @property
    def is_memory_cache_full(self) -> bool:
        """Whether a row was not kept in memory for lack of room."""
        return self._tiers.stats_by_tier()["memory"].full

    @property
    def is_persistent_cache_full(self) -> bool:
        """Whether a row was not kept in a farther tier, such as the directory, for lack of room."""
        return any(stats.full for tier, stats in self._tiers.stats_by_tier().items() if tier != "memory")

    @property
    def memory_cache_size(self) -> int:
        """Bytes of rows in memory."""
        return self._tiers.stats_by_tier()["memory"].bytes

    @property
    def persistent_cache_size(self) -> int:
        """Bytes of the files that this process has written, and of the rows that wait to be written."""
        return sum(stats.bytes for tier, stats in self._tiers.stats_by_tier().items() if tier != "memory")

    def info(self) -> CacheInfo:
        """Counters, in the manner of ``functools.lru_cache``."""
        return self._counts.info(self._tiers.stats_by_tier())

    # ---- operations

    def hash_tensor(self, *args: Any, **kwargs: Any) -> Tensor:
        """The low 64 bits of the keys of a call's rows, int64 ``[B]``. The arguments are those of forward.

        Raises:
            TypeError: the call has no keys.
            ValueError: it has no tensors, or its tensors differ in the batch dimension.
        """
        return self.keys(*args, **kwargs)[:, 0].clone()

    def keys(self, *args: Any, **kwargs: Any) -> Tensor:
        """The keys of a call's rows, int64 ``[B, 2]``. The arguments are those of forward.

        Raises:
            TypeError: the call has no keys.
            ValueError: it has no tensors, or its tensors differ in the batch dimension.
        """
        return self._decider.request(args, kwargs).keys()

    def tiers(self) -> Chain:
        """The rows by key, without what computes them."""
        return self._tiers

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """Which tier has how many of a call's rows, and what has changed in their keys if some are missing.

        For a call that is not cached: why. The arguments are those of forward; nothing is computed.
        """
        decision = self._decider.decide(args, kwargs)
        if isinstance(decision, Request):
            try:
                return self._explanation(decision, self._tiers.count(decision.keys()))
            except (RuntimeError, ValueError) as error:
                decision = _unhashable(error)
        return Explanation(0, 0, 0, None, None, str(decision))

    def compare(self, tier: Tier, /, *args: Any, **kwargs: Any) -> Comparison:
        """Computes the rows of a call and compares them with those that a tier has. The arguments are those of forward.

        Raises:
            TypeError: the call has no keys.
            ValueError: it has no tensors, or its tensors differ in the batch dimension.
            WrongRow: the forward draws random numbers or changes its state, so that it cannot be compared.
        """
        request = self._decider.request(args, kwargs)
        everything = torch.arange(request.call.batch, device="cpu")
        computed = self._computer.recompute(self._decider.forward, request, everything)
        if isinstance(computed, Bypassed):
            raise WrongRow(f"{self._decider.name}: rows cannot be compared: {computed}")
        return compare_with(tier, request, computed, self._decider.identity.modules(None))

    def rehash(self) -> None:
        """Looks at every byte of the state again: for edits of single elements that bypass torch."""
        self._decider.forget_state()

    def flush(self) -> None:
        """Returns when every row kept so far is in a file."""
        self._tiers.flush()

    def clear(self, persistent: bool = False) -> None:
        """Removes the rows in memory; with `persistent` also those of this module hash on disk.

        Raises:
            OSError: a file cannot be removed.
        """
        self._tiers.clear(persistent)

    def close(self) -> None:
        """Flushes, and frees the memory. The cache can be used again: it then starts as a new one would.

        From then on it has the options that ``torchcache_`` attributes give it.
        """
        with self._lock:
            tiers = self.__dict__.get("_tiers")
            self._refused, self._whole = {}, set()
            self._decider = self._decider.renewed(self._refused)
            for name in ("_tiers", "_computer", "_verifier", "cache_dir"):
                self.__dict__.pop(name, None)
        if tiers is not None:
            tiers.close()

    def update_options(self) -> None:
        """Puts ``torchcache_`` attributes into force that were set while the cache is in use.

        Raises:
            ValueError: an attribute is unknown, wrong, or fixed from the first call on.
        """
        with self._lock:
            options = self._decider.updated_options()
            tiers: Chain | None = self.__dict__.get("_tiers")
            if tiers is not None:
                tiers.resize_memory(options.max_memory_cache_size)
            verify, self._decider.options = self.options.verify, options
            if verify != options.verify:
                self.__dict__.pop("_verifier", None)

    # ---- one call

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of ``forward(*args, **kwargs)``, row by row from the cache where it has them."""
        decision = self._decider.decide(args, kwargs, probe=False)
        found = self._read_memory(decision) if isinstance(decision, Request) else decision
        if isinstance(found, Bypassed):
            self._note_bypass(found)
            return forward(*args, **kwargs)
        request, rows = found
        if isinstance(rows, Batch):
            return self._complete(forward, request, rows)
        state = request.state
        if state is not None and state.snapshot.trained:
            self._warn_of_parameters(request)
        self._last = call_parts(request)
        if self._verifier.is_due() and (why := self._check_hits(forward, request, rows)) is not None:
            return self._compute_all(forward, request, why)
        self._counts.hits["memory"] += request.call.batch
        return output(rows, request.call)

    def _read_memory(self, request: Request) -> tuple[Request, Rows | Batch] | Bypassed:
        """Reads the rows of a call from memory.

        The same operation probes the weights. If they have changed, the call gets new keys and is read again.
        """
        state = request.state
        watch = None if state is None else state.watch.native
        try:
            found, probe = self._tiers.hash_and_read(request.tensors, request.digest, 0 if watch is None else watch.id)
            if state is None or watch is None or probe == watch.first:
                return request, found
            decision = self._decider.decide_bound(request.call)
            if isinstance(decision, Bypassed):
                return decision
            return decision, self._tiers.hash_and_read(decision.tensors, decision.digest)[0]
        except (RuntimeError, ValueError) as error:  # a dtype without bytes, a tensor without a storage
            return _unhashable(error)

    def _complete(self, forward: Forward, request: Request, batch: Batch) -> Any:
        """The output of a call of which memory lacks some rows."""
        if batch.is_mixed:
            return self._compute_all(forward, request, _SEVERAL_LAYOUTS)
        absent = batch.missing
        self._tiers.read_missing(batch, pin=request.call.device_type == "cuda")
        missing = batch.missing
        count = missing.shape[0]
        if count and logger.isEnabledFor(logging.DEBUG):
            self._log_explanation(request, batch)
        self._last = call_parts(request)
        if count:
            started = perf_counter()
            computed = self._computer.compute(forward, request, missing, batch.layout)
            self._verifier.forward_took(perf_counter() - started, count)
            if isinstance(computed, Uncached):
                self._note_bypass(computed.why)
                return computed.output
            sample = Sample(forward, request, missing, *computed, is_computed=True)
            if self._verifier.is_due() and (why := self._verify(sample)) is not None:
                return self._compute_all(forward, request, why)
            self._write(batch.missing_keys, computed)
            batch.add(Rows(None, *computed))
        self._warn_of_parameters(request)
        rows = self._tiers.rows(batch)
        if count < batch.count and self._verifier.is_due():
            far = absent if not count else absent[~torch.isin(absent, missing)]
            if (why := self._check_hits(forward, request, rows, far)) is not None:
                return self._compute_all(forward, request, why)
        self._count(batch.hits, count)
        return output(rows, request.call)

    def _check_hits(self, forward: Forward, request: Request, rows: Rows, far: Tensor | None = None) -> Bypassed | None:
        """Why rows that were found must not be returned, if a check is due and shows it.

        Args:
            forward: of the module.
            request: the call.
            rows: all rows of the call.
            far: positions in the batch of rows that a farther tier had.
        """
        positions = torch.arange(request.call.batch, device="cpu")
        return self._verify(Sample(forward, request, positions, rows.layout, rows.leaves, False, far))

    def _verify(self, sample: Sample) -> Bypassed | None:
        """Checks rows, if that is due. If some are wrong, all rows in memory are dropped.

        Raises:
            WrongRow: some are wrong, with ``verify="strict"``.
        """
        why = self._verifier.check(sample)
        if why is not None:
            self._tiers.clear(persistent=False)
            if self._verifier.is_strict:
                raise WrongRow(f"{self._decider.name}: {why}")
        return why

    def _compute_all(self, forward: Forward, request: Request, why: Bypassed) -> Any:
        self._note_bypass(why)
        return forward(*request.call.args, **request.call.kwargs)

    def _write(self, keys: Tensor, computed: Computed) -> None:
        tiers = self._tiers
        if not tiers.is_described:
            assert self._last is not None
            tiers.describe(meta(self._decider.identity, self.options, by_name(self._last)))
        tiers.write(keys, computed.layout, computed.leaves)

    # ---- messages and counters

    def _note_bypass(self, why: Bypassed) -> None:
        self._counts.bypassed_calls += 1
        if not why.is_silent:
            self._warnings.warn(why.reason, "calls are not cached: %s", why)

    def _count(self, hits: Mapping[str, int], misses: int) -> None:
        counts = self._counts
        counts.add_hits(hits)
        counts.misses += misses
        if misses and not self.filling and counts.is_useless:
            self._warnings.warn(
                "useless",
                "of %d rows only %d were found: normal in a first pass over the data; if rows should repeat, is there "
                "random augmentation in front of the module?",
                counts.rows,
                counts.found,
            )

    def _warn_of_parameters(self, request: Request) -> None:
        if request.state is not None and (names := request.state.snapshot.trained):
            self._warnings.warn(
                "grad",
                "%s require grad: outputs come back detached, so these will not be trained, and every call hashes "
                "them in full; freeze them by torchcache(frozen=True) or requires_grad_(False), or leave what is "
                "trained out of the cached module",
                ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else ""),
            )

    def _explanation(self, request: Request, rows: Mapping[str, int]) -> Explanation:
        """What has changed, where each tier has so many rows of the call."""
        parts = by_name(call_parts(request))
        return Explanation(
            request.call.batch,
            rows["memory"],
            sum(rows.values()) - rows["memory"],
            None if self._last is None else differing(parts, by_name(self._last)),
            None if self.cache_dir is None else since_directory(self.cache_dir, self._decider.identity, parts),
        )

    def _log_explanation(self, request: Request, batch: Batch) -> None:
        logger.debug("%s: %s", self._decider.name, self._explanation(request, batch.hits))

    # ---- lazy parts

    @lazy
    def _warnings(self) -> WarnOnce:
        return WarnOnce(self._decider.name)

    @lazy
    def _computer(self) -> MissComputer:
        return MissComputer(self._decider.identity, self.options.cache_dtype, self._refused, self._whole)

    @lazy
    def _verifier(self) -> Verifier:
        modules = functools.partial(self._decider.identity.modules, None)
        given = self._decider.name, self.options, self.cache_dir, self._computer, modules
        return Verifier(*given, self._refused, self._whole, self._counts)

    @lazy
    def _tiers(self) -> Chain:
        return Chain.open(self.options, self.cache_dir, self._warnings)
