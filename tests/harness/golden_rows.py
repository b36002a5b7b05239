"""The rows of tests/store/golden by formula, and how its directories were written: tests/store/golden/README.md."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchcache import torchcache
from torchcache._native import ops

# ---- a store: layouts, keys and rows by name alone

_NAMES = (
    "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 bfloat16 float32 float64 complex64 complex128 "
    "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"
)
DTYPES = _NAMES.split()


def _layout(tree: Any, *leaves: tuple[str, list[int]], **more: str) -> str:
    described = [{"dtype": dtype, "stored": dtype, "shape": shape, **more} for dtype, shape in leaves]
    return json.dumps({"leaves": described, "tree": tree}, sort_keys=True, separators=(",", ":"))


SMALL = [
    *(_layout("*", (name, [3])) for name in DTYPES),
    _layout("*", ("float32", [])),
    _layout("*", ("float32", [0])),
    _layout("*", ("float32", [2, 2]), stored="float16"),
    _layout("*", ("float32", [2]), device="cuda:0"),
    _layout(["tuple", "*", None, ["list", "*"]], ("float32", [4, 5]), ("bool", [7])),
    _layout(["dict", ["a", "*"], [1, "*"]], ("int64", []), ("bfloat16", [2])),
    _layout(["class", "golden_rows:Pair", ["left", "*"], ["right", "*"]], ("float64", [1]), ("int16", [5])),
]
LARGE = [_layout("*", ("float16", [50]))]  # enough rows for three pages of an index

# Name of a segment → its layouts, rows of each, zstd.
SEGMENTS = {
    "raw": (SMALL, 3, False),
    "zstd": (SMALL, 3, True),
    "pages raw": (LARGE, 400, False),
    "pages zstd": (LARGE, 400, True),
}


class GoldenRow(NamedTuple):
    key: int  # 128 bits
    layout: str
    leaves: list[Tensor]  # uint8, one for each leaf

    @property
    def data(self) -> bytes:
        return b"".join(bytes(leaf.tolist()) for leaf in self.leaves)


def golden_rows(segment: str) -> list[GoldenRow]:
    layouts, count, _ = SEGMENTS[segment]
    return [_row(f"{segment}, layout {n}, row {i}", i, text) for n, text in enumerate(layouts) for i in range(count)]


def _row(name: str, number: int, layout: str) -> GoldenRow:
    """The key is SHAKE-128 of the name. So is each leaf, with its number; odd rows repeat the first three bytes."""
    leaves = []
    for i, leaf in enumerate(json.loads(layout)["leaves"]):
        size = getattr(torch, leaf["stored"]).itemsize * math.prod(leaf["shape"])
        data = hashlib.shake_128(f"{name}, leaf {i}".encode()).digest(max(3, size))
        data = (data[:3] * size if number % 2 else data)[:size]
        one = bytes(byte & 1 for byte in data) if leaf["stored"] == "bool" else data
        leaves.append(torch.tensor(list(one), dtype=torch.uint8))
    key = int.from_bytes(hashlib.shake_128(name.encode()).digest(16), "big")
    return GoldenRow(key, layout, leaves)


def keys_tensor(keys: list[int]) -> Tensor:
    """128-bit keys → int64 ``[B, 2]``, low halves first."""
    data = b"".join(key.to_bytes(16, "little") for key in keys)
    return torch.frombuffer(bytearray(data), dtype=torch.int64).reshape(-1, 2)


# ---- what a user's process writes


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


X = torch.arange(24).reshape(6, 4)
MASK = torch.tensor([True, False, True, True, False, False])


def cached_function(directory: Path, compute: bool, **options: Any) -> Any:
    """A cached function whose rows are exact on any machine; without `compute`, it must find all of them."""

    def features(x: Tensor, mask: Tensor, scale: int = 3, *rest: Tensor, mode: str = "sum", **more: Any) -> Any:
        assert compute, "rows were computed"
        pair = Pair((x * scale).to(torch.bfloat16), mask)
        return {"pair": pair, mode: (x.sum(1), None), "more": [rest[0] + 1.5]}

    return torchcache(persistent=True, persistent_cache_dir=directory, persistent_module_hash="function", **options)(
        features
    )


def function_call(features: Any) -> Any:
    return features(X, MASK, 5, X.double(), mode="total", names=("a", 2.5, None), weight=torch.float16)


class Doubled(nn.Module):
    def __init__(self, compute: bool) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        assert self.compute, "rows were computed"
        return self.inner(x) * 2


def cached_module(directory: Path, compute: bool, **options: Any) -> Any:
    """A cached module in evaluation mode, its rows kept as float16 and compressed."""
    options = {"cache_dtype": torch.half, "zstd_compression": True, **options}
    decorate = torchcache(persistent=True, persistent_cache_dir=directory, persistent_module_hash="module", **options)
    return decorate(Doubled(compute).eval())


MODULE_ROWS = torch.arange(6 * 2000.0).reshape(6, 2000) % 97  # more than one leaf of 4096 bytes a row


# ---- how it was made


def write(directory: Path) -> None:
    """Writes a new version's directory. It must not exist: what is committed is never written again."""
    directory.mkdir()
    for segment, (layouts, count, zstd) in SEGMENTS.items():
        store = ops.store_open(str(directory / "store"), 10**9, zstd, 3, 1, False, 1 << 20)
        rows = golden_rows(segment)
        for first in range(0, len(layouts) * count, count):
            _put(store, rows[first : first + count])
        ops.store_close(store)
    function, module = cached_function(directory, True), cached_module(directory, True)
    function_call(function)
    module(MODULE_ROWS)
    function.cache_instance.close()
    module.cache_instance.close()


def _put(store: int, rows: list[GoldenRow]) -> None:
    """A block of rows of one layout."""
    leaves = [torch.stack(parts) for parts in zip(*(row.leaves for row in rows))]
    ops.store_write(store, keys_tensor([row.key for row in rows]), rows[0].layout, leaves)
    ops.store_flush(store)
