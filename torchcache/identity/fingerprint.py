"""What computes: the module hash of a module or function, and the state that its keys depend on.

The module hash names the directory: code, init arguments, and the options that change what is
stored. The state (weights, buffers, configuration of submodules) is part of every key.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchcache._utils.logs import WarnOnce, logger
from torchcache._utils.torch_private import UNKNOWN, operators_are_known
from torchcache.identity.attributes import counted
from torchcache.identity.code import describe, describe_value
from torchcache.identity.encoding import Unencodable, encode, is_plain
from torchcache.identity.objects import OPERATORS, settings, tensor_bytes
from torchcache.identity.randomness import Generators, generates
from torchcache.identity.state import ABSENT, Moved, State
from torchcache.identity.values import CODE
from torchcache.options import Options

FINGERPRINT_FORMAT = 1


_NOT_SHARED = (
    "%s: %s holds an object of type %s, which has no encoding that is the same in every process: rows are not shared "
    "with other instances and processes; give persistent_module_hash to share them"
)
_once = WarnOnce()


class _Contents(NamedTuple):
    """What a module's attributes held when they were first seen: by name the object and its encoding."""

    module: nn.Module | None  # kept alive, so that no id is used twice
    values: dict[str, tuple[Any, bytes]]


_NOTHING = _Contents(None, {})


