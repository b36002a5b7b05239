"""A cache that misses says why: which tier has what, and what has changed in the keys."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cache_harness import cache_of
from torch import Tensor, nn

from torchcache import torchcache

X = torch.arange(12.0).view(4, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 2)
        self.act = nn.LeakyReLU(0.1)
        self.scale = 1.0
        self.requires_grad_(False)

    def forward(self, x: Tensor, power: int = 1) -> Tensor:
        return self.act(self.linear(x)) ** power * self.scale


def cached(directory: Path, **options: object) -> Net:
    return torchcache(persistent=True, persistent_cache_dir=directory, **options)(Net())  # type: ignore[arg-type]


def test_rows_are_counted_by_tier_and_nothing_is_computed(tmp_path: Path) -> None:
    cached(tmp_path)(X[:2])
    module = cached(tmp_path)
    module(X[1:2])
    before = cache_of(module).info()
    why = cache_of(module).explain(X)
    assert (why.rows, why.in_memory, why.on_disk) == (4, 1, 1)
    assert why.since_last_call == [] == why.since_directory
    assert "1 of 4 rows are in memory, 1 more on disk" in str(why) and "but the rows themselves" in str(why)
    assert cache_of(module).info() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.linear.weight.mul_(2), "tensor linear.weight"),
        (lambda m: setattr(m, "scale", 3.0), "attribute scale"),
        (lambda m: setattr(m, "act", nn.LeakyReLU(0.5)), "configuration of act"),
        (lambda m: m.act.eval(), "mode (train or eval)"),
    ],
)
def test_what_changed_is_named(tmp_path: Path, change: object, named: str) -> None:
    module = cached(tmp_path)
    module(X)
    change(module)  # type: ignore[operator]
    why = cache_of(module).explain(X)
    assert why.in_memory == 0 and why.since_last_call == why.since_directory == [named]
    assert f"changed: {named}" in str(why)


def test_a_changed_argument_is_named(tmp_path: Path) -> None:
    module = cached(tmp_path)
    module(X)
    assert cache_of(module).explain(X, 2).since_last_call == ["argument power"]
    assert cache_of(module).explain(X.double()).since_last_call == ["argument x"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cache_of(module).explain(X).since_last_call == ["autocast"]


def test_a_directory_of_another_module_hash_says_what_makes_it_another(tmp_path: Path) -> None:
    cached(tmp_path)(X)
    other = cached(tmp_path, zstd_compression=True, zstd_compression_level=5)
    assert cache_of(other).explain(X).since_directory == [
        "option zstd_compression",
        "option zstd_compression_level",
    ]

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    Net.__qualname__ = "Net"
    changed = torchcache(persistent=True, persistent_cache_dir=tmp_path)(Net())
    assert "code of Net" in (cache_of(changed).explain(X).since_directory or [])


def test_a_miss_is_explained_at_debug(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    module = cached(tmp_path)
    with caplog.at_level(logging.DEBUG, logger="torchcache"):
        module(X)
        module.linear.weight.mul_(2)
        module(X)
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.DEBUG]
    assert len(said) == 2 and "against the last call: changed: tensor linear.weight" in said[1]


def test_the_first_call_has_nothing_to_compare_with() -> None:
    why = cache_of(torchcache()(Net())).explain(X)
    assert why.since_last_call is None is why.since_directory
    assert "nothing to compare with" in str(why)


# ---- calls that are not cached


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x)


class Counting(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize(
    ("make", "x", "reason"),
    [
        (Dropping, X, "random numbers"),
        (Counting, X, "changes the module's own state"),
        (lambda: nn.BatchNorm1d(3, affine=False), X, "statistics of the batch"),
        (Net, X.clone().requires_grad_(), "requires grad"),
        (Net, X[:0], "empty"),
        (Net, X.to_sparse(), "no plain bytes"),
    ],
)
def test_a_call_that_is_not_cached_says_why(make: Callable[[], nn.Module], x: Tensor, reason: str) -> None:
    module = torchcache()(make())
    for _ in range(3):  # a forward must be seen to draw numbers, and to change the state twice
        module(x)
    why = cache_of(module).explain(x)
    assert why.bypassed is not None and reason in why.bypassed
    assert str(why) == f"this call is not cached: {why.bypassed}"
    assert (why.rows, why.in_memory, why.on_disk) == (0, 0, 0)
    assert cache_of(module).info().bypassed_calls == 3 and cache_of(module).info().misses == 0


def test_global_hooks_are_the_reason_while_they_are_there() -> None:
    module = torchcache()(Net())
    module(X)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert "register_module_forward_hook" in str(cache_of(module).explain(X))
    finally:
        handle.remove()
    assert cache_of(module).explain(X).bypassed is None
    assert cache_of(module).info().bypassed_calls == 0


@pytest.mark.parametrize("how", ["keys", "hash_tensor", "explain"])
@pytest.mark.parametrize("make", [Dropping, lambda: nn.BatchNorm1d(3, affine=False), Net])
def test_asking_changes_nothing(
    how: str, make: Callable[[], nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = torchcache(persistent=True, persistent_cache_dir=tmp_path)(make())
    cache = cache_of(module)
    before = cache.info(), cache.explain(X), random.getstate(), torch.get_rng_state()
    for _ in range(2):
        getattr(cache, how)(X)
        getattr(cache, how)(X[:2] + 1)
    assert cache.info() == before[0] and cache.explain(X) == before[1]
    assert random.getstate() == before[2] and torch.equal(torch.get_rng_state(), before[3])
    assert not caplog.records and not any(tmp_path.rglob("*.seg"))
    module(X)  # a call that is not cached is still told of once
    assert len(caplog.records) == (0 if isinstance(module, Net) else 1)
