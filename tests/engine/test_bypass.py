"""What must not be cached is computed, right in every way, with one warning where the user should know."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from cache_harness import cache_of
from torch import Tensor, nn
from torch.func import grad, jacfwd, vmap

from torchcache import torchcache
from torchcache.engine.bypass import training_modules


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 2


@pytest.fixture
def module() -> Double:
    return torchcache()(Double())


X = torch.arange(6.0).view(3, 2)


def rows(module: nn.Module) -> int:
    return cache_of(module).info().memory_rows


def test_inputs_that_require_grad_are_bypassed_while_grad_is_on(module: Double) -> None:
    x = X.clone().requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None and x.grad.eq(2).all() and rows(module) == 0
    with torch.no_grad():
        assert torch.equal(module(x), X * 2)
    assert rows(module) == 3
    with torch.inference_mode():
        module(x)
    assert module.calls == 2


def test_functorch_transforms_are_bypassed(module: Double) -> None:
    assert torch.equal(vmap(module)(X[None]), X[None] * 2)
    assert torch.equal(grad(lambda x: module(x).sum())(X), torch.full_like(X, 2))
    assert torch.equal(jacfwd(module)(X).sum((2, 3)), torch.full_like(X, 2))
    assert rows(module) == 0


def test_forward_mode_tangents_are_bypassed(module: Double) -> None:
    with torch.autograd.forward_ad.dual_level():
        out = module(torch.autograd.forward_ad.make_dual(X, torch.ones_like(X)))
        assert torch.autograd.forward_ad.unpack_dual(out).tangent.eq(2).all()
    assert rows(module) == 0


def test_inputs_without_plain_bytes_are_bypassed(module: Double) -> None:
    assert module(X.to("meta")).is_meta
    assert torch.equal(module(X.to_sparse()).to_dense(), X * 2)

    class Marked(torch.Tensor):
        pass

    assert type(module(X.as_subclass(Marked))) is Marked
    quantized = torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)
    assert torch.equal(torchcache()(lambda x: x.dequantize())(quantized), quantized.dequantize())
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        assert module(mode.from_tensor(X)).shape == X.shape
    assert rows(module) == 0


def test_symbolic_tracing_sees_through_the_cache() -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(torchcache()(nn.Linear(2, 3).requires_grad_(False)), nn.ReLU()))
    assert traced(torch.ones(4, 2)).shape == (4, 3)
    assert torch.fx.symbolic_trace(torchcache()(Double()))(X).equal(X * 2)


def test_function_modes_of_the_caller_are_bypassed_and_a_default_device_is_not(module: Double) -> None:
    from torch.overrides import TorchFunctionMode

    class Tripled(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            return out * 1.5 if func is torch.Tensor.mul else out

    module(X)
    with Tripled():
        tripled = module(X)
    assert torch.equal(tripled, X * 3)
    with torch.device("cpu"):
        assert torch.equal(module(X), X * 2)
    assert cache_of(module).info().memory_hits > 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs_are_bypassed(layout: torch.layout) -> None:
    module = torchcache()(nn.Linear(2, 3).requires_grad_(False))
    parts = [torch.randn(4, 2), torch.randn(5, 2)]
    out = module(torch.nested.nested_tensor(parts, layout=layout))
    assert all(torch.equal(a, module(b)) for a, b in zip(out.unbind(), parts, strict=True))
    assert cache_of(module).info().misses == 9


def test_tracing_and_export_are_bypassed(module: Double) -> None:
    traced = torch.jit.trace(module, (X,), check_trace=False)
    assert torch.equal(traced(X + 1), (X + 1) * 2)
    assert rows(module) == 0


# ---- what is worth a warning


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    caplog.set_level(logging.WARNING, "torchcache")
    yield lambda: [r.getMessage() for r in caplog.records if r.name == "torchcache"]


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def test_batch_statistics_are_never_cached_and_warned_of_once(
    warnings: Callable[[], list[str]],
) -> None:
    module, plain = torchcache()(Normalized()), Normalized()
    for _ in range(3):
        assert torch.equal(module(X), plain(X))
    assert torch.equal(module.norm.get_buffer("running_mean"), plain.norm.get_buffer("running_mean"))
    assert rows(module) == 0
    assert len(warnings()) == 1 and "BatchNorm1d" in warnings()[0] and "eval" in warnings()[0]
    module.eval(), plain.eval()
    assert torch.equal(module(X), plain(X)) and rows(module) == 3


def test_the_warning_names_the_submodule_in_train_mode(warnings: Callable[[], list[str]]) -> None:
    layers = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2))).requires_grad_(False)
    torchcache()(layers)(X)
    assert "1.0 (BatchNorm1d) is in train mode" in warnings()[0] and "torchcache(frozen=True)" in warnings()[0]
    torchcache()(nn.Sequential(nn.BatchNorm1d(2, affine=False, track_running_stats=False)).eval())(X)
    assert "0 (BatchNorm1d) always uses" in warnings()[1] and "frozen" not in warnings()[1]


def test_modules_that_compute_something_else_in_train_mode_are_found_by_name() -> None:
    rows = nn.Sequential(
        nn.Linear(2, 2), nn.Dropout(0.0), nn.Sequential(nn.BatchNorm1d(2), nn.LSTM(2, 2, 2, dropout=0.1))
    )
    assert training_modules(rows.named_modules()) == ["1 (Dropout)", "2.0 (BatchNorm1d)", "2.1 (LSTM)"]
    rows[1].eval(), rows[2].eval()
    assert training_modules(rows.named_modules()) == ["Sequential"]
    rows.eval()[0].train()
    assert training_modules(rows.named_modules()) == ["0 (Linear)"]
    assert training_modules(rows.eval().named_modules()) == []


def test_a_forward_that_changes_its_own_state_is_never_cached(
    warnings: Callable[[], list[str]],
) -> None:
    class Averaging(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return x + self.seen

    module, plain = torchcache()(Averaging()), Averaging()
    for _ in range(4):
        assert torch.equal(module(X), plain(X))
    assert len(warnings()) == 1 and "own state" in warnings()[0]


def test_what_a_first_forward_sets_up_does_not_stop_caching(
    warnings: Callable[[], list[str]],
) -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table: Tensor | None = None
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.table is None:
                self.table = torch.full((2,), 3.0)
            self.last = x
            return x * self.table

    module = torchcache()(Lazy())
    for _ in range(5):
        assert torch.equal(module(X), X * 3)
    assert module.calls == 2 and rows(module) == 3 and warnings() == []


def test_hooks_for_all_modules_are_never_cached_and_warned_of_once(warnings: Callable[[], list[str]]) -> None:
    inner = Double()
    module = torchcache()(nn.Sequential(inner))
    assert torch.equal(module(X), X * 2)
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: out * 3 if m is inner else None)
    try:
        assert torch.equal(module(X), X * 6) and torch.equal(module(X), X * 6)
    finally:
        handle.remove()
    assert torch.equal(module(X), X * 2) and inner.calls == 3
    assert len(warnings()) == 1 and "register_module_forward_hook" in warnings()[0]


def test_lazy_modules_are_cached_once_they_are_initialized() -> None:
    for module in (torchcache()(nn.LazyLinear(4)), torchcache()(nn.Sequential(nn.LazyLinear(4)))):
        right = module(X)
        module.requires_grad_(False)
        for _ in range(3):
            assert torch.equal(module(X), right)
        assert cache_of(module).info().memory_hits >= 6


def test_parameters_that_require_grad_are_named_once_and_outputs_are_detached(
    warnings: Callable[[], list[str]],
) -> None:
    module = torchcache()(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
    assert not module(X).requires_grad and not module(X).requires_grad
    assert len(warnings()) == 1
    assert "0.weight, 0.bias, 1.weight and 1 others require grad" in warnings()[0]


def test_a_full_tier_says_so_once(warnings: Callable[[], list[str]]) -> None:
    module = torchcache(max_memory_cache_size=8)(Double())
    module(X), module(X), module(X + 10)
    assert len(warnings()) == 1 and "memory cache is full" in warnings()[0]
    assert "max_memory_cache_size" in warnings()[0]


def test_a_useless_cache_says_so_once(warnings: Callable[[], list[str]]) -> None:
    module = torchcache()(Double())
    for i in range(12):
        module(torch.arange(i * 1000.0, i * 1000.0 + 1000).unsqueeze(1))
    assert len(warnings()) == 1 and "random augmentation" in warnings()[0]


def test_empty_batches_pass_through(module: Double) -> None:
    assert module(torch.empty(0, 2)).shape == (0, 2) and rows(module) == 0


def test_arguments_that_do_not_fit_raise_what_the_function_raises(module: Double) -> None:
    for args, kwargs in (((X, X), {}), ((X,), {"y": 1}), ((), {})):
        with pytest.raises(TypeError, match="forward"):
            module(*args, **kwargs)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([1, 2, 3],), "No tensor inputs found.+"),
        ((5,), "No tensor inputs found.+"),
        ((torch.tensor(1.0),), "All inputs must have the same batch dimension.+"),
    ],
)
def test_arguments_without_rows_are_named(args: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torchcache()(lambda x, more=None: x)(*args)


NOT_IMMUTABLE = "All non-Tensor extra args to the call must be an immutable type.+got {} for 'more'"


class Settings:
    """What no library knows."""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([1], NOT_IMMUTABLE.format("list")),
        ({"a": 1}, NOT_IMMUTABLE.format("dict")),
        ({1, 2}, NOT_IMMUTABLE.format("set")),
        (numpy.ones(3), NOT_IMMUTABLE.format("ndarray")),
        (numpy.float32(1), NOT_IMMUTABLE.format("float32")),
        (Settings(), NOT_IMMUTABLE.format("Settings")),
        (X[:2], r"All inputs must have the same batch dimension.+\(3, 2\), \(2, 2\)"),
        (torch.tensor(3), r"All inputs must have the same batch dimension.+\(3, 2\), \(\)"),
        (torch.ones(1, 1, 2, 2), r"All inputs must have the same batch dimension.+\(1, 1, 2, 2\)"),
        ([torch.ones(2), torch.ones(1)], "All inputs must have the same batch dimension.+"),
    ],
    ids=str,
)
def test_a_call_with_an_argument_that_can_be_no_part_of_a_key_is_computed_with_one_warning(
    more: object, message: str, warnings: Callable[[], list[str]]
) -> None:
    seen: list[object] = []

    @torchcache()
    def cached(x: Tensor, more: object) -> Tensor:
        seen.append(more)
        return x * 2

    for _ in range(2):
        assert torch.equal(cached(X, more), X * 2) and seen.pop() is more
    assert len(warnings()) == 1 and re.search(message, warnings()[0])
    assert re.search(message, str(cache_of(cached).explain(X, more)))
    for ask in (cache_of(cached).keys, cache_of(cached).hash_tensor):
        with pytest.raises(ValueError, match=message):
            ask(X, more)
