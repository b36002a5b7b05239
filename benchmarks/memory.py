"""Keys and hits in memory, beside what the machine can do: reading the input once, gathering the output once."""

from __future__ import annotations

import copy
import ctypes
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from interleaved import measure, table
from torch import Tensor, nn

from torchcache import torchcache
from torchcache._native import ops

FEATURES = 768


class Backbone(nn.Module):
    """Any input → [B, 768] f32; what it computes does not matter here."""

    def forward(self, x: Tensor) -> Tensor:
        first = x.reshape(len(x), -1)[:, :1].float()
        return first.expand(-1, FEATURES) * torch.arange(FEATURES)


def read_limit() -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp())
    library = folder / "read_limit.so"
    source = Path(__file__).with_name("read_limit.cpp")
    subprocess.run(["g++", "-O3", "-mavx2", "-shared", "-fPIC", source, "-o", library], check=True)
    found = ctypes.CDLL(str(library))
    found.read_all.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    found.read_all.restype = ctypes.c_uint64
    return found


def keys(library: ctypes.CDLL, threads: int) -> None:
    x = torch.randn(64, 3, 224, 224)
    size = x.numel() * 4
    part = size // threads
    pool = ThreadPoolExecutor(threads)
    torch.set_num_threads(threads)

    def read() -> None:
        list(pool.map(lambda i: library.read_all(x.data_ptr() + i * part, part), range(threads)))

    rivals = [("limit: AVX2 read of the same bytes", read), ("keys", lambda: ops.keys([x], (0, 0)))]
    table(f"keys of (64, 3, 224, 224) f32, {threads} thread(s)", rivals, 25, size / 1e9, "GB/s")


def hits(name: str, x: Tensor, rounds: int) -> None:
    torch.set_num_threads(1)
    module = torchcache()(Backbone().eval())
    module(x)
    rows = torch.randn(len(x), FEATURES)
    order = torch.randperm(len(x))

    def limit() -> None:
        ops.keys([x], (0, 0))
        rows.index_select(0, order)

    with torch.no_grad():
        rivals = [("limit: hash + index_select", limit), ("full hit", lambda: module(x))]
        table(f"full hit, {name} → {FEATURES} f32, 1 thread", rivals, rounds, len(x) / 1e6, "M rows/s")


def half_hits(rounds: int = 15) -> None:
    """Batches of which half is in memory: beside a full hit and the forward of the other half."""
    torch.set_num_threads(1)
    network = nn.Sequential(nn.Conv2d(3, 32, 7, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    network.eval().requires_grad_(False)
    plain = copy.deepcopy(network)
    module = torchcache()(network)
    known = torch.randn(64, 3, 96, 96)
    module(known)
    # Each round has copies of its own on both sides: what was read before is read faster.
    copies = iter([known.clone() for _ in range(rounds + 1)])
    fresh = iter(torch.randn(rounds + 1, 32, 3, 96, 96))
    mixed = iter([torch.cat([known[:32], half]) for half in torch.randn(rounds + 1, 32, 3, 96, 96)])

    def limit() -> None:
        module(next(copies))
        plain(next(fresh))

    with torch.no_grad():
        rivals = [("limit: full hit + forward of the misses", limit), ("half hits", lambda: module(next(mixed)))]
        table("half hits, half misses, (64, 3, 96, 96) f32, 1 thread", rivals, rounds, 64 / 1e3, "k rows/s")


def memory_overhead() -> None:
    """Bytes of memory for each byte of cached rows: 100,000 rows of 768 f32."""
    module: Any = torchcache()(Backbone().eval())
    module(torch.zeros(1, 8))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    for i in range(0, 100_000, 1000):
        module(torch.arange(i + 1, i + 1001.0).unsqueeze(1).expand(-1, 8))
    used = resident() - before
    rows = module.cache_instance.memory_cache_size
    print(f"\nmemory used for each cached byte: {used / rows:.3f} ({rows / 1e6:.0f} MB, {4 * FEATURES} bytes a row)")


def unchanged_state() -> None:
    """What it costs on every call to see that no weight has changed."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, batch_first=True), 8, enable_nested_tensor=False)
    block = [nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    convolutions = nn.Sequential(*(copy.deepcopy(layer) for _ in range(53) for layer in block), nn.Linear(8, 8))
    print("\nseeing that nothing changed")
    for name, module in (("encoder", encoder), ("as many tensors as ResNet-50", convolutions)):
        cache: Any = torchcache()(module.eval().requires_grad_(False)).cache_instance
        (median,) = measure([(name, cache._state.digest)], 1000)
        count = f"{len(list(module.parameters()))} parameters, {len(list(module.buffers()))} buffers"
        print(f"  {name + ', ' + count:62} {median * 1e6:8.1f} µs")


def main() -> None:
    library = read_limit()
    for threads in (1, 2):
        keys(library, threads)
    hits("(64, 3, 224, 224) f32", torch.randn(64, 3, 224, 224), 25)
    hits("(256, 512) f32", torch.randn(256, 512), 400)
    hits("(64, 128) int64", torch.randint(0, 1000, (64, 128)), 400)
    half_hits()
    unchanged_state()
    memory_overhead()


if __name__ == "__main__":
    main()
