"""Training or eval: the flags of modules, which are part of every key."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple

from torch import nn

from torchcache.engine.bypass import Bypassed, of_modules
from torchcache.identity.identity import State

_is_training = attrgetter("training")


class _Flags(NamedTuple):
    """What the training flags of a set of modules give."""

    modules: list[nn.Module]  # all that the forward may use, apart from the module itself
    flags: bytes
    mode: bytes
    bypassed: Bypassed | None


class Mode:
    """The training flags of modules, and whether cached rows could be right in that mode."""

    def __init__(self, modules: Callable[[State | None], list[nn.Module]]) -> None:
        self._list_modules = modules
        self._last = _Flags([], b"", b"", None)

    def of(self, state: State | None) -> tuple[bytes, Bypassed | None]:
        """The mode, for keys, and why calls in this mode are not cached, if they are not.

        The mode is one byte where all flags are the same, else one for each submodule in order.
        """
        modules = self._list_modules(state)
        try:
            flags = bytes(map(_is_training, modules))
        except AttributeError:  # frozen TorchScript has none
            modules = [m for m in modules if hasattr(m, "training")]
            flags = bytes(map(_is_training, modules))
        last = self._last
        if flags != last.flags or modules[1:] != last.modules:
            mode = flags if any(flags) and not all(flags) else flags[:1]
            self._last = last = _Flags(modules[1:], flags, mode, of_modules(modules))
        return last.mode, last.bypassed
