"""Plain values as bytes: equal means equal everywhere, different never collides."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import itertools
import math
import os
import pathlib
import struct
import subprocess
import sys
import types
import typing

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from torchcache.identity.encoding import Unencodable, encode, is_plain


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Level(enum.IntEnum):
    LOW = 1


class Bits(enum.Flag):
    A = 1
    B = 2


@dataclasses.dataclass
class Point:
    x: object
    y: object


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: object


class Pair(typing.NamedTuple):
    x: object
    y: object


class MyInt(int):
    pass


class MyList(list):  # type: ignore[type-arg]
    pass


NAN = struct.unpack("<d", struct.pack("<Q", 0x7FF8000000000000))[0]
OTHER_NAN = struct.unpack("<d", struct.pack("<Q", 0x7FF8000000000001))[0]

DISTINCT: list[object] = [
    *(None, ..., True, False, 1, 0, -1, 255, 256, -128, 2**64, 1.0, 0.0, -0.0, NAN, OTHER_NAN),
    *(1j, complex(-0.0, 1), "", "1", "a", "\ud800", b"", b"1", b"a", MyInt(1)),
    *((), [], set(), frozenset(), {}, (1,), [1], {1}, frozenset((1,)), MyList([1])),
    *((1, 2), (2, 1), ((1,), 2), (1, (2,)), ("ab", "c"), ("a", "bc"), {1: 2}, {2: 1}, {"1": 2}),
    *(torch.Size((1,)), torch.Size(()), range(3), range(0, 3, 2), slice(3), slice(0, 3)),
    *(Color.RED, Color.BLUE, Level.LOW, Bits.A, Bits.B, Bits.A | Bits.B),
    *(Point(1, 2), Point(2, 1), Frozen(1), Pair(1, 2)),
    *(types.SimpleNamespace(x=1), argparse.Namespace(x=1)),
    *(collections.OrderedDict(a=1, b=2), collections.OrderedDict(b=2, a=1), {"a": 1, "b": 2}),
    *(torch.float32, torch.float16, "torch.float32", torch.device("cpu"), torch.device("cuda:1")),
    *(torch.strided, torch.channels_last, pathlib.PurePosixPath("a"), decimal.Decimal("1.0")),
    *(decimal.Decimal("1.00"), fractions.Fraction(1, 2), datetime.date(2020, 1, 2)),
    *(datetime.datetime(2020, 1, 2), datetime.time(1), datetime.timedelta(1)),
]

hashable = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text()
    | st.binary()
    | st.sampled_from([torch.float32, torch.int8, Color.RED, Level.LOW, ...]),
    lambda item: st.lists(item, max_size=4).map(tuple) | st.frozensets(item, max_size=4),
    max_leaves=12,
)
values = st.recursive(
    hashable,
    lambda item: (
        st.lists(item, max_size=4)
        | st.lists(item, max_size=4).map(tuple)
        | st.dictionaries(hashable, item, max_size=4)
        | st.builds(Point, item, item)
        | st.builds(Pair, item, item)
    ),
    max_leaves=12,
)


def same(a: object, b: object) -> bool:
    """Equality that tells types and bit patterns apart, written without the encoder."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, complex) and isinstance(b, complex):
        return same((a.real, a.imag), (b.real, b.imag))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, frozenset) and isinstance(b, frozenset):
        return permuted(list(a), list(b))
    if isinstance(a, Point) and isinstance(b, Point):
        return same((a.x, a.y), (b.x, b.y))
    return a == b


def permuted(a: list[object], b: list[object]) -> bool:
    return len(a) == len(b) and any(same(a, list(order)) for order in itertools.permutations(b))


@hypothesis.given(values, values)
def test_any_two_values_have_one_encoding_exactly_if_they_are_the_same(a: object, b: object) -> None:
    assert (encode(a) == encode(b)) == same(a, b)


@hypothesis.given(st.lists(values, max_size=4))
def test_encodings_can_be_cut_apart_again(items: list[object]) -> None:
    joined = b"".join(map(encode, items))
    for item in items:
        size = 9 + int.from_bytes(joined[1:9], "little")
        assert joined[:size] == encode(item)
        joined = joined[size:]
    assert joined == b""


