"""One call: binds the arguments, finds the batch, and describes what is not a row.

A signature is resolved once for each way of passing arguments (how many by position, which by
name) and replayed after that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from torchcache.identity.encoding import encode, is_plain
from torchcache.tiers.layout import select

# Equal values of these are described alike. Floats are not: 0.0 == -0.0.
_EXACT = frozenset({int, str, bool, type(None)})
_MOST_FORMS = 1024  # remembered: a number that counts calls must not pile them up
_LONGEST_TEXT = 256  # characters of an argument that is remembered
_EMPTY = inspect.Parameter.empty
_VAR_POSITIONAL = inspect.Parameter.VAR_POSITIONAL
_NO_TENSORS = (
    "No tensor inputs found in the call: torchcache needs at least one tensor [B, ...] whose rows it can cache"
)


class Form:
    """What calls have in common that differ in nothing but the elements of their tensors."""

    __slots__ = ("batch", "description", "names", "order", "parts")

    def __init__(self, batch: int, names: list[str], parts: list[bytes]) -> None:
        self.batch = batch
        self.names = names  # of what the parts describe
        self.parts = parts
        self.description = b"".join(parts)  # of everything but the rows; see docs/format.md
        self.order: list[int] | None = None  # signature order of the tensors as they are passed; None: the same


class Call:
    """The bound arguments of one call."""

    __slots__ = ("args", "batch", "form", "kwargs", "tensors")

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], form: Form) -> None:
        self.args = args
        self.kwargs = kwargs
        self.tensors = tensors  # [B, …] each, in signature order
        self.form = form
        self.batch = form.batch

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def device_type(self) -> str:
        first = self.tensors[0]
        return "cpu" if first.is_cpu else first.device.type  # to name a device takes longer than to ask for one

    def take(self, rows: Tensor, copy: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with only these rows (int64, ascending, on the CPU) of every tensor.

        Args:
            copy: the function may edit its inputs: they must not be those of the caller.

        Raises:
            Indivisible: an argument holds tensors and cannot be made anew with others.
        """
        on_device: dict[torch.device, Tensor] = {}
        first, last = int(rows[0]), int(rows[-1])
        together = last - first + 1 == len(rows)  # then no copy is needed

        def pick(t: Tensor) -> Tensor:
            if together:
                part = t.narrow(0, first, len(rows))
                return part.clone() if copy else part
            if t.device not in on_device:
                on_device[t.device] = rows.to(t.device)
            return select(t, on_device[t.device])

        args = tuple(map_tensors(a, pick) for a in self.args)
        return args, {name: map_tensors(a, pick) for name, a in self.kwargs.items()}

    def versions(self) -> list[int] | None:
        """What changes when the tensors are edited; None where that is not counted."""
        return None if any(t.is_inference() for t in self.tensors) else [t._version for t in self.tensors]


class Indivisible(Exception):
    """An argument of which no copy with fewer rows can be made."""


class Binder:
    """Binds calls of one function; with `takes_self` its first parameter is not an argument."""

    def __init__(self, function: Callable[..., Any], takes_self: bool) -> None:
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # of compiled code nothing is known
            parameters = list(inspect.signature(lambda *args, **kwargs: None).parameters.values())
        leave_out = takes_self and bool(parameters) and parameters[0].kind is not _VAR_POSITIONAL
        self._parameters = parameters[1:] if leave_out else parameters
        # A wrapper shows the signature of what it wraps, but what it does without an argument is its own affair.
        self._wrapped = hasattr(function, "__wrapped__")
        self._plans: dict[tuple[int, tuple[str, ...]], list[tuple[str, Any, Any]] | None] = {}
        self._forms: dict[tuple[Any, ...], Form] = {}

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The call, or None where it has no keys.

        That is where the arguments do not fit the signature (the function itself says it best), and where one is of a
        tensor subclass or a nested tensor: those have no rows of plain bytes.

        Raises ValueError for calls without tensors, with different batch sizes, or with arguments
        that are neither tensors nor immutable.
        """
        tensors: list[Tensor] = []
        passed: list[Any] = [len(args), *kwargs]
        for value in (*args, *kwargs.values()) if kwargs else args:
            kind = type(value)
            if kind is Tensor and not value.is_nested:
                tensors.append(value)
                passed += (value.dtype, value.shape)
            elif kind in _EXACT and (kind is not str or len(value) <= _LONGEST_TEXT):
                passed += (kind, value)
            else:  # what takes longer to recognize than to describe
                return self._bind_anew(args, kwargs)
        key = tuple(passed)
        form = self._forms.get(key)
        if form is None:
            call = self._bind_anew(args, kwargs)
            if call is not None:
                if len(self._forms) >= _MOST_FORMS:
                    self._forms.clear()
                call.form.order = self._order(args, kwargs)
                self._forms[key] = call.form
            return call
        if form.order is not None:
            tensors = [tensors[i] for i in form.order]
        return Call(args, kwargs, tensors, form)

    def _bind_anew(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        pattern = (len(args), tuple(kwargs))
        if pattern not in self._plans:
            self._plans[pattern] = self._plan(*pattern)
        plan = self._plans[pattern]
        if plan is None:
            return None
        found = _Found()
        for name, source, default in plan:
            if source is _EMPTY:
                found.describe(name, default)
                continue
            value = args[source] if type(source) is int else kwargs[source]
            found.add(name, value)
        return None if found.foreign else Call(args, kwargs, found.tensors, found.form())

    def _order(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int] | None:
        """Where the tensors of the plan stand among those that are passed; None if they are in that order."""
        sources = [source for _, source, _ in self._plans[len(args), tuple(kwargs)] or ()]
        passed = [source for source, value in (*enumerate(args), *kwargs.items()) if type(value) is Tensor]
        order = [passed.index(source) for source in sources if source in passed]
        return None if order == sorted(order) else order

    def _plan(self, count: int, names: tuple[str, ...]) -> list[tuple[str, Any, Any]] | None:
        """(name, position or keyword or nothing, encoded default) for each parameter in signature order."""
        plan: list[tuple[str, Any, Any]] = []
        left = set(names)
        positions = iter(range(count))
        for p in self._parameters:
            if p.kind is _VAR_POSITIONAL:
                plan += [(f"*{p.name}[{k}]", i, None) for k, i in enumerate(positions)]
            elif p.kind is p.VAR_KEYWORD:
                plan += [(f"**{name}", name, None) for name in names if name in left]
                left.clear()
            elif p.kind is not p.KEYWORD_ONLY and (i := next(positions, None)) is not None:
                plan.append((p.name, i, None))
            elif p.kind is not p.POSITIONAL_ONLY and p.name in left:
                left.remove(p.name)
                plan.append((p.name, p.name, None))
            elif p.default is not _EMPTY:
                omitted = encode((p.name, "omitted")) if self._wrapped else _default(p.name, p.default)
                plan.append((p.name, _EMPTY, omitted))
            else:
                return None
        return None if left or next(positions, None) is not None else plan


def _default(name: str, value: Any) -> bytes:
    """A default is fixed with the code; one that cannot be encoded is the code's affair alone."""
    found = _Found()
    found.add(name, value)
    return encode(name) + b"d" if found.wrong else b"".join(found.parts)


