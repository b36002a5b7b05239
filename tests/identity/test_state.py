"""Rows belong to the state that computed them: whatever changes it changes the keys, and going back finds the rows."""

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
from state_harness import X, keys
from torch import Tensor, nn

from torchcache import torchcache
from torchcache._native import ops


class Net(nn.Module):
    def __init__(self, slope: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(12, 4)
        self.act = nn.LeakyReLU(slope)
        self.norm = nn.BatchNorm1d(4)
        self.plain = torch.ones(4)
        self.scale = 1.0
        self.calls = 0
        self.requires_grad_(False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.norm(self.act(self.linear(x))) * self.plain * self.scale


def set_weight(m: Net, value: Tensor) -> None:
    with torch.no_grad():
        m.linear.weight.copy_(value)


def replace(m: Net, layer: nn.Module) -> None:
    m.act = layer.eval()  # type: ignore[assignment]


# (what is done, what undoes it)
CHANGES: dict[str, tuple[Callable[[Net], Any], Callable[[Net], Any]]] = {
    "weight in place": (
        lambda m: set_weight(m, m.linear.weight * 2),
        lambda m: set_weight(m, m.linear.weight / 2),
    ),
    "weight through .data": (
        lambda m: m.linear.weight.data.mul_(2),
        lambda m: m.linear.weight.data.div_(2),
    ),
    "data replaced": (
        lambda m: setattr(m.linear.weight, "data", m.linear.weight.data * 2),
        lambda m: setattr(m.linear.weight, "data", m.linear.weight.data / 2),
    ),
    "parameter replaced": (
        lambda m: setattr(m.linear, "bias", nn.Parameter(m.linear.bias * 2, requires_grad=False)),
        lambda m: setattr(m.linear, "bias", nn.Parameter(m.linear.bias / 2, requires_grad=False)),
    ),
    "weights loaded": (
        lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
        lambda m: m.load_state_dict({k: v // 2 if k.endswith("tracked") else v / 2 for k, v in m.state_dict().items()}),
    ),
    "buffer": (
        lambda m: m.norm.get_buffer("running_mean").add_(4),
        lambda m: m.norm.get_buffer("running_mean").sub_(4),
    ),
    "plain tensor attribute": (lambda m: m.plain.mul_(2), lambda m: m.plain.div_(2)),
    "plain tensor replaced": (
        lambda m: setattr(m, "plain", m.plain * 2),
        lambda m: setattr(m, "plain", m.plain / 2),
    ),
    "all parameters replaced": (
        lambda m: setattr(m.linear, "_parameters", {k: p * 2 for k, p in m.linear.named_parameters()}),
        lambda m: setattr(m.linear, "_parameters", {k: p / 2 for k, p in m.linear.named_parameters()}),
    ),
    "own attribute": (lambda m: setattr(m, "scale", 2.0), lambda m: setattr(m, "scale", 1.0)),
    "own attribute of another type": (
        lambda m: setattr(m, "scale", 1),
        lambda m: setattr(m, "scale", 1.0),
    ),
    "submodule replaced": (
        lambda m: replace(m, nn.ReLU()),
        lambda m: replace(m, nn.LeakyReLU(0.1)),
    ),
    "submodule of another configuration": (
        lambda m: replace(m, nn.LeakyReLU(0.9)),
        lambda m: replace(m, nn.LeakyReLU(0.1)),
    ),
    "dtype": (lambda m: m.double(), lambda m: m.float()),
    "mode of a submodule": (lambda m: m.act.train(), lambda m: m.act.eval()),
    "mode": (lambda m: m.train(), lambda m: m.eval()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_changes_every_key_and_undoing_it_brings_them_back(change: str) -> None:
    do, undo = CHANGES[change]
    module = torchcache()(Net())
    before = keys(module)
    assert keys(module) == before
    do(module)
    changed = keys(module)
    assert not set(changed) & set(before)
    assert keys(module) == changed
    undo(module)
    assert keys(module) == before


@pytest.mark.parametrize("change", [c for c in CHANGES if c not in ("dtype", "mode")])
def test_a_changed_module_gives_what_it_would_give_without_the_cache(change: str) -> None:
    module, plain = torchcache()(Net()), Net()
    for step in CHANGES[change]:
        for _ in range(2):
            assert torch.equal(module(X), plain(X))
        step(module), step(plain)
    assert torch.equal(module(X), plain(X))
    assert module.calls == 3 - 1  # the first state's rows are found again


class Sized:
    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1, 2], [1, 3]),
        ({"a": 1}, {"a": 2}),
        (Sized([1]), Sized([2])),
        ([torch.ones(2)], [torch.zeros(2)]),
        ([nn.LeakyReLU(0.1)], [nn.LeakyReLU(0.2)]),
    ],
)
def test_instances_with_other_contents_of_lists_dicts_and_objects_share_no_rows(one: Any, other: Any) -> None:
    def with_attribute(value: Any) -> Net:
        module = Net()
        module.extra = value
        return torchcache()(module)

    assert keys(with_attribute(one)) == keys(with_attribute(one)) != keys(with_attribute(other))


def test_tensors_and_modules_in_lists_are_watched() -> None:
    module: Any = Net()
    module.extra = [torch.ones(2), {"layer": nn.Linear(2, 2).requires_grad_(False)}]
    torchcache()(module)
    before = keys(module)
    module.extra[0].mul_(2)
    changed = keys(module)
    module.extra[1]["layer"].weight.mul_(2)
    assert len({tuple(before), tuple(changed), tuple(keys(module))}) == 3


def test_lists_that_a_forward_fills_do_not_matter() -> None:
    class Logging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x)
            return x * 2

    module = torchcache()(Logging())
    before = keys(module)
    module(X), module(X + 1)
    module.act = nn.ReLU()
    del module.act
    assert keys(module) == before and len(module.seen) == 2


def test_instances_of_different_weights_or_configuration_share_no_rows() -> None:
    same, other, sloped = Net(), Net(), Net(slope=0.9)
    set_weight(other, other.linear.weight + 1)
    modules = [torchcache()(m) for m in (Net(), same, other, sloped)]
    a, b, c, d = (keys(m) for m in modules)
    assert a == b
    assert len({tuple(a), tuple(c), tuple(d)}) == 3


def test_parameters_that_require_grad_are_digested_in_full() -> None:
    module = torchcache()(Net())
    module.requires_grad_(True)
    before = keys(module)
    module.linear.weight.data[1, 3] += 1  # neither counter nor probe moves
    assert keys(module) != before


def test_a_fused_optimizer_is_noticed() -> None:
    module = torchcache()(Net())
    module.requires_grad_(True)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1, fused=True)
    before = keys(module)
    type(module).forward(module, X.clone().requires_grad_()).sum().backward()
    optimizer.step()
    assert keys(module) != before


