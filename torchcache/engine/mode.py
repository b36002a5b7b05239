"""Training or eval: the flags of modules, which are part of every key."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from torch import nn

from torchcache.engine.bypass import Bypassed, of_modules

_is_training = attrgetter("training")


class Mode:
    """The training flags of modules, and whether cached rows could be right in that mode."""

    def __init__(self, modules: Callable[[], list[nn.Module]]) -> None:
        self._list_modules = modules
        self._generation = -1
        self._flags = self._encoded = b""
        self.bypassed: dict[bytes, Bypassed | None] = {}  # by what `flags` returned: why such calls are not cached

    def flags(self, generation: int) -> bytes:
        """One byte where all flags are the same, else one for each submodule in order.

        Args:
            generation: of the set of submodules (see `State.generation`).
        """
        if generation != self._generation:
            self._modules = [m for m in self._list_modules() if hasattr(m, "training")]  # frozen TorchScript has none
            self._flags, self._encoded, self.bypassed, self._generation = b"", b"", {b"": None}, generation
        flags = bytes(map(_is_training, self._modules))
        if flags != self._flags:
            encoded = flags if any(flags) and not all(flags) else flags[:1]
            self.bypassed[encoded] = of_modules(self._modules)
            self._encoded, self._flags = encoded, flags
        return self._encoded
