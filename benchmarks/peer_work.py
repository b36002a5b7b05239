"""The work that all rivals of peers.py do: inputs, and a frozen module that counts the rows that it computes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

FEATURES = 768
WEIGHT = torch.linspace(1, 2, FEATURES)
computed = [0]  # rows, since the process began


class Work(NamedTuple):
    title: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    calls: int  # in a round, whose median counts
    epoch: int  # batches that a new process reads from disk

    def batch(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.dtype.is_floating_point:
            return torch.randn(self.shape, generator=generator)
        return torch.randint(0, 1000, self.shape, generator=generator)


WORKS = {
    "images": Work("(64, 3, 224, 224) f32", (64, 3, 224, 224), torch.float32, 3, 5),
    "vectors": Work("(256, 512) f32", (256, 512), torch.float32, 100, 32),
    "ids": Work("(64, 128) int64", (64, 128), torch.int64, 100, 32),
}


def features(x: Tensor, weight: Tensor) -> Tensor:
    """[B, …] → [B, 768] f32, to which every element of a row contributes at its position."""
    rows = x.reshape(len(x), -1).float()
    padded = nn.functional.pad(rows, (0, -rows.shape[1] % FEATURES))
    return padded.view(len(x), -1, FEATURES).sum(1) * weight


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        computed[0] += len(x)
        return features(x, self.weight)
