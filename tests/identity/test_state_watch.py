"""The check of the state on every call finds what leaves no other trace, and ignores what forwards count with."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cache_harness import cache_of
from state_harness import X, keys
from torch import Tensor, nn

from torchcache import torchcache
from torchcache.identity.watch import NativeWatch


def test_submodules_in_another_order_are_another_state() -> None:
    module = torchcache()(nn.Sequential(OrderedDict(a=nn.Linear(2, 2), b=nn.Tanh())).requires_grad_(False))
    x = torch.randn(3, 2)
    module(x)
    module._modules["a"] = module._modules.pop("a")  # now behind b
    assert torch.equal(module(x), module[1](module[0](x)))


def test_hooks_added_to_submodules_and_removed_again_count() -> None:
    module = torchcache()(nn.Sequential(nn.Identity()))
    x = torch.ones(2, 2)
    first = module(x)
    handles = [module[0].register_forward_hook(lambda m, args, out: out * 3)]
    assert torch.equal(module(x), 3 * x)
    handles += [module[0].register_forward_pre_hook(lambda m, args: (args[0] + 1,))]
    assert torch.equal(module(x), 3 * (x + 1))
    for handle in handles:
        handle.remove()
    assert torch.equal(module(x), first)
    assert cache_of(module).info().misses == 3  # of one distinct row each


def test_edits_of_weights_made_in_inference_mode_are_noticed() -> None:
    with torch.inference_mode():
        module = torchcache()(nn.Linear(64, 64).requires_grad_(False))
        x = torch.randn(2, 64)
        module(x)
        module.weight[7:12] = 1000.0
        assert torch.equal(module(x), nn.functional.linear(x, module.weight, module.bias))


def test_edits_of_what_a_replaced_submodule_reaches_are_noticed() -> None:
    scale = torch.tensor([2.0])

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * scale

    module = torchcache()(nn.Sequential(nn.Identity()))
    x = torch.ones(2, 2)
    module(x)
    module[0] = Scaled()
    assert torch.equal(module(x), 2 * x)
    scale.fill_(5)
    assert torch.equal(module(x), 5 * x)


def test_weights_and_inputs_whose_storage_was_freed_are_computed_not_read() -> None:
    class Gathered(nn.Module):
        """As sharded modules do: the weight is there only while the forward runs."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(400, 400), requires_grad=False)
            self.whole = self.weight.detach().clone().tolist()

        def forward(self, x: Tensor) -> Tensor:
            self.weight.untyped_storage().resize_(4 * 400 * 400)
            self.weight.data.copy_(torch.tensor(self.whole))
            out = x @ self.weight
            self.weight.untyped_storage().resize_(0)
            return out

    plain = Gathered()
    plain.weight.untyped_storage().resize_(0)
    x = torch.randn(3, 400)
    expected = plain(x)
    module = torchcache()(plain)
    assert torch.equal(module(x), expected) and torch.equal(module(x), expected)
    freed = torch.randn(60, 400)
    freed.untyped_storage().resize_(100)
    for rows in (freed, torch._efficientzerotensor((6, 4))):
        assert torchcache()(lambda t: torch.ones(len(t)))(rows).sum() == len(rows)


def test_parameters_that_are_unfrozen_later_are_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    module = torchcache()(nn.Linear(2, 2).requires_grad_(False))
    x = torch.ones(1, 2)
    module(x)
    assert not caplog.records
    module.requires_grad_(True)
    assert not module(x).requires_grad
    assert "weight, bias require grad" in caplog.text


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enabled, self.calls = True, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 3 if self.enabled else x


def test_attributes_of_submodules_that_are_set_later_count_and_counters_do_not() -> None:
    adapter: Any = Adapter()
    module = torchcache()(nn.Sequential(adapter, nn.Identity()))
    x = torch.arange(1.0, 5.0).view(4, 1)
    assert torch.equal(module(x), 3 * x) and torch.equal(module(x), 3 * x)
    adapter.enabled = False
    assert torch.equal(module(x), x) and torch.equal(module(x), x)
    adapter.enabled = True
    assert torch.equal(module(x), 3 * x)
    assert adapter.calls == 2 and cache_of(module).info().misses == 8


def test_compiled_modules_with_one_state_have_one_key() -> None:
    plain = nn.Linear(2, 2).requires_grad_(False)
    x = torch.ones(3, 2)
    compiled = [torch.compile(plain, backend="eager") for _ in range(2)]
    keys = [cache_of(torchcache()(module)).keys(x) for module in compiled]
    assert torch.equal(*keys)


def test_quantised_tensors_differ_by_what_their_integers_stand_for() -> None:
    class Quantised(nn.Module):
        table: Tensor

        def __init__(self, scale: float) -> None:
            super().__init__()
            self.register_buffer(
                "table", torch.quantize_per_tensor(torch.tensor([2.0, 4.0]) * scale, scale, 0, torch.qint8)
            )

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :2] * self.table.dequantize()

    first, second = torchcache()(Quantised(0.5)), torchcache()(Quantised(1.0))
    assert torch.equal(first.table.int_repr(), second.table.int_repr())
    assert keys(first) != keys(second)
    first.table = second.table
    assert keys(first) == keys(second)


def test_a_counter_does_not_stop_caching_where_threads_begin_together(caplog: pytest.LogCaptureFixture) -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()
            self.calls = 0
            self.together: threading.Barrier | None = threading.Barrier(4, timeout=60)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.part.calls += 1
            if self.together is not None:
                self.together.wait()
            return x * 2

    module = torchcache()(Counting())
    for start in range(3):
        threads = [threading.Thread(target=module, args=(X + 10 * start + i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    module.together = None
    for _ in range(3):
        assert torch.equal(module(X), X * 2)
    before = module.calls
    assert torch.equal(module(X), X * 2) and module.calls == before
    assert "not cached" not in caplog.text


@hypothesis.given(data=st.data())
def test_any_edit_of_a_small_tensor_that_moves_no_counter_is_noticed(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.uint8, torch.half, torch.float32, torch.float64, torch.complex128]))
    size = data.draw(st.integers(1, 256 // dtype.itemsize))
    tensor = torch.zeros(size, dtype=dtype)
    watch = NativeWatch([tensor])
    first = watch.probe()
    element = data.draw(st.integers(0, size - 1))
    tensor.data[element] = 1
    assert watch.probe() != first
    tensor.data[element] = 0
    assert watch.probe() == first


@pytest.mark.parametrize("edit", [lambda t: t.mul_(2), lambda t: t.neg_(), lambda t: t.clamp_(min=0)])
@pytest.mark.parametrize("apart", [False, True])
def test_edits_of_a_whole_tensor_that_move_no_counter_are_noticed(
    edit: Callable[[Tensor], object], apart: bool
) -> None:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        tensor = torch.randn(64, 64, dtype=torch.float64, generator=generator)
        if apart:
            tensor = tensor[:, ::2]
        else:
            tensor *= torch.rand(64, 64, generator=generator) < 0.5  # pruned
        watch = NativeWatch([tensor])
        first = watch.probe()
        edit(tensor.data)
        assert watch.probe() != first
