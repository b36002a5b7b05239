"""Outputs of any nesting, dtype and layout come back as the forward gave them."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import subprocess
import sys
import textwrap
import types
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from cache_harness import cache_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchcache import torchcache

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int64,
    torch.half,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
]


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


@dataclasses.dataclass
class Result:
    hidden: Tensor
    extra: Any = None


def nested(x: Tensor) -> Any:
    return {
        "tuple": (x + 1, None, [x.sum(1), x.to(torch.int64)]),
        "pair": Pair(x * 2, None),
        "result": Result(x.half(), Pair(x > 0, x.double())),
        "ordered": collections.OrderedDict(b=x, a=x.to(torch.complex64)),
        3: x.view(len(x), 3, 1, 1).expand(-1, -1, 2, 0),
    }


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for one, other in zip(a, b):
            assert_same(one, other)
    elif isinstance(a, numpy.ndarray):
        assert numpy.array_equal(a, b)
    else:
        assert a is b or a == b


@pytest.mark.parametrize("persistent", [False, True])
def test_any_pytree_of_batched_tensors_comes_back_as_it_was(persistent: bool) -> None:
    cached = torchcache(persistent=persistent, max_memory_cache_size=0 if persistent else 1e9)(nested)
    x = torch.randn(5, 3)
    for batch in (x[:3], x, x.flip(0), x[1:2]):
        assert_same(cached(batch), nested(batch))
    info = cache_of(cached).info()
    assert info.misses == 5 and info.memory_hits + info.disk_hits == 3 + 5 + 1


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=st.sampled_from([(), (1,), (7,), (3, 5, 2), (0,)]))
def test_rows_of_every_dtype_come_back_bit_by_bit(dtype: torch.dtype, persistent: bool, shape: tuple[int, ...]) -> None:
    size = math.prod(shape)

    def function(x: Tensor) -> Tensor:
        return x[:, : dtype.itemsize * size].flatten().clone().view(dtype).view(len(x), *shape)

    cached: Any = torchcache(persistent=persistent)(function)
    x = torch.randint(0, 2, (6, 1 + 16 * size), dtype=torch.uint8)  # 0 and 1: all that a bool may be
    x[:, -1] = torch.arange(6)
    for batch in (x[:4], x[:4].flip(0), x, x[[5, 0, 5]]):  # computed, found, found in part, found again
        got, expected = cached(batch), function(batch)
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert torch.equal(bits(got), bits(expected))
    assert cached.cache_instance.info()[:3] == (4 + 4 + 3, 0, 4 + 2)
    if persistent:
        cached.cache_instance.clear()
        assert torch.equal(bits(cached(x)), bits(function(x))) and cached.cache_instance.info().disk_hits == 6


@given(dtype=st.sampled_from(DTYPES), row=st.integers(0, 3))
def test_inputs_of_every_dtype_are_told_apart_and_taken_apart(dtype: torch.dtype, row: int) -> None:
    x = torch.eye(4, dtype=torch.uint8).repeat_interleave(dtype.itemsize).view(dtype).view(4, 4)
    for rows in (x[:, 0].clone(), x):  # of one dimension and of two
        cached: Any = torchcache()(lambda x: bits(x).view(len(x), -1).long())
        cached(rows[row : row + 1])
        assert torch.equal(cached(rows), bits(rows).view(len(rows), -1).long())


def bits(t: Tensor) -> Tensor:
    return t.reshape(-1).view(torch.uint8)


def test_rows_are_right_where_address_space_cannot_be_reserved() -> None:
    code = """
        import resource, torch
        from torchcache import torchcache
        module = torchcache(max_memory_cache_size=64e9)(torch.nn.Linear(2, 100_000).requires_grad_(False))
        x = torch.arange(800.0).view(400, 2)
        in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + (4 << 30), -1))
        with torch.no_grad():
            first = [module(part) for part in x.split(100)]  # 400 kB a row: more than two chunks of 64 MiB
            again = module(x.flip(0))
        assert torch.equal(again.flip(0), torch.cat(first))
        assert module.cache_instance.info()[:3] == (400, 0, 400), module.cache_instance.info()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("persistent", [False, True])
def test_cache_dtype_stores_floats_narrower_and_gives_back_the_original_dtype(
    dtype: torch.dtype, persistent: bool
) -> None:
    @torchcache(cache_dtype=dtype, persistent=persistent)
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return x / 3, x.long()

    x = torch.randn(4, 50)
    first = function(x)
    assert_same(first, ((x / 3).to(dtype).float(), x.long()))
    assert_same(function(x), first)
    assert cache_of(function).memory_cache_size == 4 * 50 * (dtype.itemsize + 8)


