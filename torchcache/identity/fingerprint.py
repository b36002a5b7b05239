"""The identity of a module or function: its module hash, and the state that its keys depend on.

The module hash names the directory. It stands for code, init arguments, and the options that change what
is stored. The state (weights, buffers, configuration of submodules) is part of every key.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchcache._utils.logs import WarnOnce, logger
from torchcache._utils.torch_private import UNKNOWN, operators_are_known
from torchcache.identity.attributes import counted
from torchcache.identity.code import describe, describe_value
from torchcache.identity.encoding import Unencodable, encode, is_plain
from torchcache.identity.objects import OPERATORS, configuration, tensor_bytes
from torchcache.identity.randomness import Generators, generates
from torchcache.identity.state import ABSENT, SetByForward, State
from torchcache.identity.values import CODE
from torchcache.options import Options

FINGERPRINT_FORMAT = 1


_NOT_SHARED = (
    "%s: %s holds an object of type %s, which has no encoding that is the same in every process: rows are not shared "
    "with other instances and processes; give persistent_module_hash to share them"
)
_once = WarnOnce()


class _Contents(NamedTuple):
    """By name the objects in a module's attributes, with their encodings at the time when they were first described."""

    module: nn.Module | None  # kept alive, so that no id is used twice
    values: dict[str, tuple[Any, bytes]]


_NOTHING = _Contents(None, {})


class Fingerprint:
    """The identity of one module (with the forward that is cached) or one function.

    Args:
        target: the module, or the function itself.
        forward: the undecorated forward of the module, or the function.
        init: encoded init arguments.
        options: the options in force.
    """

    def __init__(
        self,
        target: nn.Module | Callable[..., Any],
        forward: Callable[..., Any],
        init: bytes,
        options: Options,
    ) -> None:
        self._target = target
        self._forward = forward
        self.name = type(target).__qualname__ if isinstance(target, nn.Module) else forward.__qualname__
        self._modules: dict[str, nn.Module] = {}
        self._tensors: dict[str, Tensor] = {}
        self._generators: Generators = {}
        self._is_given = options.persistent_module_hash is not None
        self._known: dict[int, _Contents] = {}  # by the id of the module
        self._class_code: dict[type, bytes] = {}
        self._is_watched = False
        if not self._is_given:
            self._contents({})
        code = self._first_code = self._code(constants=True, set_by_forward={})
        self._later_code = b""
        self.parts = {
            "code": code,
            "init arguments": init,
            **{f"option {name}": encode(value) for name, value in options.stored().items()},
            **({} if operators_are_known() else {"operators": UNKNOWN}),
        }
        hashed = encode((FINGERPRINT_FORMAT, self.parts))
        self.module_hash = options.persistent_module_hash or hashlib.blake2b(hashed, digest_size=16).hexdigest()
        logger.info("%s: module hash %s", self.name, self.module_hash)

    def state(self) -> State | None:
        """The state to watch; None if the user gave a module hash, which stands for everything."""
        if self._is_given:
            return None
        if self._is_watched:
            self._describe_again()
        self._is_watched = True
        own = self._target if isinstance(self._target, nn.Module) else None
        return State(self._roots, self._tensors, self._describe, own)

    def _describe_again(self) -> None:
        self._known.clear()
        self._class_code.clear()
        self._contents({})
        code = self._code(constants=True, set_by_forward={})
        self._later_code = b"" if code == self._first_code else code

    def classes(self) -> dict[str, bytes]:
        """Name of each class of a module → its code, to say which one changed."""
        kinds = {type(m).__qualname__: type(m) for m in self.modules()}
        return {name: describe(kind, tensors=tensor_bytes) for name, kind in sorted(kinds.items())}

    def modules(self) -> list[nn.Module]:
        """Every module that the forward may use."""
        return [m for _, m in self._named_modules()]

    def generators(self, state: State | None) -> Generators:
        """The generators of random numbers that the forward may use: those that code reaches or modules hold.

        Args:
            state: the state, if there is one. It lists the modules, which takes longer than to check their attributes.
        """
        generators = dict(self._generators)
        modules = self.modules() if state is None else state.modules
        if any(map(generates, set(map(type, chain.from_iterable([m.__dict__.values() for m in modules]))))):
            generators |= {
                f"{path}.{name}": value
                for path, module in self._named_modules()
                for name, value in counted(module).items()
                if generates(type(value))
            }
        return generators

    def _roots(self) -> dict[str, nn.Module]:
        own = {"": self._target} if isinstance(self._target, nn.Module) else {}
        return {**own, **self._modules}

    def _named_modules(self) -> list[tuple[str, nn.Module]]:
        return [
            (".".join(filter(None, (root, name))), m)
            for root, module in self._roots().items()
            for name, m in module.named_modules()
        ]

    def _code(self, constants: bool, set_by_forward: SetByForward) -> bytes:
        """Describes the forward, the module, the modules that their code reaches, and so on."""
        attributes = functools.partial(_attributes, set_by_forward=set_by_forward)
        scripted = isinstance(self._target, torch.jit.ScriptModule)  # then the module has the code of its forward
        todo: list[Any] = [] if scripted else [self._forward]
        if isinstance(self._target, nn.Module):
            todo.append(self._target)
        known = len(self._modules)
        todo += self._modules.values()
        parts = []
        for code in todo:
            parts.append(describe(code, **self._reached, attributes=attributes, constants=constants))
            todo += list(self._modules.values())[known:]
            known = len(self._modules)
        return encode(tuple(parts))

    @property
    def _reached(self) -> dict[str, Any]:
        """The callbacks of `describe` that collect tensors, modules and generators that code or values reach."""
        return {
            "tensors": self._reached_tensor,
            "modules": self._reached_module,
            "generators": self._reached_generator,
        }

    def _reached_generator(self, generator: object) -> None:
        _name_of(generator, self._generators, "generator")

    def _reached_tensor(self, tensor: Tensor) -> bytes:
        return _name_of(tensor, self._tensors, "tensor").encode()

    def _reached_module(self, module: nn.Module) -> bytes:
        for path, own in self._named_modules():
            if own is module:
                return f"module {path}".encode()
        return _name_of(module, self._modules, "module").encode()

    def _describe(self, set_by_forward: SetByForward) -> dict[str, bytes]:
        """Describes code and configuration of all modules as they are now, for the state digest.

        Constants, lists, dicts and other objects count with what they held when they were first described, since
        forwards may put results in them.
        """
        parts = {
            **self._contents(set_by_forward),
            "code": self._code(constants=False, set_by_forward=set_by_forward),
            "constants": self._later_code,
        }
        for path, module in self._named_modules():
            values = _attributes(module, set_by_forward)
            is_own = module is self._target
            parts[f"configuration of {path or 'the module'}"] = _configuration(module, {} if is_own else values)
        return parts

    def _contents(self, set_by_forward: SetByForward) -> dict[str, bytes]:
        """Describes what classes reach and what attributes hold, each object as it was when it was first described."""
        parts, known = {}, {}
        encodings: dict[int, bytes] = {}  # by id: submodules often share a configuration
        for path, module in self._named_modules():
            before = self._known.get(id(module), _NOTHING)
            contents = self._contents_of(module, path, before, encodings, set_by_forward)
            known[id(module)] = _Contents(module, contents)
            parts[f"contents of {path}"] = self._class_code[type(module)]
            for name, (_, encoded) in contents.items():
                parts[f"contents of {'.'.join(filter(None, (path, name)))}"] = encoded
        self._known = known
        return parts

    def _contents_of(
        self, module: nn.Module, path: str, before: _Contents, encodings: dict[int, bytes], set_by_forward: SetByForward
    ) -> dict[str, tuple[Any, bytes]]:
        """Name of an attribute of a module → object and what it holds."""
        kind = type(module)
        if kind not in self._class_code:
            self._class_code[kind] = describe(kind, **self._reached)
        contents = {}
        for name, value in _attributes(module, set_by_forward).items():
            if not _has_contents(value):
                continue
            if name in before.values and before.values[name][0] is value:
                contents[name] = before.values[name]
                continue
            if id(value) not in encodings:
                encodings[id(value)] = self._encoded(value, ".".join(filter(None, (path, name))))
            contents[name] = value, encodings[id(value)]
        return contents

    def _encoded(self, value: Any, name: str) -> bytes:
        values = configuration(value)
        fallback = functools.partial(self._not_shared, name)
        try:
            whole = value if values is None else (type(value), values)
            return describe_value(whole, fallback=fallback, **self._reached, name=name)
        except Exception:  # the user's objects may raise anything
            return fallback(value)

    def _not_shared(self, name: str, value: object) -> bytes:
        """Encodes an object without a stable encoding so that no rows are shared; one of torch, a stream, by type."""
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if kind.startswith("torch.") and not isinstance(value, torch.ScriptObject):
            return encode(kind)
        subject = self.name, name, type(value).__qualname__
        _once.warn(subject, _NOT_SHARED, *subject)
        return os.urandom(16)


