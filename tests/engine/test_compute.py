"""A cached forward gives what the forward gives, whatever it needs: whole batches, a graph, hooks, tuples."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cache_harness import cache_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm

from torchcache import torchcache
from torchcache.engine.observation import hooks_of_users

X = torch.arange(8.0).view(4, 2)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    caplog.set_level(logging.WARNING, "torchcache")
    yield lambda: [r.getMessage() for r in caplog.records if r.name == "torchcache" and r.levelno >= logging.WARNING]


# ---- grad mode


def test_rows_of_training_and_of_evaluation_are_the_same() -> None:
    cached = torchcache()(lambda x: x + (1 if torch.is_grad_enabled() else 2))
    outputs = [cached(X)]
    with torch.no_grad():
        outputs.append(cached(X))
    assert torch.equal(*outputs) and cache_of(cached).info().memory_hits == 4


def test_a_forward_that_needs_a_graph_is_computed_in_the_mode_of_the_caller() -> None:
    def slope(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad((x**2).sum(), x)[0]

    cached = torchcache()(slope)
    for batch in (X[:2], X, X):
        assert torch.equal(cached(batch), batch * 2)
    assert cache_of(cached).info()[:3] == (2 + 4, 0, 4)
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        cached(X + 100)


def test_an_error_of_the_forward_is_its_own_in_every_mode() -> None:
    def failing(x: Tensor) -> Tensor:
        raise KeyError("mine")

    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), pytest.raises(KeyError, match="mine"):
            torchcache()(failing)(X)


@pytest.mark.parametrize("kind", ["scalar", "random"])
def test_an_output_that_is_not_cached_has_its_graph_from_the_first_call_on(kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mean() if kind == "scalar" else nn.functional.dropout(self.layer(x)).sum(1)

    module = torchcache()(Net())
    for _ in range(3):
        module.zero_grad()
        module(X).sum().backward()
        assert module.layer.weight.grad is not None


# ---- whole batches


WHOLE: dict[str, Callable[[Tensor], Any]] = {
    "squeeze": lambda x: x.unsqueeze(2).repeat(1, 1, 3).squeeze(),
    "view": lambda x: x.view(8, -1) * 2,
    "an assertion": lambda x: x * 2 if len(x) == 8 else [][0],
    "another width": lambda x: (x * 2).repeat(1, 2 if len(x) == 8 else 1),
    "another dtype": lambda x: x * 2 if len(x) == 8 else x.double() * 2,
    "another nesting": lambda x: x * 2 if len(x) == 8 else [x * 2],
}


@given(st.sampled_from(sorted(WHOLE)), st.lists(st.lists(st.integers(0, 12), min_size=8, max_size=8), max_size=6))
def test_a_forward_that_is_right_only_for_whole_batches_never_fails(kind: str, batches: list[list[int]]) -> None:
    cached = torchcache()(WHOLE[kind])
    table = torch.arange(26.0).view(13, 2)
    cached(table[:8])
    for rows in batches:
        assert torch.equal(cached(table[rows]), WHOLE[kind](table[rows]))


def test_a_kind_of_call_that_needs_whole_batches_is_told_of_once_and_cached(caplog: pytest.LogCaptureFixture) -> None:
    sizes = []

    def fixed(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x.view(4, -1) * 2

    caplog.set_level(logging.INFO, "torchcache")
    cached = torchcache()(fixed)
    for row in range(4):
        batch = X.clone()
        batch[row] += 100
        for _ in range(2):
            assert torch.equal(cached(batch), batch * 2)
    assert sizes == [4, 2, 4, 4, 4] and cache_of(cached).info().memory_rows == 4 + 4
    assert [("whole batches" in r.getMessage()) for r in caplog.records].count(True) == 1


def test_an_interrupt_during_the_missing_rows_is_not_taken_for_a_failure() -> None:
    def interrupted(x: Tensor) -> Tensor:
        if len(x) == 1:
            raise KeyboardInterrupt
        return x * 2

    cached = torchcache()(interrupted)
    cached(X)
    batch = torch.cat([X, X[:1] + 100])
    with pytest.raises(KeyboardInterrupt):
        cached(batch)
    assert cache_of(cached).info().misses == 4


# ---- tuples of plain values


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_a_tuple_with_a_value_for_each_row_is_never_taken_for_one_of_the_batch(
    calls: list[tuple[int, int]], nested: bool, reverse: bool
) -> None:
    def scaled(x: Tensor, values: Any) -> Tensor:
        values = values[0] if nested else values
        return torch.stack([row * value for row, value in zip(x, values, strict=True)])

    cached = torchcache()(scaled)
    for row, value in calls:
        x = torch.stack([X[0], X[row], X[0]])
        values = (1, value, 2)
        for batch, given_values in ((x, values), (x.flip(0), values[::-1]), (x, values)):
            argument = (given_values, "note") if nested else given_values
            assert torch.equal(cached(batch, argument), scaled(batch, argument))


def test_a_tuple_of_the_length_of_the_batch_that_belongs_to_all_rows_is_cached() -> None:
    cached = torchcache()(lambda x, size: x * size[0] + size[1])
    for _ in range(2):
        assert torch.equal(cached(X[:2], (2, 3)), X[:2] * 2 + 3)
        assert torch.equal(cached(X[:3], (2, 3)), X[:3] * 2 + 3)
    assert cache_of(cached).info().memory_hits == 2 + 3


# ---- hooks inside the module


class Steer:
    def __init__(self, by: float) -> None:
        self.by = by

    def hook(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + self.by


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).requires_grad_(False)


def collecting_hooks(kept: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    def same(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        kept["features"] = output
        return output

    @torch.no_grad()
    def decorated(module: nn.Module, args: Any, output: Tensor) -> None:
        kept["features"] = output

    class Callback:
        def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
            kept["features"] = output

    return {
        "lambda": lambda m, args, output: kept.update(features=output),
        "same": same,
        "decorated": decorated,
        "object": Callback(),
    }


@pytest.mark.parametrize("kind", ["lambda", "same", "decorated", "object"])
def test_a_hook_that_collects_features_gets_those_of_every_batch(kind: str, warnings: Callable[[], list[str]]) -> None:
    kept: dict[str, Any] = {}
    plain, module = network(), torchcache()(network())
    module(X)
    handle = module[0].register_forward_hook(collecting_hooks(kept)[kind])
    for batch in (X, X + 1, X, X[:2]):
        assert torch.equal(module(batch), plain(batch))
        assert torch.equal(kept["features"], plain[0](batch))
    assert len(warnings()) == 1 and "remove the hook" in warnings()[0]
    handle.remove()
    hits = cache_of(module).info().memory_hits
    module(X)
    assert cache_of(module).info().memory_hits == hits + 4


def test_a_pre_hook_that_collects_inputs_gets_those_of_every_batch() -> None:
    kept: list[Tensor] = []
    module = torchcache()(network())
    module[0].register_forward_pre_hook(lambda m, args: kept.append(args[0]))
    for batch in (X, X + 1, X):
        module(batch)
    assert len(kept) == 3 and torch.equal(kept[2], X)


@pytest.mark.parametrize("edits", [False, True])
def test_a_hook_that_changes_what_is_computed_is_cached(edits: bool, warnings: Callable[[], list[str]]) -> None:
    plain, module = network(), torchcache()(network())

    def edit(m: nn.Module, args: Any, output: Tensor) -> None:
        output.add_(5.0)

    hook: Any = edit if edits else Steer(5.0).hook
    for net in (plain, module):
        net[0].register_forward_hook(hook)
    for _ in range(3):
        assert torch.equal(module(X), plain(X))
    assert cache_of(module).info()[:3] == (8, 0, 4) and warnings() == []


def test_the_hooks_of_torch_itself_are_part_of_the_computation() -> None:
    module = nn.Sequential(nn.Linear(2, 3), spectral_norm(nn.Linear(3, 2)))
    prune.l1_unstructured(module[0], "weight", 0.5)
    assert hooks_of_users(module) == {}


# ---- threads


def test_a_miss_in_several_threads_at_once_is_right() -> None:
    cached = torchcache()(lambda x: x.unsqueeze(1).repeat(1, 3, 1).squeeze())
    results: list[bool] = []

    def work(offset: int) -> None:
        for i in range(20):
            batch = X + offset * i
            batch[0] = -1.0
            results.append(torch.equal(cached(batch), batch.unsqueeze(1).repeat(1, 3, 1)))

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 60 and all(results)
