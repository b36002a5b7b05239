"""Fills a cache from batches, ahead of training, and gives back its rows as a dataset."""

from __future__ import annotations

import importlib
import inspect
import operator
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from torchcache.cached_rows import CachedRows
from torchcache.engine.cache import Cache
from torchcache.engine.call import map_tensors

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def precompute(
    module: nn.Module | Callable[..., Any],
    batches: Iterable[Any],
    device: str | torch.device | None = None,
    progress: bool = True,
) -> CachedRows:
    """Computes the rows of these batches that the cache does not have, and gives all of them as a dataset.

    It can be stopped at any moment: batches that are done stay in a persistent cache, and the next
    run goes on behind them. What is an input of forward, and what rides along (labels, ids):

    ================================  =======================================================
    a batch                           what happens
    ================================  =======================================================
    tensor                            ``forward(batch)``
    dict, or another mapping          entries named as forward's parameters are its keyword
                                      arguments, the others ride along
    tuple or list                     its first element is the input, the others ride along:
                                      a tuple or list there is ``forward(*first)``, a dict
                                      ``forward(**first)``
    ================================  =======================================================

    What rides along has one entry for each row: tensors (or arrays) of B rows, lists or tuples of
    B values, dicts of these.

    Args:
        module: a module or function with a cache. Its forward runs without grad, in the mode in which it is.
        batches: any iterable, such as a DataLoader.
        device: where the inputs are moved first.
        progress: show rows per second, hits and bytes, where stderr is a terminal or a notebook.

    Raises:
        TypeError: the module has no cache, or the batches are none.
        ValueError: a batch has no input, or what rides along does not fit; the module has hooks.
        RuntimeError: a row was not kept, since a tier is full or the module's calls are not cached.
    """
    cache = _cache_of(module)
    if isinstance(batches, Tensor) or (isinstance(batches, Dataset) and not isinstance(batches, IterableDataset)):
        raise TypeError(
            f"batches must be an iterable of batches, got a {type(batches).__name__}, which gives single rows: "
            "use DataLoader(dataset, batch_size=...) or tensor.split(256)"
        )
    filler = _Filler(module, cache, device)
    done = _Progress(batches, cache) if progress and _is_watched() else None
    cache.filling = True
    try:
        for batch in batches:
            rows, hits = filler.add(batch)
            if done is not None:
                done.step(rows, hits)
    finally:
        cache.filling = False
        cache.flush()
        if done is not None:
            done.close()
    return filler.rows()


def _cache_of(module: Any) -> Cache:
    cache = getattr(module, "cache_instance", None)
    name = type(module).__name__ if isinstance(module, nn.Module) else repr(module)
    if not isinstance(cache, Cache):
        raise TypeError(
            f"{name} has no cache: decorate it with @torchcache(...) and leave that enabled, "
            "or give the module inside it that is decorated"
        )
    modules = [m for m in (module, _inner(module)) if isinstance(m, nn.Module)]
    if any(m._forward_pre_hooks or m._forward_hooks for m in modules):
        raise ValueError(
            f"{name} has forward hooks, which run around its cache and would not run for cached rows: "
            "remove them, or cache a module that holds this one"
        )
    return cache


def _inner(module: Any) -> Any:
    """What torch.compile wraps hides the names of its parameters."""
    return getattr(module, "_orig_mod", module)


class _Filler:
    """Takes one batch after the other through the cache, and collects what makes the dataset."""

    def __init__(self, module: Any, cache: Cache, device: str | torch.device | None) -> None:
        inner = _inner(module)
        forward = inner.forward if isinstance(inner, nn.Module) else inner
        self._names = {p.name for p in inspect.signature(forward).parameters.values() if p.kind in _NAMED}
        self._module = module
        self._cache = cache
        self._tiers = cache.tiers()
        self._device = device
        self._keys: list[Tensor] = []
        self._rest: list[Any] = []

    def add(self, batch: Any) -> tuple[int, int]:
        """Rows of the batch, and how many of them were there."""
        args, kwargs, rest = _parts_of(batch, self._names)
        if self._device is not None:
            args = tuple(map_tensors(value, self._move) for value in args)
            kwargs = {name: map_tensors(value, self._move) for name, value in kwargs.items()}
        keys, computed = self._fill(args, kwargs)
        rest = _columns(rest, len(keys), "the batch")
        if self._rest and _form(rest) != _form(self._rest[0]):
            raise ValueError(
                f"what rides along must be the same in all batches but for the number of rows: "
                f"batch {len(self._rest)} has {_form(rest)}, batch 0 has {_form(self._rest[0])}"
            )
        self._keys.append(keys)
        self._rest.append(rest)
        return len(keys), len(keys) - computed

    def rows(self) -> CachedRows:
        if not self._keys:
            raise ValueError("batches must hold at least one batch, got none: was the iterator used up before?")
        if self._cache.info().dropped_rows:  # while they waited to be written
            for i, keys in enumerate(self._keys):
                self._expect(keys, f"batch {i}")
        return CachedRows(self._tiers, torch.cat(self._keys), _joined(self._rest))

    def _move(self, t: Tensor) -> Tensor:
        return t.to(self._device, non_blocking=True)

    def _fill(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, int]:
        """Keys of the rows, all of them in the cache, and how many had to be computed."""
        keys = self._cache.keys(*args, **kwargs)
        computed = len(self._tiers.missing(keys))
        if computed:
            self._compute(args, kwargs)
            if len(self._tiers.missing(keys)):  # a first forward that set something up is not kept
                keys = self._cache.keys(*args, **kwargs)
                self._compute(args, kwargs)
                self._expect(keys, f"batch {len(self._keys)}")
        return keys, computed

    def _compute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            self._module(*args, **kwargs)

    def _expect(self, keys: Tensor, name: str) -> None:
        missing = len(self._tiers.missing(keys))
        if not missing:
            return
        if self._cache.is_persistent_cache_full:
            why = "the directory is full: raise max_persistent_cache_size"
        elif self._cache.is_memory_cache_full and not self._cache.persistent:
            why = "the memory cache is full: raise max_memory_cache_size, or cache with persistent=True"
        else:
            why = "a warning of the torchcache logger says why"
        raise RuntimeError(f"{missing} of {len(keys)} rows of {name} were computed but not kept: {why}")