def test_the_order_of_a_dict_counts_since_code_may_go_through_it() -> None:
    assert encode({"a": 1, "b": 2}) != encode({"b": 2, "a": 1})
    assert encode({"a": 1}) != encode(collections.OrderedDict(a=1))


def test_values_that_differ_in_type_sign_or_bits_differ() -> None:
    encodings = [encode(value) for value in DISTINCT]
    clashes = [
        (DISTINCT[i], DISTINCT[j])
        for i, j in itertools.combinations(range(len(DISTINCT)), 2)
        if encodings[i] == encodings[j]
    ]
    assert clashes == []


SCRIPT = """
import sys, torch
from torchcache.identity.encoding import encode
value = {"s": {"a", "b", "c", 1, 2.5, None}, "f": frozenset("xyz"), "d": torch.float16,
         "n": {"z": 1, "y": [2, (3,)], "x": {b"q"}}}
print(encode(value).hex())
"""


def test_an_encoding_is_the_same_in_processes_with_other_hash_seeds() -> None:
    answers = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "77")
    }
    assert len(answers) == 1 and answers != {""}


def test_known_answers() -> None:
    assert encode(None) == b"N" + bytes(8)
    assert encode(-2).hex() == "69" + "0100000000000000" + "fe"
    assert encode(128).hex() == "69" + "0200000000000000" + "8000"
    assert encode("é").hex() == "73" + "0200000000000000" + "c3a9"
    assert encode(1.0).hex() == "66" + "0800000000000000" + "000000000000f03f"
    assert encode((True,)).hex() == "74" + "0a00000000000000" + "62" + "0100000000000000" + "01"


def test_a_value_that_contains_itself_is_refused() -> None:
    loop: list[object] = []
    loop += [loop, loop]
    with pytest.raises(Unencodable, match="contains itself, or is nested deeper than 100 levels"):
        encode(loop)


def test_a_refusal_says_where_the_value_stands_and_what_it_is() -> None:
    with pytest.raises(Unencodable, match=r"^config\['hook'\]\[1\] is of type function") as info:
        encode({"hook": [1, lambda: None]}, name="config")
    assert isinstance(info.value, TypeError) and info.value.path == "['hook'][1]"
    with pytest.raises(Unencodable, match=r"^value\.y is of type object"):
        encode(Point(1, object()))


@pytest.mark.parametrize("value", [object(), len, int, math, torch.zeros(1), iter(()), collections.defaultdict()])
def test_what_is_not_plain_needs_the_hook(value: object) -> None:
    with pytest.raises(Unencodable):
        encode(value)
    assert encode([value], lambda item: b"known") != encode([b"known"])
    with pytest.raises(Unencodable):
        encode(value, lambda item: None)


def test_the_hook_is_asked_for_the_class_of_a_dataclass() -> None:
    asked: list[object] = []
    assert encode(Point(1, 2), asked.append) == encode(Point(1, 2))
    assert asked == [Point]
    assert encode(Point(1, 2), lambda cls: b"code") != encode(Point(1, 2))


def test_attributes_of_a_dataclass_that_are_no_fields_count() -> None:
    more = Point(1, 2)
    vars(more)["z"] = 3
    assert encode(more) != encode(Point(1, 2))
    hidden = Frozen(1)
    vars(hidden)["z"] = []
    assert not is_plain(hidden)


def test_classes_that_differ_only_in_where_they_are_defined_are_the_same() -> None:
    def make() -> type:
        class Local(int):
            pass

        return Local

    def make_again() -> type:
        class Local(int):
            pass

        return Local

    assert encode(make()(3)) == encode(make_again()(3)) != encode(MyInt(3))


def test_plain_means_immutable_all_the_way_down() -> None:
    plain: list[object] = [
        None,
        1,
        2.0,
        1j,
        "a",
        b"b",
        torch.int8,
        torch.device("cpu"),
        torch.Size((1,)),
        ...,
    ]
    plain += [Color.RED, (1, ("a",)), frozenset(((1, 2),)), Pair(1, 2), Frozen(1), range(2)]
    assert [value for value in plain if not is_plain(value)] == []
    mutable = [[], {}, set(), ([],), Pair(1, []), Frozen([]), Point(1, 2), torch.zeros(1), len, int]
    assert [value for value in mutable if is_plain(value)] == []
    for value in plain:
        encode(value)
