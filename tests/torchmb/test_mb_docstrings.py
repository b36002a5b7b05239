"""The examples in the docstrings of torchmb run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import torchmb
from torchmb import base
from torchmb.functional import PerModelLR

MODULES = sorted(module.name for module in pkgutil.walk_packages(torchmb.__path__, "torchmb."))
PUBLIC = {name: getattr(torchmb, name) for name in torchmb.__all__} | {"PerModelLR": PerModelLR}


def public_methods(cls: type[Any]) -> Iterator[tuple[str, Any]]:
    """What a class of torchmb defines itself for its users."""
    for name, value in vars(cls).items():
        function = value.__func__ if isinstance(value, classmethod) else value
        if inspect.isfunction(function) and not name.startswith("_"):
            yield name, function


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTERED", dict(base._REGISTERED))
    module = importlib.import_module(name)
    results = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn, "torchmb": torchmb})
    assert not results.failed


@pytest.mark.parametrize("name", PUBLIC)
def test_what_users_call_has_an_example(name: str) -> None:
    assert ">>> " in (inspect.getdoc(PUBLIC[name]) or "")


@pytest.mark.parametrize("name", [name for name in PUBLIC if inspect.isclass(PUBLIC[name])])
def test_methods_that_users_call_have_a_docstring(name: str) -> None:
    for method, function in public_methods(PUBLIC[name]):
        assert function.__doc__, method
