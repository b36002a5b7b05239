"""Keys, the look at the state and hits on a GPU, beside what the GPU can do: reading, gathering, waiting once.

Figures count only from a real GPU; without one this says so and measures nothing.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch
from interleaved import table
from torch import Tensor, nn
from torch._C._autograd import DeviceType

from torchcache import torchcache
from torchcache._native import ops
from torchcache.identity.watch import NativeWatch

FEATURES = 768
ROUNDS = 50
BEYOND_CACHE = 400_000_000  # bytes of inputs that are used in turn, so that none is still in the L2 cache


class Backbone(nn.Module):
    """Any input → [B, 768] f32; what it computes does not matter here."""

    def forward(self, x: Tensor) -> Tensor:
        first = x.reshape(len(x), -1)[:, :1].float()
        return first.expand(-1, FEATURES) * torch.arange(FEATURES, device=x.device)


def gpu_seconds(work: Callable[[], object], kernel: str | None = None) -> float:
    """Median time of the kernels of one call (those whose name has `kernel` in it), without launches and waits."""
    times = []
    work()
    torch.cuda.synchronize()
    for _ in range(ROUNDS):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize()
        events = [e for e in profile.events() or [] if e.device_type == DeviceType.CUDA]
        named = [e for e in events if kernel is None or kernel in e.name]
        times.append(sum(e.time_range.elapsed_us() for e in named) / 1e6)
    return statistics.median(times)


def print_line(name: str, seconds: float, size: int, limit: float) -> None:
    rate = size / seconds / 1e9
    print(f"  {name:42} {seconds * 1e6:12.1f} µs {rate:12.1f} GB/s {rate / limit:8.0%} of the limit")


def in_turn(make: Callable[[], Tensor], size: int) -> Callable[[], Tensor]:
    """The next of so many tensors that each is out of the cache when its turn comes."""
    tensors = itertools.cycle([make() for _ in range(max(2, BEYOND_CACHE // size))])
    return lambda: next(tensors)


def read_limit() -> float:
    """GB/s that the GPU reads: the best of torch's sums over 2 GB."""
    x = torch.ones(500_000_000, device="cuda")
    best = min(gpu_seconds(x.sum), gpu_seconds(x.view(torch.int32).amax))
    print(f"\nreading 2 GB: {2 / best:.0f} GB/s, the limit of keys")
    return 2 / best


def keys(shape: tuple[int, ...], limit: float) -> None:
    size = 4 * torch.Size(shape).numel()
    following = in_turn(lambda: torch.randn(shape, device="cuda"), size)
    call = (0, 0)
    print(f"\nkeys of {shape} f32, {size / 1e6:.0f} MB")
    print_line("limit: reading it", size / limit / 1e9, size, limit)
    print_line("torch: sum", gpu_seconds(lambda: following().sum()), size, limit)
    print_line("kernels of keys", gpu_seconds(lambda: ops.keys([following()], call), "digest_kernel"), size, limit)
    last = in_turn(lambda: torch.randn(shape, device="cuda").transpose(1, -1), size)
    print_line("the same, transposed", gpu_seconds(lambda: ops.keys([last()], call), "digest_kernel"), size, limit)
    table(
        "  as a call, with launches and the wait",
        [
            ("limit: sum().item()", lambda: following().sum().item()),
            ("keys", lambda: ops.keys([following()], call)),
            ("through the host", lambda: ops.keys([following().cpu()], call)),
        ],
        ROUNDS,
        size / 1e9,
        "GB/s",
    )


def gather() -> None:
    """What a hit cannot do without: rows of the arena in another order, read once and written once."""
    arena = torch.randn(1_000_000, FEATURES, device="cuda")
    slots = torch.randint(0, len(arena), (65_536,), device="cuda")
    size = 2 * len(slots) * FEATURES * 4
    copied = torch.empty(len(slots), FEATURES, device="cuda")
    source = in_turn(lambda: torch.randn(len(slots), FEATURES, device="cuda"), size)
    copy = gpu_seconds(lambda: copied.copy_(source()))
    limit = size / copy / 1e9
    print(f"\ngather of {len(slots):,} rows of {FEATURES} f32")
    print_line("limit: copying as many rows in order", copy, size, limit)
    print_line("index_select", gpu_seconds(lambda: arena.index_select(0, slots)), size, limit)


def unchanged_state() -> None:
    layers = [layer for _ in range(53) for layer in (nn.Conv2d(64, 64, 3, bias=False), nn.BatchNorm2d(64))]
    module = nn.Sequential(*layers, nn.Linear(8, 8)).eval().requires_grad_(False).cuda()
    tensors = [*module.parameters(), *module.buffers()]
    watch = NativeWatch(tensors)
    one = torch.zeros(1, device="cuda")
    x = torch.randn(64, 1000, device="cuda")
    call = (0, 0)
    empty = ops.table_open()
    table(
        f"seeing that nothing changed, {len(tensors)} tensors",
        [
            ("limit: one kernel and one wait", lambda: one.add_(1).item()),
            ("a probe of its own", watch.probe),
            ("keys", lambda: ops.table_hash_and_read(empty, [x], call, 0)),
            ("keys and a probe that rides along", lambda: ops.table_hash_and_read(empty, [x], call, watch.id)),
        ],
        1000,
        1e-6,
        "M/s",
    )
    ops.table_close(empty)


def hits(name: str, x: Tensor, device: str) -> None:
    module = torchcache(memory_cache_device=device)(Backbone().eval())
    module(x)
    rows = torch.randn(len(x), FEATURES, device="cuda")
    order = torch.randperm(len(x), device="cuda")
    call = (0, 0)

    def timed(work: Callable[[], object]) -> Callable[[], None]:
        def to_the_end() -> None:
            work()
            torch.cuda.synchronize()

        return to_the_end

    def limit() -> None:
        ops.keys([x], call)
        rows.index_select(0, order)

    with torch.no_grad():
        rivals = [("limit: hash + index_select", timed(limit)), ("full hit", timed(lambda: module(x)))]
        table(f"full hit, {name} → {FEATURES} f32, rows on {device}", rivals, 400, len(x) / 1e6, "M rows/s")


def main() -> None:
    if not torch.cuda.is_available():
        print("there is no GPU here: nothing is measured")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%d %B %Y')}")
    print(f"CUDA built in for: {', '.join(map(str, ops.cuda_architectures())) or 'none: all goes through the host'}")
    limit = read_limit()
    keys((64, 3, 224, 224), limit)
    keys((4096, 512), limit)
    gather()
    unchanged_state()
    for device in ("cuda", "cpu"):
        hits("(64, 3, 224, 224) f32", torch.randn(64, 3, 224, 224, device="cuda"), device)
        hits("(4096, 512) f32", torch.randn(4096, 512, device="cuda"), device)


if __name__ == "__main__":
    main()
