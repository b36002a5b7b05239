"""Plain values as bytes: equal values give equal bytes in every process, different values never do.

An encoding is one tag byte, the payload's length as u64 little-endian, and the payload. In a
payload, `+` stands for concatenation; a *type* is the class's qualified name (s), without its module
and the part before `<locals>.`, followed by the bytes that the hook gives for the class (X), if any.

    N None, . Ellipsis   empty
    b bool               one byte, 0 or 1
    i int                two's complement, little-endian, (bits + 8) // 8 bytes
    f float, c complex   IEEE 754 binary64, little-endian, bits as they are; real, imaginary
    s str, y bytes       UTF-8 (lone surrogates as three bytes); the bytes
    t tuple, l list, z torch.Size     the items
    e set, F frozenset   the items' encodings, sorted
    d dict               key + value for each item, in order
    r range, : slice     start + stop + step
    E enum member        type + name (None if it has none) + value + its other attributes (dict), if it
                         has any
    D dataclass          type + name + value for each field + its other attributes (dict), if it
                         has any; cached properties do not count
    n named tuple        type + name + value for each field
    a Namespace          type + its dict (argparse.Namespace, types.SimpleNamespace)
    u another subclass of int, float, complex, str, bytes, tuple, list, set, frozenset or dict
                         type + the value as the builtin (OrderedDict: list of (key, value), in
                         order) + its attributes (dict), if it has any
    T value named by text  kind (s) + text (s): torch dtypes, devices, layouts, memory formats
                         (str), paths (POSIX), Decimal, Fraction, dates, naive times, durations
                         (repr)
    X anything else      the bytes that the hook gave
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import struct
import types
from collections.abc import Callable, Iterable

import torch

Hook = Callable[[object], "bytes | None"]

MAX_DEPTH = 100

_LENGTH = struct.Struct("<Q")
_DOUBLE = struct.Struct("<d")
_COMPLEX = struct.Struct("<dd")
_SCALARS = (str, bool, int, float, type(None), bytes, complex)
_SCALAR_TYPES = frozenset(_SCALARS)
_CONTAINERS = (tuple, list, dict, set, frozenset)
_TORCH_NAMES = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_NAMESPACES = (argparse.Namespace, types.SimpleNamespace)
_REPR_TYPES = frozenset(
    (
        decimal.Decimal,
        fractions.Fraction,
        datetime.date,
        datetime.datetime,
        datetime.time,
        datetime.timedelta,
    )
)


class Unencodable(TypeError):
    """A value has no encoding that is the same in every process; `path` says where the value stands."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.name = "value"
        self.path = ""

    def __str__(self) -> str:
        return (
            f"{self.name}{self.path} {self.reason}; use numbers, strings, torch dtypes and "
            "devices, or tuples, lists, sets, dicts and dataclasses of them"
        )


def encode(value: object, other: Hook | None = None, *, name: str = "value") -> bytes:
    """Encodes a value.

    Args:
        value: the value.
        other: is called with each value that is not plain, and gives its bytes or None. It is also called with the
            class of each enum member, dataclass, named tuple and subclass of a builtin: its bytes follow the name.
            Its attribute `earlier`, if there is one, gives what dicts and lists held before a forward changed them.
        name: what an error calls the value.

    Raises:
        Unencodable: a value in it is not plain, and `other` gives None for it.
    """
    if type(value) in _SCALAR_TYPES:
        return _scalar(value)
    try:
        return _encode(value, other, 0)
    except Unencodable as error:
        error.name = name
        raise


def is_builtin(value: object) -> bool:
    """Whether `value` is immutable all the way down and of no class whose code could count."""
    kind = type(value)
    if kind in _SCALAR_TYPES or value is ... or isinstance(value, _TORCH_NAMES) or kind in (range, torch.Size):
        return True
    return kind in (tuple, frozenset) and all(map(is_builtin, value))  # type: ignore[call-overload]


