"""Keys mean exactly "the same computation on the same row", in every process, batch and memory layout."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import textwrap
from collections import OrderedDict
from typing import Any

import pytest
import torch
from cache_harness import cache_of
from hypothesis import given
from hypothesis import strategies as st
from keys_harness import CALL, DTYPES, as_pair, reference_keys, row_digest, strided
from torch import Tensor, nn

from torchcache import torchcache
from torchcache._native import ops

# ---- the hash


def test_digest_equals_xxhash_for_every_length_up_to_20000_bytes() -> None:
    data = random.Random(0).randbytes(20_000)
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    lengths = range(20_001)
    digests = ops.digests([buffer[:n] for n in lengths]).tolist()
    for n, got in zip(lengths, digests):
        assert got == as_pair(row_digest(data[:n])), n


def test_row_digests_of_every_dtype_and_shape_equal_the_reference() -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        for shape in [(3,), (3, 0), (2, 5), (2, 3, 700), (2, 33, 65), (1, 3, 1025)]:
            x = torch.randint(0, 2, shape).to(dtype)
            assert ops.keys([x], CALL).tolist() == reference_keys(CALL, x), (dtype, shape)


@given(strided())
def test_keys_do_not_depend_on_strides(x: Tensor) -> None:
    assert ops.keys([x], CALL).tolist() == reference_keys(CALL, x)


@given(st.data())
def test_keys_of_several_arguments_equal_the_reference(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 5))
    rows = [torch.randn(batch, data.draw(st.integers(0, 3000))) for _ in range(data.draw(st.integers(1, 20)))]
    assert ops.keys(rows, CALL).tolist() == reference_keys(CALL, *rows)


@given(st.integers(1, 9000), st.data())
def test_any_flipped_bit_changes_the_key_of_its_row_only(size: int, data: st.DataObject) -> None:
    x = torch.randint(0, 256, (3, size), dtype=torch.uint8)
    before = ops.keys([x], CALL)
    row, at, bit = (
        data.draw(st.integers(0, 2)),
        data.draw(st.integers(0, size - 1)),
        data.draw(st.integers(0, 7)),
    )
    x[row, at] ^= 1 << bit
    changed = (ops.keys([x], CALL) != before).any(1)
    assert changed.tolist() == [i == row for i in range(3)]


# ---- keys of calls


@torchcache()
class Twice(nn.Module):
    def forward(self, x: Tensor, y: Tensor | None = None, scale: object = 1, *more: object, **named: object) -> Tensor:
        return x * 2


def key(*args: object, **kwargs: object) -> list[int]:
    return cache_of(Twice()).hash_tensor(*args, **kwargs).tolist()


X = torch.arange(24, dtype=torch.float32).view(2, 12)


@given(st.integers(1, 40), st.data())
def test_keys_do_not_depend_on_batch_size_split_or_order(batch: int, data: st.DataObject) -> None:
    x = torch.randn(batch, data.draw(st.integers(1, 50)))
    order = data.draw(st.permutations(range(batch)))
    cut = data.draw(st.integers(0, batch - 1))
    whole = key(x)
    assert key(x[:cut]) + key(x[cut:]) == whole if cut else True
    assert key(x[list(order)]) == [whole[i] for i in order]


def test_keys_do_not_depend_on_offset_or_memory_format() -> None:
    x = torch.randn(3, 4, 5, 6)
    shifted = torch.empty(x.numel() + 7)[7:].view_as(x).copy_(x)
    assert key(x) == key(shifted) == key(x.to(memory_format=torch.channels_last)) == key(x.mT.contiguous().mT)


@pytest.mark.parametrize("shape", [(2, 12), (2, 3, 4), (2, 4, 3), (2, 1, 12), (2, 12, 1)])
def test_shape_of_a_row_is_part_of_the_key(shape: tuple[int, ...]) -> None:
    assert (key(X.view(shape)) == key(X)) is (shape == (2, 12))


def test_dtype_sign_of_zero_and_nan_payload_are_part_of_the_key() -> None:
    bits = torch.tensor([[0], [-(2**31)], [0x7FC00000], [0x7FC00001]], dtype=torch.int32)
    floats = key(bits.view(torch.float32))
    assert len(set(floats)) == 4
    assert not set(floats) & set(key(bits))
    assert not set(key(torch.zeros(1, 4))) & set(key(torch.zeros(1, 4, dtype=torch.int32)))


def test_values_of_arguments_are_told_apart_by_type() -> None:
    keys = [tuple(key(X, scale=s)) for s in (1, True, 1.0, "1", b"1", None, 0.0, -0.0, (1,), (1.0,), torch.float32)]
    assert len(set(keys)) == len(keys)


def test_positional_keyword_and_default_forms_agree() -> None:
    assert key(X) == key(X, None) == key(x=X) == key(X, None, 1) == key(scale=1, x=X)


def test_names_and_places_of_tensors_are_part_of_the_key() -> None:
    a, b = X, X + 1
    assert key(a, b) != key(b, a)
    assert key(a, b) == key(y=b, x=a)
    assert key(a, None, 1, b) != key(a, b)
    assert key(a, p=1) != key(a, q=1)
    assert key(a, p=1, q=2) != key(a, q=2, p=1)  # a function sees the order of its **kwargs
    assert key(a, None, 1, 5, 6) != key(a, None, 1, 6, 5)


@given(st.lists(st.tuples(st.integers(0, 3), st.permutations("abc"), st.tuples(*[st.integers(0, 2)] * 3)), max_size=12))
def test_keys_do_not_depend_on_how_the_arguments_of_a_call_or_of_earlier_calls_were_passed(
    calls: list[tuple[int, list[str], tuple[int, ...]]],
) -> None:
    tensors = [X, X + 1, X + 2]
    cache = cache_of(torchcache()(lambda a, b, c: a))
    for positional, names, values in calls:
        arguments = {name: tensors[v] for name, v in zip("abc", values)}
        passed = [arguments.pop(name) for name in "abc"[:positional]]
        keywords = {name: arguments[name] for name in names if name in arguments}
        fresh = cache_of(torchcache()(lambda a, b, c: a))
        in_order = fresh.keys(*(tensors[v] for v in values))
        assert torch.equal(cache.keys(*passed, **keywords), in_order)


def test_tensors_in_tuples_and_dicts_are_rows_too() -> None:
    assert key((X, X + 1)) != key((X + 1, X))
    assert key({"a": X, "b": X + 1}) != key({"b": X + 1, "a": X})  # and that of a dict
    assert key({"a": X, "b": X + 1}) != key(OrderedDict(a=X, b=X + 1))
    assert key({"a": X, "b": X + 1}) != key({"a": X + 1, "b": X})
    assert key({"a": X, "n": 1}) != key({"a": X, "n": 2})


def test_rows_that_differ_only_in_scale_or_position_have_different_keys() -> None:
    tiny = torch.rand(100, 8) * 1e-6
    onehot = torch.eye(100)
    assert len(set(key(tiny))) == len(set(key(onehot))) == 100


def test_lazy_conjugates_are_hashed_as_what_they_stand_for() -> None:
    x = torch.randn(3, 4, dtype=torch.complex64)
    assert key(x.conj()) == key(x.conj().resolve_conj()) != key(x)
    assert key(x.conj().imag) == key(-x.imag)


def test_the_default_dtype_is_part_of_the_key() -> None:
    module: Any = torchcache()(lambda x: torch.zeros(len(x)))
    assert module(X).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert module(X).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    module(X)
    assert cache_of(module).info().misses == 2 * len(X.unique(dim=0))


def test_what_a_wrapper_does_without_an_argument_is_its_own_affair() -> None:
    def doubled_by_default(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(x: Tensor, scale: float | None = None) -> Any:
            return function(x, 2.0 if scale is None else scale)

        return wrapper

    @torchcache()
    @doubled_by_default
    def scaled(x: Tensor, scale: float = 1.0) -> Tensor:
        return x * scale

    assert torch.equal(scaled(X), 2 * X) and torch.equal(scaled(X, 1.0), X)
    assert torch.equal(scaled(X), 2 * X) and torch.equal(scaled(X, scale=1.0), X)


def test_long_texts_are_told_apart_and_not_remembered() -> None:
    module: Any = torchcache()(lambda x, text: x + len(text))
    texts = ["a" * 100_000 + str(i) for i in range(8)]
    keys = [tuple(module.cache_instance.keys(X, text)[0].tolist()) for text in [*texts, *texts]]
    assert keys[:8] == keys[8:] and len(set(keys)) == 8
    decider = module.cache_instance._decider
    assert not decider._binder._templates and not decider._keys._digests


def test_precision_settings_are_part_of_the_key_and_setting_them_back_restores_it() -> None:
    module = torchcache()(torch.nn.Linear(2, 2).requires_grad_(False))
    x = torch.ones(1, 2)
    before = cache_of(module).keys(x).tolist()
    seen = [before]
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            seen.append(cache_of(module).keys(x).tolist())
        torch.set_float32_matmul_precision("highest")
        assert cache_of(module).keys(x).tolist() == before
        torch.use_deterministic_algorithms(True)
        seen.append(cache_of(module).keys(x).tolist())
        torch.use_deterministic_algorithms(False)
        if torch.set_flush_denormal(True):
            seen.append(cache_of(module).keys(x).tolist())
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)
        torch.set_flush_denormal(False)
    assert cache_of(module).keys(x).tolist() == before
    assert all(seen.count(keys) == 1 for keys in seen)


def test_autocast_is_part_of_the_key() -> None:
    plain = key(X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = key(X)
    assert plain != half
    with torch.autocast("cpu", enabled=False):
        assert key(X) == plain


def test_keys_are_the_same_in_another_process() -> None:
    script = """
        import torch, torch.nn as nn
        from torchcache import torchcache

        @torchcache(persistent=True)
        class Net(nn.Module):
            def __init__(self, width, name="n"):
                super().__init__()
                torch.manual_seed(0)
                self.linear = nn.Linear(4, width)
                self.act = nn.LeakyReLU(0.2)
                self.requires_grad_(False)
            def forward(self, x, scale=1.5, mode="a"):
                return self.act(self.linear(x)) * scale

        m = Net(3, name="x")
        x = torch.arange(20.).view(5, 4)
        print(m.cache_instance.module_hash, m.cache_instance.hash_tensor(x, scale=2.0).tolist())
    """
    outputs = {
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and "[" in outputs.pop()


def test_subsampling_hashes_only_about_the_documented_number_of_elements() -> None:
    @torchcache(subsample=True, subsample_count=10)
    def sampled(x: Tensor) -> Tensor:
        return x * 2

    @torchcache(subsample_count=10)
    def whole(x: Tensor) -> Tensor:
        return x * 2

    a = torch.zeros(1, 1000)
    b = a.clone()
    b[0, 1] = 1  # between two of the sampled elements
    assert cache_of(sampled).hash_tensor(a).equal(cache_of(sampled).hash_tensor(b))
    assert not cache_of(whole).hash_tensor(a).equal(cache_of(whole).hash_tensor(b))
