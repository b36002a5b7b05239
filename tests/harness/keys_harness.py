"""Keys and digests in plain Python, after docs/format.md, and tensors to compare them on; shared by tests of keys."""

from __future__ import annotations

import struct

import torch
import xxhash
from hypothesis import strategies as st
from torch import Tensor

LEAF = 4096
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


# ---- a plain reference in Python: docs/format.md, "Keys and digests"


def h(data: bytes) -> bytes:
    return xxhash.xxh3_128_digest(data.ljust(256, b"\0"))


def row_digest(data: bytes) -> bytes:
    leaves = [h(data[i : i + LEAF]) for i in range(0, len(data), LEAF)] or [h(b"")]
    return leaves[0] if len(leaves) == 1 else h(b"".join(leaves))


def as_pair(digest: bytes) -> list[int]:
    high, low = struct.unpack(">qq", digest)
    return [low, high]


def row_bytes(t: Tensor) -> list[bytes]:
    rows = [torch.empty(r.numel(), dtype=r.dtype).copy_(r.reshape(-1)) for r in t]
    return [bytes(r.view(torch.uint8).tolist()) for r in rows]


def reference_keys(call: tuple[int, int], *rows: Tensor) -> list[list[int]]:
    low, high = call
    prefix = struct.pack(">qq", high, low)
    return [as_pair(h(prefix + b"".join(map(row_digest, r)))) for r in zip(*map(row_bytes, rows))]


CALL = (0x0123456789ABCDEF, -2)


@st.composite
def strided(draw: st.DrawFn) -> Tensor:
    """A tensor [B, …] seen through slices, steps, transpositions and expansions."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=2, max_size=4))
    dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.float32, torch.int64, torch.complex128]))
    x = torch.arange(1, 1 + torch.Size(sizes).numel()).to(dtype).view(sizes)
    x = x.permute(draw(st.permutations(range(x.dim()))))
    for d in range(x.dim()):
        start = draw(st.integers(0, x.shape[d] - 1))
        x = x[(slice(None),) * d + (slice(start, None, draw(st.integers(1, 3))),)]
    if draw(st.booleans()):
        x = x.unsqueeze(1).expand(x.shape[0], draw(st.integers(1, 3000)), *x.shape[1:])
    return x
