"""A version of torch that lacks a private name: torchcache can be imported, says what is missing, and stays right."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch

from torchcache._utils import torch_private

# Imports the package again without one of the names, and says what a cached module then gives, for each name.
WITHOUT = textwrap.dedent(
    """
    import importlib, json, logging, pkgutil, sys
    import torch
    from torch import nn
    from torchcache._utils import torch_private
    assert "torch._dynamo" not in sys.modules  # its import takes seconds

    class Linear(nn.Linear):
        def forward(self, x):
            return scaled(super().forward(x))

    @torch.library.custom_op("torch_private_test::scaled", mutates_args=())
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def fresh():
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchcache"]:
            del sys.modules[name]
        return importlib.import_module("torchcache")

    class Warnings(logging.Handler):
        def emit(self, record):
            warnings.append(record.getMessage())

    def outputs(package):
        torch.manual_seed(0)
        module = type("Net", (Linear,), {})(3, 2).requires_grad_(False)
        x = torch.arange(12.0).view(4, 3)
        expected = module(x)
        cached = package.torchcache()(module)
        right = all(torch.equal(cached(rows), expected) for rows in (x, x))
        scripted = package.torchcache()(torch.jit.script(nn.Linear(3, 2).requires_grad_(False)))
        same = torch.equal(scripted(x), scripted(x))
        info = cached.cache_instance.info()
        return {"right": right and same, "found": info.memory_hits, "hash": cached.cache_instance.module_hash}

    def without(name):
        warnings.clear()
        module, attribute = name.split(":")
        module = importlib.import_module(module)
        value = getattr(module, attribute)
        delattr(module, attribute)
        try:
            package = fresh()
        finally:
            setattr(module, attribute, value)
        return {**outputs(package), "warnings": list(warnings)}

    warnings = []
    logging.getLogger().addHandler(Warnings())  # importing the package again takes away those of its own logger
    names = list(torch_private.names)
    whole = {**outputs(fresh()), "warnings": warnings[:]}
    print(json.dumps({"": whole, **{name: without(name) for name in names}}))
    """
)

# Where torch does not tell these, no call is cached.
NO_CALL = {
    "torch._C._functorch:peek_interpreter_stack",
    "torch._C:_len_torch_dispatch_stack",
    "torch.nn.modules.module:_global_forward_hooks",
    "torch.nn.modules.module:_global_forward_pre_hooks",
}
# Where torch does not tell these, no other process finds the rows.
NOT_SHARED = {"torch._library.custom_ops:CustomOpDef", "torch._library.custom_ops:OPDEFS"}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """By the name that torch lacks what a cached module then does; under "" what it does if torch has all names."""
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def missing(result: dict[str, Any]) -> list[str]:
    return [text for text in result["warnings"] if text.startswith("torch ")]


def test_this_torch_has_every_name(results: dict[str, Any]) -> None:
    assert all(torch_private.names.values())
    assert missing(results[""]) == []
    assert results[""]["right"] and results[""]["found"] == 4


@pytest.mark.parametrize("name", torch_private.names)
def test_without_a_name_rows_are_right_and_one_warning_names_it(name: str, results: dict[str, Any]) -> None:
    result = results[name]
    assert result["right"]
    assert result["found"] == (0 if name in NO_CALL else 4)
    assert (result["hash"] == results[""]["hash"]) == (name not in NOT_SHARED)
    (warning,) = missing(result)
    assert name.replace(":", ".") in warning


def test_every_use_of_a_name_that_is_asked_for_later_is_guarded() -> None:
    assert torch_private.parts_of_operator(object()) is None
    assert torch_private.operator_definition(object()) is None
    assert torch_private.without_frame(len) is len
    tensors: Any = [torch.ones(1), object()]
    assert torch_private.versions(tensors) != torch_private.versions(tensors)
    assert torch_private.compiled_forward(object()) == torch_private.UNKNOWN  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        torch_private.script_type_name(object())  # type: ignore[arg-type]


def test_operators_of_which_torch_does_not_tell_the_parts_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.library.custom_op("torch_private_test::plain", mutates_args=())
    def plain(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    assert torch_private.operators_are_known()
    assert "torch_private_test::plain" in [op.qualified_name for op in torch_private.operators({"plain"})]
    monkeypatch.delattr(plain, "_backend_fns")
    assert not torch_private.operators_are_known()
    assert "torch_private_test::plain" not in [op.qualified_name for op in torch_private.operators({"plain"})]
