"""Arguments of __init__, by value."""

from __future__ import annotations

import functools
import itertools
import pathlib

import pytest
import torch
from source_harness import tensors, value_of
from torch import nn

from torchcache.identity.code import describe_value
from torchcache.identity.encoding import Unencodable


class Config:
    def __init__(self, width: object, hook: object = None) -> None:
        self.width = width
        self.hook = hook

    def get(self) -> object:
        return self.width


def test_init_arguments_count_by_value() -> None:
    numpy = pytest.importorskip("numpy")
    different = [
        *(1, 1.0, "1", True, None, [1], (1,), {"a": 1}, nn.ReLU, nn.GELU, torch.relu, Config),
        *(torch.zeros(2), torch.zeros(3), numpy.zeros(2), numpy.zeros(2, "f4"), numpy.float32(1)),
        *(numpy.array([[1], [2]]), numpy.array([[1, 2]]), nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
        *(Config(1), Config(2), Config(1, len), [Config(1)], lambda x: x, lambda x: -x),
        *(Config([1]).get, Config([2]).get, [1].append, [2].append, torch.ones(1).add),
        *(functools.partial(max, [1]), functools.partial(max, [2])),
        *(nn.Dropout(), nn.Dropout().eval(), range(3), functools.partial(int, base=2)),
    ]
    encodings = [value_of(value) for value in different]
    clashes = [
        (different[i], different[j])
        for i, j in itertools.combinations(range(len(different)), 2)
        if encodings[i] == encodings[j]
    ]
    assert clashes == []
    assert value_of(Config(1)) == value_of(Config(1))
    assert value_of(nn.LeakyReLU(0.1)) == value_of(nn.LeakyReLU(0.1))


def test_a_module_given_to_init_counts_with_its_state() -> None:
    linear = nn.Linear(2, 2)
    nn.init.zeros_(linear.weight)
    first = value_of({"backbone": linear})
    with torch.no_grad():
        linear.weight[0, 0] = 1
    assert value_of({"backbone": linear}) != first
    with torch.no_grad():
        linear.weight[0, 0] = 0
    assert value_of({"backbone": linear}) == first


def test_what_has_no_stable_encoding_is_refused_with_its_place(tmp_path: pathlib.Path) -> None:
    with open(tmp_path / "file", "w") as file:
        for bad in (file, (i for i in range(0))):
            with pytest.raises(Unencodable, match=r"^config\['a'\]\[0\] is of type"):
                describe_value({"a": [bad]}, tensors=tensors, name="config")
            with pytest.raises(Unencodable, match=r"^Config\[2\]\['hook'\] is of type"):
                value_of(Config(1, bad))


def test_a_method_given_to_init_counts_with_its_object_though_that_may_change() -> None:
    config = Config(1)
    config.hook = config.get
    other = Config(2)
    other.hook = other.get
    assert value_of(config.get) != value_of(other.get)


def test_an_object_that_contains_itself_has_an_encoding() -> None:
    config = Config(1)
    config.hook = config
    other = Config(1)
    other.hook = other
    assert value_of(config) == value_of(other) != value_of(Config(1))