def test_rehash_finds_edits_of_single_elements() -> None:
    module = torchcache()(Net())
    before = keys(module)
    module.linear.weight.numpy()[1, 5] += 1
    cache_of(module).rehash()
    assert keys(module) != before


def test_counters_that_forward_moves_do_not_matter() -> None:
    module = torchcache()(Net())
    before = keys(module)
    module(X), module(X + 1)
    assert module.calls == 2 and keys(module) == before


def test_freezing_does_not_change_keys() -> None:
    module = torchcache()(Net())
    before = keys(module)
    module.requires_grad_(True)
    assert keys(module) == before


SCALE = torch.tensor(2.0)
LAYER = Net()


def test_tensors_and_modules_that_a_function_reaches_belong_to_its_state() -> None:
    def scaled(x: Tensor) -> Tensor:
        return LAYER(x) * SCALE

    cached = torchcache()(scaled)
    assert torch.equal(cached(X), scaled(X))
    SCALE.mul_(3)
    assert torch.equal(cached(X), scaled(X))
    LAYER.linear.weight.mul_(2)
    assert torch.equal(cached(X), scaled(X))
    assert cache_of(cached).info().misses == 6
    LAYER.linear.weight.div_(2)
    SCALE.div_(3)
    cached(X)
    assert cache_of(cached).info().misses == 6


@pytest.mark.slow
def test_rows_of_a_state_are_found_again_by_a_new_process(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        f"""
import sys, torch, torch.nn as nn
from torchcache import torchcache

@torchcache(persistent=True, persistent_cache_dir={str(tmp_path / "rows")!r})
class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, width)
        self.requires_grad_(False)
    def forward(self, x):
        return self.linear(x)

m = Net(3)
with torch.no_grad():
    m.linear.weight.mul_(float(sys.argv[1]))
m(torch.arange(20.).view(5, 4))
info = m.cache_instance.info()
print(info.misses, info.disk_hits)
"""
    )

    def run(factor: str) -> list[int]:
        done = subprocess.run([sys.executable, script, factor], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return [int(n) for n in done.stdout.split()]

    assert run("1") == [5, 0]
    assert run("2") == [5, 0]
    assert run("1") == [0, 5]
    assert run("2") == [0, 5]


def test_a_check_that_fails_is_made_again_and_never_gives_rows_of_old_weights() -> None:
    module = torchcache()(nn.Linear(12, 2, bias=False).requires_grad_(False))
    x = torch.ones(2, 12)
    module(x)
    module.weight = nn.Parameter(torch.full((2, 12), 5.0, device="meta"), requires_grad=False)
    for _ in range(3):
        with contextlib.suppress(RuntimeError, NotImplementedError):
            module(x)
    assert cache_of(module).info().bypassed_calls == 3
    module.weight = nn.Parameter(torch.full((2, 12), 7.0), requires_grad=False)
    assert torch.allclose(module(x), nn.functional.linear(x, module.weight, module.bias))


@pytest.mark.parametrize("edit", [lambda w: w.mul_(3), lambda w: w.data.mul_(3)])
def test_an_interrupt_while_weights_are_digested_costs_no_right_row(
    edit: Callable[[Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = torchcache()(nn.Linear(12, 2).requires_grad_(False))
    x = torch.ones(2, 12)
    module(x)
    edit(module.weight)

    def interrupted(tensors: list[Tensor]) -> list[bytes]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ops, "digests", interrupted)
        module(x)
    assert torch.allclose(module(x), nn.functional.linear(x, module.weight, module.bias))
