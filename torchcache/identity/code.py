"""What code computes: functions, classes and modules as bytes that are the same in every process.

A function is the syntax tree of its source, without docstrings, comments and layout, where that
source compiles to the very code that runs (a file edited since its import does not), else its
bytecode; with its decorators, its defaults, and what it reaches by closure, global and imported
names, attributes of the user's modules one by one. A class is its functions, plain attributes and
bases. Installed distributions count by name and version (without a local part such as +cu130), the
standard library by name; what was installed from a directory counts as the user's own code. Names
of the user's modules and files are no part of it, nor is this library with its decorator.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from operator import itemgetter
from typing import Any

import torch

from torchcache._utils.logs import WarnOnce
from torchcache._utils.torch_private import UNKNOWN, CustomOpDef, parts_of_operator
from torchcache.identity import syntax
from torchcache.identity.attributes import FORWARD_HOOKS, counted, counts
from torchcache.identity.encoding import encode, is_plain, type_name
from torchcache.identity.objects import bound_object, definition, users_operators
from torchcache.identity.origin import (
    Origin,
    attributes_of,
    import_users,
    is_added,
    is_our_decorator,
    is_users,
    of_function,
    of_module,
    unwrap,
)
from torchcache.identity.patches import is_replaced
from torchcache.identity.slots import Earlier, Slots
from torchcache.identity.tensors import tensor_bytes
from torchcache.identity.torchscript import attributes_read, program
from torchcache.identity.values import (
    C_FUNCTIONS,
    CODE,
    PLACES,
    Fallback,
    Generators,
    Modules,
    Tensors,
    Values,
    left_out,
)

_DESCRIPTORS = (types.GetSetDescriptorType, types.MemberDescriptorType)
_ANNOTATIONS = ("__annotations__", "__annotate__", "__annotate_func__")
# What dataclasses and named tuples write from their fields.
_GENERATED = {*dir(object), "__getstate__", "__setstate__", "__replace__"}
_BYTECODE = (
    "%s has no source that compiles to what runs, so its bytecode names the cache: another version of Python "
    "will compute its rows again (further functions without source are named at level INFO)"
)


def describe(
    obj: object,
    *,
    tensors: Tensors,
    modules: Modules | None = None,
    generators: Generators | None = None,
    attributes: Callable[[torch.nn.Module], dict[str, Any]] = counted,
    fallback: Fallback | None = None,
    slots: Slots | None = None,
    earlier: Earlier | None = None,
) -> bytes:
    """Describes what a callable computes; of a module its classes, hooks and functions, without its state.

    Args:
        obj: a class, a module, a function or another callable.
        tensors: gives the bytes for a tensor that code reaches.
        modules: gives the bytes for a module that code reaches; without it such modules count with their state.
        generators: is called with each generator of random numbers that code reaches; these do not count.
        attributes: gives the attributes of a module that count.
        fallback: gives the bytes for what code reaches and what cannot be pickled; by default its type alone counts.
        slots: collects where everything was found.
        earlier: what containers held before a forward changed them.
    """
    describer = _Describer(tensors, modules)
    describer.fallback, describer.generators = fallback or (lambda value, location: left_out(value)), generators
    describer.slots, describer.earlier = slots or describer.slots, earlier or describer.earlier
    if not isinstance(obj, torch.nn.Module):
        return describer.finish(encode(obj, describer, name="the callable"))
    describer.attributes_of = attributes
    for name, module in tree(obj):
        describer.own_modules.setdefault(id(module), name)
    return describer.finish(encode(describer.module(obj, state=False)))


def describe_value(
    value: object,
    *,
    tensors: Tensors,
    modules: Modules | None = None,
    weights: Tensors | None = None,
    generators: Generators | None = None,
    fallback: Fallback | None = None,
    slots: Slots | None = None,
    earlier: Earlier | None = None,
    name: str = "value",
) -> bytes:
    """Describes any value that has a stable encoding; code as `describe` does, other objects as pickle would keep them.

    Args:
        value: the value.
        tensors: gives the bytes for a tensor.
        modules: gives the bytes for a module; without it modules count with their state.
        weights: gives the bytes for a tensor of a module, if not `tensors`.
        generators: is called with each generator of random numbers; these do not count.
        fallback: gives the bytes for what cannot be pickled, such as an open file.
        slots: collects where everything was found.
        earlier: what containers held before a forward changed them.
        name: what an error calls the value.

    Raises:
        Unencodable: the value holds something that cannot be pickled, and there is no `fallback`.
    """
    describer = _Describer(tensors, modules, weights)
    describer.fallback, describer.generators, describer.location = fallback, generators, name
    describer.slots, describer.earlier = slots or describer.slots, earlier or describer.earlier
    describer.slots.add_contents(value)
    return describer.finish(encode(value, describer, name=name))


def class_code(value: object) -> bytes | None:
    """Encodes a class of the user's by its code; None for a class of a library, whose name is enough, and other values.

    It is a hook of `encode`.
    """
    if not isinstance(value, type) or of_module(value.__module__) is not None:
        return None
    return _described_class(value)


@functools.lru_cache(maxsize=256)
def _described_class(cls: type) -> bytes:
    return describe(cls, tensors=tensor_bytes)


def tree(module: torch.nn.Module | None, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, object]]:
    """Yields path and module for every mention of a submodule, in order; it enters each submodule once."""
    seen = set() if seen is None else seen
    yield path, module
    if module is not None and id(module) not in seen:
        seen.add(id(module))
        for name, part in module._modules.items():
            yield from tree(part, f"{path}.{name}" if path else name, seen)


_without_source = WarnOnce()


def _log_bytecode(name: str) -> None:
    level = logging.INFO if _without_source.subjects else logging.WARNING
    _without_source.log(level, name, _BYTECODE, name)


class _Describer(Values):
    """Functions, classes and modules, each described once."""

    attributes_of: Callable[[torch.nn.Module], dict[str, Any]] = staticmethod(counted)

    def finish(self, root: bytes) -> bytes:
        # To describe an object may mention others: the list grows during the loop.
        return encode((root, [encode(self.record(obj)) for obj in self.objects]))

    def mention(self, value: object, location: str) -> object:
        value = definition(unwrap(value))
        if is_plain(value):
            return "value", encode(value, self)
        if isinstance(value, torch.Tensor):
            return "tensor", self.tensors(value)
        if id(value) in self.own_modules:
            return "submodule", self.own_modules[id(value)]
        if self.modules is not None and isinstance(value, torch.nn.Module):
            return "module", self.modules(value)
        if isinstance(value, CODE):
            return "see", self.number_of(value)
        if isinstance(value, types.ModuleType):
            origin = of_module(value.__name__)
            return ("see", self.number_of(value)) if origin is None else ("module", origin, value.__name__)
        constant = self.constant(value, location) if location else None
        if constant is not None:
            return "constant", constant
        return "instance", self.number_of(type(value)), self.mention(attributes_of(value).get("__wrapped__"), location)

    def record(self, obj: object) -> object:
        """Describes an object that was mentioned."""
        if id(obj) in self.contents:
            return "object", self.encoded_contents(obj)
        if isinstance(obj, types.FunctionType):
            return self.function(obj)
        if isinstance(obj, type):
            return self.class_(obj)
        if isinstance(obj, torch.nn.Module):
            return self.module(obj, state=True)
        if isinstance(obj, types.ModuleType):
            return self.whole_module(obj)
        if isinstance(obj, torch.jit.ScriptFunction):
            return "script", program(obj)
        if isinstance(obj, CustomOpDef):
            return self.operator(obj)
        if isinstance(obj, C_FUNCTIONS):
            return self.c_function(obj)
        return type_name(type(obj)), self.wrapper(obj)

    def whole_module(self, module: types.ModuleType) -> object:
        """Describes a module of the user's that code uses as a whole, by what it defines or imports."""
        kinds = (types.ModuleType, torch.Tensor, tuple, frozenset, *PLACES, *CODE)
        return "module", [
            (name, self.mention(item, f"{name}, in a module that code uses as a whole"))
            for name, item in sorted(vars(module).items())
            if not name.startswith("__") and (isinstance(item, kinds) or is_plain(item))
        ]

    def wrapper(self, obj: object) -> object:
        """Describes what a bound method, a partial or a descriptor holds."""
        location = f"an argument of {type_name(type(obj))}"
        if isinstance(obj, (functools.partial, functools.partialmethod)):
            values = [self.mention(item, location) for item in (obj.func, *obj.args)]
            return values, [(name, self.mention(item, location)) for name, item in obj.keywords.items()]
        parts = ("__func__", "__self__", "fget", "fset", "fdel", "func", "dispatcher")
        return [self.mention(getattr(obj, part), location) for part in parts if hasattr(obj, part)]

    def operator(self, definition: object) -> object:
        """Describes an operator that Python code defines, with its kernels for single devices."""
        op = parts_of_operator(definition)
        if op is None:
            return "operator", UNKNOWN
        kernels = [(str(device), self.mention(kernel, "")) for device, kernel in op.kernels.items()]
        return "operator", op.qualified_name, self.mention(op.function, ""), sorted(kernels, key=itemgetter(0))

    def c_function(self, function: object) -> object:
        name = str(getattr(function, "__qualname__"))  # noqa: B009
        bound = bound_object(function)
        if bound is not None:
            return "C method", name, self.mention(bound, f"the object of the method {name}")
        home = getattr(function, "__self__", None) or getattr(function, "__objclass__", None)
        module = home.__module__ if isinstance(home, type) else getattr(function, "__module__", "")
        return "C function", of_module(module), name

    # Functions

    def function(self, function: types.FunctionType) -> object:
        cells = self.closure(function)
        origin = of_function(function)
        if origin is not None:
            return self.library_function(function, origin, cells)
        self.slots.add_function(function)
        location = f"of the function {function.__qualname__}"
        defaults = [self.mention(item, f"a default {location}") for item in function.__defaults__ or ()]
        keywords = {
            name: self.mention(item, f"the default of {name} {location}")
            for name, item in sorted((function.__kwdefaults__ or {}).items())
        }
        attributes = [
            (name, self.mention(item, f"the attribute {name} {location}"))
            for name, item in sorted(vars(function).items())
            if not name.startswith("_") and counts(name)
        ]
        return "function", self.code(function), defaults, keywords, self.reached(function, cells), attributes

    def library_function(self, function: types.FunctionType, origin: Origin, cells: dict[str, object]) -> object:
        """Describes a function of a library by its name, and by what its closure holds or singledispatch registered."""
        wraps = hasattr(function, "__wrapped__")  # then the name is the wrapped function's
        name = function.__code__.co_name if wraps else function.__qualname__
        inside = {key: self.mention(value, "") for key, value in sorted(cells.items())}
        if isinstance(registry := vars(function).get("registry"), types.MappingProxyType):
            inside["cases"] = [(self.mention(kind, ""), self.mention(case, "")) for kind, case in registry.items()]
        return "library function", origin, str(function.__globals__.get("__name__")), name, inside

    def code(self, function: types.FunctionType) -> object:
        source = syntax.source_of(function)
        if source is None:
            # Several lambdas on one line have a source, only nothing tells them apart.
            if function.__name__ != "<lambda>" or not syntax.text_of(function):
                _log_bytecode(function.__qualname__)
            return "bytecode", syntax.bytecode(function.__code__)
        scope = function.__globals__
        return "source", source.form, [form for node, form in source.decorators if not is_our_decorator(node, scope)]

    def closure(self, function: types.FunctionType) -> dict[str, object]:
        cells = {}
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            self.slots.add_cell(cell, name, value)
            cells[name] = self.earlier.item(cell, name, value)
        return cells

    def reached(self, function: types.FunctionType, cells: dict[str, object]) -> object:
        """Describes what the function's names stand for outside of it."""
        values: dict[str, object] = {}
        for chain in syntax.reached(function.__code__):
            if chain[0] in cells:
                self.follow(cells[chain[0]], chain, values)
            elif chain[0] in function.__globals__:
                self.follow(self.item_of(function.__globals__, chain[0]), chain, values)
        names = syntax.attribute_names(function.__code__)
        if "__subclasses__" in names:
            classes = [value for value in values.values() if isinstance(value, type)]
            values.update({f"subclass {type_name(c)}": c for base in classes for c in _subclasses(base)})
        package = function.__globals__.get("__package__")
        for name in syntax.imported(function.__code__, package):
            self.search(import_users(name), name, names, values)
        values.update({f"operator {op.qualified_name}": op.definition for op in users_operators(names)})
        location = f"that {function.__qualname__} reads"
        return [(name, self.mention(values[name], f"{name}, {location}")) for name in sorted(values)]

    def item_of(self, attributes: dict[str, Any], name: str) -> object:
        """What a name stands for in a module, or stood for before a forward changed it."""
        value = attributes[name]
        self.slots.add(attributes, name, value)
        return self.earlier.item(attributes, name, value)

    def follow(self, value: object, chain: tuple[str, ...], values: dict[str, object]) -> None:
        """Follows attributes of modules as far as they are modules, and of a function the first one.

        What code reads in a library's module counts by the library, unless somebody put something else there.
        """
        depth = 1
        while isinstance(value, types.ModuleType) and depth < len(chain) and chain[depth] in vars(value):
            part = self.item_of(vars(value), chain[depth])
            if of_module(value.__name__) is not None and not is_replaced(value, chain[depth], part):
                break
            value = part
            depth += 1
        values[".".join(chain[:depth])] = value
        if isinstance(value, types.FunctionType) and chain[depth : depth + 1] and chain[depth] in vars(value):
            values[".".join(chain[: depth + 1])] = vars(value)[chain[depth]]

    def search(self, value: object, name: str, names: Collection[str], values: dict[str, object]) -> None:
        """Adds all that the function may mean of a module that it imports itself."""
        if name in values:
            return
        used = set(names) & set(vars(value)) if isinstance(value, types.ModuleType) else set()
        if not used or of_module(getattr(value, "__name__")) is not None:  # noqa: B009
            values[name] = value
            return
        values[name] = None
        for attribute in used:
            # Modules may import each other.
            if not isinstance(vars(value)[attribute], types.ModuleType) or name.count(".") < 20:
                self.search(vars(value)[attribute], f"{name}.{attribute}", names, values)

    # Classes

    def class_(self, cls: type) -> object:
        origin = of_module(cls.__module__)
        bases = [self.number_of(base) for base in cls.__bases__ if base is not object]
        members = sorted(vars(cls).items())
        if origin is not None:
            patched = [item for item in members if is_users(item[1])]
            home = f"{cls.__module__}.{type_name(cls)}"
            return "library class", origin, home, bases, self.members(cls, patched)
        maker = None if type(cls) is type else self.number_of(type(cls))
        fields = [
            (field.name, self.mention(field.default_factory, ""))
            for field in (dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ())
        ]
        return "class", type_name(cls), maker, bases, self.members(cls, members), fields

    def members(self, cls: type, members: Iterable[tuple[str, object]]) -> object:
        location = f"an attribute of the class {type_name(cls)}"
        if issubclass(cls, enum.Enum):
            values = {name: member.value for name, member in cls.__members__.items()}
            members = [(name, item) for name, item in members if is_users(item)]
            members = [*members, *sorted(values.items())]
        members = [(name, item) for name, item in members if counts(name) and not _is_machinery(cls, name, item)]
        for name, item in members:
            if name in vars(cls) and not issubclass(cls, enum.Enum):
                self.slots.add_attribute(cls, name, item)
        return [(name, self.mention(item, f"{name}, {location}")) for name, item in members]

    # Modules

    def module(self, module: torch.nn.Module, *, state: bool) -> object:
        numbers: dict[int, int] = {}
        parts: list[tuple[object, ...]] = []
        for path, part in tree(module):
            if part is None or id(part) in numbers:
                parts.append((path, numbers.get(id(part))))  # used again
            elif isinstance(part, torch.nn.Module):
                numbers[id(part)] = len(parts)
                parts.append((path, self.number_of(type(part)), self.hooks(part), self.attributes(part, state)))
        return parts

    def hooks(self, module: torch.nn.Module) -> object:
        location = f"a hook of {type_name(type(module))}"
        hooks = []
        for kind in FORWARD_HOOKS:
            flags = (f"{kind}_with_kwargs", f"{kind}_always_called")
            for number, hook in getattr(module, kind, {}).items():
                set_flags = [number in getattr(module, flag, ()) for flag in flags]
                hooks.append((kind, set_flags, self.mention(hook, location)))
        return hooks

    def attributes(self, module: torch.nn.Module, state: bool) -> object:
        """Describes what the module's own __dict__ adds to its class; with its state or without."""
        location = f"an attribute of a {type_name(type(module))}"
        encoded = self.attribute_with_state if state else self.attribute_without_state
        attributes = sorted(self.attributes_of(module).items())
        described = [(name, encoded(name, value, location)) for name, value in attributes]
        described = [item for item in described if item[1] is not None]
        if isinstance(module, torch.jit.ScriptModule):
            read = [(name, encode(item)) for name, item in attributes_read(module) if is_plain(item)]
            described += [("script", program(module)), ("reads", read)]
        if state:
            tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            described.append(("training", module.training))
            described += [(name, self.weights(tensor)) for name, tensor in tensors]
        return described

    def attribute_with_state(self, name: str, value: object, location: str) -> object:
        return self.weights(value) if isinstance(value, torch.Tensor) else self.mention(value, f"{name}, {location}")

    def attribute_without_state(self, name: str, value: object, location: str) -> object:
        """Describes the code in an attribute; None if there is none. What an object holds is part of the state."""
        if isinstance(value, CODE) or "__wrapped__" in attributes_of(value):
            return self.mention(value, f"{name}, {location}")
        return None if is_plain(value) or isinstance(value, torch.Tensor) else self.number_of(type(value))


def _subclasses(cls: type) -> Iterator[type]:
    sub: type
    for sub in cls.__subclasses__():
        if of_module(sub.__module__) is None:
            yield sub
        yield from _subclasses(sub)


def _is_machinery(cls: type, name: str, member: object) -> bool:
    """Whether Python itself put a member into the class, or a decorator of ours did."""
    if is_added(member) or isinstance(member, _DESCRIPTORS) or name in _ANNOTATIONS:
        return True
    if name == "_field_defaults" and not member:  # of a named tuple
        return True
    function = getattr(member, "__func__", member)  # a class holds its __new__ as a staticmethod
    function = getattr(function, "__wrapped__", function)  # reprlib guards the __repr__ of a dataclass
    if isinstance(function, types.FunctionType):
        record = dataclasses.is_dataclass(cls) or hasattr(cls, "_fields")
        return record and name in _GENERATED and function.__code__.co_filename == "<string>"
    dunder = name.startswith("__") and name.endswith("__")
    return (dunder or name == "_abc_impl") and not isinstance(member, CODE)
