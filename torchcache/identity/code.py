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
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import Any

import torch

from torchcache._utils.logs import WarnOnce
from torchcache._utils.torch_private import UNKNOWN, CustomOpDef, operator
from torchcache.identity import syntax
from torchcache.identity.attributes import FORWARD_HOOKS, counted, counts
from torchcache.identity.encoding import encode, is_plain, type_name
from torchcache.identity.objects import definition, owner, settings, users_operators
from torchcache.identity.origin import (
    attributes_of,
    import_users,
    is_added,
    is_our_decorator,
    of_function,
    of_module,
    unwrap,
)
from torchcache.identity.torchscript import attributes_read, program
from torchcache.identity.values import C_FUNCTIONS, CODE, PLACES, Generators, Modules, Tensors, Unknown, Values

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
    constants: bool = True,
) -> bytes:
    """What `obj`, a class, a module, a function or another callable, computes.

    Of a module: the classes, hooks and functions of it and its submodules, not their state. Tensors
    that functions reach are given to `tensors`, which says what they hold, modules to `modules`;
    without it they count with their state. `generators` is given those of random numbers, which do not count.
    `attributes` gives those of a module that count. `constants`: whether containers and objects that code
    reaches count, by what they hold; empty containers do not.
    """
    describer = _Describer(tensors, modules, constants=constants)
    describer.unknown, describer.generators = describer.leave_out, generators
    if not isinstance(obj, torch.nn.Module):
        return describer.finish(encode(obj, describer.value, name="the callable"))
    describer.attributes_of = attributes
    for name, module in tree(obj):
        describer.own.setdefault(id(module), name)
    return describer.finish(encode(describer.module(obj, state=False)))


def describe_value(
    value: object,
    *,
    tensors: Tensors,
    modules: Modules | None = None,
    weights: Tensors | None = None,
    generators: Generators | None = None,
    unknown: Unknown | None = None,
    name: str = "value",
) -> bytes:
    """Any value that has a stable encoding; code as `describe` does, modules with their state or as `modules` says.

    Objects of other classes count as what pickling them would keep; what cannot be pickled, such as open files and
    generators, as `unknown` says. Without it `Unencodable` is raised, which calls the value `name`. `weights` says
    what the tensors of modules hold, if not `tensors`.
    """
    describer = _Describer(tensors, modules, weights)
    describer.unknown, describer.generators = unknown, generators
    return describer.finish(encode(value, describer.value, name=name))


