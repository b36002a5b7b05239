"""Values that code reaches: what containers and objects hold, as bytes that are the same in every process."""

from __future__ import annotations

import functools
import logging
import types
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

import torch

from torchcache._utils.logs import WarnOnce
from torchcache._utils.torch_private import CustomOpDef
from torchcache.identity.encoding import Unencodable, encode, type_name
from torchcache.identity.objects import array_bytes, bound_object, definition, is_without_value, pickled
from torchcache.identity.origin import attributes_of, of_module, unwrap
from torchcache.identity.randomness import generates
from torchcache.identity.slots import Earlier, Slots
from torchcache.identity.torchscript import script_object

Tensors = Callable[[torch.Tensor], bytes]
Modules = Callable[[torch.nn.Module], bytes]
Fallback = Callable[[object, str], bytes]  # for objects that have no stable encoding, and where they were found
Generators = Callable[[object], None]

_once = WarnOnce()

C_FUNCTIONS = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
)
CODE = (
    *C_FUNCTIONS,
    *(types.FunctionType, types.MethodType, functools.partial, functools.partialmethod),
    *(staticmethod, classmethod, property, functools.cached_property, functools.singledispatchmethod),
    *(torch.jit.ScriptFunction, CustomOpDef, type, torch.nn.Module),
)
# Where a program puts its results. They do not count while they are empty.
PLACES = (list, dict, set, deque, bytearray)
# Containers of the standard library hold the users' values; other objects of libraries count whole or not at all.
_CONTAINER_MODULES = frozenset(("builtins", "collections", "functools", "operator", "types", "weakref"))


class Values(ABC):
    """Describes objects in the order in which they are first mentioned; a mention is the number of an object."""

    def __init__(self, tensors: Tensors, modules: Modules | None, weights: Tensors | None = None) -> None:
        self.tensors = tensors
        self.modules = modules
        self.weights = weights or tensors
        self.fallback: Fallback | None = None
        self.generators: Generators | None = None
        self.slots = Slots({})
        self.earlier = Earlier({}, {})  # what containers held before a forward changed them
        self.location = ""  # of the value that is being described
        self.own_modules: dict[int, str] = {}  # by id the names of modules whose state is left out
        self.numbers: dict[int, int] = {}  # by id
        self.objects: list[object] = []  # also keeps them alive, so that no id is used twice
        self.contents: dict[int, object] = {}  # by id what pickle would keep of an object

    def __call__(self, value: object) -> bytes | None:
        """Encodes a value that counts with all it holds: the hook of `encode`."""
        return self.value(value)

    def number_of(self, obj: object) -> int:
        """The number of an object; an object without one gets the next."""
        if id(obj) not in self.numbers:
            self.numbers[id(obj)] = len(self.objects)
            self.objects.append(obj)
        return self.numbers[id(obj)]

    @abstractmethod
    def finish(self, root: bytes) -> bytes:
        """Encodes the root and every object that was mentioned."""

    @abstractmethod
    def mention(self, value: object, location: str) -> object:
        """Describes a value that code reaches, objects by a number.

        Args:
            value: the value.
            location: where the value stands; empty if what the value holds does not count.
        """

    def value(self, value: object) -> bytes | None:
        """Encodes a value that counts with all it holds."""
        value = definition(unwrap(value))
        if isinstance(value, types.MethodType):
            return encode(("method", value.__func__, value.__self__), self)
        if isinstance(value, functools.partial):
            return encode(("partial", value.func, value.args, value.keywords), self)
        is_code = isinstance(value, (torch.Tensor, types.ModuleType, *CODE)) and bound_object(value) is None
        if is_code or "__wrapped__" in attributes_of(value):
            return encode(self.mention(value, ""))
        is_generator = generates(type(value))  # its state changes as it is used
        if is_generator and self.generators is not None:
            self.generators(value)
        if is_generator or is_without_value(value):
            return encode(("without value", type_name(type(value))))
        return array_bytes(value) or self.instance(value)

    def instance(self, value: object) -> bytes | None:
        """Encodes the mention of an object by what pickle would keep of it; None if it has no encoding."""
        if isinstance(value, torch.ScriptObject):
            return script_object(value) or self.fall_back(value)
        if id(value) not in self.numbers:
            contents = pickled(value)
            if contents is None:
                return self.fall_back(value)
            if len(contents) > 2 and isinstance(contents[2], dict):
                contents[2] = self.earlier.contents(attributes_of(value), contents[2])
            top = type(value).__module__.partition(".")[0]
            if self.fallback and top not in _CONTAINER_MODULES and of_module(type(value).__module__) is not None:
                return self.library_object(contents) or self.fall_back(value)
            self.contents[id(value)] = contents
        return encode(("see", self.number_of(value)))

    def library_object(self, contents: object) -> bytes | None:
        """Encodes what an object of a library holds; None if a part has no encoding, since the rest means nothing."""
        inner = type(self)(self.tensors, self.modules, self.weights)
        inner.own_modules, inner.generators, inner.earlier = self.own_modules, self.generators, self.earlier
        try:
            return inner.finish(encode(contents, inner.value))
        except Unencodable:
            return None

    def fall_back(self, value: object) -> bytes | None:
        """Encodes an object without a stable encoding by `fallback`; None without it."""
        return None if self.fallback is None else self.fallback(value, self.location)

    def constant(self, value: object, location: str) -> bytes | None:
        """Encodes what a container or object holds; an empty one is a place for results."""
        if "__wrapped__" in attributes_of(value):
            return None
        self.slots.add_contents(value)
        value = self.earlier.contents(value) if isinstance(value, (dict, list)) else value
        if isinstance(value, PLACES) and not value:
            subject = location, type_name(type(value))
            _once.log(logging.INFO, subject, "%s, of type %s, may change and is left out of the module hash", *subject)
            return left_out(value)
        outer, self.location = self.location, location
        try:
            return encode(value, self)
        except Unencodable:  # nested too deeply
            return self.fall_back(value) or left_out(value)
        finally:
            self.location = outer

    def encoded_contents(self, obj: object) -> bytes:
        """Encodes what an object that was mentioned holds."""
        try:
            return encode(self.contents[id(obj)], self, name=type_name(type(obj)))
        except Unencodable:
            if self.fallback is None:
                raise
            return self.fallback(obj, self.location)


def left_out(value: object) -> bytes:
    """Encodes a value by its type alone."""
    return encode(("left out", type_name(type(value))))
