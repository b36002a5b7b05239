"""Training or eval: the flags of modules, which are part of every key."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from torch import nn

from torchcache.engine.bypass import of_modules

_is_training = attrgetter("training")


class Mode:
    """The training flags of modules, and whether cached rows could be right in that mode."""

    def __init__(self, modules: Callable[[], list[nn.Module]]) -> None:
        self._list_modules = modules
        self._generation = -1
        self._flags = self._encoded = b""
        self.reason: str | None = None  # why calls in this mode are not cached

    def flags(self, generation: int) -> bytes:
        """One byte where all flags are the same, else one for each submodule in order."""
        if generation != self._generation:
            self._modules = [m for m in self._list_modules() if hasattr(m, "training")]  # frozen TorchScript has none
            self._flags, self._encoded, self._generation = b"", b"", generation
        flags = bytes(map(_is_training, self._modules))
        if flags != self._flags:
            self._flags = flags
            self._encoded = flags if any(flags) and not all(flags) else flags[:1]
            self.reason = of_modules(self._modules)
        return self._encoded
