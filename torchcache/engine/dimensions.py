"""Recognises layers that expect the sequence in dimension 0, where torchcache expects the batch."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchcache._utils.logs import WarnOnce

_once = WarnOnce()
_MESSAGE = (
    "%s: %s take the sequence in dimension 0, not the batch (batch_first=False, the default of torch). If the inputs "
    "of the cached module are [T, B, ...], cached rows depend on their neighbours: build the layers with "
    "batch_first=True. If its forward swaps the dimensions itself, this is fine"
)


def warn_of_sequence_first(module: nn.Module, subject: Any) -> None:
    """Warns of attention and recurrent layers with ``batch_first=False``, once for each subject."""
    layers = {
        type(m).__name__: None
        for m in module.modules()
        if isinstance(m, (nn.MultiheadAttention, nn.RNNBase)) and not m.batch_first
    }
    if layers:
        _once.warn(subject, _MESSAGE, type(module).__qualname__, ", ".join(layers))