def is_plain(value: object) -> bool:
    """Whether `value` is immutable all the way down and can be encoded without a hook."""
    if type(value) in _SCALAR_TYPES or value is ... or isinstance(value, (*_TORCH_NAMES, range)):
        return True
    if isinstance(value, enum.Enum):
        return is_plain(value.value)
    if _is_dataclass(value):
        items = [item for _, item in _fields(value)] + list(_other_attributes(value).values())
        frozen: bool = type(value).__dataclass_params__.frozen  # type: ignore[attr-defined]
        return frozen and all(map(is_plain, items))
    if not isinstance(value, (tuple, frozenset, *_SCALARS)) or getattr(value, "__dict__", None):
        return False
    return isinstance(value, _SCALARS) or all(map(is_plain, value))


def type_name(cls: type) -> str:
    """The class's name, nested classes with their owner's, the same wherever it was defined."""
    return cls.__qualname__.rpartition("<locals>.")[2]


def _frame(tag: bytes, payload: bytes) -> bytes:
    return tag + _LENGTH.pack(len(payload)) + payload


def _scalar(value: object) -> bytes:
    # The methods of the builtins: a subclass may have overridden any of them.
    if isinstance(value, str):
        return _frame(b"s", str.encode(value, "utf-8", "surrogatepass"))
    if isinstance(value, bool):
        return _frame(b"b", b"\1" if value else b"\0")
    if isinstance(value, int):
        size = (int.bit_length(value) + 8) // 8
        return _frame(b"i", int.to_bytes(value, size, "little", signed=True))
    if isinstance(value, float):
        return _frame(b"f", _DOUBLE.pack(value))
    if isinstance(value, bytes):
        return _frame(b"y", bytes.__getitem__(value, slice(None)))
    if isinstance(value, complex):
        return _frame(b"c", _COMPLEX.pack(value.real, value.imag))
    return _frame(b"N", b"")


def _encode(value: object, other: Hook | None, depth: int) -> bytes:
    kind = type(value)
    if kind in _SCALAR_TYPES:
        return _scalar(value)
    if depth > MAX_DEPTH:
        raise Unencodable(f"contains itself, or is nested deeper than {MAX_DEPTH} levels")
    if kind in _CONTAINERS:
        return _container(value, other, depth)
    encoding = _named(value, other, depth) or _unnamed(value, other, depth)
    if encoding is not None:
        return encoding
    given = other(value) if other is not None else None
    if given is None:
        raise Unencodable(f"is of type {type_name(kind)}, which has no stable encoding")
    return _frame(b"X", given)


def _each(items: Iterable[tuple[str, object]], other: Hook | None, depth: int) -> list[bytes]:
    """The encodings of `items`, which are (path, value)."""
    encodings = []
    for path, item in items:
        try:
            encodings.append(_encode(item, other, depth + 1))
        except Unencodable as error:
            error.path = path + error.path
            raise
    return encodings


def _container(value: object, other: Hook | None, depth: int) -> bytes:
    earlier = getattr(other, "earlier", None)
    value = earlier.contents(value) if earlier else value
    if isinstance(value, dict):
        pairs = dict.items(value)
        keys = _each(((".keys()", key) for key, _ in pairs), other, depth)
        values = _each(((f"[{_short(key)}]", item) for key, item in pairs), other, depth)
        return _frame(b"d", b"".join(key + item for key, item in zip(keys, values, strict=True)))
    if isinstance(value, (set, frozenset)):
        tag = b"F" if isinstance(value, frozenset) else b"e"
        return _frame(tag, b"".join(sorted(_each((("{}", item) for item in value), other, depth))))
    assert isinstance(value, (tuple, list))
    tag = b"t" if isinstance(value, tuple) else b"l"
    items = ((f"[{index}]", item) for index, item in enumerate(value))
    return _frame(tag, b"".join(_each(items, other, depth)))


def _short(key: object) -> str:
    return repr(key) if isinstance(key, (str, int)) else f"<{type_name(type(key))}>"


