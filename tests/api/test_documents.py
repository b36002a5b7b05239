"""The examples of the documented API, as a reader would type them: each runs, caches and trains."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from cache_harness import cache_of
from torch import Tensor

from torchcache import torchcache


class Plain(nn.Module):
    """The module of most examples; its parameters require grad."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def decorated(**options: object) -> type[Plain]:
    class MyModule(Plain):
        pass

    return torchcache(**options)(MyModule)  # type: ignore[arg-type]


def check(module: nn.Module) -> None:
    x = torch.randn(4, 10)
    first, again = module(x), module(x)
    assert torch.equal(first, again) and not first.requires_grad
    assert cache_of(module).info().misses == 4


def test_the_first_example_runs_though_its_parameters_require_grad(caplog: pytest.LogCaptureFixture) -> None:
    check(decorated()())
    assert [r for r in caplog.records if "require grad" in r.getMessage()] == caplog.records[:1]


def test_a_function_is_cached() -> None:
    @torchcache()
    def my_function(x: Tensor) -> Tensor:
        return x + 1

    x = torch.randn(4, 10)
    assert torch.equal(my_function(x), x + 1) and torch.equal(my_function(x), x + 1)


def test_a_head_is_trained_on_a_frozen_backbone() -> None:
    @torchcache(persistent=True)
    class MyBackbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(10, 10)
            self.eval()
            self.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    class MyModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = MyBackbone()
            self.head = nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x))

    model = MyModel()
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(16, 10)
    losses = []
    for _ in range(5):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert cache_of(model.backbone).info().misses == 16


@pytest.mark.parametrize(
    "options",
    [
        lambda d: {"persistent": True, "persistent_cache_dir": str(d)},
        lambda d: {"persistent": True, "max_memory_cache_size": 5e9, "max_persistent_cache_size": 50e9},
        lambda d: {"persistent": True, "cache_dtype": torch.half, "zstd_compression": True},
        lambda d: {"persistent": True, "persistent_module_hash": "my_module_hash", "persistent_cache_dir": d},
    ],
)
def test_each_documented_set_of_options_works(options: Callable[[Path], dict[str, object]], tmp_path: Path) -> None:
    check(decorated(**options(tmp_path))())


def test_options_can_be_set_as_attributes_of_the_module() -> None:
    @torchcache(persistent=True)
    class MyModule(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.torchcache_cache_dtype = torch.half
            self.torchcache_zstd_compression = True

    module = MyModule()
    check(module)
    assert cache_of(module).options.cache_dtype is torch.half


def test_instances_are_enabled_one_by_one() -> None:
    @torchcache()
    class MyModule(Plain):
        def __init__(self, caching_enabled: bool) -> None:
            super().__init__()
            self.torchcache_enabled = caching_enabled

    check(MyModule(caching_enabled=True))
    without = MyModule(caching_enabled=False)
    assert without(torch.randn(2, 10)).requires_grad and not hasattr(without, "cache_instance")


def test_rows_are_invalid_after_a_change_and_valid_again_after_its_undoing(tmp_path: Path) -> None:
    def hash_of(bias: bool, **options: object) -> str:
        @torchcache(persistent=True, persistent_cache_dir=tmp_path, **options)  # type: ignore[arg-type]
        class MyModule(nn.Module):
            def __init__(self, bias: bool) -> None:
                super().__init__()

            def forward(self, x: Tensor) -> Tensor:
                return x

        return cache_of(MyModule(bias)).module_hash

    first = hash_of(True)
    assert hash_of(False) != first
    assert hash_of(True, zstd_compression=True) != first
    assert hash_of(True, persistent_module_hash="fixed") == hash_of(False, persistent_module_hash="fixed") == "fixed"
    assert hash_of(True) == first


def test_every_test_that_a_page_names_exists() -> None:
    root = Path(__file__).resolve().parents[2]
    tests = [*(root / "tests").rglob("*.py"), *(root / "tests" / "native").iterdir()]
    sources = "".join(path.read_text() for path in tests if path.is_file())
    named = re.findall(r"`(native: \w+|test_\w+)`", (root / "docs" / "faults.md").read_text())
    functions = {name.removeprefix("native: ") for name in named}
    assert len(functions) > 60
    assert [name for name in functions if not re.search(rf"(?:def|void) {name}\(", sources)] == []
