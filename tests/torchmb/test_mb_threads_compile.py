"""A batch may be called by several threads, and by what torch.compile makes of it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn as nn
from models_harness import Own, close, run_alike, separate
from torch import Tensor

from torchmb import BatchModule


def own_forward() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.last = m.l(x)
        return m.l(m.last.relu()).softmax(0)

    return Own(forward, l=nn.Linear(4, 4))


def tree() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def branching() -> nn.Module:
    return Own(lambda m, x: m.l(x) * (2 if x.sum() > 0 else 3), l=nn.Linear(4, 4))


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """They take turns after as few instructions as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.filterwarnings("ignore:the 3 models of Own run one by one")
@pytest.mark.parametrize("make", [own_forward, tree, branching])
def test_threads_may_share_a_batch(make: Callable[[], nn.Module], hasty_threads: None) -> None:
    models = separate(make, 3)
    batch = BatchModule.from_modules(models)
    inputs = torch.randn(160, 3, 5, 4)
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(batch, inputs))
    for x, out in zip(inputs, outputs):
        close(out, [m(one) for m, one in zip(models, x)], "output")
    assert batch.get_parameter("0.weight" if make is tree else "l.weight").is_leaf


def test_switches_of_torch_are_as_they_were_when_runs_of_several_threads_overlap(hasty_threads: None) -> None:
    batches = [BatchModule(own_forward(), 3) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda b: [b(torch.randn(3, 5, 4)) for _ in range(20)], batches))
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("outer", [lambda b: b, lambda b: nn.Sequential(b, nn.Identity())])
@pytest.mark.parametrize("make", [own_forward, tree])
def test_a_compiled_batch_is_right_and_runs_all_models_at_once(make: Any, outer: Any) -> None:
    models = separate(make, 3)
    batch = BatchModule.from_modules(models)
    compiled = torch.compile(outer(batch), backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the 3 models of")
        for _ in range(2):
            run_alike(batch, models, torch.randn(3, 5, 4), lambda m, x: compiled(x) if m is batch else m(x))
