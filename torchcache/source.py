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
import sys
import types
from collections.abc import Callable, Iterable

import torch

from torchcache import syntax
from torchcache.encoding import Unencodable, encode, is_plain, type_name
from torchcache.origin import (
    import_users,
    is_added,
    is_our_decorator,
    of_function,
    of_module,
    unwrap,
)
from torchcache.torchscript import attributes_read, program

Tensors = Callable[[torch.Tensor], bytes]
Modules = Callable[[torch.nn.Module], bytes]

logger = logging.getLogger("torchcache")

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_MODULE_ATTRIBUTES = frozenset(vars(torch.nn.Module()))
_DESCRIPTORS = (types.GetSetDescriptorType, types.MemberDescriptorType)
_ANNOTATIONS = ("__annotations__", "__annotate__", "__annotate_func__")
# What dataclasses and named tuples write from their fields.
_GENERATED = {*dir(object), "__getstate__", "__setstate__", "__replace__"}
_C_FUNCTIONS = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
)
CODE = (
    *_C_FUNCTIONS,
    *(types.FunctionType, types.MethodType, functools.partial, functools.partialmethod),
    *(staticmethod, classmethod, property, functools.cached_property),
    *(torch.jit.ScriptFunction, type, torch.nn.Module),
)
_BYTECODE = (
    "%s has no source that compiles to what runs, so its bytecode names the cache: "
    "another version of Python will compute its rows again"
)


def describe(obj: object, *, tensors: Tensors, modules: Modules | None = None, constants: bool = True) -> bytes:
    """What `obj`, a class, a module, a function or another callable, computes.

    Of a module: the classes, hooks and functions of it and its submodules, not their state. Tensors
    that functions reach are given to `tensors`, which says what they hold, modules to `modules`;
    without it they count with their state. `constants`: whether lists, dicts, sets and arrays that
    code reaches count, if what they hold is plain.
    """
    describer = _Describer(tensors, modules, constants)
    if not isinstance(obj, torch.nn.Module):
        return describer.finish(encode(obj, describer.value, name="the callable"))
    for name, module in obj.named_modules():
        describer.own[id(module)] = name
    return describer.finish(encode(describer.module(obj, state=False)))


def describe_value(value: object, *, tensors: Tensors, modules: Modules | None = None, name: str = "value") -> bytes:
    """Any value that has a stable encoding; code as `describe` does, modules with their state or as `modules` says.

    Objects of other classes count as what pickling them would keep; `Unencodable`, which calls the value `name`, is
    raised for those that cannot be pickled, such as open files and generators.
    """
    describer = _Describer(tensors, modules)
    return describer.finish(encode(value, describer.value, name=name))


def _is_own_attribute(name: str) -> bool:
    return name.startswith(("_torchcache", "torchcache_")) or name == "cache_instance"


@functools.lru_cache(maxsize=4096)
def _say_once(level: int, message: str) -> None:
    logger.log(level, message)


