"""Enums, dataclasses and containers of the user's count with the code of their class and with their attributes."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_harness import cache_of
from torch import Tensor, nn

from torchcache import torchcache

X = torch.arange(6.0).view(3, 2)


def enum_of(by: float) -> Any:
    class Mode(enum.Enum):
        ON = 1

        def apply(self, x: Tensor) -> Tensor:
            return x * by

    return Mode.ON


def enum_with_attribute(by: float) -> Any:
    class Mode(enum.Enum):
        ON = 1

        def apply(self, x: Tensor) -> Tensor:
            return x * self.by  # type: ignore[attr-defined]

    Mode.ON.by = by  # type: ignore[attr-defined]
    return Mode.ON


def dataclass_of(by: float) -> Any:
    @dataclasses.dataclass(frozen=True)
    class Mode:
        name: str = "on"

        def apply(self, x: Tensor) -> Tensor:
            return x * by

    return Mode()


def dataclass_with_attribute(by: float) -> Any:
    @dataclasses.dataclass(frozen=True)
    class Mode:
        name: str = "on"

        def apply(self, x: Tensor) -> Tensor:
            return x * self.__dict__["by"]

    mode = Mode()
    mode.__dict__["by"] = by
    return mode


def string_of(by: float) -> Any:
    class Mode(str):
        __slots__ = ()

        def apply(self, x: Tensor) -> Tensor:
            return x * by

    return Mode("on")


def dict_of(by: float) -> Any:
    class Mode(dict):  # type: ignore[type-arg]
        def apply(self, x: Tensor) -> Tensor:
            return x * by

    return Mode(weight=torch.ones(3, 1))


def dict_with_attribute(by: float) -> Any:
    class Mode(dict):  # type: ignore[type-arg]
        def apply(self, x: Tensor) -> Tensor:
            return x * self.by  # type: ignore[attr-defined]

    mode = Mode(weight=torch.ones(3, 1))
    mode.by = by  # type: ignore[attr-defined]
    return mode


MAKERS = [
    enum_of,
    enum_with_attribute,
    dataclass_of,
    dataclass_with_attribute,
    string_of,
    dict_of,
    dict_with_attribute,
]


@pytest.mark.parametrize("make", MAKERS)
def test_an_argument_counts_with_the_code_and_the_attributes_of_its_class(make: Callable[[float], Any]) -> None:
    @torchcache()
    def function(x: Tensor, mode: Any) -> Any:
        return mode.apply(x)

    for by in (2.0, 3.0, 2.0):
        assert torch.equal(function(X, make(by)), X * by)
    assert cache_of(function).info().misses == 6


class Applying(nn.Module):
    def __init__(self, mode: Any) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor) -> Any:
        return self.mode.apply(x)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("make", MAKERS)
def test_an_attribute_counts_with_the_code_and_the_attributes_of_its_class(
    make: Callable[[float], Any], inside: bool
) -> None:
    part = Applying(make(2.0))
    module = torchcache()(nn.Sequential(part) if inside else part)
    for by in (2.0, 3.0, 2.0):
        part.mode = make(by)
        assert torch.equal(module(X), X * by)
    assert cache_of(module).info().misses == 6
