"""What values hold that code reaches: containers and objects, as bytes that are the same in every process."""

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
from torchcache.identity.objects import array, definition, held, is_without_value, owner
from torchcache.identity.origin import attributes_of, of_module, unwrap
from torchcache.identity.randomness import generates
from torchcache.identity.torchscript import script_object

Tensors = Callable[[torch.Tensor], bytes]
Modules = Callable[[torch.nn.Module], bytes]
Unknown = Callable[[object], bytes]
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
# Where a program puts its results: empty at first, they say nothing.
PLACES = (list, dict, set, deque, bytearray)
# Containers of the standard library hold the users' values; other objects of libraries count whole or not at all.
_CONTAINER_MODULES = frozenset(("builtins", "collections", "functools", "operator", "types", "weakref"))


class Values(ABC):
    """Describes objects in the order in which they are first mentioned; a mention is a number."""

    def __init__(
        self, tensors: Tensors, modules: Modules | None, weights: Tensors | None = None, constants: bool = True
    ) -> None:
        self.constants = constants
        self.tensors = tensors
        self.modules = modules
        self.weights = weights or tensors
        self.unknown: Unknown | None = None
        self.generators: Generators | None = None
        self.where = ""  # what is being described holds the constant
        self.own: dict[int, str] = {}  # the described module's parts, whose state does not count
        self.numbers: dict[int, int] = {}
        self.objects: list[object] = []  # also keeps them alive, so that no id is used twice
        self.held: dict[int, object] = {}

    def refer(self, obj: object) -> int:
        if id(obj) not in self.numbers:
            self.numbers[id(obj)] = len(self.objects)
            self.objects.append(obj)
        return self.numbers[id(obj)]

    @abstractmethod
    def finish(self, root: bytes) -> bytes:
        """The root and every object that was mentioned."""

    @abstractmethod
    def mention(self, value: object, where: str) -> object:
        """A value that code reaches; `where` it stands, if what it holds counts too."""

    def value(self, value: object) -> bytes | None:
        """The hook of `encode`: a value that counts with all it holds."""
        value = definition(unwrap(value))
        if isinstance(value, types.MethodType):
            return encode(("method", value.__func__, value.__self__), self.value)
        if isinstance(value, functools.partial):
            return encode(("partial", value.func, value.args, value.keywords), self.value)
        known = isinstance(value, (torch.Tensor, types.ModuleType, *CODE)) and owner(value) is None
        if known or "__wrapped__" in attributes_of(value):
            return encode(self.mention(value, ""))
        if generates(type(value)):  # it changes as it is used
            if self.generators is not None:
                self.generators(value)
            return encode(("without value", type_name(type(value))))
        if is_without_value(value):
            return encode(("without value", type_name(type(value))))
        return array(value) or self.instance(value)

    def instance(self, value: object) -> bytes | None:
        if isinstance(value, torch.ScriptObject):
            return script_object(value) or self.otherwise(value)
        if id(value) not in self.numbers:
            found = held(value)
            if found is None:
                return self.otherwise(value)
            home = type(value).__module__.partition(".")[0]
            if self.unknown and home not in _CONTAINER_MODULES and of_module(type(value).__module__) is not None:
                return self.whole(found) or self.otherwise(value)
            self.held[id(value)] = found
        return encode(("see", self.refer(value)))

    def whole(self, held_by_object: object) -> bytes | None:
        """What an object of a library holds: of one that cannot be encoded, the rest means nothing."""
        inner = type(self)(self.tensors, self.modules, self.weights)
        inner.own, inner.generators = self.own, self.generators
        try:
            return inner.finish(encode(held_by_object, inner.value))
        except Unencodable:
            return None

    def otherwise(self, value: object) -> bytes | None:
        return None if self.unknown is None else self.unknown(value)

    def leave_out(self, value: object) -> bytes:
        """What code reaches and has no stable encoding counts by its type alone."""
        kind = type_name(type(value))
        subject = self.where or "an object that code reaches", kind
        _once.log(logging.INFO, subject, "%s, of type %s, may change and is left out of the module hash", *subject)
        return encode(("left out", kind))

    def constant(self, value: object, where: str) -> bytes | None:
        """What a container or object holds; an empty one is a place for results."""
        if "__wrapped__" in attributes_of(value):
            return None
        self.where = where
        try:
            return self.leave_out(value) if isinstance(value, PLACES) and not value else encode(value, self.value)
        except Unencodable:  # nested too deeply
            return self.leave_out(value)
        finally:
            self.where = ""

    def contents(self, obj: object) -> bytes:
        try:
            return encode(self.held[id(obj)], self.value, name=type_name(type(obj)))
        except Unencodable:
            if self.unknown is None:
                raise
            return self.unknown(obj)
