"""What the disk tier costs where every row is new: the digits demo's backbone, beside the same without a cache."""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from interleaved import Rival, table

from torchcache import torchcache

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from digits import Backbone, load_data

ROWS, BATCH = 512, 64


def main() -> None:
    images = load_data(0, "cpu")[0][:ROWS]
    plain = Backbone()
    caches: list[Any] = []

    def without() -> None:
        for batch in images.split(BATCH):
            plain(batch)

    def with_cache(**options: Any) -> None:
        module: Any = torchcache(**options)(copy.deepcopy(plain))
        for batch in images.split(BATCH):
            module(batch)
        assert module.cache_instance.info().misses == ROWS
        caches.append(module.cache_instance)

    with tempfile.TemporaryDirectory(prefix="torchcache-bench-") as folder:
        new = iter(range(10**6))
        rivals: list[Rival] = [
            ("limit: no cache", without),
            ("memory tier", with_cache),
            (
                "memory and disk tier",
                lambda: with_cache(persistent=True, persistent_cache_dir=f"{folder}/{next(new)}"),
            ),
        ]
        with torch.no_grad():
            table(f"first epoch of {ROWS} digits, batches of {BATCH}", rivals, 9, ROWS / 1e3, "k rows/s")
        for cache in caches:
            cache.close()


if __name__ == "__main__":
    main()
