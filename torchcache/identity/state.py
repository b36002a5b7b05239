"""The state that a forward uses: weights, buffers, attributes, and the code and configuration of modules.

State computes a digest of everything once. After that each call makes a cheap check (identities, version
counters, and natively addresses, shapes and some bytes of every tensor), and State digests again only what
changed. It digests tensors that require grad in full at every check: an optimizer may change them without
incrementing a counter.
"""

from __future__ import annotations

import hashlib
import struct
import weakref
from collections.abc import Callable, Iterator
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchcache._native import ops
from torchcache._utils.torch_private import version, versions
from torchcache.identity.attributes import FORWARD_HOOKS, TENSORS_AND_MODULES, counted
from torchcache.identity.encoding import encode, is_plain

ABSENT = object()

# (id of a module's __dict__, name) of an attribute that a forward set → its value before, which counts instead of the
# present one; ABSENT if the forward created the attribute.
SetByForward = dict[tuple[int, str], Any]

_get = dict.get
_requires_grad = attrgetter("requires_grad")


class Unwatchable(Exception):
    """A tensor of the state has no readable bytes: on the meta device, of a tensor subclass, without a storage."""


class Uninitialized(Unwatchable):
    """A parameter of a lazy module has no bytes before the first call."""


class _Watched:
    """One tensor of the state, with the digest of its bytes at `version`."""

    __slots__ = ("digest", "name", "tensor", "version")

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name = name
        self.tensor = tensor
        self.version: object = 0
        self.digest = b""

    @property
    def is_live(self) -> bool:
        """Whether edits may leave no trace: of what is trained, and of inference tensors, which have no versions."""
        return self.tensor.requires_grad or self.tensor.is_inference()

    def encoded(self) -> bytes:
        t = self.tensor
        parts = (self.name, t.dtype, tuple(t.shape), str(t.layout))
        return encode((*parts, scales(t)) if t.is_quantized else parts) + self.digest