class _Found:
    """What the arguments of one call turn out to be."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.names: list[str] = []
        self.parts: list[bytes] = []
        self.wrong: tuple[str, Any] | None = None
        self.foreign = False  # a tensor is not one whose bytes say what it is, or only stands for one that is traced

    def add_tensor(self, name: str, value: Tensor) -> None:
        if type(value) not in (Tensor, Parameter) or value.is_nested:
            self.foreign = True
            return
        self.tensors.append(value)
        self.names.append(name)
        key = (name, value.dtype, value.shape[1:])
        self.parts.append(_tensor_parts.get(key) or _tensor_part(key))

    def describe(self, name: str, part: bytes) -> None:
        self.names.append(name)
        self.parts.append(part)

    def add(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self.add_tensor(name, value)
        elif is_plain(value):
            self.describe(name, encode(name) + encode(value))
        elif isinstance(value, Mapping) and _holds_tensor(value):
            self.describe(name, encode((name, "mapping", type(value).__name__, len(value))))
            for key in value:
                self.describe(name, encode(key) if is_plain(key) else encode(str(key)))
                self.add(f"{name}[{key!r}]", value[key])
        elif isinstance(value, (tuple, list)) and _holds_tensor(value):
            self.describe(name, encode((name, "sequence", type(value).__name__, len(value))))
            for i, item in enumerate(value):
                self.add(f"{name}[{i}]", item)
        elif type(value).__module__ == "torch.fx.proxy":
            self.foreign = True
        elif self.wrong is None:
            self.wrong = (name, value)

    def form(self) -> Form:
        if not self.tensors:
            raise ValueError(_NO_TENSORS)
        if self.wrong is not None:
            name, value = self.wrong
            raise ValueError(
                "All non-Tensor extra args to the call must be an immutable type (None, bool, int, float, complex, "
                f"str, bytes, torch.dtype, torch.device, or tuples of these), got {type(value).__name__} for {name!r}"
            )
        sizes = {t.shape[:1] for t in self.tensors}
        if len(sizes) != 1 or () in sizes:
            shapes = ", ".join(str(tuple(t.shape)) for t in self.tensors)
            raise ValueError(
                f"All inputs must have the same batch dimension (dimension 0), got tensors of shapes {shapes}"
            )
        return Form(self.tensors[0].shape[0], self.names, self.parts)


_TensorKey = tuple[str, torch.dtype, torch.Size]  # name, dtype, shape of a row
_tensor_parts: dict[_TensorKey, bytes] = {}


def _tensor_part(key: _TensorKey) -> bytes:
    if len(_tensor_parts) > 10_000:
        _tensor_parts.clear()
    name, dtype, shape = key
    return _tensor_parts.setdefault(key, encode((name, "tensor", dtype, tuple(shape))))


def _holds_tensor(value: Mapping[Any, Any] | Sequence[Any]) -> bool:
    items = value.values() if isinstance(value, Mapping) else value
    return any(isinstance(v, Tensor) or (isinstance(v, (Mapping, tuple, list)) and _holds_tensor(v)) for v in items)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The argument with every tensor in it replaced, containers copied, their types kept."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping) and _holds_tensor(value):
        return _map_mapping(value, function)
    if isinstance(value, (tuple, list)) and _holds_tensor(value):
        items = [map_tensors(v, function) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _map_mapping(value: Mapping[Any, Any], function: Callable[[Tensor], Tensor]) -> Any:
    mapped = {key: map_tensors(item, function) for key, item in value.items()}
    if type(value) is dict:
        return mapped
    if not isinstance(value, MutableMapping):
        raise Indivisible
    result = copy(value)
    before = dict(value)
    for key, item in mapped.items():
        result[key] = item
    if any(value[key] is not item for key, item in before.items()):  # a copy that shares what it holds
        for key, item in before.items():
            result[key] = item
        raise Indivisible
    return result
