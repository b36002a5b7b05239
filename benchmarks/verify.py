"""What the checks of a cache cost: a share of the digits demo's epochs, and the fixed cost of a hit when none is due.

The demo's backbone and head are trained for some seconds, without checks and with them. A hit is that of one row, which
costs least, so that its fixed cost shows.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import torch
from interleaved import measure
from torch import Tensor, nn
from tqdm import tqdm

from torchcache import torchcache
from torchcache.engine.bypass import Bypassed
from torchcache.engine.cache import Cache
from torchcache.engine.verify import Sample, Verifier

ROUNDS = 20_000


def demo() -> Any:
    """The module of examples/digits.py."""
    path = Path(__file__).resolve().parent.parent / "examples" / "digits.py"
    spec = importlib.util.spec_from_file_location("digits", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["digits"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Checks:
    """Adds up the seconds that all checks of the process take."""

    def __init__(self) -> None:
        self.seconds = 0.0
        check = Verifier.check

        def timed(verifier: Verifier, sample: Sample) -> Bypassed | None:
            start = time.perf_counter()
            try:
                return check(verifier, sample)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(Verifier, "check", timed)  # noqa: B010 - mypy compares the names of the parameters


def train(digits: Any, data: tuple[Tensor, ...], seconds: float, share: float, checks: Checks) -> None:
    """Prints the mean epoch from the second on, and the share of the checks in the whole time."""
    torch.manual_seed(0)
    backbone: Any = torchcache(verify=share)(digits.Backbone())
    head = nn.Sequential(nn.BatchNorm1d(digits.FEATURES, affine=False), nn.Linear(digits.FEATURES, digits.CLASSES))
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    checks.seconds = 0.0
    start, epochs = time.perf_counter(), list[float]()
    while time.perf_counter() - start < seconds:
        begun = time.perf_counter()
        with tqdm(disable=True) as bar:
            digits.train_epoch(backbone, head, optimizer, data, bar)
        epochs.append(time.perf_counter() - begun)
    elapsed = time.perf_counter() - start
    info = backbone.cache_instance.info()
    later = epochs[1:] or epochs
    mean = sum(later) / len(later)
    print(
        f"  verify={share}: {len(epochs)} epochs, mean from the second on {mean * 1e3:.2f} ms; checks "
        f"took {checks.seconds / elapsed:.2%}, {info.checks} rows, largest error {info.largest_error:.1e}"
    )


def fixed_cost() -> None:
    """Prints a hit of one row without checks, with checks none of which is due, and the question alone."""
    x = torch.randn(1, 8)
    modules: list[Any] = [torchcache(verify=share)(nn.Linear(8, 8).requires_grad_(False)) for share in (0, 1e-9)]
    for module in modules:
        for _ in range(1200):  # past the rows before the first check
            module(x)
    cache: Cache = modules[1].cache_instance
    verifier = cache._verifier
    off, on, question = measure(
        [("off", lambda: modules[0](x)), ("on", lambda: modules[1](x)), ("asked", verifier.is_due)], ROUNDS
    )
    print(
        f"\na hit of one row: {off * 1e6:.2f} µs without checks, {on * 1e6:.2f} µs when none is due; to ask whether "
        f"one is due takes {question * 1e6:.2f} µs"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="of training, without checks and with them")
    seconds = parser.parse_args().seconds
    fixed_cost()
    digits, checks = demo(), Checks()
    data = digits.load_data(0, "cpu")
    print(f"\nthe digits demo, {seconds:.0f} s of training")
    for share in (0.0, 0.01):
        train(digits, data, seconds, share, checks)


if __name__ == "__main__":
    main()
