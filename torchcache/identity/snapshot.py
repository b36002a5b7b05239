"""What a computation is made of, at one moment: code, configuration, and the bytes of its tensors.

`survey` finds everything that is reached, and describes it; `Survey.snapshot` adds the bytes of the tensors. Both are
pure: they change nothing that a later call would notice, so that an error or Ctrl-C in the middle does no harm.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchcache._utils.logs import WarnOnce
from torchcache.identity import patches
from torchcache.identity.attributes import counted
from torchcache.identity.code import describe, describe_value
from torchcache.identity.encoding import encode, is_builtin
from torchcache.identity.randomness import Generators, generates
from torchcache.identity.slots import Earlier, Slots
from torchcache.identity.tensors import TensorDigests, check_has_bytes, described
from torchcache.identity.watch import Modules, Watch

_NOT_SHARED = (
    "%s: %s holds an object of type %s, which has no encoding that is the same in every process: rows are not shared "
    "with other instances and processes; give persistent_module_hash to share them"
)
_once = WarnOnce()

# By id an object that has no stable encoding, and bytes that stand for it in this process.
Private = dict[int, tuple[object, bytes]]


class Target(NamedTuple):
    """What is cached.

    Attributes:
        name: of its class or of the function, for messages.
        module: the module itself; None: it is a function.
        forward: the undecorated forward of the module, or the function.
    """

    name: str
    module: nn.Module | None
    forward: Callable[..., Any]


@dataclass(frozen=True)
class Snapshot:
    """What the keys of a computation depend on, apart from its arguments and the module hash.

    Attributes:
        digest: 16 bytes that stand for all parts.
        parts: what the digest is made of, by names for `explain`.
        others: all modules but the module itself.
        generators: the generators of random numbers that code reaches.
        trained: the names of tensors that require grad.
    """

    digest: bytes
    parts: dict[str, bytes]
    others: list[nn.Module]
    generators: Generators
    trained: list[str]


class Kept(NamedTuple):
    """What outlives a snapshot.

    Attributes:
        earlier: what containers held before a forward changed them.
        private: bytes that stand for what cannot be encoded.
        classes: see `Slots`.
        digests: those of tensors that are known.
    """

    earlier: Earlier
    private: Private
    classes: dict[type, Any]
    digests: TensorDigests


def nothing_kept() -> Kept:
    """Of a computation that nobody has looked at yet."""
    return Kept(Earlier({}, {}), {}, {}, TensorDigests())


class Survey:
    """Finds and describes all that a computation uses, but for the bytes of tensors.

    Attributes:
        code: the description of its code, for the module hash.
        parts: the descriptions of everything, by name.
        named: every module by its path.
    """

    def __init__(self, target: Target, kept: Kept) -> None:
        self.target = target
        self._kept = kept
        self.modules: dict[str, nn.Module] = {}  # that code reaches, by name
        self.tensors: dict[str, Tensor] = {}
        self.generators: Generators = {}
        self.slots = Slots(kept.classes)
        self.private: Private = {}
        self._encodings: dict[int, bytes] = {}  # by id: submodules often share a configuration
        self._classes: dict[type, bytes] = {}
        contents, self.code = self._contents(), self._describe_code()
        while len(self._named()) != len(self.named):  # code reached more modules
            contents, self.code = self._contents(), self._describe_code()
        self.parts = {"code": self.code, **contents, **self._configurations(), **self._replaced()}

    # ---- modules

    def _named(self) -> list[tuple[str, nn.Module]]:
        own = {} if self.target.module is None else {"": self.target.module}
        return [
            (".".join(filter(None, (root, name))), m)
            for root, module in {**own, **self.modules}.items()
            for name, m in module.named_modules()
        ]

    def _attributes(self, module: nn.Module) -> dict[str, Any]:
        """The attributes of a module that count, in order of their names, as they were before any forward set them."""
        return dict(sorted(self._kept.earlier.contents(module.__dict__, counted(module)).items()))

    # ---- descriptions

    def _describe_code(self) -> bytes:
        """Describes the forward, the module, the modules that their code reaches, and so on."""
        scripted = isinstance(self.target.module, torch.jit.ScriptModule)  # then the module has the code of its forward
        todo: list[Any] = [] if scripted else [self.target.forward]
        todo += [m for m in (self.target.module,) if m is not None]
        parts, known = [], 0
        while todo:
            parts.append(describe(todo.pop(0), **self._reach, attributes=self._attributes))
            todo += list(self.modules.values())[known:]
            known = len(self.modules)
        return encode(tuple(parts))

    def _contents(self) -> dict[str, bytes]:
        """Describes what classes reach, and what the attributes of modules hold."""
        parts: dict[str, bytes] = {}
        self.named = self._named()
        for path, module in self.named:
            self.slots.add_attributes(module, is_own=module is self.target.module)  # before they are described
            kind = type(module)
            if kind not in self._classes:
                self._classes[kind] = describe(kind, **self._reach)
            parts[f"contents of {path}"] = self._classes[kind]
            for name, value in self._attributes(module).items():
                if not (isinstance(value, (Tensor, nn.Module, type, torch.ScriptModule)) or is_builtin(value)):
                    where = ".".join(filter(None, (path, name)))
                    parts[f"contents of {where}"] = self._content(value, where)
        return parts

    def _content(self, value: Any, name: str) -> bytes:
        if id(value) not in self._encodings:
            try:
                self._encodings[id(value)] = describe_value(value, **self._reach, name=name)
            except Exception:  # the user's objects may raise anything
                self._encodings[id(value)] = self._not_shared(value, name)
        return self._encodings[id(value)]

    def _configurations(self) -> dict[str, bytes]:
        """Encodes plain attributes, those of the module itself one by one, and the order of tensors."""
        parts = {}
        for path, module in self.named:
            plain = {name: value for name, value in self._attributes(module).items() if is_builtin(value)}
            if module is self.target.module:
                parts.update({f"attribute {name}": encode(value) for name, value in plain.items()})
                plain = {}
            scripted = not isinstance(module._parameters, dict)
            names = () if scripted else (tuple(module._parameters), tuple(module._buffers))
            parts[f"configuration of {path or 'the module'}"] = encode((plain, names))
        return parts

    def _replaced(self) -> dict[str, bytes]:
        """Describes what somebody put into libraries."""
        values = patches.replaced(patches.homes([m for _, m in self.named]))
        return {f"replaced {name}": self._content(value, name) for name, value in values.items()}

    # ---- what is reached

    @property
    def _reach(self) -> dict[str, Any]:
        return {
            "tensors": self._reached_tensor,
            "modules": self._reached_module,
            "generators": self._reached_generator,
            "fallback": self._not_shared,
            "slots": self.slots,
            "earlier": self._kept.earlier,
        }

    def _reached_generator(self, generator: object) -> None:
        _name_of(generator, self.generators, "generator")

    def _reached_tensor(self, tensor: Tensor) -> bytes:
        return _name_of(tensor, self.tensors, "tensor").encode()

    def _reached_module(self, module: nn.Module) -> bytes:
        for path, own in self._named():
            if own is module:
                return f"module {path}".encode()
        return _name_of(module, self.modules, "module").encode()

    def _not_shared(self, value: object, name: str) -> bytes:
        """Encodes an object without a stable encoding, so that no rows are shared."""
        subject = self.target.name, name, type(value).__qualname__
        _once.warn(subject, _NOT_SHARED, *subject)
        known = self._kept.private.get(id(value)) or self.private.get(id(value)) or (value, os.urandom(16))
        self.private[id(value)] = known
        return known[1]

    # ---- the snapshot

    def snapshot(self) -> tuple[Watch, Snapshot]:
        """Reads the tensors. The watch is made before that: what changes meanwhile will be noticed.

        Raises:
            Unwatchable: a tensor has no readable bytes.
        """
        own = self.target.module
        named = {**self.tensors, **dict(self._module_tensors())}
        for name, tensor in named.items():
            check_has_bytes(name, tensor)
        tensors = list(named.values())
        modules = Modules(own, [m for _, m in self.named if m is not own])
        watch = Watch(modules, tensors, self.slots)
        digests = self._kept.digests.of(tensors)
        encoded = {f"tensor {name}": described(t, d) for (name, t), d in zip(named.items(), digests)}
        parts = {**self.parts, **encoded}
        digest = hashlib.blake2b(encode(dict(sorted(parts.items()))), digest_size=16).digest()
        trained = [name for name, t in named.items() if t.requires_grad]
        return watch, Snapshot(digest, parts, modules.others, self.generators, trained)

    def _module_tensors(self) -> list[tuple[str, Tensor]]:
        """Parameters, buffers and tensors in attributes, but for those that forwards created."""
        return [
            (".".join(filter(None, (path, name))), value)
            for path, m in self.named
            for d in (dict(m._parameters), dict(m._buffers), self._attributes(m))
            for name, value in d.items()
            if isinstance(value, Tensor)
        ]

    def kept(self) -> Kept:
        """What the next survey needs."""
        reached = {*self.slots.sized, *(c for c, _ in self.slots.slots), *self.slots.cells}
        reached |= {id(m.__dict__) for _, m in self.named}
        return self._kept._replace(earlier=self._kept.earlier.only(reached), private=self.private)


def held_generators(modules: list[nn.Module]) -> Generators:
    """The generators of random numbers in the attributes of modules."""
    if not any(map(generates, set(map(type, chain.from_iterable([m.__dict__.values() for m in modules]))))):
        return {}
    return {
        f"{name} of module {i}": value
        for i, module in enumerate(modules)
        for name, value in counted(module).items()
        if generates(type(value))
    }


def _name_of(obj: Any, names: dict[str, Any], kind: str) -> str:
    for name, other in names.items():
        if other is obj:
            return name
    name = f"{kind} {len(names)}"
    names[name] = obj
    return name
