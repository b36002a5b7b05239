"""What computes: the module hash of a module or function, and the state that its keys depend on.

The module hash names the directory: code, init arguments, and the options that change what is
stored. The state (weights, buffers, configuration of submodules) is part of every key.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchcache import source
from torchcache.encoding import Unencodable, encode, is_plain
from torchcache.logs import logger
from torchcache.options import Options
from torchcache.state import Moved, State, digests

FINGERPRINT_FORMAT = 1

_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)


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
        self._contents = self._mutable_attributes()
        code = self._code(constants=True)
        self.fixed = options.persistent_module_hash is not None
        self.parts = {
            "code": code,
            "init arguments": init,
            **{f"option {name}": encode(value) for name, value in options.stored().items()},
        }
        hashed = encode((FINGERPRINT_FORMAT, self.parts))
        self.module_hash = options.persistent_module_hash or hashlib.blake2b(hashed, digest_size=16).hexdigest()
        logger.info("%s: module hash %s", self.name, self.module_hash)

    def state(self) -> State | None:
        """The state to watch; None where a given module hash stands for everything."""
        if self.fixed:
            return None
        own = self._target if isinstance(self._target, nn.Module) else None
        return State(self._roots, self._tensors, self._describe, own)

    def classes(self) -> dict[str, bytes]:
        """Name of each class that takes part → its code, to tell which one changed."""
        kinds = {type(m).__qualname__: type(m) for m in self.modules()}
        return {name: source.describe(kind, tensors=_tensor_bytes) for name, kind in sorted(kinds.items())}

    def modules(self) -> list[nn.Module]:
        """Every module whose training flag may matter."""
        return [m for _, m in self._named_modules()]

    def _roots(self) -> dict[str, nn.Module]:
        own = {"": self._target} if isinstance(self._target, nn.Module) else {}
        return {**own, **self._modules}

    def _named_modules(self) -> list[tuple[str, nn.Module]]:
        return [
            (".".join(filter(None, (root, name))), m)
            for root, module in self._roots().items()
            for name, m in module.named_modules()
        ]

    def _code(self, constants: bool) -> bytes:
        """Of the forward, the module, and the modules that their code reaches, and so on."""
        scripted = isinstance(self._target, torch.jit.ScriptModule)  # then the module has the code of its forward
        todo: list[Any] = [] if scripted else [self._forward]
        if isinstance(self._target, nn.Module):
            todo.append(self._target)
        known = len(self._modules)
        todo += self._modules.values()
        parts = []
        for what in todo:
            parts.append(
                source.describe(what, tensors=self._reached_tensor, modules=self._reached_module, constants=constants)
            )
            todo += list(self._modules.values())[known:]
            known = len(self._modules)
        return encode(tuple(parts))

    def _reached_tensor(self, tensor: Tensor) -> bytes:
        return _name_of(tensor, self._tensors, "tensor").encode()

    def _reached_module(self, module: nn.Module) -> bytes:
        for path, own in self._named_modules():
            if own is module:
                return f"module {path}".encode()
        return _name_of(module, self._modules, "module").encode()

    def _describe(self, moved: Moved) -> dict[str, bytes]:
        """Code and configuration of all modules as they are now, for the state digest.

        Without the constants: these are in the module hash as they were at first, and may be places for results.
        """
        parts = {**self._contents, "code": self._code(constants=False)}
        for path, module in self._named_modules():
            parts[f"configuration of {path or 'the module'}"] = _configuration(module, module is self._target, moved)
        return parts

    def _mutable_attributes(self) -> dict[str, bytes]:
        """What lists, dicts and other objects hold that are attributes of modules, as it is when the cache is made."""
        reached: dict[str, Any] = {"tensors": self._reached_tensor, "modules": self._reached_module}
        parts = {}
        for path, module in self._named_modules():
            for name, value in module.__dict__.items():
                if _is_mutable_attribute(name, value):
                    what = ".".join(filter(None, (path, name)))
                    try:
                        parts[f"contents of {what}"] = source.describe_value(value, name=what, **reached)
                    except Exception as error:  # whatever the objects of others raise when they are looked at
                        logger.info("%s: %s is left out of the key: %s", self.name, what, error)
        return parts


def _is_mutable_attribute(name: str, value: Any) -> bool:
    """Not what is looked at otherwise: plain values, tensors, modules, code, a Hugging Face config."""
    own = name in _MODULE_ATTRIBUTES or name.startswith(("torchcache_", "_torchcache"))
    otherwise = isinstance(value, (Tensor, nn.Module, *source.CODE)) or is_plain(value) or hasattr(value, "to_dict")
    return not (own or otherwise or type(value).__module__.partition(".")[0] in ("torch", "torchcache"))


def _name_of(what: Any, known: dict[str, Any], kind: str) -> str:
    for name, other in known.items():
        if other is what:
            return name
    name = f"{kind} {len(known)}"
    known[name] = what
    return name


def _configuration(module: nn.Module, is_own: bool, moved: Moved) -> bytes:
    """Plain attributes, and a Hugging Face config. The decorated module's own are watched live instead."""
    plain = {
        name: moved.get((id(module.__dict__), name), value)
        for name, value in module.__dict__.items()
        if not is_own and name not in _MODULE_ATTRIBUTES and not name.startswith("torchcache_") and is_plain(value)
    }
    config = module.__dict__.get("config")
    as_dict = getattr(config, "to_dict", None)
    try:
        settings = encode(as_dict()) if callable(as_dict) else b""
    except Unencodable as error:
        logger.info("the config of %s is left out of the key: %s", type(module).__qualname__, error)
        settings = b""
    return encode((encode(plain), settings))


def init_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Init arguments in an encoding that is the same in every process.

    Where there is none, a random one and a warning: rows are then not shared with other processes.
    """
    try:
        return source.describe_value((args, kwargs), tensors=_tensor_bytes, name="init arguments")
    except Unencodable as error:
        logger.warning(
            "%s: an init argument has no encoding that is the same in every process (%s): its rows are "
            "not shared with other processes; give persistent_module_hash to share them",
            name,
            error,
        )
        return os.urandom(16)


def _tensor_bytes(tensor: Tensor) -> bytes:
    return encode((tensor.dtype, tuple(tensor.shape), digests([tensor])[0]))
