"""What the tests of precompute and CachedRows share: forty labelled rows, and a module that counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torchcache import CachedRows, torchcache

N = 40
X = torch.arange(N * 3.0).view(N, 3)
LABELS = torch.arange(N) * 10


class Counting(nn.Module):
    """Remembers which rows were computed."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows += x[:, 0].tolist()
        return x * 2 + 1


def cached(directory: Path | None = None, **options: Any) -> Counting:
    return torchcache(persistent=directory is not None, persistent_cache_dir=directory, **options)(Counting())


def labelled(size: int = 7) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, LABELS), batch_size=size)


def assert_rows(rows: CachedRows, **loading: Any) -> None:
    """An epoch of a DataLoader gives every row once, as the module gives it."""
    seen = []
    for outputs, labels in DataLoader(rows, batch_size=6, shuffle=True, **loading):
        assert torch.equal(outputs, X[labels // 10] * 2 + 1)
        seen += labels.tolist()
    assert sorted(seen) == LABELS.tolist()