class Fingerprint:
    """Of one module (with the forward that is cached) or one function.

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
        self.fixed = options.persistent_module_hash is not None
        self._known: dict[int, _Contents] = {}  # by the id of the module
        self._class_code: dict[type, bytes] = {}
        self._is_watched = False
        if not self.fixed:
            self._contents({})
        code = self._first_code = self._code(constants=True, moved={})
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
        """The state to watch; None where a given module hash stands for everything."""
        if self.fixed:
            return None
        if self._is_watched:
            self._look_anew()
        self._is_watched = True
        own = self._target if isinstance(self._target, nn.Module) else None
        return State(self._roots, self._tensors, self._describe, own)

    def _look_anew(self) -> None:
        self._known.clear()
        self._class_code.clear()
        self._contents({})
        code = self._code(constants=True, moved={})
        self._later_code = b"" if code == self._first_code else code

    def classes(self) -> dict[str, bytes]:
        """Name of each class that takes part → its code, to tell which one changed."""
        kinds = {type(m).__qualname__: type(m) for m in self.modules()}
        return {name: describe(kind, tensors=tensor_bytes) for name, kind in sorted(kinds.items())}

    def modules(self) -> list[nn.Module]:
        """Every module whose training flag may matter."""
        return [m for _, m in self._named_modules()]

    def generators(self, state: State | None) -> Generators:
        """Those of random numbers that the forward may draw from: what its code reaches, attributes of modules.

        The state, where there is one, knows the modules: to look for them takes longer than to look at them.
        """
        found = dict(self._generators)
        modules = self.modules() if state is None else state.modules
        if any(map(generates, set().union(*(map(type, m.__dict__.values()) for m in modules)))):
            found |= {
                f"{path}.{name}": value
                for path, module in self._named_modules()
                for name, value in counted(module).items()
                if generates(type(value))
            }
        return found

    def _roots(self) -> dict[str, nn.Module]:
        own = {"": self._target} if isinstance(self._target, nn.Module) else {}
        return {**own, **self._modules}

    def _named_modules(self) -> list[tuple[str, nn.Module]]:
        return [
            (".".join(filter(None, (root, name))), m)
            for root, module in self._roots().items()
            for name, m in module.named_modules()
        ]

    def _code(self, constants: bool, moved: Moved) -> bytes:
        """Of the forward, the module, and the modules that their code reaches, and so on."""
        attributes = functools.partial(_attributes, moved=moved)
        scripted = isinstance(self._target, torch.jit.ScriptModule)  # then the module has the code of its forward
        todo: list[Any] = [] if scripted else [self._forward]
        if isinstance(self._target, nn.Module):
            todo.append(self._target)
        known = len(self._modules)
        todo += self._modules.values()
        parts = []
        for what in todo:
            parts.append(describe(what, **self._reached, attributes=attributes, constants=constants))
            todo += list(self._modules.values())[known:]
            known = len(self._modules)
        return encode(tuple(parts))

    @property
    def _reached(self) -> dict[str, Any]:
        """What is told of the tensors, modules and generators that code or values reach."""
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

    def _describe(self, moved: Moved) -> dict[str, bytes]:
        """Code and configuration of all modules as they are now, for the state digest.

        What constants, lists, dicts and other objects hold counts as it was when they were first seen: these may be
        places for results.
        """
        parts = {
            **self._contents(moved),
            "code": self._code(constants=False, moved=moved),
            "constants": self._later_code,
        }
        for path, module in self._named_modules():
            values = _attributes(module, moved)
            is_own = module is self._target
            parts[f"configuration of {path or 'the module'}"] = _configuration(module, {} if is_own else values)
        return parts

    def _contents(self, moved: Moved) -> dict[str, bytes]:
        """What classes reach, and what mutable attributes of modules hold, as it was when the object was first seen."""
        parts, known = {}, {}
        alike: dict[int, bytes] = {}  # submodules often share a configuration
        for path, module in self._named_modules():
            before = self._known.get(id(module), _NOTHING)
            contents = self._contents_of(module, path, before, alike, moved)
            known[id(module)] = _Contents(module, contents)
            parts[f"contents of {path}"] = self._class_code[type(module)]
            for name, (_, encoded) in contents.items():
                parts[f"contents of {'.'.join(filter(None, (path, name)))}"] = encoded
        self._known = known
        return parts

    def _contents_of(
        self, module: nn.Module, path: str, before: _Contents, alike: dict[int, bytes], moved: Moved
    ) -> dict[str, tuple[Any, bytes]]:
        """Name → object and what it holds."""
        kind = type(module)
        if kind not in self._class_code:
            self._class_code[kind] = describe(kind, **self._reached)
        contents = {}
        for name, value in _attributes(module, moved).items():
            if not _has_contents(value):
                continue
            if name in before.values and before.values[name][0] is value:
                contents[name] = before.values[name]
                continue
            if id(value) not in alike:
                alike[id(value)] = self._encoded(value, ".".join(filter(None, (path, name))))
            contents[name] = value, alike[id(value)]
        return contents

    def _encoded(self, value: Any, what: str) -> bytes:
        said = settings(value)
        unknown = functools.partial(self._unknown, what)
        try:
            whole = value if said is None else (type(value), said)
            return describe_value(whole, unknown=unknown, **self._reached, name=what)
        except Exception:  # whatever the objects of others raise when they are looked at
            return unknown(value)

    def _unknown(self, what: str, value: object) -> bytes:
        """What has no stable encoding is not shared; objects of torch, such as streams, do not say what is computed."""
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if kind.startswith("torch.") and not isinstance(value, torch.ScriptObject):
            return encode(kind)
        subject = self.name, what, type(value).__qualname__
        _once.warn(subject, _NOT_SHARED, *subject)
        return os.urandom(16)


def _has_contents(value: Any) -> bool:
    """Not what is looked at otherwise: plain values, tensors, modules, classes, and what torch itself puts there."""
    if isinstance(value, (Tensor, nn.Module, type, torch.ScriptModule)) or is_plain(value):
        return False
    own = isinstance(value, (*CODE, *OPERATORS, torch.ScriptObject))
    return own or type(value).__module__.partition(".")[0] not in ("torch", "torchcache")


def _name_of(what: Any, known: dict[str, Any], kind: str) -> str:
    for name, other in known.items():
        if other is what:
            return name
    name = f"{kind} {len(known)}"
    known[name] = what
    return name


def _attributes(module: nn.Module, moved: Moved) -> dict[str, Any]:
    """Those of a module, in order of their names, as if no forward had set any."""
    d = id(module.__dict__)
    now = {name: moved.get((d, name), value) for name, value in sorted(counted(module).items())}
    return {name: value for name, value in now.items() if value is not ABSENT}


def _configuration(module: nn.Module, attributes: dict[str, Any]) -> bytes:
    """Plain attributes (the decorated module's own are watched live instead), and the order of tensors."""
    plain = {name: value for name, value in attributes.items() if is_plain(value)}
    names = (tuple(module._parameters), tuple(module._buffers)) if isinstance(module._parameters, dict) else ()
    return encode((plain, names))


def init_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Init arguments in an encoding that is the same in every process.

    Weights of modules are none of it: these may be loaded later, and belong to the state. Where there is no
    encoding, a random one and a warning: rows are then not shared with other processes.
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