def tree(module: torch.nn.Module | None, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, object]]:
    """Path and module for every mention of a submodule, in order; below later mentions of one it does not look."""
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
        # Describing one may mention more: the list grows under the loop.
        return encode((root, [encode(self.record(obj)) for obj in self.objects]))

    def mention(self, value: object, where: str) -> object:
        """A value that code reaches; `where` it stands, if what it holds counts too."""
        value = definition(unwrap(value))
        if is_plain(value):
            return "value", encode(value, self.value)
        if isinstance(value, torch.Tensor):
            return "tensor", self.tensors(value)
        if id(value) in self.own:
            return "submodule", self.own[id(value)]
        if self.modules is not None and isinstance(value, torch.nn.Module):
            return "module", self.modules(value)
        if isinstance(value, CODE):
            return "see", self.refer(value)
        if isinstance(value, types.ModuleType):
            found = of_module(value.__name__)
            return ("see", self.refer(value)) if found is None else ("module", found, value.__name__)
        constant = self.constant(value, where) if where and self.constants else None
        if constant is not None:
            return "constant", constant
        return "instance", self.refer(type(value)), self.mention(attributes_of(value).get("__wrapped__"), where)

    def record(self, obj: object) -> object:
        if id(obj) in self.held:
            return "object", self.contents(obj)
        if isinstance(obj, types.FunctionType):
            return self.function(obj)
        if isinstance(obj, type):
            return self.class_(obj)
        if isinstance(obj, torch.nn.Module):
            return self.module(obj, state=True)
        if isinstance(obj, types.ModuleType):
            return self.imported(obj)
        if isinstance(obj, torch.jit.ScriptFunction):
            return "script", program(obj)
        if isinstance(obj, CustomOpDef):
            return self.operator(obj)
        if isinstance(obj, C_FUNCTIONS):
            return self.c_function(obj)
        return type_name(type(obj)), self.wrapper(obj)

    def imported(self, module: types.ModuleType) -> object:
        """A module of the user's that code uses as a whole, by what it defines or imports."""
        kinds = (types.ModuleType, torch.Tensor, tuple, frozenset, *PLACES, *CODE)
        return "module", [
            (name, self.mention(item, f"{name}, in a module that code uses as a whole"))
            for name, item in sorted(vars(module).items())
            if not name.startswith("__") and (isinstance(item, kinds) or is_plain(item))
        ]

    def wrapper(self, obj: object) -> object:
        """What a bound method, a partial or a descriptor holds."""
        where = f"an argument of {type_name(type(obj))}"
        if isinstance(obj, (functools.partial, functools.partialmethod)):
            values = [self.mention(item, where) for item in (obj.func, *obj.args)]
            return values, [(name, self.mention(item, where)) for name, item in obj.keywords.items()]
        parts = ("__func__", "__self__", "fget", "fset", "fdel", "func", "dispatcher")
        return [self.mention(getattr(obj, part), where) for part in parts if hasattr(obj, part)]

    def operator(self, definition: object) -> object:
        """An operator that Python code defines, for all devices and for some."""
        op = operator(definition)
        if op is None:
            return "operator", UNKNOWN
        kernels = [(str(device), self.mention(kernel, "")) for device, kernel in op.kernels.items()]
        return "operator", op.qualified_name, self.mention(op.function, ""), sorted(kernels, key=itemgetter(0))

    def c_function(self, function: object) -> object:
        name = str(getattr(function, "__qualname__"))  # noqa: B009
        bound = owner(function)
        if bound is not None:
            return "C method", name, self.mention(bound, f"the object of the method {name}")
        home = getattr(function, "__self__", None) or getattr(function, "__objclass__", None)
        module = home.__module__ if isinstance(home, type) else getattr(function, "__module__", "")
        return "C function", of_module(module), name

    # Functions

    def function(self, function: types.FunctionType) -> object:
        origin = of_function(function)
        cells = self.closure(function)
        if origin is not None:
            wraps = hasattr(function, "__wrapped__")  # then the name is the wrapped function's
            name = function.__code__.co_name if wraps else function.__qualname__
            home = str(function.__globals__.get("__name__"))
            inside = {key: self.mention(value, "") for key, value in sorted(cells.items())}
            if isinstance(registry := vars(function).get("registry"), types.MappingProxyType):  # of singledispatch
                inside["cases"] = [(self.mention(kind, ""), self.mention(case, "")) for kind, case in registry.items()]
            return "library function", origin, home, name, inside
        name, where = function.__qualname__, f"of the function {function.__qualname__}"
        defaults = [self.mention(item, f"a default {where}") for item in function.__defaults__ or ()]
        keywords = {
            key: self.mention(item, f"the default of {key} {where}")
            for key, item in sorted((function.__kwdefaults__ or {}).items())
        }
        added = [
            (name, self.mention(item, f"the attribute {name} {where}"))
            for name, item in sorted(vars(function).items() if self.constants else ())
            if not name.startswith("_") and counts(name)
        ]
        return "function", self.code(function), defaults, keywords, self.reach(function, cells), added

    def code(self, function: types.FunctionType) -> object:
        node = syntax.source_of(function)
        if node is None:
            # Of several lambdas on one line it is not known which is meant: no fault of the source.
            if function.__name__ != "<lambda>" or not syntax.text_of(function):
                _log_bytecode(function.__qualname__)
            return "bytecode", syntax.bytecode(function.__code__)
        scope = function.__globals__
        kept = [item for item in syntax.decorators(node) if not is_our_decorator(item, scope)]
        return "source", syntax.normal_form(node), [syntax.normal_form(item) for item in kept]

    def closure(self, function: types.FunctionType) -> dict[str, object]:
        cells = {}
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                cells[name] = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        return cells

    def reach(self, function: types.FunctionType, cells: dict[str, object]) -> object:
        """What the function's names stand for outside of it."""
        found: dict[str, object] = {}
        for chain in syntax.reached(function.__code__):
            if chain[0] in cells:
                self.follow(cells[chain[0]], chain, found)
            elif chain[0] in function.__globals__:
                self.follow(function.__globals__[chain[0]], chain, found)
        names = syntax.attribute_names(function.__code__)
        package = function.__globals__.get("__package__")
        for name in syntax.imported(function.__code__, package):
            self.search(import_users(name), name, names, found)
        found.update({f"operator {op.qualified_name}": op.definition for op in users_operators(names)})
        where = f"that {function.__qualname__} reads"
        return [(name, self.mention(found[name], f"{name}, {where}")) for name in sorted(found)]

    def follow(self, value: object, chain: tuple[str, ...], found: dict[str, object]) -> None:
        """Follow attributes of the user's modules as far as they are modules, and of a function the first one."""
        done = 1
        while isinstance(value, types.ModuleType) and of_module(value.__name__) is None:
            if done == len(chain) or not hasattr(value, chain[done]):
                break
            value = getattr(value, chain[done])
            done += 1
        found[".".join(chain[:done])] = value
        if isinstance(value, types.FunctionType) and chain[done : done + 1] and chain[done] in vars(value):
            found[".".join(chain[: done + 1])] = vars(value)[chain[done]]

    def search(self, value: object, name: str, names: set[str], found: dict[str, object]) -> None:
        """Take from a module that a function imports itself all that the function may mean."""
        if name in found:
            return
        used = names & set(vars(value)) if isinstance(value, types.ModuleType) else set()
        if not used or of_module(getattr(value, "__name__")) is not None:  # noqa: B009
            found[name] = value
            return
        found[name] = None
        for attribute in used:
            if not isinstance(vars(value)[attribute], types.ModuleType) or name.count(".") < 20:  # they may be a circle
                self.search(vars(value)[attribute], f"{name}.{attribute}", names, found)

    # Classes

    def class_(self, cls: type) -> object:
        origin = of_module(cls.__module__)
        bases = [self.refer(base) for base in cls.__bases__ if base is not object]
        members = sorted(vars(cls).items())
        if origin is not None:
            patched = [item for item in members if _is_users(item[1])]
            home = f"{cls.__module__}.{type_name(cls)}"
            return "library class", origin, home, bases, self.members(cls, patched)
        maker = None if type(cls) is type else self.refer(type(cls))
        fields = [
            (field.name, self.mention(field.default_factory, ""))
            for field in (dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ())
        ]
        return "class", type_name(cls), maker, bases, self.members(cls, members), fields

    def members(self, cls: type, members: Iterable[tuple[str, object]]) -> object:
        where = f"an attribute of the class {type_name(cls)}"
        if issubclass(cls, enum.Enum):
            values = {name: member.value for name, member in cls.__members__.items()}
            members = [(name, item) for name, item in members if _is_users(item)]
            members = [*members, *sorted(values.items())]
        return [
            (name, self.mention(item, f"{name}, {where}"))
            for name, item in members
            if counts(name) and not _is_machinery(cls, name, item)
        ]

    # Modules

    def module(self, module: torch.nn.Module, *, state: bool) -> object:
        numbers: dict[int, int] = {}
        found: list[tuple[object, ...]] = []
        for path, part in tree(module):
            if part is None or id(part) in numbers:
                found.append((path, numbers.get(id(part))))  # used once more
            elif isinstance(part, torch.nn.Module):
                numbers[id(part)] = len(found)
                found.append((path, self.refer(type(part)), self.hooks(part), self.attributes(part, state)))
        return found

    def hooks(self, module: torch.nn.Module) -> object:
        found = []
        for kind in FORWARD_HOOKS:
            flags = (f"{kind}_with_kwargs", f"{kind}_always_called")
            for number, hook in getattr(module, kind, {}).items():
                marks = [number in getattr(module, flag, ()) for flag in flags]
                found.append((kind, marks, self.mention(hook, f"a hook of {type_name(type(module))}")))
        return found

    def attributes(self, module: torch.nn.Module, state: bool) -> object:
        """What the module's own __dict__ adds to its class; with its state or without."""
        where = f"an attribute of a {type_name(type(module))}"
        found: list[tuple[str, object]] = []
        for name, value in sorted(self.attributes_of(module).items()):
            said = settings(value) if state else None
            if said is not None:
                found.append((name, encode((self.refer(type(value)), said), self.value, name=name)))
            elif state and isinstance(value, torch.Tensor):
                found.append((name, self.weights(value)))
            elif state or isinstance(value, CODE) or "__wrapped__" in attributes_of(value):
                found.append((name, self.mention(value, f"{name}, {where}")))
            elif not (is_plain(value) or isinstance(value, torch.Tensor)):
                found.append((name, self.refer(type(value))))  # what it holds is part of the state
        if isinstance(module, torch.jit.ScriptModule):
            read = [(name, encode(item)) for name, item in attributes_read(module) if is_plain(item)]
            found += [("script", program(module)), ("reads", read)]
        if state:
            found.append(("training", module.training))
            tensors = [
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ]
            found += [(name, self.weights(tensor)) for name, tensor in tensors]
        return found


def _is_users(member: object) -> bool:
    """Whether a class's member is a function that the user wrote."""
    function = unwrap(getattr(member, "__func__", member))
    return isinstance(function, types.FunctionType) and of_function(function) is None


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
