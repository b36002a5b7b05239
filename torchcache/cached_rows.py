"""Cached outputs as a dataset: training on them needs neither the inputs nor the module."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from torchcache.errors import MissingRows
from torchcache.options import Options
from torchcache.tiers.chain import Chain
from torchcache.tiers.layout import Layout, select

_FORMAT = "torchcache.CachedRows 1"
_CHECK_ROWS = 256  # read at a time
_STORE_OPTIONS = (  # with the same ones, caches of one directory share a store
    "max_persistent_cache_size",
    "zstd_compression",
    "zstd_compression_level",
    "zstd_compression_threads",
    "use_mmap_on_load",
)


class CachedRows(Dataset[Any]):
    """Outputs of a cached module by number, beside what rode along with their inputs. Made by ``precompute``.

    Item `i` is what the module gave for row `i`, without the batch dimension; where something rode
    along, it is ``(output, *rest)``, or ``(output, {name: rest})`` for batches that were dicts.
    Outputs are on the device of the memory tier. ::

        DataLoader(rows, batch_size=256, shuffle=True, collate_fn=rows.collate)

    is one lookup a batch; without `collate_fn` it gives the same tensors more slowly. Workers: those
    that fork see the rows in memory; spawned ones read the directory, which takes ``persistent=True``.

    Attributes:
        keys: int64 ``[N, 2]``, on the CPU.
        rest: what rode along: a tuple or dict of tensors ``[N, …]`` and lists of N.
    """

    def __init__(self, tiers: Chain, keys: Tensor, rest: tuple[Any, ...] | dict[str, Any] = ()) -> None:
        self._tiers = tiers
        self.keys = keys
        self.rest = rest

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The items of these numbers, by one lookup. Raises LookupError for rows that no tier has any more.

        Numbers below 0 count from the end, as those of a list do; IndexError for what is out of range.
        """
        if len(indices) == 0:
            return []
        where = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        outside = (where < -len(self)) | (where >= len(self))
        if outside.any():
            raise IndexError(f"row {int(where[outside][0])} is out of range: there are {len(self)} rows")
        where = where.where(where >= 0, where + len(self))
        try:
            layout, leaves = self._tiers.fetch(self.keys.index_select(0, where))
        except MissingRows as error:
            raise self._lost([int(indices[i]) for i in error.places]) from None
        return _Batch(layout, leaves, _map(self.rest, lambda column: _take(column, where)), len(where))

    @staticmethod
    def collate(batch: list[Any]) -> Any:
        """What ``__getitems__`` gave, as one output ``[B, …]`` and columns ``[B, …]``: for ``DataLoader(collate_fn=)``.

        Lists stay lists.
        """
        return batch.collated() if isinstance(batch, _Batch) else default_collate(batch)

    def _lost(self, rows: list[int]) -> MissingRows:
        names = ", ".join(f"{i} (key {_hex(self.keys[i])})" for i in rows[:3])
        more = f" and {len(rows) - 3} others" if len(rows) > 3 else ""
        where = "memory" if self._tiers.directory is None else f"memory and {self._tiers.directory}"
        return MissingRows(
            f"rows {names}{more} are not in {where}: they were cleared, removed or damaged, or are of a class that "
            "this process has not imported; torchcache.precompute with the same batches computes what is missing",
            rows,
        )

    # ---- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes keys, what rode along, and where the rows lie, as a safetensors file for ``load``.

        The rows themselves stay in their directory. Lists must hold what JSON can hold.
        """
        directory = self._tiers.directory
        if directory is None or self._tiers.options.persistent_cache_dir is None:
            lasting = "in the memory of this process only" if directory is None else "in a temporary directory"
            raise ValueError(
                f"these rows are {lasting}, so no file can refer to them: "
                "cache with persistent=True and persistent_cache_dir=..., then precompute again"
            )
        self._tiers.flush()
        self._require_on_disk()
        tensors = {"keys": self.keys}
        options = {name: getattr(self._tiers.options, name) for name in _STORE_OPTIONS}
        metadata = {
            "format": _FORMAT,
            "directory": str(directory),
            "options": json.dumps(options),
            "rest": json.dumps(_pack(self.rest, "rest", tensors)),
        }
        temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
        try:
            _safetensors("torch").save_file(tensors, temporary, metadata)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _require_on_disk(self) -> None:
        disk = self._tiers.without_memory()
        stats = disk.stats()
        if not stats.full and not stats.dropped_rows:
            return
        lost = sum(len(disk.missing(self.keys[i : i + _CHECK_ROWS])) for i in range(0, len(self), _CHECK_ROWS))
        if lost:
            raise ValueError(
                f"{lost} of {len(self)} rows are not in {disk.directory}, which is full: "
                "raise max_persistent_cache_size, or free space on the disk, then precompute again"
            )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        directory: str | os.PathLike[str] | None = None,
        max_memory_cache_size: float = int(1e9),
        memory_cache_device: str | torch.device = "cpu",
    ) -> CachedRows:
        """What ``save`` wrote. No module is needed; classes of outputs must have been imported.

        Args:
            path: the file.
            directory: where the rows lie now, if they were moved.
            max_memory_cache_size: bytes of rows that this process keeps in memory.
            memory_cache_device: where it keeps them.
        """
        tensors, metadata = _read(path)
        found = Path(metadata["directory"] if directory is None else directory)
        if not found.is_dir():
            raise FileNotFoundError(f"the rows of {os.fspath(path)} were in {found}: give directory= if they moved")
        options = Options.checked(
            persistent=True,
            persistent_cache_dir=found.parent,
            max_memory_cache_size=max_memory_cache_size,
            memory_cache_device=memory_cache_device,
            **json.loads(metadata["options"]),
        )
        return cls(Chain.open(options, found), tensors["keys"], _unpack(json.loads(metadata["rest"]), tensors))


class _Batch(list[Any]):
    """The items of a batch. They are made when one is first looked at, which ``collate`` never does."""

    def __init__(self, layout: Layout, leaves: list[Tensor], rest: Any, count: int) -> None:
        super().__init__([None] * count)
        self._layout = layout
        self._leaves = leaves
        self._rest = rest
        self._made = False

    def collated(self) -> Any:
        return _beside(self._layout.join(self._leaves), self._rest)

    def __getitem__(self, index: Any) -> Any:
        self._make()
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Any]:
        self._make()
        return super().__iter__()

    def _make(self) -> None:
        if not self._made:
            self._made = True
            leaves = [t.unbind(0) for t in self._leaves]
            rest = _map(self._rest, lambda column: list(column))
            self[:] = [self._item(leaves, rest, i) for i in range(len(self))]

    def _item(self, leaves: list[tuple[Tensor, ...]], rest: Any, i: int) -> Any:
        return _beside(self._layout.join([rows[i] for rows in leaves]), _map(rest, lambda column: column[i]))


def _beside(output: Any, rest: tuple[Any, ...] | dict[str, Any]) -> Any:
    if not rest:
        return output
    return (output, rest) if isinstance(rest, dict) else (output, *rest)


def _map(rest: Any, function: Any) -> Any:
    """The same nesting with every column replaced."""
    if isinstance(rest, tuple):
        return tuple(_map(column, function) for column in rest)
    if isinstance(rest, dict):
        return {name: _map(column, function) for name, column in rest.items()}
    return function(rest)


def _take(column: Tensor | list[Any], where: Tensor) -> Tensor | list[Any]:
    return select(column, where) if isinstance(column, Tensor) else [column[i] for i in where.tolist()]


def _hex(key: Tensor) -> str:
    """A key as docs/format.md writes it: the high half first."""
    low, high = (int(half) & 0xFFFFFFFFFFFFFFFF for half in key)
    return f"{high:016x}{low:016x}"


# ---- the file: columns as tensors, lists as the bytes of their JSON, the nesting as JSON in the metadata


def _pack(rest: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(rest, tuple):
        return {"tuple": [_pack(column, f"{name}[{i}]", tensors) for i, column in enumerate(rest)]}
    if isinstance(rest, dict):
        return {"dict": [[key, _pack(column, f"{name}[{key!r}]", tensors)] for key, column in rest.items()]}
    tensors[name] = rest.contiguous() if isinstance(rest, Tensor) else _to_json_bytes(rest, name)
    return {"tensor" if isinstance(rest, Tensor) else "list": name}


def _unpack(tree: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, value),) = tree.items()
    if kind == "tuple":
        return tuple(_unpack(column, tensors) for column in value)
    if kind == "dict":
        return {key: _unpack(column, tensors) for key, column in value}
    return tensors[value] if kind == "tensor" else json.loads(bytes(tensors[value].tolist()))


def _to_json_bytes(column: list[Any], name: str) -> Tensor:
    try:
        text = json.dumps(column)
        same = json.loads(text) == column
    except (TypeError, ValueError):
        same = False
    if not same:
        kinds = ", ".join(sorted({type(v).__name__ for v in column}))
        raise ValueError(f"{name} is a list of {kinds}, which JSON does not keep: make it a tensor, strings or numbers")
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _safetensors().safe_open(os.fspath(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{os.fspath(path)} must be a file that CachedRows.save wrote (format {_FORMAT!r}), "
                f"got format {metadata.get('format')!r}"
            )
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118  no mapping


def _safetensors(part: str = "") -> Any:
    try:
        return importlib.import_module(f"safetensors.{part}".rstrip("."))
    except ImportError as error:
        raise ImportError("CachedRows.save and CachedRows.load need safetensors: pip install safetensors") from error