def _parts_of(batch: Any, names: set[str]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional arguments, keyword arguments, and what rides along."""
    if isinstance(batch, Tensor):
        return (batch,), {}, ()
    if isinstance(batch, Mapping):
        inputs = {name: value for name, value in batch.items() if name in names}
        if not inputs:
            raise ValueError(
                "a batch that is a dict must have an entry named as a parameter of forward "
                f"({', '.join(sorted(names))}), got {', '.join(map(str, batch))}: rename them, or give (inputs, *rest)"
            )
        return (), inputs, {name: value for name, value in batch.items() if name not in names}
    if isinstance(batch, (tuple, list)) and batch:
        first, rest = batch[0], tuple(batch[1:])
        if isinstance(first, Mapping):
            return (), dict(first), rest
        return (tuple(first) if isinstance(first, (tuple, list)) else (first,)), {}, rest
    raise ValueError(
        f"a batch must be a tensor, a dict, or a tuple or list (inputs, *rest), got {type(batch).__name__}"
    )


# ---- what rides along


def _columns(value: Any, rows: int, name: str) -> Any:
    """Checked, and copied: tensors from DataLoader workers would each hold on to a file."""
    if isinstance(value, Mapping):
        return {key: _columns(column, rows, f"{name}[{key!r}]") for key, column in value.items()}
    if isinstance(value, tuple) and name == "the batch":
        return tuple(_columns(column, rows, f"{name}[{i}]") for i, column in enumerate(value, 1))
    column = _plain_column(value)
    if isinstance(column, Tensor):
        got = f"a tensor of shape {tuple(column.shape)}"
        fits = column.dim() > 0 and len(column) == rows
    else:
        got = f"a {type(column).__name__}" + (f" of {len(column)}" if isinstance(column, (list, tuple)) else "")
        fits = isinstance(column, (list, tuple)) and len(column) == rows
    if not fits:
        raise ValueError(
            f"{name} rides along and must be a tensor, list or tuple with one entry for each of {rows} rows, got {got}"
        )
    return column.detach().to("cpu", copy=True) if isinstance(column, Tensor) else list(column)


def _plain_column(value: Any) -> Any:
    """An array as a tensor, or, of texts and objects, as a list."""
    if not hasattr(value, "__array__") or isinstance(value, Tensor):
        return value
    return value.tolist() if getattr(value.dtype, "kind", "") in "OSU" else torch.as_tensor(value)


def _form(rest: Any) -> Any:
    """What must be the same in all batches."""
    if isinstance(rest, tuple):
        return tuple(map(_form, rest))
    if isinstance(rest, dict):
        return {name: _form(column) for name, column in rest.items()}
    return f"{rest.dtype} [B{''.join(f', {n}' for n in rest.shape[1:])}]" if isinstance(rest, Tensor) else "list"


def _joined(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, tuple):
        return tuple(_joined(list(column)) for column in zip(*parts))
    if isinstance(first, dict):
        return {name: _joined([part[name] for part in parts]) for name in first}
    return torch.cat(parts) if isinstance(first, Tensor) else list(chain.from_iterable(parts))


# ---- progress

_LINE_EVERY = 0.2  # seconds


def _is_watched() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class _Progress:
    """A bar of tqdm where that is installed, else one line that is written over and over."""

    def __init__(self, batches: Iterable[Any], cache: Cache) -> None:
        self._total = operator.length_hint(batches) or None
        self._cache = cache
        self._start = self._last = time.monotonic()
        self._batches = self._rows = self._hits = 0
        self._bar = _tqdm(self._total)

    def step(self, rows: int, hits: int) -> None:
        self._batches += 1
        self._rows += rows
        self._hits += hits
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(), refresh=False)
            self._bar.update()
        elif time.monotonic() - self._last >= _LINE_EVERY:
            self._write("")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            self._write("\n")

    def _write(self, end: str) -> None:
        self._last = time.monotonic()
        of = f"/{self._total}" if self._total else ""
        print(f"\r\x1b[Kprecompute: {self._batches}{of} batches, {self._text()}", end=end, file=sys.stderr, flush=True)

    def _text(self) -> str:
        rate = self._rows / max(1e-9, time.monotonic() - self._start)
        info = self._cache.info()
        size = info.disk_bytes or info.memory_bytes
        return f"{rate:.0f} rows/s, {self._hits} of {self._rows} hits, {size / 1e6:.1f} MB kept"


def _tqdm(total: int | None) -> Any:
    try:
        tqdm = importlib.import_module("tqdm.auto").tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc="precompute", unit="batch")