class State:
    """Watches the modules and tensors that one cached forward uses.

    Args:
        modules: gives name → root module; all submodules are included.
        tensors: name → tensor that code reaches in another way (a global, a closure).
        describe: gives name → canonical bytes of the code and configuration of the modules; called again when a
            submodule is replaced or configured differently.
        own: the module whose own plain attributes are compared on every call, or None.

    Attributes:
        generation: counts the sets of submodules.
        parts: what the digest is made of; replaced, never changed.
        modules: all of them as of the last scan; replaced, never changed.
        is_live: whether there are tensors that are digested on every call.
        watch: the native watch of the frozen tensors, if there are any. The caller holds it while using it.
        probe: what the watch found when they were digested.
    """

    def __init__(
        self,
        modules: Callable[[], dict[str, nn.Module]],
        tensors: dict[str, Tensor],
        describe: Callable[[SetByForward], dict[str, bytes]],
        own: nn.Module | None,
    ) -> None:
        self._roots = modules
        self._tensors = tensors
        self._describe = describe
        self._own = own
        self._own_set_by_forward: dict[str, Any] = {}  # attributes of `own`: their first values
        self._set_by_forward: SetByForward = {}  # of all modules
        self._owners: dict[int, weakref.ref[nn.Module]] = {}  # by the id of their __dict__
        self.generation = 0
        self.parts: dict[str, bytes] = {}
        self.modules: list[nn.Module] = []
        self.probe = 0
        self._is_stale = False  # what was found to have changed is not digested: an error or Ctrl-C came between
        self._versions: list[object] = []
        self._scan()

    # ---- checking

    def digest(self, probe: bool = True) -> bytes:
        """16 bytes that change with the state. Cheap when nothing changed.

        Args:
            probe: whether to probe the tensors natively. Else the caller probes the `watch` and compares with `probe`.
        """
        # map() over prepared lists: this runs on every call, and a loop would take three times as long.
        if (
            self._is_stale
            or not all(map(is_, map(_get, *self._columns), self._values))
            or any(self._empty)
            or list(map(type, self.modules)) != self._classes
            or list(map(len, self._filled)) != self._counts
            or (self._ordered and list(map(list, self._ordered)) != self._orders)
            or (RemovableHandle.next_id != self._next_hook and self._hooks_added())
            or any(map(_requires_grad, self._frozen_tensors))
            or (self._live and list(map(_requires_grad, self._live_tensors)) != self._live_flags)
            or (self._attributes and self._attributes_changed())
        ):
            self._is_stale = True
            self._scan()
            self._is_stale = False
            return self._value
        changed = self._changed(probe) if self._frozen else []
        if changed or self._live or self._is_stale:
            self._is_stale = True
            _compute_digests(changed)
            _compute_digests(self._live)
            self._combine()
            self._is_stale = False
        return self._value

    def _changed(self, probe: bool) -> list[_Watched]:
        """The frozen tensors that may have other bytes than at the last check."""
        changed = []
        present = versions(self._frozen_tensors)
        if present != self._versions:
            self._is_stale = True
            changed = [w for w, v in zip(self._frozen, present) if w.version != v]
            self._versions = present
        if probe and self.watch is not None and (result := self.watch.probe()) != self.probe:
            self._is_stale = True
            changed, self.probe = self._frozen, result
        return changed

    @property
    def live_names(self) -> list[str]:
        """Names of the tensors that require grad."""
        return [w.name for w in self._live if w.tensor.requires_grad]

    # ---- attributes set by forward

    def before_forward(self) -> tuple[bytes, list[set[str]], dict[str, Any]]:
        """What `after_forward` compares with."""
        return self._value, [set(d) for d in self._attribute_dicts], self._own_attributes()

    def after_forward(self, before: tuple[bytes, list[set[str]], dict[str, Any]]) -> bool:
        """Whether the forward left the state as it was.

        Attributes that it creates or counts with do not matter. Parameters, buffers and submodules that it adds do:
        they belong to the state from then on.
        """
        value, names, own = before
        for d, old in zip(self._attribute_dicts, names):
            self._set_by_forward.update({(id(d), name): ABSENT for name in d.keys() - old})
        known = len(self._own_set_by_forward)
        for name, now in self._own_attributes().items():
            if name in own and not _same(own[name], now):
                self._own_set_by_forward.setdefault(name, own[name])
                self._attributes[name] = now
        if len(self._own_set_by_forward) != known:
            self._combine()  # another thread may have checked while the forward ran
        self._keep_values_before_forward()
        self._counts[self._attributes_from :] = map(len, self._attribute_dicts)
        # A probe on a GPU would wait for the forward. What only the probe would find counts from the next call on.
        return self.digest(probe=not any(t.is_cuda for t in self._frozen_tensors)) == value

    # ---- scanning

    def _scan(self) -> None:
        self.generation += 1
        self._forget_collected_modules()
        self._description = self._describe(self._set_by_forward)  # first: it may reach more tensors and modules
        self._named = [
            (".".join(filter(None, (root, name))), m)
            for root, module in self._roots().items()
            for name, m in module.named_modules()
        ]
        self.modules = [m for _, m in self._named]
        self._classes = list(map(type, self.modules))
        self._attribute_dicts = [m.__dict__ for m in self.modules]
        self._owners.update({id(m.__dict__): weakref.ref(m) for m in self.modules})
        slots = list(self._slots())
        plain = [m for m in self.modules if isinstance(m._parameters, dict)]  # TorchScript makes new ones each time
        held = [(d, key, value) for _, d, key, value in slots]
        held += [(m.__dict__, name, m.__dict__[name]) for m in plain for name in TENSORS_AND_MODULES]
        self._other_attributes_from = len(held)
        held += self._other_attributes()
        dicts, keys, self._values = map(list, zip(*held)) if held else ([], [], [])
        self._columns: Any = dicts, keys, [ABSENT] * len(held)
        # Those of the module itself run outside the cache.
        hooks = [m.__dict__.get(name, {}) for m in self.modules if m is not self._own for name in FORWARD_HOOKS]
        self._no_hooks, self._next_hook = [d for d in hooks if not d], RemovableHandle.next_id
        self._ordered = [m._modules for m in plain if len(m._modules) > 1] + [d for d in hooks if d]
        self._orders = list(map(list, self._ordered))
        holders = [d for m in self.modules for d in _holders(m)]
        self._empty = [d for d in holders if not d]
        self._filled = [*filter(None, holders), *self._attribute_dicts]
        self._attributes_from = len(self._filled) - len(self._attribute_dicts)
        self._counts = list(map(len, self._filled))
        watched = [_Watched(name, t) for name, t in self._tensors.items()]
        watched += [_Watched(name, value) for name, _, _, value in slots if isinstance(value, Tensor)]
        for w in watched:
            _check_has_bytes(w)
        self._live: list[_Watched] = [w for w in watched if w.is_live]
        self._frozen: list[_Watched] = [w for w in watched if not w.is_live]
        self._live_tensors = [w.tensor for w in self._live]
        self._live_flags = list(map(_requires_grad, self._live_tensors))
        self._frozen_tensors = [w.tensor for w in self._frozen]
        self._versions = versions(self._frozen_tensors)
        _compute_digests(watched)
        self.is_live = bool(self._live)
        self.watch = NativeWatch(self._frozen_tensors) if self._frozen else None
        self.probe = self.watch.probe() if self.watch is not None else 0
        self._attributes: dict[str, Any] = self._own_attributes()
        self._combine()

    def _slots(self) -> Iterator[tuple[str, dict[str, Any], str, Any]]:
        """(name, dictionary, key, value) of everything that may hold a tensor or a submodule."""
        for path, m in self._named:
            prefix = path + "." if path else ""
            for d in _holders(m):
                for key, value in d.items():
                    yield prefix + key, d, key, value
            for key, value in counted(m).items():
                if (isinstance(value, Tensor) or value is None) and not self._is_created_by_forward(m.__dict__, key):
                    yield prefix + key, m.__dict__, key, value

    def _is_created_by_forward(self, attributes: dict[str, Any], name: str) -> bool:
        return self._set_by_forward.get((id(attributes), name)) is ABSENT

    def _other_attributes(self) -> list[tuple[dict[str, Any], str, Any]]:
        """(dictionary, key, value) of other attributes: switches of submodules, functions and objects that they use.

        The module's own plain attributes are compared by value instead. The layers of torch have about ten plain
        attributes each, which are hardly ever set later, and private ones, which they set again themselves.
        """
        return [
            (m.__dict__, key, value)
            for m in self.modules
            for key, value in counted(m).items()
            if value is not None and not isinstance(value, Tensor) and (id(m.__dict__), key) not in self._set_by_forward
            if _may_be_set_later(m, key, value) and not (m is self._own and is_plain(value))
        ]

    def _keep_values_before_forward(self) -> None:
        """Makes what a forward set, such as a counter of a submodule, count as it was before."""
        dicts, keys, absent = self._columns
        watched = range(self._other_attributes_from, len(keys))
        for i in reversed([i for i in watched if dicts[i].get(keys[i], ABSENT) is not self._values[i]]):
            self._set_by_forward[id(dicts[i]), keys[i]] = self._values[i]
            del dicts[i], keys[i], absent[i], self._values[i]

    def _forget_collected_modules(self) -> None:
        """Forgets what forwards set on modules that no longer exist: other modules may have their ids."""
        gone = {key for key, owner in self._owners.items() if owner() is None}
        self._owners = {key: owner for key, owner in self._owners.items() if key not in gone}
        self._set_by_forward = {key: value for key, value in self._set_by_forward.items() if key[0] not in gone}

    def _hooks_added(self) -> bool:
        """Whether a submodule has a new hook. The check runs only after some module of the process got a hook."""
        self._next_hook = RemovableHandle.next_id
        return any(self._no_hooks)

    def _attributes_changed(self) -> bool:
        assert self._own is not None
        now = self._own.__dict__
        for name, value in self._attributes.items():
            if (present := now.get(name, ABSENT)) is not value and not _same(present, value):
                return True
        return False

    def _own_attributes(self) -> dict[str, Any]:
        if self._own is None:
            return {}
        return {name: value for name, value in counted(self._own).items() if is_plain(value)}

    def _combine(self) -> None:
        own = {**self._attributes, **self._own_set_by_forward}
        if self._own is not None:
            attributes = self._own.__dict__
            own = {name: value for name, value in own.items() if not self._is_created_by_forward(attributes, name)}
        self.parts = {
            **self._description,
            **{f"attribute {name}": encode(value) for name, value in own.items()},
            **{f"tensor {w.name}": w.encoded() for w in (*self._frozen, *self._live)},
        }
        self._value: bytes = hashlib.blake2b(encode(dict(sorted(self.parts.items()))), digest_size=16).digest()


