"""Fills a cache from batches, ahead of training, and returns its rows as a dataset."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from torchcache._utils.columns import concatenate, copied, signature
from torchcache.cached_rows import CachedRows
from torchcache.cli.progress import BatchProgress, is_interactive
from torchcache.engine.cache import Cache
from torchcache.engine.call import map_tensors

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def precompute(
    module: nn.Module | Callable[..., Any],
    batches: Iterable[Any],
    device: str | torch.device | None = None,
    progress: bool = True,
) -> CachedRows:
    """Computes the rows of these batches that are not cached, and returns all of them as a dataset.

    It can be stopped at any moment: a persistent cache has the rows of all finished batches, and the next run computes
    only the others. A batch holds inputs of ``forward`` and, if you like, extra columns, such as labels:

    ================================  =======================================================
    a batch                           what happens
    ================================  =======================================================
    tensor                            ``forward(batch)``
    dict, or another mapping          entries named like parameters of forward are keyword
                                      arguments, the others are extra columns
    tuple or list                     its first element is the input, the others are extra
                                      columns; a tuple or list as input is
                                      ``forward(*first)``, a dict ``forward(**first)``
    ================================  =======================================================

    An extra column has one entry for each row: a tensor (or array) ``[B, …]``, a list or tuple of B values, or a dict
    of these. ::

        >>> backbone = torchcache.torchcache()(nn.Linear(3, 8).eval().requires_grad_(False))
        >>> images, labels = torch.rand(10, 3), torch.arange(10)
        >>> rows = torchcache.precompute(backbone, zip(images.split(4), labels.split(4)), progress=False)
        >>> len(rows)
        10
        >>> features, label = rows[7]
        >>> features.shape, label
        (torch.Size([8]), tensor(7))

    Args:
        module: a module or function with a cache. Its forward runs without grad, in the module's current mode.
        batches: any iterable of batches, such as a DataLoader.
        device: the device that inputs are moved to first; None: they stay where they are.
        progress: show rows per second, hits and bytes, if stderr is a terminal or a notebook.

    Returns:
        The rows of all batches, in their order.

    Raises:
        TypeError: the module has no cache, or `batches` gives single rows.
        ValueError: there are no batches, a batch has no input, an extra column does not fit, or the module has hooks.
        RuntimeError: a row was not stored, because a tier is full or the module's calls are not cached.
    """
    cache = cache_of(module)
    if isinstance(batches, Tensor) or (isinstance(batches, Dataset) and not isinstance(batches, IterableDataset)):
        raise TypeError(
            f"batches must be an iterable of batches, got a {type(batches).__name__}, which gives single rows: "
            "use DataLoader(dataset, batch_size=...) or tensor.split(256)"
        )
    filler = _CacheFiller(module, cache, device)
    shown = _shown_progress(batches, cache) if progress and is_interactive() else None
    cache.filling = True
    try:
        for batch in batches:
            rows, hits = filler.add(batch)
            if shown is not None:
                shown.update(rows, hits)
    finally:
        cache.filling = False
        cache.flush()
        if shown is not None:
            shown.close()
    return filler.rows()


def _shown_progress(batches: Iterable[Any], cache: Cache) -> BatchProgress:
    def size() -> int:
        info = cache.info()
        return info.disk_bytes or info.memory_bytes

    return BatchProgress("precompute", operator.length_hint(batches) or None, size)


def cache_of(module: Any) -> Cache:
    """The cache of a module or function.

    Raises:
        TypeError: it has none.
        ValueError: it has hooks, which would not run for cached rows.
    """
    cache = getattr(module, "cache_instance", None)
    name = type(module).__name__ if isinstance(module, nn.Module) else repr(module)
    if not isinstance(cache, Cache):
        raise TypeError(
            f"{name} has no cache: decorate it with @torchcache(...) and leave that enabled, "
            "or pass the module inside it that is decorated"
        )
    modules = [m for m in (module, _uncompiled(module)) if isinstance(m, nn.Module)]
    if any(m._forward_pre_hooks or m._forward_hooks for m in modules):
        raise ValueError(
            f"{name} has forward hooks, which run around its cache and would not run for cached rows: "
            "remove them, or cache a module that contains this one"
        )
    return cache


def _uncompiled(module: Any) -> Any:
    """The module inside the wrapper of torch.compile, which hides the names of its parameters."""
    return getattr(module, "_orig_mod", module)


def parameter_names(module: Any) -> set[str]:
    """The parameters of a forward that a batch may name."""
    inner = _uncompiled(module)
    forward = inner.forward if isinstance(inner, nn.Module) else inner
    return {p.name for p in inspect.signature(forward).parameters.values() if p.kind in _NAMED}


class _CacheFiller:
    """Sends batches through the cache, and collects the keys and extra columns of their rows."""

    def __init__(self, module: Any, cache: Cache, device: str | torch.device | None) -> None:
        self._names = parameter_names(module)
        self._module = module
        self._cache = cache
        self._tiers = cache.tiers()
        self._device = device
        self._keys: list[Tensor] = []
        self._columns: list[Any] = []

    def add(self, batch: Any) -> tuple[int, int]:
        """Computes the missing rows of a batch.

        Returns:
            The number of its rows, and how many of them were cached before.
        """
        args, kwargs, columns = split_batch(batch, self._names)
        if self._device is not None:
            args = tuple(map_tensors(value, self._move) for value in args)
            kwargs = {name: map_tensors(value, self._move) for name, value in kwargs.items()}
        keys, computed = self._fill(args, kwargs)
        self._add_columns(columns, len(keys))
        self._keys.append(keys)
        return len(keys), len(keys) - computed

    def rows(self) -> CachedRows:
        """The rows of all batches."""
        if not self._keys:
            raise ValueError("batches must hold at least one batch, got none: was the iterator used up before?")
        if self._cache.info().dropped_rows:  # while they were queued to be written
            for i, keys in enumerate(self._keys):
                self._require_cached(keys, f"batch {i}")
        return CachedRows(self._tiers, torch.cat(self._keys), concatenate(self._columns))

    def _add_columns(self, columns: Any, rows: int) -> None:
        if isinstance(columns, tuple):
            columns = tuple(copied(column, rows, f"the batch[{i}]") for i, column in enumerate(columns, 1))
        else:
            columns = copied(columns, rows, "the batch")
        if self._columns and signature(columns) != signature(self._columns[0]):
            raise ValueError(
                "all batches must have the same extra columns, apart from the number of rows: "
                f"batch {len(self._columns)} has {signature(columns)}, batch 0 has {signature(self._columns[0])}"
            )
        self._columns.append(columns)

    def _move(self, t: Tensor) -> Tensor:
        return t.to(self._device, non_blocking=True)

    def _fill(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, int]:
        """Keys of the rows, all of them in the cache, and how many rows had to be computed."""
        keys = self._cache.keys(*args, **kwargs)
        computed = len(self._tiers.missing(keys))
        if computed:
            self._compute(args, kwargs)
            if len(self._tiers.missing(keys)):  # the rows of a first forward that initialises something are not cached
                keys = self._cache.keys(*args, **kwargs)
                self._compute(args, kwargs)
                self._require_cached(keys, f"batch {len(self._keys)}")
        return keys, computed

    def _compute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            self._module(*args, **kwargs)

    def _require_cached(self, keys: Tensor, name: str) -> None:
        missing = len(self._tiers.missing(keys))
        if not missing:
            return
        if self._cache.is_persistent_cache_full:
            why = "the directory is full: raise max_persistent_cache_size"
        elif self._cache.is_memory_cache_full and not self._cache.persistent:
            why = "the memory cache is full: raise max_memory_cache_size, or cache with persistent=True"
        else:
            why = "a warning of the torchcache logger says why"
        raise RuntimeError(f"{missing} of {len(keys)} rows of {name} were computed but not cached: {why}")


def split_batch(batch: Any, names: set[str]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional arguments and keyword arguments of forward, and extra columns.

    Args:
        batch: what the DataLoader gave.
        names: those of the parameters of forward.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}, ()
    if isinstance(batch, Mapping):
        inputs = {name: value for name, value in batch.items() if name in names}
        if not inputs:
            raise ValueError(
                "a batch that is a dict must have an entry named like a parameter of forward "
                f"({', '.join(sorted(names))}), got {', '.join(map(str, batch))}: "
                "rename its entries, or make it a tuple (inputs, *columns)"
            )
        return (), inputs, {name: value for name, value in batch.items() if name not in names}
    if isinstance(batch, (tuple, list)) and batch:
        first, columns = batch[0], tuple(batch[1:])
        if isinstance(first, Mapping):
            return (), dict(first), columns
        return (tuple(first) if isinstance(first, (tuple, list)) else (first,)), {}, columns
    raise ValueError(
        f"a batch must be a tensor, a dict, or a tuple or list (inputs, *columns), got {type(batch).__name__}"
    )
