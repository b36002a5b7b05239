"""What users import: the names are there, and every example in the docstrings prints what it says."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchcache
from torchcache.errors import BuildError, MaintenanceError, MissingRows, TorchcacheError

MODULES = sorted(module.name for module in pkgutil.walk_packages(torchcache.__path__, "torchcache."))
PUBLIC = {name: getattr(torchcache, name) for name in torchcache.__all__ if not name.startswith("__")}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
RUN_ON_IMPORT = {"torchcache.__main__", "torchcache._native._C"}


@pytest.mark.parametrize("name", [name for name in MODULES if name not in RUN_ON_IMPORT])
def test_the_examples_run(name: str, tmp_path: Path) -> None:
    given = {"torch": torch, "nn": nn, "torchcache": torchcache, "folder": tmp_path}
    assert not doctest.testmod(importlib.import_module(name), extraglobs=given).failed


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "errors"])
def test_what_users_call_has_an_example(name: str) -> None:
    assert ">>> " in (inspect.getdoc(PUBLIC[name]) or "")


@pytest.mark.parametrize("name", CLASSES)
def test_methods_and_properties_have_a_docstring(name: str) -> None:
    for member, value in vars(CLASSES[name]).items():
        if not member.startswith("_") and (callable(value) or hasattr(value, "__get__")):
            assert inspect.getdoc(value), member


def test_the_public_names_are_those_that_the_package_exports() -> None:
    assert set(PUBLIC) == {
        "Cache",
        "CacheInfo",
        "CachedRows",
        "Explanation",
        "Verification",
        "errors",
        "precompute",
        "set_logger_config",
        "torchcache",
        "verify",
    }
    scope: dict[str, Any] = {}
    exec("from torchcache import *", scope)
    assert set(PUBLIC) <= scope.keys()


def test_errors_have_a_base_class_and_a_builtin_one() -> None:
    for error in (BuildError, MaintenanceError, MissingRows):
        assert issubclass(error, TorchcacheError)
    assert issubclass(MissingRows, LookupError) and issubclass(BuildError, ImportError)
