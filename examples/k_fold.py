"""k-fold cross-validation as one batch of models: fold m is model m, all folds are trained at once.

Compares hyperparameters (here widths of a hidden layer) by their mean accuracy on what each fold holds out, on made-up
spirals that take a moment. Needs nothing but torch.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn as nn
from torch import Tensor

from torchmb import BatchModule, batch_accuracy, batch_loss


def folds(rows: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of the rows that each fold trains on, (k, rows - rows // k), and holds out, (k, rows // k).

    Each row is held out by at most one fold, and by exactly one if k divides `rows`.
    """
    if not 2 <= k <= rows:
        raise ValueError(f"k must be between 2 and the {rows} rows, got {k}")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    size = rows // k
    held_out = order[: k * size].view(k, size)
    train = torch.stack([order[(order.unsqueeze(1) != fold).all(1)] for fold in held_out])
    return train, held_out


def cross_validate(
    model: nn.Module, x: Tensor, y: Tensor, k: int, epochs: int = 200, rate: float = 0.01, seed: int = 0
) -> Tensor:
    """Trains k models, initialised by their own seeds, each on its fold → accuracies on what they hold out, [k]."""
    train, held_out = folds(len(y), k, seed)
    models = BatchModule(model, seeds=range(k))
    optimizer = torch.optim.Adam(models.parameters(), rate)
    for _ in range(epochs):
        losses = batch_loss(models(x[train]), y[train])  # x[train] is (k, rows of a fold, features)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    with torch.no_grad():
        return batch_accuracy(models.eval()(x[held_out]), y[held_out])[0]


def spirals(rows: int, arms: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points (rows, 2) of `arms` noisy spirals, and the arm of each, [rows]."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(rows) % arms
    radius = torch.rand(rows, generator=generator).sqrt()
    angle = 4 * radius + y * (2 * torch.pi / arms)
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return x + 0.02 * torch.randn(rows, 2, generator=generator), y


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--rows", type=int, default=600)
    given = parser.parse_args()
    x, y = spirals(given.rows)
    print(f"{given.folds} folds of {given.rows} points at once")
    for width in (2, 4, 8, 16, 32):
        start = time.perf_counter()
        accuracies = cross_validate(mlp(width), x, y, given.folds)
        seconds = time.perf_counter() - start
        print(f"width {width:3}: {accuracies.mean():6.1%} ± {accuracies.std():.1%}  {seconds:.2f} s")


if __name__ == "__main__":
    main()