def test_what_torch_functions_return_comes_back_as_it_was() -> None:
    x = torch.randn(6, 5)
    for function in (lambda x: x.topk(2, 1), lambda x: x.max(1), lambda x: x.sort(1)):
        cached = torchcache(persistent=True, max_memory_cache_size=0)(function)
        for got in (cached(x), cached(x.flip(0)), cached(x)):
            assert type(got) is type(function(x)) and got.values.shape == got.indices.shape
        assert_same(tuple(cached(x)), tuple(function(x)))


@dataclasses.dataclass
class Doubled:
    x: Tensor

    def __post_init__(self) -> None:
        self.x = self.x * 2


@dataclasses.dataclass
class Late:
    x: Tensor
    late: Any = dataclasses.field(init=False, default=None)


@dataclasses.dataclass
class Weighted:
    x: Tensor
    weight: dataclasses.InitVar[int] = 1
    sum: Any = dataclasses.field(init=False, default=None)

    def __post_init__(self, weight: int) -> None:
        self.sum = self.x * weight


class Shifted(NamedTuple("Shifted", [("x", Tensor)])):
    def __new__(cls, x: Tensor) -> Any:
        return super().__new__(cls, x + 1)


def late(x: Tensor) -> Any:
    output = Late(x)
    output.late = x * 3
    return output


def more(x: Tensor) -> Any:
    output = Result(x)
    output.more = x * 5  # type: ignore[attr-defined]
    return output


