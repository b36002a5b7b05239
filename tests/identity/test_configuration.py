"""What modules hold besides tensors belongs to their keys: structure, objects, methods of objects, configurations."""

from __future__ import annotations

import collections
import functools
import logging
import threading
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchcache import torchcache
from torchcache.identity.identity import init_arguments

X = torch.arange(24.0).view(6, 4) / 7


def keys(module: Any) -> tuple[str, list[int]]:
    return module.cache_instance.module_hash, module.cache_instance.hash_tensor(X).tolist()


def cached(module: nn.Module) -> Any:
    return torchcache()(module.requires_grad_(False))


class Scale(nn.Module):
    def __init__(self, by: Any = None) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by[0]


# ---- structure

LAYER, OTHER, ACT = nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([LAYER], [LAYER, LAYER]),
        ([LAYER, OTHER, LAYER], [LAYER, OTHER, OTHER]),
        ([LAYER, ACT], [LAYER, ACT, ACT]),
        ([nn.ModuleList([LAYER] * 2)], [nn.ModuleList([LAYER] * 3)]),
    ],
)
def test_how_often_and_where_a_submodule_is_used_counts(one: list[nn.Module], other: list[nn.Module]) -> None:
    assert keys(cached(nn.Sequential(*one))) == keys(cached(nn.Sequential(*one)))
    assert keys(cached(nn.Sequential(*one))) != keys(cached(nn.Sequential(*other)))


def test_a_submodule_that_is_used_once_more_changes_the_output() -> None:
    module = cached(nn.Sequential(ACT))
    module(X)
    module.append(ACT)
    assert torch.equal(module(X), ACT(ACT(X)))


def test_a_module_that_contains_itself_or_shares_submodules_widely_is_described() -> None:
    circle = nn.Sequential(nn.ReLU())
    circle.add_module("self", circle)
    assert keys(cached(circle)) == keys(circle)
    shared: nn.Module = nn.ReLU()
    for _ in range(60):  # 2**60 paths
        shared = nn.ModuleList([shared, shared])
    assert keys(cached(nn.Sequential(shared))) != keys(cached(nn.Sequential(nn.ReLU())))


def test_the_order_of_parameters_and_buffers_counts() -> None:
    a, b = torch.ones(2), torch.zeros(2)
    one, other = nn.ParameterDict([("a", a), ("b", b)]), nn.ParameterDict([("b", b), ("a", a)])
    assert keys(cached(one)) != keys(cached(other))
    modules = [Scale(), Scale()]
    for module, names in zip(modules, ("ab", "ba")):
        for name in names:
            module.register_buffer(name, a)
    assert keys(cached(modules[0])) != keys(cached(modules[1]))


# ---- what attributes hold


class Times:
    def __init__(self, by: Any) -> None:
        self.by = by

    def apply(self, x: Any) -> Any:
        return x * self.by

    def __call__(self, x: Any) -> Any:
        return x * self.by


def function(x: Any, by: Any) -> Any:
    return by(x)


def closing_over(by: Any) -> Callable[[Any], Any]:
    return lambda x: by(x)


class Settings:
    def __init__(self, by: float) -> None:
        self._by = by

    def to_dict(self) -> dict[str, float]:
        return {"by": self._by}


HOLDERS: dict[str, Callable[[float], Any]] = {
    "a method of an object": lambda by: Times(by).apply,
    "a method of an object in an object": lambda by: Times(Times(by)).apply,
    "a callable object": Times,
    "a partial": lambda by: functools.partial(function, by=Times(by)),
    "a function that closes over an object": lambda by: closing_over(Times(by)),
    "an object next to a lock": lambda by: [Times(by), threading.Lock()],
    "an object next to a logger": lambda by: {"log": logging.getLogger("x"), "by": Times(by)},
    "an operator": lambda by: torch.ops.aten.relu if by == 2 else torch.ops.aten.sigmoid,
    "an object next to something for each thread": lambda by: [Times(by), threading.local()],
    "a configuration": Settings,
    "the order of a dict": lambda by: {"a": 0, "b": 0} if by == 2 else {"b": 0, "a": 0},
    "the kind of a dict": lambda by: {"a": 0} if by == 2 else collections.OrderedDict(a=0),
    "a tuple": lambda by: ([by],),
    "a read-only view": lambda by: types.MappingProxyType({"by": by}),
}


@pytest.mark.parametrize("what", HOLDERS)
def test_what_an_attribute_holds_counts(what: str, caplog: pytest.LogCaptureFixture) -> None:
    make = HOLDERS[what]
    assert keys(cached(Scale(make(2.0)))) == keys(cached(Scale(make(2.0))))
    assert keys(cached(Scale(make(2.0)))) != keys(cached(Scale(make(3.0))))
    assert caplog.text == ""


