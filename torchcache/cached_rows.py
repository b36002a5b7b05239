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

from torchcache._utils.columns import map_columns, signature
from torchcache.errors import MissingRows
from torchcache.options import Options
from torchcache.tiers.chain import Chain
from torchcache.tiers.layout import Layout, select

_FORMAT = "torchcache.CachedRows 1"
_AT_ONCE = 256  # rows
_STORE_OPTIONS = (  # caches of one directory with equal values of these share a store
    "max_persistent_cache_size",
    "zstd_compression",
    "zstd_compression_level",
    "zstd_compression_threads",
    "use_mmap_on_load",
)


class CachedRows(Dataset[Any]):
    """Cached outputs of a module as a dataset, with extra columns such as labels. Made by ``precompute``.

    Item `i` is the output for row `i`, without the batch dimension. With extra columns it is ``(output, *columns)``, or
    ``(output, {name: column})`` for batches that were dicts. Outputs are on the device of the memory tier. With
    ``collate_fn=rows.collate`` a ``DataLoader`` reads each batch by one lookup; without it, it gives the same tensors
    more slowly. Forked workers share the rows in memory; spawned ones read the directory, which needs
    ``persistent=True``. ::

        >>> double = torchcache.torchcache()(lambda x: x * 2)
        >>> rows = torchcache.precompute(double, [(torch.eye(3), ["a", "b", "c"])], progress=False)
        >>> rows[1]
        (tensor([0., 2., 0.]), 'b')
        >>> loader = torch.utils.data.DataLoader(rows, batch_size=3, collate_fn=rows.collate)
        >>> outputs, names = next(iter(loader))
        >>> outputs.shape, names
        (torch.Size([3, 3]), ['a', 'b', 'c'])
        >>> rows
        <CachedRows: 3 rows in memory, extra columns (list,)>

    Attributes:
        keys: int64 ``[N, 2]``, on the CPU.
        rest: the extra columns: a tuple or dict of tensors ``[N, …]`` and lists of N values.
    """

    def __init__(self, tiers: Chain, keys: Tensor, rest: tuple[Any, ...] | dict[str, Any] = ()) -> None:
        self._tiers = tiers
        self.keys = keys
        self.rest = rest

    def __repr__(self) -> str:
        columns = f", extra columns {signature(self.rest)}" if self.rest else ""
        return f"<CachedRows: {len(self)} rows in {self._location()}{columns}>"

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The items of these numbers, by one lookup. Negative numbers count from the end, as those of a list do.

        Raises:
            IndexError: a number is out of range.
            torchcache.errors.MissingRows: rows are in no tier any more.
            ValueError: the outputs differ in shape or type, so they cannot be one batch.
        """
        if len(indices) == 0:
            return []
        numbers = self._checked_numbers(indices)
        try:
            layout, leaves = self._tiers.fetch(self.keys.index_select(0, numbers))
        except MissingRows as error:
            raise self._missing_rows([int(indices[i]) for i in error.positions]) from None
        return _Batch(layout, leaves, map_columns(self.rest, lambda column: _select(column, numbers)), len(numbers))

    @staticmethod
    def collate(batch: list[Any]) -> Any:
        """The items of ``__getitems__`` as one batch: for ``DataLoader(collate_fn=)``.

        Returns:
            The output ``[B, …]``, with extra columns as items have them, each a tensor ``[B, …]`` or a list of B.
        """
        return batch.collated() if isinstance(batch, _Batch) else default_collate(batch)

    def _checked_numbers(self, indices: Sequence[int]) -> Tensor:
        numbers = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        outside = (numbers < -len(self)) | (numbers >= len(self))
        if outside.any():
            raise IndexError(f"row {int(numbers[outside][0])} is out of range: there are {len(self)} rows")
        return numbers.where(numbers >= 0, numbers + len(self))

    def _location(self) -> str:
        return "memory" if self._tiers.directory is None else f"memory and {self._tiers.directory}"

    def _missing_rows(self, rows: list[int]) -> MissingRows:
        names = ", ".join(f"{i} (key {_hex(self.keys[i])})" for i in rows[:3])
        more = f" and {len(rows) - 3} others" if len(rows) > 3 else ""
        return MissingRows(
            f"rows {names}{more} are not in {self._location()}: they were cleared, removed or damaged, or are of a "
            "class that this process has not imported; call torchcache.precompute with the same batches again",
            rows,
        )

    # ---- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the keys, the extra columns and the path of the directory to a safetensors file for ``load``.

        The rows themselves stay in their directory. ::

            >>> linear = torchcache.torchcache(persistent=True, persistent_cache_dir=folder)(nn.Linear(3, 2))
            >>> torchcache.precompute(linear, [torch.eye(3)], progress=False).save(folder / "rows.safetensors")
            >>> len(torchcache.CachedRows.load(folder / "rows.safetensors"))
            3

        Args:
            path: the file, which is replaced if it exists.

        Raises:
            ValueError: rows are not in a lasting directory, or a list holds values that JSON cannot hold.
            ImportError: safetensors is not installed.
            OSError: the file cannot be written.
        """
        directory = self._tiers.directory
        if directory is None or self._tiers.options.persistent_cache_dir is None:
            location = "in the memory of this process only" if directory is None else "in a temporary directory"
            raise ValueError(
                f"these rows are {location}, so no file can refer to them: "
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
        missing = sum(len(disk.missing(self.keys[i : i + _AT_ONCE])) for i in range(0, len(self), _AT_ONCE))
        if missing:
            raise ValueError(
                f"{missing} of {len(self)} rows are not in {disk.directory}, which is full: "
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
        """The rows that ``save`` wrote. No module is needed; the classes of outputs must have been imported.

        Args:
            path: the file.
            directory: the directory that holds the rows now, if they were moved.
            max_memory_cache_size: the limit for rows in the memory of this process, in bytes.
            memory_cache_device: the device of the memory tier.

        Raises:
            FileNotFoundError: the file or the directory does not exist.
            ValueError: ``save`` did not write the file, or an argument is out of its range.
            ImportError: safetensors is not installed.
        """
        tensors, metadata = _read(path)
        folder = Path(metadata["directory"] if directory is None else directory)
        if not folder.is_dir():
            raise FileNotFoundError(f"the rows of {os.fspath(path)} were in {folder}: pass directory= if they moved")
        options = Options.checked(
            persistent=True,
            persistent_cache_dir=folder.parent,
            max_memory_cache_size=max_memory_cache_size,
            memory_cache_device=memory_cache_device,
            **json.loads(metadata["options"]),
        )
        return cls(Chain.open(options, folder), tensors["keys"], _unpack(json.loads(metadata["rest"]), tensors))


class _Batch(list[Any]):
    """The items of a batch, which are built only when somebody reads one. ``collate`` never does."""

    def __init__(self, layout: Layout, leaves: list[Tensor], columns: Any, count: int) -> None:
        super().__init__([None] * count)
        self._layout = layout
        self._leaves = leaves
        self._columns = columns
        self._is_built = False

    def collated(self) -> Any:
        return _join(self._layout.join(self._leaves), self._columns)

    def __getitem__(self, index: Any) -> Any:
        self._build()
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Any]:
        self._build()
        return super().__iter__()

    def _build(self) -> None:
        if not self._is_built:
            self._is_built = True
            leaves = [t.unbind(0) for t in self._leaves]
            columns = map_columns(self._columns, list)
            self[:] = [self._item(leaves, columns, i) for i in range(len(self))]

    def _item(self, leaves: list[tuple[Tensor, ...]], columns: Any, i: int) -> Any:
        output = self._layout.join([rows[i] for rows in leaves])
        return _join(output, map_columns(columns, lambda column: column[i]))


def _join(output: Any, columns: tuple[Any, ...] | dict[str, Any]) -> Any:
    if not columns:
        return output
    return (output, columns) if isinstance(columns, dict) else (output, *columns)


def _select(column: Tensor | list[Any], numbers: Tensor) -> Tensor | list[Any]:
    return select(column, numbers) if isinstance(column, Tensor) else [column[i] for i in numbers.tolist()]


def _hex(key: Tensor) -> str:
    """A key as docs/format.md writes it: the high half first."""
    low, high = (int(half) & 0xFFFFFFFFFFFFFFFF for half in key)
    return f"{high:016x}{low:016x}"


# ---- the file: tensors, lists as the bytes of their JSON, and the nesting of the columns as JSON in the metadata


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
        raise ValueError(f"{name} is a list of {kinds}, which JSON cannot hold: make it a tensor, strings or numbers")
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