class _Describer:
    """Describes objects in the order in which they are first mentioned; a mention is a number."""

    def __init__(self, tensors: Tensors, modules: Modules | None = None, constants: bool = True) -> None:
        self.constants = constants
        self.tensors = tensors
        self.modules = modules
        self.own: dict[int, str] = {}  # the described module's parts, whose state does not count
        self.numbers: dict[int, int] = {}
        self.objects: list[object] = []  # also keeps them alive, so that no id is used twice
        self.reduced: dict[int, object] = {}

    def finish(self, root: bytes) -> bytes:
        # Describing one may mention more: the list grows under the loop.
        return encode((root, [encode(self.record(obj)) for obj in self.objects]))

    def refer(self, obj: object) -> int:
        if id(obj) not in self.numbers:
            self.numbers[id(obj)] = len(self.objects)
            self.objects.append(obj)
        return self.numbers[id(obj)]

    def value(self, value: object) -> bytes | None:
        """The hook of `encode`: a value that counts with all it holds."""
        value = unwrap(value)
        if isinstance(value, types.MethodType):
            return encode(("method", value.__func__, value.__self__), self.value)
        if isinstance(value, functools.partial):
            return encode(("partial", value.func, value.args, value.keywords), self.value)
        known = isinstance(value, (torch.Tensor, *CODE)) and _owner(value) is None
        if known or "__wrapped__" in getattr(value, "__dict__", {}):
            return encode(self.mention(value, ""))
        array = _array(value)
        if array is not None:
            return array
        if id(value) not in self.numbers:
            reduced = _reduced(value)
            if reduced is None:
                return None
            self.reduced[id(value)] = reduced
        return encode(("see", self.refer(value)))

    def mention(self, value: object, where: str) -> object:
        """A value that code reaches: code and immutable values count, what may change does not."""
        value = unwrap(value)
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
            return "module", of_module(value.__name__)
        constant = self.constant(value) if where and self.constants else None
        if constant is not None:
            return "constant", constant
        wrapped = getattr(value, "__dict__", {}).get("__wrapped__")
        if where and wrapped is None:
            kind = type_name(type(value))
            text = "%s, of type %s, may change and is left out of the module hash"
            _say_once(logging.INFO, text % (where, kind))
        return "instance", self.refer(type(value)), self.mention(wrapped, where)

    def constant(self, value: object) -> bytes | None:
        """A list, dict, set or array of plain values is mostly a constant; an empty one is a place for results."""
        numpy = sys.modules.get("numpy")
        array = numpy is not None and isinstance(value, numpy.ndarray)
        if not array and not (isinstance(value, (list, dict, set)) and value):
            return None
        try:
            return encode(value, self.value if array else None)
        except Unencodable:
            return None

    def record(self, obj: object) -> object:
        if id(obj) in self.reduced:
            return "object", encode(self.reduced[id(obj)], self.value, name=type_name(type(obj)))
        if isinstance(obj, types.FunctionType):
            return self.function(obj)
        if isinstance(obj, type):
            return self.class_(obj)
        if isinstance(obj, torch.nn.Module):
            return self.module(obj, state=True)
        if isinstance(obj, torch.jit.ScriptFunction):
            return "script", program(obj, self.tensors)
        if isinstance(obj, _C_FUNCTIONS):
            return self.c_function(obj)
        return type_name(type(obj)), self.wrapper(obj)

    def wrapper(self, obj: object) -> object:
        """What a bound method, a partial or a descriptor holds."""
        where = f"an argument of {type_name(type(obj))}"
        if isinstance(obj, (functools.partial, functools.partialmethod)):
            keywords = sorted(obj.keywords.items())
            values = [self.mention(item, where) for item in (obj.func, *obj.args)]
            return values, [(name, self.mention(item, where)) for name, item in keywords]
        parts = ("__func__", "__self__", "fget", "fset", "fdel", "func")
        return [self.mention(getattr(obj, part), where) for part in parts if hasattr(obj, part)]

    def c_function(self, function: object) -> object:
        name = str(getattr(function, "__qualname__"))  # noqa: B009
        owner = _owner(function)
        if owner is not None:
            return "C method", name, self.mention(owner, f"the object of the method {name}")
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
            return "library function", origin, home, name, inside
        name, where = function.__qualname__, f"of the function {function.__qualname__}"
        defaults = [self.mention(item, f"a default {where}") for item in function.__defaults__ or ()]
        keywords = {
            key: self.mention(item, f"the default of {key} {where}")
            for key, item in sorted((function.__kwdefaults__ or {}).items())
        }
        return "function", self.code(function), defaults, keywords, self.reach(function, cells)

    def code(self, function: types.FunctionType) -> object:
        node = syntax.source_of(function)
        if node is None:
            # Of several lambdas on one line it is not known which is meant: no fault of the source.
            if function.__name__ != "<lambda>" or not syntax.text_of(function):
                _say_once(logging.WARNING, _BYTECODE % function.__qualname__)
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
        package = function.__globals__.get("__package__")
        for name in syntax.imported(function.__code__, package):
            self.search(import_users(name), name, syntax.attribute_names(function.__code__), found)
        where = f"that {function.__qualname__} reads"
        return [(name, self.mention(found[name], f"{name}, {where}")) for name in sorted(found)]

    def follow(self, value: object, chain: tuple[str, ...], found: dict[str, object]) -> None:
        """Follow attributes of the user's modules as far as they are modules."""
        done = 1
        while isinstance(value, types.ModuleType) and of_module(value.__name__) is None:
            if done == len(chain) or not hasattr(value, chain[done]):
                break
            value = getattr(value, chain[done])
            done += 1
        found[".".join(chain[:done])] = value

    def search(self, value: object, name: str, names: set[str], found: dict[str, object]) -> None:
        """Take from a module that a function imports itself all that the function may mean."""
        if name in found:
            return
        found[name] = value
        if isinstance(value, types.ModuleType) and of_module(value.__name__) is None:
            for attribute in names & set(vars(value)):
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
            if not _is_own_attribute(name) and not _is_machinery(cls, name, item)
        ]

    # Modules

    def module(self, module: torch.nn.Module, *, state: bool) -> object:
        return [
            (name, self.refer(type(part)), self.hooks(part), self.attributes(part, state))
            for name, part in module.named_modules()
        ]

    def hooks(self, module: torch.nn.Module) -> object:
        found = []
        for kind in _HOOKS:
            flags = (f"{kind}_with_kwargs", f"{kind}_always_called")
            for number, hook in getattr(module, kind, {}).items():
                marks = [number in getattr(module, flag, ()) for flag in flags]
                found.append((kind, marks, self.mention(hook, f"a hook of {type_name(type(module))}")))
        return found

    def attributes(self, module: torch.nn.Module, state: bool) -> object:
        """What the module's own __dict__ adds to its class; with its state or without."""
        where = f"an attribute of a {type_name(type(module))}"
        found: list[tuple[str, object]] = []
        for name, value in sorted(vars(module).items()):
            if name in _MODULE_ATTRIBUTES or _is_own_attribute(name):
                continue
            if state or not (is_plain(value) or isinstance(value, torch.Tensor)):
                found.append((name, self.mention(value, f"{name}, {where}")))
            if state and hasattr(value, "to_dict"):
                found.append((name, encode(value.to_dict(), self.value, name=name)))
        if isinstance(module, torch.jit.ScriptModule):
            read = [(name, encode(item)) for name, item in attributes_read(module) if is_plain(item)]
            found += [("script", program(module, self.tensors)), ("reads", read)]
        if state:
            found.append(("training", module.training))
            tensors = [
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ]
            found += [(name, self.tensors(tensor)) for name, tensor in tensors]
        return found


