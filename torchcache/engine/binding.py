"""Arguments → call: binds them to the signature, finds the batch, and describes what is not a row.

A signature is resolved once for each way of passing arguments (how many by position, which by
name) and replayed after that.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from torchcache.engine.call import Call, CallTemplate, holds_tensor
from torchcache.identity.code import class_code
from torchcache.identity.encoding import encode, is_plain

# Equal values of these types are described alike. Floats are not: 0.0 == -0.0.
_EXACT = frozenset({int, str, bool, type(None)})
_MAX_TEMPLATES = 1024  # remembered: a number that counts calls must not pile them up
_MAX_STRING = 256  # characters of an argument that is remembered
_EMPTY = inspect.Parameter.empty
_VAR_POSITIONAL = inspect.Parameter.VAR_POSITIONAL
_NO_TENSORS = (
    "No tensor inputs found in the call: torchcache needs at least one tensor [B, ...] whose rows it can cache"
)


class UnsupportedArgument(ValueError):
    """An argument that can be no part of a key, though the forward may take it; the message says what to change."""


# Name of the parameter; position, keyword or nothing (_EMPTY) that it gets; its encoded default where it gets nothing.
_Step = tuple[str, Any, Any]


class Binder:
    """Binds calls of one function; with `takes_self` its first parameter is not an argument."""

    def __init__(self, function: Callable[..., Any], takes_self: bool) -> None:
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # compiled code does not tell
            parameters = list(inspect.signature(lambda *args, **kwargs: None).parameters.values())
        leave_out = takes_self and bool(parameters) and parameters[0].kind is not _VAR_POSITIONAL
        self._parameters = parameters[1:] if leave_out else parameters
        # A wrapper shows the signature of what it wraps, but only itself knows what it does without an argument.
        self._is_wrapper = hasattr(function, "__wrapped__")
        self._plans: dict[tuple[int, tuple[str, ...]], list[_Step] | None] = {}
        self._templates: dict[tuple[Any, ...], CallTemplate] = {}

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The call, or None where it has no keys.

        That is where the arguments do not fit the signature (the function itself says it best), and where one is of a
        tensor subclass or a nested tensor: those have no rows of plain bytes.

        Raises:
            ValueError: no argument has rows: there are no tensors, or none with a batch dimension.
            UnsupportedArgument: tensors differ in the batch size, or arguments are neither tensors nor immutable.
        """
        tensors: list[Tensor] = []
        passed: list[Any] = [len(args), *kwargs]
        for value in (*args, *kwargs.values()) if kwargs else args:
            kind = type(value)
            if kind is Tensor and not value.is_nested:
                tensors.append(value)
                passed += (value.dtype, value.shape)
            elif kind in _EXACT and (kind is not str or len(value) <= _MAX_STRING):
                passed += (kind, value)
            else:  # recognizing it takes longer than describing it
                return self._bind_new(args, kwargs)
        key = tuple(passed)
        template = self._templates.get(key)
        if template is None:
            call = self._bind_new(args, kwargs)
            if call is not None:
                if len(self._templates) >= _MAX_TEMPLATES:
                    self._templates.clear()
                call.template.order = self._order(args, kwargs)
                self._templates[key] = call.template
            return call
        if template.order is not None:
            tensors = [tensors[i] for i in template.order]
        return Call(args, kwargs, tensors, template)

    def _bind_new(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        pattern = (len(args), tuple(kwargs))
        if pattern not in self._plans:
            self._plans[pattern] = self._plan(*pattern)
        plan = self._plans[pattern]
        if plan is None:
            return None
        arguments = _Arguments()
        for name, source, default in plan:
            if source is _EMPTY:
                arguments.describe(name, default)
            else:
                arguments.add(name, args[source] if type(source) is int else kwargs[source])
        return None if arguments.have_foreign else Call(args, kwargs, arguments.tensors, arguments.template())

    def _order(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int] | None:
        """Where the tensors of the plan stand among those that are passed; None if they are in that order."""
        sources = [source for _, source, _ in self._plans[len(args), tuple(kwargs)] or ()]
        passed = [source for source, value in (*enumerate(args), *kwargs.items()) if type(value) is Tensor]
        order = [passed.index(source) for source in sources if source in passed]
        return None if order == sorted(order) else order

    def _plan(self, count: int, names: tuple[str, ...]) -> list[_Step] | None:
        """A step for each parameter in signature order; None if such arguments do not fit the signature."""
        plan = _Plan(count, names, self._is_wrapper)
        if not all(map(plan.add, self._parameters)) or plan.is_incomplete:
            return None
        return plan.steps


class _Plan:
    """Gives each parameter what it gets of `count` arguments by position and some by name."""

    def __init__(self, count: int, names: tuple[str, ...], is_wrapper: bool) -> None:
        self.steps: list[_Step] = []
        self._positions = deque(range(count))
        self._names = list(names)
        self._is_wrapper = is_wrapper

    @property
    def is_incomplete(self) -> bool:
        """Whether arguments are left that no parameter gets."""
        return bool(self._positions or self._names)

    def add(self, parameter: inspect.Parameter) -> bool:
        """False if the parameter gets nothing and has no default."""
        name = parameter.name
        if parameter.kind is _VAR_POSITIONAL:
            self.steps += [(f"*{name}[{k}]", i, None) for k, i in enumerate(self._positions)]
            self._positions.clear()
        elif parameter.kind is parameter.VAR_KEYWORD:
            self.steps += [(f"**{keyword}", keyword, None) for keyword in self._names]
            self._names.clear()
        elif (source := self._source(parameter)) is not _EMPTY:
            self.steps.append((name, source, None))
        elif parameter.default is not _EMPTY:
            omitted = encode((name, "omitted")) if self._is_wrapper else _default(name, parameter.default)
            self.steps.append((name, _EMPTY, omitted))
        else:
            return False
        return True

    def _source(self, parameter: inspect.Parameter) -> Any:
        if parameter.kind is not parameter.KEYWORD_ONLY and self._positions:
            return self._positions.popleft()
        if parameter.kind is not parameter.POSITIONAL_ONLY and parameter.name in self._names:
            self._names.remove(parameter.name)
            return parameter.name
        return _EMPTY


def _default(name: str, value: Any) -> bytes:
    """A default belongs to the code; one that cannot be encoded counts as part of that alone."""
    arguments = _Arguments()
    arguments.add(name, value)
    return encode(name) + b"d" if arguments.wrong else b"".join(arguments.parts)


class _Arguments:
    """The tensors among the arguments of one call, and the description of everything else."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.names: list[str] = []
        self.parts: list[bytes] = []
        self.constants: list[Any] = []  # that hold several values
        self.wrong: tuple[str, Any] | None = None
        self.have_foreign = False  # a tensor without bytes of its own: of a subclass, nested, or a proxy that is traced

    def add_tensor(self, name: str, value: Tensor) -> None:
        if type(value) not in (Tensor, Parameter) or value.is_nested:
            self.have_foreign = True
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
            if isinstance(value, (tuple, range)):
                self.constants.append(value)
            self.describe(name, encode(name) + encode(value, class_code))
        elif isinstance(value, Mapping) and holds_tensor(value):
            self.describe_container(name, value, "mapping")
            for key in value:
                self.describe(name, encode(key) if is_plain(key) else encode(str(key)))
                self.add(f"{name}[{key!r}]", value[key])
        elif isinstance(value, (tuple, list)) and holds_tensor(value):
            self.describe_container(name, value, "sequence")
            for i, item in enumerate(value):
                self.add(f"{name}[{i}]", item)
        elif type(value).__module__ == "torch.fx.proxy":
            self.have_foreign = True
        elif self.wrong is None:
            self.wrong = (name, value)

    def describe_container(self, name: str, value: Any, kind: str) -> None:
        """Describes a container of tensors without them; one of the user's with its code and other attributes."""
        cls = type(value)
        code = class_code(cls)
        self.describe(name, encode((name, kind, cls.__name__, len(value))) + (code or b""))
        held = [*(value.values() if isinstance(value, Mapping) else value)]
        for attribute, item in sorted(getattr(value, "__dict__", {}).items() if code else ()):
            items = item.values() if isinstance(item, Mapping) else [item]
            if not all(any(one is other for other in held) for one in items):  # what holds them, or shows one of them
                self.add(f"{name}.{attribute}", item)

    def template(self) -> CallTemplate:
        self._check()
        batch = self.tensors[0].shape[0]
        return CallTemplate(batch, self.names, self.parts, _positions(self.constants, batch, self.tensors[0].device))

    def _check(self) -> None:
        if not self.tensors:
            raise ValueError(_NO_TENSORS)
        sizes = {t.shape[:1] for t in self.tensors}
        shapes = ", ".join(str(tuple(t.shape)) for t in self.tensors)
        different = f"All inputs must have the same batch dimension (dimension 0), got tensors of shapes {shapes}"
        if sizes == {()}:
            raise ValueError(different)
        if self.wrong is not None:
            name, value = self.wrong
            raise UnsupportedArgument(
                "All non-Tensor extra args to the call must be an immutable type (None, bool, int, float, complex, "
                f"str, bytes, torch.dtype, torch.device, or tuples of these), got {type(value).__name__} for {name!r}"
            )
        if len(sizes) != 1:
            raise UnsupportedArgument(f"{different}; expand those that all rows share")


def _positions(constants: list[Any], batch: int, device: torch.device) -> Tensor | None:
    """int64 ``[B, N]``: for each of N tuples of B plain values, where the value of a row stands first in it.

    Nobody can tell whether such a tuple holds a value for each row or one for all of them, such as the height and width
    of two images. So keys cover the whole tuple and the value at the place of the row. None: there is no such tuple.
    """
    if batch < 2:
        return None
    columns = []
    for values in (values for constant in constants for values in _tuples(constant, batch)):
        encoded = [encode(value) for value in values]
        columns.append([encoded.index(value) for value in encoded])
    return torch.tensor(columns, device=device).T.contiguous() if columns else None


def _tuples(value: Any, length: int) -> Iterator[tuple[Any, ...] | range]:
    """The tuples of a length in a plain value, at any depth."""
    if isinstance(value, (tuple, range)):
        if len(value) == length:
            yield value
        for item in value:
            yield from _tuples(item, length)


_TensorKey = tuple[str, torch.dtype, torch.Size]  # name, dtype, shape of a row
_tensor_parts: dict[_TensorKey, bytes] = {}


def _tensor_part(key: _TensorKey) -> bytes:
    if len(_tensor_parts) > 10_000:
        _tensor_parts.clear()
    name, dtype, shape = key
    return _tensor_parts.setdefault(key, encode((name, "tensor", dtype, tuple(shape))))