def test_an_attribute_that_cannot_be_told_apart_is_not_shared_and_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with open(tmp_path / "file") as file:
        modules = [cached(nn.Sequential(Scale({"file": file, "by": 2.0}))) for _ in range(2)]
        found = [keys(module) for module in modules]
        assert found == [keys(module) for module in modules]
    assert found[0] != found[1]
    assert [r.getMessage().partition(", which")[0] for r in caplog.records] == [
        "Sequential: 0.by holds an object of type TextIOWrapper"
    ]


def test_tensors_next_to_what_cannot_be_told_apart_are_watched(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as file:
        tensor = torch.ones(1)
        module = cached(Scale([tensor, file]))
        module(X)
        tensor.mul_(3)
        assert torch.equal(module(X), X * 3)


class AttrDict(dict):  # type: ignore[type-arg]
    __getattr__ = dict.__getitem__


class Raising:
    def to_dict(self) -> None:
        raise RuntimeError


class NeedsArguments:
    def to_dict(self, deep: bool) -> dict[str, bool]:
        return {"deep": deep}


class Lazy:
    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("not loaded yet")


@pytest.mark.parametrize("kind", [AttrDict, Raising, NeedsArguments, Lazy])
def test_objects_that_raise_when_they_are_described_do_no_harm(kind: type) -> None:
    value = kind()
    module = cached(nn.Sequential(nn.ReLU()))
    module.inside = [value]
    module.cfg = value
    module[0].cfg = value
    assert torch.equal(module(X), X)


def test_a_reference_back_to_the_module_is_no_reason_for_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> Any:
        module = nn.Sequential(Scale([1.0]))
        module[0].parent = weakref.ref(module)  # type: ignore[assignment]
        return cached(module)

    assert keys(make()) == keys(make())
    assert caplog.text == ""


# ---- what is replaced later


def with_constant(by: list[float]) -> nn.Module:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * by[0]

    return Constant()


@pytest.mark.parametrize("make", [Scale, with_constant, lambda by: Scale({0: by[0]}), lambda by: Scale((by,))])
def test_a_replaced_submodule_counts_with_what_it_holds(make: Callable[[list[float]], nn.Module]) -> None:
    module = cached(nn.Sequential(nn.ReLU(), make([2.0])))
    before = keys(module)
    module[1] = make([3.0])
    assert keys(module) != before
    module[1] = make([2.0])
    assert keys(module) == before


def test_tensors_in_lists_of_a_replaced_submodule_count() -> None:
    modules = [cached(nn.Sequential(nn.ReLU(), Scale([2.0]))) for _ in range(2)]
    for module, by in zip(modules, (3.0, 4.0)):
        module(X)
        module[1] = Scale([torch.tensor(by)])
    assert keys(modules[0]) != keys(modules[1])


def test_a_list_that_takes_the_place_of_a_plain_attribute_counts() -> None:
    module = cached(Scale((2.0,)))
    module(X)
    del module.by
    module.cache_instance.hash_tensor(X)
    module.by = [3.0]
    assert torch.equal(module(X), X * 3)


def test_results_that_forwards_left_behind_do_not_count_when_another_submodule_is_replaced() -> None:
    module = cached(nn.Sequential(Scale([2.0]), Scale([2.0])))
    before = keys(module)
    module[0].by.append(X)
    module[1] = Scale([2.0])
    assert keys(module) == before


ROW_FACTORS = [1.0]


class Global(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * ROW_FACTORS[0]


def test_rehash_finds_edits_of_lists_in_attributes_and_globals() -> None:
    module = cached(nn.Sequential(Scale([2.0]), Global()))
    before = keys(module)
    for values in (module[0].by, ROW_FACTORS):
        values[0] *= 5
        module.cache_instance.rehash()
        assert keys(module) != before
        values[0] /= 5
        module.cache_instance.rehash()
        assert keys(module) == before


# ---- init arguments


def test_weights_of_a_module_that_is_given_to_init_do_not_name_the_cache() -> None:
    @torchcache()
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module, **more: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    one, other = (Wrapped(nn.Linear(4, 4).requires_grad_(False)) for _ in range(2))
    assert keys(one)[0] == keys(other)[0]
    assert keys(one)[1] != keys(other)[1]
    other.load_state_dict(one.state_dict())
    assert keys(one) == keys(other)
    assert keys(Wrapped(nn.LeakyReLU(0.1)))[0] != keys(Wrapped(nn.LeakyReLU(0.2)))[0]
    assert keys(Wrapped(nn.ReLU(), a=1, b=2))[0] != keys(Wrapped(nn.ReLU(), b=2, a=1))[0]


def test_locks_in_init_arguments_are_no_reason_for_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    first, second = (init_arguments("M", ([Times(2.0), threading.Lock()],), {}) for _ in range(2))
    assert first == second and caplog.text == ""
