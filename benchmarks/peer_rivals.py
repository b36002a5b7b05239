"""The rivals of peers.py, each brought to one form: made on a folder, called with a batch, counted in rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch
from peer_work import FEATURES, WEIGHT, Backbone, features
from torch import Tensor

Names = list[str]  # of the rows of a batch, for a rival that does not look at the rows themselves


class Rival(Protocol):
    def __init__(self, folder: Path, persistent: bool) -> None: ...

    @property
    def weight(self) -> Tensor:
        """Of the module whose rows are cached."""

    def __call__(self, x: Tensor, names: Names) -> Tensor: ...

    def flush(self) -> None: ...


class Limit:
    """What no cache can do without: reading the input once, and gathering (or reading) the output once."""

    def __init__(self, folder: Path, persistent: bool) -> None:
        from torchcache._native import ops

        self._keys = ops.keys
        self._call = (0, 0)
        self._file = os.open(folder / "rows", os.O_RDWR | os.O_CREAT) if persistent else None
        self._rows: Tensor | None = None
        self.weight = WEIGHT

    def __call__(self, x: Tensor, names: Names) -> Tensor:
        self._keys([x], self._call)
        return self._from_memory(x) if self._file is None else self._from_file(x, self._file)

    def _from_memory(self, x: Tensor) -> Tensor:
        if self._rows is None:
            self._order = torch.randperm(len(x))
            self._rows = features(x, self.weight).index_select(0, self._order.argsort())
        return self._rows.index_select(0, self._order)

    def _from_file(self, x: Tensor, file: int) -> Tensor:
        out = torch.empty(len(x), FEATURES)
        if os.readv(file, [out.numpy().data.cast("B")]) == 0:  # the end: this is the process that fills
            os.write(file, features(x, self.weight).numpy().tobytes())
        return out

    def flush(self) -> None:
        pass


class Torchcache:
    """This project, and the public package of the same name: PYTHONPATH decides which one is found."""

    def __init__(self, folder: Path, persistent: bool) -> None:
        from torchcache import torchcache

        decorate: Any = torchcache(persistent=persistent, persistent_cache_dir=str(folder))
        self._module: Any = decorate(Backbone)()
        self.weight: Tensor = self._module.weight

    def __call__(self, x: Tensor, names: Names) -> Tensor:
        return self._module(x)

    def flush(self) -> None:
        if hasattr(self._module.cache_instance, "flush"):
            self._module.cache_instance.flush()


class ModuleCache:
    """torch-module-cache: the caller names the rows."""

    def __init__(self, folder: Path, persistent: bool) -> None:
        from torch_module_cache import CacheLevel, cache_module

        level = CacheLevel.DISK if persistent else CacheLevel.MEMORY
        self._module: Any = cache_module(cache_path=str(folder), cache_level=level)(Backbone)()

    @property
    def weight(self) -> Tensor:
        return self._module.weight

    def __call__(self, x: Tensor, names: Names) -> Tensor:
        return self._module(x, cache_key=names)

    def flush(self) -> None:
        pass


_backbone = Backbone()


def _embed(batch: Any) -> Any:
    return _backbone(torch.from_numpy(batch)).numpy()


class Joblib:
    """joblib.Memory on a function from a NumPy batch to a NumPy batch, which is what it hashes and loads fastest."""

    def __init__(self, folder: Path, persistent: bool) -> None:
        from joblib import Memory

        self._cached = Memory(folder, verbose=0).cache(_embed)
        self.weight: Tensor = _backbone.weight

    def __call__(self, x: Tensor, names: Names) -> Tensor:
        return torch.from_numpy(self._cached(x.numpy()))

    def flush(self) -> None:
        pass


RIVALS: dict[str, type[Rival]] = {
    "limit": Limit,
    "torchcache": Torchcache,
    "torch_module_cache": ModuleCache,
    "joblib": Joblib,
}
