"""An epoch of training batches from cached rows, beside indexing a tensor in memory that holds the same rows."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from interleaved import table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from torchcache import CachedRows, precompute, torchcache

FEATURES = 768
BATCH = 256


class Backbone(nn.Module):
    """[B, 4] → [B, 768] f32; what it computes does not matter here."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] * torch.arange(FEATURES)


class Indexed(Dataset[Any]):
    """The limit: outputs and labels in two tensors, a batch is one index_select of each."""

    def __init__(self, outputs: Tensor, labels: Tensor) -> None:
        self.outputs, self.labels = outputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        where = torch.tensor(indices)
        return self.outputs.index_select(0, where), self.labels.index_select(0, where)


def same(batch: Any) -> Any:
    return batch


def loader(dataset: Dataset[Any], collate: Callable[[Any], Any] | None) -> Iterable[Any]:
    return DataLoader(dataset, batch_size=BATCH, shuffle=True, collate_fn=collate)


def all_of(batches: Iterable[Any]) -> None:
    for _ in batches:
        pass


def direct(get: Callable[[list[int]], Any], orders: list[list[int]]) -> None:
    for order in orders:
        get(order)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), given.rows, given.rounds)


def compare(folder: Path, count: int, rounds: int) -> None:
    inputs, labels = torch.arange(count * 4.0).view(-1, 4), torch.arange(count)
    module = torchcache(persistent=True, persistent_cache_dir=folder)(Backbone())
    rows = precompute(module, DataLoader(TensorDataset(inputs, labels), batch_size=BATCH))
    rows.save(folder / "rows")
    on_disk = CachedRows.load(folder / "rows", max_memory_cache_size=0)
    with torch.no_grad():
        indexed = Indexed(Backbone()(inputs), labels)
    orders = [order.tolist() for order in torch.randperm(count).split(BATCH)]
    title = f"an epoch over {count} rows of {FEATURES} f32 and a label, shuffled, batches of {BATCH}, 1 thread"
    rivals = [
        ("limit: index_select of two tensors", lambda: direct(indexed.__getitems__, orders)),
        ("CachedRows, memory", lambda: direct(lambda order: rows.collate(rows.__getitems__(order)), orders)),
        ("CachedRows, disk only", lambda: direct(lambda order: on_disk.collate(on_disk.__getitems__(order)), orders)),
    ]
    table(title, rivals, rounds, count / 1e6, "M rows/s")
    rivals = [
        ("limit: index_select of two tensors", lambda: all_of(loader(indexed, same))),
        ("CachedRows, memory, collate=rows.collate", lambda: all_of(loader(rows, rows.collate))),
        ("CachedRows, disk only, the same", lambda: all_of(loader(on_disk, rows.collate))),
        ("CachedRows, memory, default collate", lambda: all_of(loader(rows, None))),
        ("TensorDataset, default collate", lambda: all_of(loader(TensorDataset(indexed.outputs, labels), None))),
    ]
    table(f"{title}, by a DataLoader", rivals, rounds, count / 1e6, "M rows/s")


if __name__ == "__main__":
    main()
