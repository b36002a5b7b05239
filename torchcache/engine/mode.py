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
        self._last: tuple[bytes, bytes, Bypassed | None] = b"", b"", None  # flags, and what `of` returns for them

    def of(self, generation: int) -> tuple[bytes, Bypassed | None]:
        """The mode, for keys, and why calls in this mode are not cached, if they are not.

        The mode is one byte where all flags are the same, else one for each submodule in order. Callers hold the lock
        of the state.

        Args:
            generation: of the set of submodules (see `State.generation`).
        """
        if generation != self._generation:
            self._modules = [m for m in self._list_modules() if hasattr(m, "training")]  # frozen TorchScript has none
            self._last, self._generation = (b"", b"", None), generation
        flags = bytes(map(_is_training, self._modules))
        if flags != self._last[0]:
            mode = flags if any(flags) and not all(flags) else flags[:1]
            self._last = flags, mode, of_modules(self._modules)
        return self._last[1:]
