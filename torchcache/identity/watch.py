"""A cheap check, on every call, whether anything that a snapshot is made of may have changed since."""

from __future__ import annotations

import copy
import itertools
import types
import weakref
from collections.abc import Callable, Iterable
from operator import attrgetter, getitem, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from torchcache._native import ops
from torchcache._utils.torch_private import versions
from torchcache.identity import optimizers
from torchcache.identity.attributes import FORWARD_HOOKS, TENSORS_AND_MODULES, counted, counts_in_module
from torchcache.identity.encoding import is_builtin
from torchcache.identity.slots import ABSENT, LENGTH, Slot, Slots, are_equal, is_of_torch, is_same, may_be_set_later
from torchcache.identity.tensors import Unwatchable, digests, plain_view

_cell_contents = attrgetter("cell_contents")
_code = attrgetter("__code__", "__defaults__", "__kwdefaults__")
_requires_grad = attrgetter("requires_grad")
_data_ptr = Tensor.data_ptr
_holders_of = itemgetter(*TENSORS_AND_MODULES)
_DIFFER = (LookupError, ValueError, TypeError, AttributeError, RuntimeError)


class Modules(NamedTuple):
    """The modules that a computation uses.

    Attributes:
        own: the module itself, to which nothing here refers; None: the computation is a function.
        others: all other modules.
    """

    own: nn.Module | None
    others: list[nn.Module]

    @property
    def all(self) -> list[nn.Module]:
        """Every module once."""
        return self.others if self.own is None else [self.own, *self.others]


