"""Whatever line of the library an exception interrupts, rows stay right: in this process and in the next one."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_harness import cache_of
from interrupt_harness import AtLine, Line, lines_of
from torch import Tensor, nn

from torchcache import precompute, torchcache

X = torch.arange(12.0).view(6, 2)
ERRORS = (KeyboardInterrupt, MemoryError)


class Net(nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3, bias=False)
        self.scale = {"all": 1.0}
        self.calls = 0
        self.requires_grad_(False)
        set_weight(self, weight)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * self.scale["all"]


def set_weight(net: Net, weight: float) -> None:
    net.linear.weight = nn.Parameter(torch.full((3, 2), weight), requires_grad=False)


def cached(directory: Path, weight: float) -> Net:
    return torchcache(persistent=True, persistent_cache_dir=directory, max_memory_cache_size=1e6)(Net(weight))


def replace_weight(net: Net, weight: float) -> None:
    set_weight(net, weight)
    net(X)


def edit_weight(net: Net, weight: float) -> None:
    net.linear.weight.fill_(weight)
    net(X)


def edit_dict(net: Net, weight: float) -> None:
    net.scale["all"] = weight
    net(X)


def some_rows_are_new(net: Net, weight: float) -> None:
    net(torch.cat([X[:3], X + weight]))


def fill(net: Net, weight: float) -> None:
    set_weight(net, weight)
    precompute(net, X.split(3), progress=False)[2]


def clear(net: Net, weight: float) -> None:
    net(X + weight)
    cache_of(net).clear()
    cache_of(net).flush()


STEPS: dict[str, Callable[[Net, float], Any]] = {
    f.__name__: f for f in (replace_weight, edit_weight, edit_dict, some_rows_are_new, fill, clear)
}

IN_A_DIRECTORY = 32  # interrupted steps: each opens a store, which reads what the others left there

READ_ALL = """
import sys, torch
sys.path[:0] = sys.argv[3:]
from test_interrupts import IN_A_DIRECTORY, X, cached, set_weight
from pathlib import Path
hits, net = 0, None
for k in range(1, int(sys.argv[2]) + 1):
    if net is None or k % IN_A_DIRECTORY == 0:
        net = cached(Path(sys.argv[1]) / str(k // IN_A_DIRECTORY), 1.0)
    for weight, scale in ((float(k), 1.0), (1.0, float(k))):
        set_weight(net, weight)
        net.scale["all"] = scale
        rows = torch.cat([X, X + k])
        assert torch.equal(net(rows), net.linear(rows) * scale), k
    hits += net.cache_instance.info().disk_hits
print(hits)
"""


def interrupt(directory: Path, step: Callable[[Net, float], Any], line: Line, number: int) -> None:
    """One interrupted step; afterwards the same calls give what the module gives without a cache."""
    net = cached(directory, 1.0)
    net(X)
    tracer = AtLine(line, ERRORS[number % 2])
    with contextlib.suppress(*ERRORS):
        tracer.run(lambda: step(net, float(number)))
    for _ in range(2):
        for x in (X, X[2:], torch.cat([X, X + number])):
            assert torch.equal(net(x), net.linear(x) * net.scale["all"]), line
    cache_of(net).close()


def lines_of_step(step: Callable[[Net, float], Any], directory: Path) -> list[Line]:
    net = cached(directory, 1.0)
    net(X)
    return lines_of(lambda: step(net, 2.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_an_exception_at_any_line_costs_no_right_row(name: str, tmp_path: Path) -> None:
    lines = lines_of_step(STEPS[name], tmp_path / "first")
    if name != "replace_weight":  # which comes by most lines; the others only at those that are their own
        others = set(lines_of_step(replace_weight, tmp_path / "second"))
        lines = [line for line in lines if line not in others]
    assert lines
    for number, line in enumerate(lines, 1):
        interrupt(tmp_path / "rows" / str(number // IN_A_DIRECTORY), STEPS[name], line, number)
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "harness")]
    command = [sys.executable, "-c", READ_ALL, str(tmp_path / "rows"), str(len(lines)), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