@pytest.mark.parametrize("make", [Doubled, late, more, lambda x: Weighted(x, 2), Shifted, lambda x: (x, [Doubled(x)])])
def test_what_a_class_does_to_its_fields_is_never_done_twice_and_nothing_is_lost(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.arange(6.0).view(3, 2)
    cached = torchcache()(lambda x: make(x))
    for _ in range(3):
        assert repr(cached(x)) == repr(make(x)) and repr(vars_of(cached(x))) == repr(vars_of(make(x)))
    assert len([r for r in caplog.records if "would differ" in r.getMessage()]) == 1


def vars_of(value: Any) -> Any:
    return getattr(value, "__dict__", None)


@dataclasses.dataclass(slots=True)
class Slots:
    x: Tensor
    kind: Any = dataclasses.field(init=False, default="plain")


def test_classes_that_hold_what_they_are_given_are_cached() -> None:
    x = torch.arange(6.0).view(3, 2)
    for make in (Slots, Result, lambda x: Pair(x, None), lambda x: {"a": Result(x, [x])}):
        cached = torchcache()(lambda x, make=make: make(x))
        assert repr(cached(x)) == repr(cached(x)) == repr(make(x))
        assert cache_of(cached).info().memory_rows == 3


def test_rows_from_several_places_keep_their_dtype_under_autocast() -> None:
    cached = torchcache(max_memory_cache_size=24)(lambda x: x.half())
    x = torch.arange(18.0).view(6, 3)
    with torch.autocast("cpu", torch.bfloat16):
        cached(x[:3])
        assert torch.equal(cached(x), x.half())


class Attributes(collections.UserDict):  # type: ignore[type-arg]
    """Whose copies share what they hold."""

    def __copy__(self) -> Attributes:
        other = Attributes()
        other.data = self.data
        return other


@pytest.mark.parametrize(
    "make", [dict, collections.OrderedDict, types.MappingProxyType, Attributes, collections.UserDict]
)
def test_mappings_of_tensors_are_never_edited_and_give_right_rows(make: Any) -> None:
    cached = torchcache()(lambda batch: batch["a"] + batch["b"])
    a, b = torch.arange(6.0), torch.arange(6.0) * 10
    cached(make({"a": a[:3], "b": b[:3]}))
    batch = make({"a": a, "b": b})
    assert torch.equal(cached(batch), a + b)  # half of it was found
    assert batch["a"] is a and batch["b"] is b


def test_a_forward_that_edits_its_input_never_edits_it_twice() -> None:
    def wide(x: Tensor) -> Tensor:
        x.mul_(2)
        return x[:, : int(x.max() > 100) + 1].clone()

    cached = torchcache()(wide)
    small, large = torch.tensor([[1.0, 1.0]]), torch.tensor([[60.0, 60.0]])
    cached(small.clone())
    both = torch.cat([small, large])
    assert torch.equal(cached(both.clone()), wide(both.clone()))  # of two layouts: computed as a whole


PARTS: list[Any] = [
    None,
    1.0,
    7,
    "text",
    torch.Size([2]),
    numpy.ones(2),
    {1, 2},
    torch.zeros(()),
    torch.ones(7),
    object(),
]


def trees(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    containers = (st.lists, lambda s: st.lists(s).map(tuple), lambda s: st.dictionaries(st.sampled_from("ab"), s))
    return st.recursive(leaves, lambda s: st.one_of(*(make(s) for make in containers)), max_leaves=5)


@given(trees(st.sampled_from(["rows", *range(len(PARTS))])))
def test_an_output_with_any_parts_is_that_of_the_forward(tree: Any) -> None:
    def build(part: Any, x: Tensor) -> Any:
        if isinstance(part, dict):
            return {name: build(value, x) for name, value in part.items()}
        if isinstance(part, (list, tuple)):
            return type(part)(build(value, x) for value in part)
        return x * 2 if part == "rows" else PARTS[part]

    cached = torchcache()(lambda x: build(tree, x))
    x = torch.arange(6.0).view(3, 2)
    for batch in (x, x, torch.cat([x, x + 100])):
        assert_same(cached(batch), build(tree, batch))


def test_an_output_that_is_not_batched_is_computed_with_one_warning_that_names_the_shapes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x = torch.arange(6.0).view(3, 2)
    functions: list[Any] = [lambda x: x.sum(), lambda x: x[:1], lambda x: (x, x.t()), lambda x: None, lambda x: (x, 1)]
    for function in functions:
        caplog.clear()
        cached = torchcache()(function)
        for _ in range(2):
            assert_same(cached(x), function(x))
        assert ["the output cannot be cached" in r.getMessage() for r in caplog.records] == [True]
        assert cache_of(cached).info().memory_rows == 0 and cache_of(cached).explain(x).bypassed is not None
    caplog.clear()
    torchcache()(lambda x: x.sum(0))(x)
    assert re.search(r"3 rows .* got \(2,\)", caplog.text)


def test_rows_of_different_shapes_come_from_different_calls() -> None:
    cached = torchcache()(lambda x: x.cumsum(1))
    for length in (3, 7, 3, 1, 7):
        x = torch.randn(2, length)
        assert torch.equal(cached(x), x.cumsum(1))
        assert torch.equal(cached(x), x.cumsum(1))


def test_a_batch_whose_rows_have_several_layouts_is_computed() -> None:
    def trimmed(x: Tensor) -> Tensor:
        return x[:, : int(x[:, 0].max())]  # the width depends on the batch

    cached = torchcache()(trimmed)
    one, two = torch.tensor([[1.0, 5.0, 5.0]]), torch.tensor([[2.0, 6.0, 6.0]])
    cached(one)
    cached(two)
    both = torch.cat([one, two])
    assert torch.equal(cached(both), trimmed(both))
    new = torch.cat([one, torch.tensor([[3.0, 1.0, 1.0]])])
    assert torch.equal(cached(new), trimmed(new))


# ---- aliasing


def test_edits_of_inputs_and_outputs_never_reach_the_cache() -> None:
    for function in (
        lambda x: x,
        lambda x: x.view(-1, 2, 2),
        lambda x: x[:, :2],
        lambda x: x + 1,
        lambda x: {"a": x},
    ):
        cached = torchcache()(function)
        x = torch.randn(3, 4)
        right = function(x.clone())
        first = cached(x)
        kept = x.clone()
        for output in (first, cached(x), cached(x)):
            leaf = output["a"] if isinstance(output, dict) else output
            leaf.fill_(-1)
            assert torch.equal(x, kept)  # no output is the input
        assert_same(cached(x), right)
        x.zero_()
        assert_same(cached(kept), right)


def test_an_exception_inside_forward_leaves_the_cache_as_it_was() -> None:
    def fragile(x: Tensor) -> Tensor:
        if (x < 0).any():
            raise RuntimeError("negative")
        return x + 1

    cached = torchcache()(fragile)
    good = torch.ones(2, 2)
    cached(good)
    before = cache_of(cached).info()
    with pytest.raises(RuntimeError, match="negative"):
        cached(torch.cat([good, -good]))
    assert cache_of(cached).info() == before
    assert torch.equal(cached(good), good + 1)