class NativeWatch:
    """A native watch that is closed with its owner."""

    def __init__(self, tensors: list[Tensor]) -> None:
        try:
            self.id = ops.watch_open([_plain_view(t) for t in tensors])
        except RuntimeError as error:
            raise Unwatchable(str(error)) from error
        weakref.finalize(self, ops.watch_close, self.id).atexit = False

    def probe(self) -> int:
        """A number that changes with the address, shape, dtype and sampled bytes of the tensors."""
        return ops.watch_probe(self.id)


def _compute_digests(watched: list[_Watched]) -> None:
    for w in watched:
        w.version = version(w.tensor)
    for w, digest in zip(watched, digests([w.tensor for w in watched])):
        w.digest = digest


def digests(tensors: list[Tensor]) -> list[bytes]:
    """The digest of each tensor's bytes, 16 bytes each."""
    try:
        pairs = ops.digests([_one_row(t) for t in tensors]).tolist() if tensors else []
    except (RuntimeError, ValueError) as error:  # of a dtype that has no bytes, or without a storage
        raise Unwatchable(str(error)) from error
    return [struct.pack(">qq", high, low) for low, high in pairs]


def scales(tensor: torch.Tensor) -> tuple[object, ...]:
    """The scales and zero points of a quantised tensor."""
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return tensor.q_scale(), tensor.q_zero_point()
    scales = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    return tensor.q_per_channel_axis(), *(tuple(item.tolist()) for item in scales)


