"""Different initialisations of one module."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from .state import copied
from .torch_private import RESETS


def initialised(module: nn.Module, seeds: Sequence[int]) -> list[nn.Module]:
    """A copy of `module` for each seed, drawn anew; the generators are left as they were.

    Each submodule that has a reset_parameters draws its parameters, inner ones first: the order in which they were
    drawn when it was made, so that ordinary modules get the weights that a new one gets after torch.manual_seed(seed).
    Warns of a parameter that was drawn in some other way and so is the same in all copies.
    """
    copies = []
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        for seed in seeds:
            one = copied(module)
            torch.manual_seed(seed)
            one.apply(_reset)
            copies.append(one)
    if len(set(seeds)) > 1:
        _warn_of_equals(copies)
    return copies


@torch.no_grad()
def _reset(module: nn.Module) -> None:
    for name in RESETS:
        if callable(reset := getattr(module, name, None)):
            reset()
            return


def _warn_of_equals(copies: Sequence[nn.Module]) -> None:
    first, *others = (dict(one.named_parameters()) for one in copies)
    equal = [
        name
        for name, p in first.items()
        if bool((p != p.flatten()[0]).any()) and all(p.equal(other[name]) for other in others)
    ]
    if equal:
        warnings.warn(
            f"no reset_parameters() draws {', '.join(equal)}: the same in all models; BatchModule.from_modules takes "
            "models that were made one by one",
            stacklevel=4,
        )