class Watch:
    """Compares what a snapshot was made of with what is there now. Immutable, and it does not keep `own` alive.

    Args:
        modules: all modules.
        tensors: all tensors.
        slots: where everything else was found.
    """

    def __init__(self, modules: Modules, tensors: list[Tensor], slots: Slots) -> None:
        own = modules.own
        own_dict = None if own is None else own.__dict__
        found = slots.slots.values()
        self._slots = [s for s in found if s.container is not own_dict]
        self._own_slots = [s._replace(container=None) for s in found if s.container is own_dict]
        self._own_keys = set() if own is None else set(own.__dict__)
        self._sized = [*(c for c in slots.sized.values() if c is not own_dict), *(m.__dict__ for m in modules.others)]
        self._cells = list(slots.cells.values())
        self.functions = list(slots.functions.values())
        self._lists = list(slots.lists.values())
        self._reads = list(slots.reads.values())
        self._layers = _layer_attributes(modules.others)
        self._others = modules.others
        self._watch_structure(modules)
        self._watch_tensors(modules, tensors)
        self._complete()

    def _watch_structure(self, modules: Modules) -> None:
        plain = [m for m in modules.all if isinstance(m._parameters, dict)]  # TorchScript makes new ones each time
        self._holders = [d for m in plain for d in _holders_of(m.__dict__)]
        self._empty, self._filled = [d for d in self._holders if not d], [d for d in self._holders if d]
        self._lengths = list(map(len, self._filled))
        self._held_in = [d for d in self._filled for _ in d], [key for d in self._filled for key in d]
        self._held = [value for d in self._filled for value in d.values()]
        self._ordered = [m._modules for m in plain if len(m._modules) > 1]
        self._orders = list(map(list, self._ordered))
        self._plain_others = [m.__dict__ for m in plain if m is not modules.own]
        self._own_is_plain = modules.own in plain
        # Those of the module itself run outside the cache.
        hooks = [m.__dict__.get(name, {}) for m in modules.others for name in FORWARD_HOOKS]
        self._no_hooks, self._next_hook = [d for d in hooks if not d], RemovableHandle.next_id
        self._hooks = [d for d in hooks if d]
        self._hook_keys = list(map(list, self._hooks))
        self._classes = list(map(type, modules.others))
        self._functional = list(vars(functional).values())

    def _watch_tensors(self, modules: Modules, tensors: list[Tensor]) -> None:
        self._parameters = [p for m in modules.all for p in dict(m._parameters).values() if p is not None]
        self._flags = list(map(_requires_grad, self._parameters))
        self.trained = [t for t in tensors if t.requires_grad]
        if self.trained:
            optimizers.count_steps()
        self._steps = optimizers.steps()
        self.tensors = tensors
        self._ids = frozenset(map(id, tensors))
        self._versions = versions(tensors)
        self._addressed = [t for t in tensors if t.layout is torch.strided and not t.is_meta]
        self._addresses = list(map(_data_ptr, self._addressed))
        self._unversioned = [t for t in tensors if t.is_inference()]
        self._digests = digests(self._unversioned)
        self.native = NativeWatch(tensors) if tensors else None

    def _complete(self) -> None:
        """Computes the columns that `holds` compares without a loop."""
        self._columns = [s.container for s in self._slots], [s.key for s in self._slots]
        self._values = [s.value for s in self._slots]
        self._own_names, self._own_values = [s.key for s in self._own_slots], [s.value for s in self._own_slots]
        self._sizes, self._keys = list(map(len, self._sized)), list(map(set, self._sized))
        self._cell_list, self._cell_values = [s.container for s in self._cells], [s.value for s in self._cells]
        self._codes = list(map(_code, self.functions))

    # ---- checking

    def holds(self, own: nn.Module | None, probe: bool = True) -> bool:
        """Whether everything is as it was.

        Args:
            own: the module itself.
            probe: whether to probe the tensors natively. Else the caller does, and compares with `native.first`.
        """
        try:
            return self._slots_hold(own) and self._rest_holds(own, probe)
        except _DIFFER:  # something is gone, or is no longer what it was
            return False

    def _slots_hold(self, own: nn.Module | None) -> bool:
        # map() over prepared lists: this runs on every call, and a loop would take three times as long.
        return (
            (all(map(is_, map(getitem, *self._columns), self._values)) or are_equal(self._slots))
            and (all(map(is_, map(_cell_contents, self._cell_list), self._cell_values)) or are_equal(self._cells))
            and list(map(len, self._sized)) == self._sizes
            and (own is None or self._own_holds(own.__dict__))
        )

    def _own_holds(self, attributes: dict[str, Any]) -> bool:
        present = map(attributes.__getitem__, self._own_names)
        return len(attributes) == len(self._own_keys) and (
            all(map(is_, present, self._own_values))
            or are_equal([s._replace(container=attributes) for s in self._own_slots])
        )

    def _rest_holds(self, own: nn.Module | None, probe: bool) -> bool:
        holders = itertools.chain.from_iterable(map(_holders_of, self._plain_others))
        if self._own_is_plain and own is not None:
            holders = itertools.chain(_holders_of(own.__dict__), holders)
        return (
            all(map(is_, holders, self._holders))
            and all(map(is_, map(getitem, *self._held_in), self._held))
            and list(map(len, self._filled)) == self._lengths
            and not any(self._empty)
            and list(map(list, self._ordered)) == self._orders
            and list(map(type, self._others)) == self._classes
            and all(list(map(getter, dicts)) == values for getter, dicts, values in self._layers)
            and list(map(list, self._hooks)) == self._hook_keys
            and (RemovableHandle.next_id == self._next_hook or not any(self._no_hooks))
            and list(map(_code, self.functions)) == self._codes
            and all(read() is value for read, value in self._reads)
            and list(vars(functional).values()) == self._functional
            and self.tensors_hold(probe)
        )

    def tensors_hold(self, probe: bool) -> bool:
        """Whether the tensors have the bytes that they had, as far as can be told without reading all of them."""
        return (
            list(map(_requires_grad, self._parameters)) == self._flags
            and versions(self.tensors) == self._versions
            and list(map(_data_ptr, self._addressed)) == self._addresses
            and not (optimizers.steps() != self._steps and optimizers.have_changed(self._ids, self._steps))
            and (not self._unversioned or digests(self._unversioned) == self._digests)
            and (not probe or self.native is None or self.native.probe() == self.native.first)
        )

    def may_hold_again(self, other: Watch) -> bool:
        """Whether a switch that is set back is all that this watch needs to hold instead of the other one."""
        return self._ids <= other._ids and self.tensors_hold_versions()

    def tensors_hold_versions(self) -> bool:
        """Whether no version has moved: versions never return."""
        return versions(self.tensors) == self._versions

    # ---- what forwards set

    def changes(self, own: nn.Module | None) -> list[Slot]:
        """What differs in slots and attributes, each with its value before; ABSENT if it is new."""
        slots, sized = self._all_slots(own), list(zip(self._sized, self._keys))
        if own is not None:
            sized.append((own.__dict__, self._own_keys))
        changed = [s for s in slots if not is_same(s.present, s.value)]
        created = [(container, key) for container, keys in sized for key in container.keys() - keys]
        return changed + [Slot(c, key, ABSENT) for c, key in created if "_parameters" not in c or counts_in_module(key)]

    def _all_slots(self, own: nn.Module | None) -> list[Slot]:
        of_own = [] if own is None else [s._replace(container=own.__dict__) for s in self._own_slots]
        return [*self._slots, *self._cells, *of_own]

    def appended(self) -> list[Slot]:
        """The lengths of lists to which somebody has appended: results, which do not count."""
        return [Slot(items, LENGTH, length) for items, length in self._lists if len(items) > length]

    def after(self, changed: Iterable[Slot], own: nn.Module | None) -> Watch:
        """The same watch for what a forward left behind.

        Args:
            changed: the slots that do not count any more. Others that have changed have an equal value now.
            own: the module itself.
        """
        gone = {(id(s.container), s.key) for s in changed}
        slots = [s for s in self._all_slots(own) if (id(s.container), s.key) not in gone]
        slots = [s if s.present is s.value else s._replace(value=s.present) for s in slots]
        new = copy.copy(self)
        own_dict = None if own is None else own.__dict__
        new._own_slots = [s._replace(container=None) for s in slots if s.container is own_dict]
        new._cells = [s for s in slots if isinstance(s.container, types.CellType)]
        new._slots = [s for s in slots if s.container is not own_dict and not isinstance(s.container, types.CellType)]
        new._own_keys = set() if own is None else set(own.__dict__)
        new._complete()
        return new


def _layer_attributes(modules: Iterable[nn.Module]) -> list[tuple[Callable[[Any], Any], list[Any], list[Any]]]:
    """The plain attributes of torch's own layers, such as a stride, compared by value: there are hundreds of them."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for m in filter(is_of_torch, modules):
        names = tuple(n for n, value in counted(m).items() if is_builtin(value) and may_be_set_later(m, n))
        if names:
            groups.setdefault(names, []).append(m.__dict__)
    getters = [(itemgetter(*names), dicts) for names, dicts in groups.items()]
    return [(getter, dicts, list(map(getter, dicts))) for getter, dicts in getters]


class NativeWatch:
    """A native watch that is closed with its owner.

    Attributes:
        first: the result of the first probe.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        try:
            self.id = ops.watch_open([plain_view(t) for t in tensors])
        except RuntimeError as error:
            raise Unwatchable(str(error)) from error
        weakref.finalize(self, ops.watch_close, self.id).atexit = False
        self.first = self.probe()

    def probe(self) -> int:
        """A number that changes with the address, shape, dtype and sampled bytes of the tensors."""
        return ops.watch_probe(self.id)