def _one_row(t: Tensor) -> Tensor:
    t = t.detach()
    if t.layout is not torch.strided or t.is_quantized:
        t = t.to_dense() if not t.is_quantized else t.int_repr()
    return ops.hashable(t)


def _plain_view(t: Tensor) -> Tensor:
    """The tensor for the native watch; an empty one instead of a tensor without strided memory."""
    if t.layout is not torch.strided or t.is_quantized or t.is_meta:
        return torch.empty(0, device="cpu")
    return ops.bits(t)


def _may_be_set_later(m: nn.Module, name: str, value: Any) -> bool:
    if not type(m).__module__.startswith("torch.nn."):
        return True
    return not (is_plain(value) or name.startswith("_"))


def _holders(m: nn.Module) -> list[dict[str, Any]]:
    """The dicts of a module's parameters, buffers and submodules. A scripted module has immutable native ones."""
    dicts = (m._parameters, m._buffers, m._modules)
    return [d if isinstance(d, dict) else dict(d.items()) for d in dicts]


def _check_has_bytes(w: _Watched) -> None:
    t = w.tensor
    if torch.nn.parameter.is_lazy(t):
        raise Uninitialized(w.name)
    if t.is_meta:
        raise Unwatchable(f"{w.name} is on the meta device")
    if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise Unwatchable(f"{w.name} is a {type(t).__name__}")


def _same(a: Any, b: Any) -> bool:
    """Equal in type and value, for plain attributes; NaN is the same as itself."""
    return a is b or (is_plain(a) and is_plain(b) and encode(a) == encode(b))