def _has_contents(value: Any) -> bool:
    """Whether an attribute holds something that is not described elsewhere, as plain values and tensors are."""
    if isinstance(value, (Tensor, nn.Module, type, torch.ScriptModule)) or is_plain(value):
        return False
    has_value = isinstance(value, (*CODE, *OPERATORS, torch.ScriptObject))
    return has_value or type(value).__module__.partition(".")[0] not in ("torch", "torchcache")


def _name_of(obj: Any, names: dict[str, Any], kind: str) -> str:
    for name, other in names.items():
        if other is obj:
            return name
    name = f"{kind} {len(names)}"
    names[name] = obj
    return name


def _attributes(module: nn.Module, set_by_forward: SetByForward) -> dict[str, Any]:
    """The attributes of a module that count, in order of their names, as they were before any forward set them."""
    d = id(module.__dict__)
    now = {name: set_by_forward.get((d, name), value) for name, value in sorted(counted(module).items())}
    return {name: value for name, value in now.items() if value is not ABSENT}


def _configuration(module: nn.Module, attributes: dict[str, Any]) -> bytes:
    """Encodes plain attributes (the state compares those of the decorated module itself), and the order of tensors."""
    plain = {name: value for name, value in attributes.items() if is_plain(value)}
    names = (tuple(module._parameters), tuple(module._buffers)) if isinstance(module._parameters, dict) else ()
    return encode((plain, names))


def init_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Encodes init arguments, the same in every process; modules without their weights, which belong to the state.

    If an argument has no such encoding, the result is random, so that rows are not shared with other processes, and
    one warning says so.
    """
    try:
        return describe_value((args, kwargs), tensors=tensor_bytes, weights=_shape, name="init arguments")
    except Unencodable as error:
        logger.warning(
            "%s: an init argument has no encoding that is the same in every process (%s): its rows are "
            "not shared with other processes; give persistent_module_hash to share them",
            name,
            error,
        )
        return os.urandom(16)


def _shape(tensor: Tensor) -> bytes:
    return encode((tensor.dtype, tuple(tensor.shape)))