def _is_users(member: object) -> bool:
    """Whether a class's member is a function that the user wrote."""
    function = unwrap(getattr(member, "__func__", member))
    return isinstance(function, types.FunctionType) and of_function(function) is None


def _is_machinery(cls: type, name: str, member: object) -> bool:
    """Whether Python itself put a member into the class, or a decorator of ours did."""
    if is_added(member) or isinstance(member, _DESCRIPTORS) or name in _ANNOTATIONS:
        return True
    function = getattr(member, "__func__", member)  # a class holds its __new__ as a staticmethod
    if isinstance(function, types.FunctionType):
        record = dataclasses.is_dataclass(cls) or hasattr(cls, "_fields")
        return record and name in _GENERATED and function.__code__.co_filename == "<string>"
    dunder = name.startswith("__") and name.endswith("__")
    return (dunder or name == "_abc_impl") and not isinstance(member, CODE)


def _array(value: object) -> bytes | None:
    """A NumPy array or scalar, unless it holds references to objects."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, (numpy.ndarray, numpy.generic)):
        return None
    if value.dtype.hasobject:
        return None
    return encode(("array", str(value.dtype), value.shape, value.tobytes()))


def _owner(function: object) -> object | None:
    """The object that a C function is bound to; modules and classes only hold it."""
    if not isinstance(function, types.BuiltinFunctionType):
        return None
    owner = function.__self__
    return None if isinstance(owner, (types.ModuleType, type)) else owner


def _reduced(value: object) -> object | None:
    """What pickling would keep of an object, None if it cannot be pickled."""
    try:
        reduced = value.__reduce_ex__(2)
    except Exception:  # a class may raise what it likes
        return None
    if isinstance(reduced, str):  # the name of a global
        return [type(value), reduced]
    parts = list(reduced)
    return [*parts[:3], *(None if part is None else list(part) for part in parts[3:5]), *parts[5:]]
