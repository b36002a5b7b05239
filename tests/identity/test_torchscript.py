"""Compiled programs and packed weights are told apart by what they compute, not by the objects that hold them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchcache import torchcache

X = torch.arange(24.0).view(6, 4) / 7


def keys(module: Any) -> tuple[str, list[int]]:
    return module.cache_instance.module_hash, module.cache_instance.hash_tensor(X).tolist()


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4)).eval().requires_grad_(False)


def scripted(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


def frozen(seed: int) -> Any:
    return torch.jit.freeze(scripted(linear(seed)))


def loaded(seed: int) -> Any:
    file = io.BytesIO()
    torch.jit.save(frozen(seed), file)
    file.seek(0)
    return torch.jit.load(file)


def quantized(seed: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(linear(seed), {nn.Linear})


def quantized_program(seed: int) -> Any:
    return scripted(quantized(seed))


KINDS = [frozen, loaded, quantized, quantized_program]


@pytest.mark.parametrize("make", KINDS)
def test_programs_with_the_same_weights_share_rows_and_those_with_others_do_not(make: Callable[[int], Any]) -> None:
    one, same, other = (torchcache()(make(seed)) for seed in (1, 1, 2))
    assert keys(one) == keys(one) == keys(same)
    assert keys(other) != keys(one)


def test_programs_that_compute_different_things_share_no_rows() -> None:
    class Plus(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    class Minus(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - 1

    modules = [torchcache()(torch.jit.freeze(scripted(cls().eval()))) for cls in (Plus, Minus)]
    assert len({keys(m)[0] for m in modules}) == 2
    assert torch.equal(modules[0](X), X + 1) and torch.equal(modules[1](X), X - 1)


def test_packed_weights_that_are_loaded_later_are_noticed_by_rehash() -> None:
    module, other = torchcache()(quantized(1)), torchcache()(quantized(2))
    before = keys(module)
    module.load_state_dict(other.state_dict())
    module.cache_instance.rehash()
    assert keys(module) == keys(other) != before