def _type(cls: type, other: Hook | None) -> bytes:
    given = other(cls) if other is not None else None
    return _scalar(type_name(cls)) + (b"" if given is None else _frame(b"X", given))


def _is_dataclass(value: object) -> bool:
    holder = isinstance(value, (type, torch.nn.Module, torch.Tensor))  # more than their fields
    return dataclasses.is_dataclass(value) and not holder


def _other_attributes(value: object) -> dict[str, object]:
    """The attributes of a dataclass that are neither fields nor cached properties."""
    fields = {name for name, _ in _fields(value)}
    return {
        name: item
        for name, item in getattr(value, "__dict__", {}).items()
        if name not in fields and not isinstance(getattr(type(value), name, None), functools.cached_property)
    }


def _fields(value: object) -> list[tuple[str, object]]:
    """Name and value of the fields of a dataclass or named tuple, in order."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    else:
        names = list(getattr(value, "_fields"))  # noqa: B009
    return [(name, getattr(value, name)) for name in names if hasattr(value, name)]


def _named(value: object, other: Hook | None, depth: int) -> bytes | None:
    """Encodes values with the name of their class; None for other values."""
    kind = type(value)
    if isinstance(value, enum.Enum):
        name = value.name if value.name in type(value).__members__ else None
        body = _each([("", name), (".value", value.value)], other, depth)
        extra = {key: item for key, item in vars(value).items() if not (key.startswith("_") and key.endswith("_"))}
        body += [_container(extra, other, depth)] if extra else []
        return _frame(b"E", _type(kind, other) + b"".join(body))
    dataclass = _is_dataclass(value)
    if dataclass or (isinstance(value, tuple) and hasattr(value, "_fields")):
        fields = _fields(value)
        values = _each(((f".{name}", item) for name, item in fields), other, depth)
        body = [_scalar(name) + item for (name, _), item in zip(fields, values, strict=True)]
        more = _other_attributes(value) if dataclass else None
        body += [_container(more, other, depth)] if more else []
        return _frame(b"D" if dataclass else b"n", _type(kind, other) + b"".join(body))
    if kind in _NAMESPACES:
        return _frame(b"a", _type(kind, other) + _container(vars(value), other, depth))
    builtin = isinstance(value, (*_SCALARS, *_CONTAINERS)) and kind is not torch.Size
    # A defaultdict also computes values for keys that it does not hold.
    if builtin and not isinstance(value, collections.defaultdict):
        return _frame(b"u", _type(kind, other) + _subclass(value, other, depth))
    return None


def _subclass(value: object, other: Hook | None, depth: int) -> bytes:
    if isinstance(value, collections.OrderedDict):
        body = _container(list(value.items()), other, depth)
    elif isinstance(value, _SCALARS):
        body = _scalar(value)
    else:
        body = _container(value, other, depth)
    attributes = getattr(value, "__dict__", None)
    return body + (_container(attributes, other, depth) if attributes else b"")


def _unnamed(value: object, other: Hook | None, depth: int) -> bytes | None:
    """Encodes values whose class is the same everywhere; None for other values."""
    if value is ...:
        return _frame(b".", b"")
    if type(value) is torch.Size:
        return _frame(b"z", b"".join(_each((("[]", item) for item in value), other, depth)))
    if isinstance(value, (range, slice)):
        ends = [(".start", value.start), (".stop", value.stop), (".step", value.step)]
        tag = b"r" if isinstance(value, range) else b":"
        return _frame(tag, b"".join(_each(ends, other, depth)))
    text = _text(value)
    return None if text is None else _frame(b"T", _scalar(text[0]) + _scalar(text[1]))


def _text(value: object) -> tuple[str, str] | None:
    if isinstance(value, _TORCH_NAMES):
        return type_name(type(value)), str(value)
    if isinstance(value, pathlib.PurePath):
        return "path", value.as_posix()
    # A time zone may be anything, its repr an address.
    if type(value) in _REPR_TYPES and getattr(value, "tzinfo", None) is None:
        return type_name(type(value)), repr(value)
    return None
