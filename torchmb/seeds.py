"""Initialises copies of one module from seeds."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from .state import copy_module
from .torch_private import RESETS


def initialised_copies(module: nn.Module, seeds: Sequence[int]) -> list[nn.Module]:
    """A copy of `module` for each seed, initialised again; the states of the random generators do not change.

    reset_parameters() of each submodule draws its parameters, inner submodules first. Constructors draw in the same
    order, so most modules get the weights that a new one has after torch.manual_seed(seed). A warning names parameters
    that no reset_parameters() draws, which are equal in all copies.
    """
    copies = []
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        for seed in seeds:
            one = copy_module(module)
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
            f"no reset_parameters() draws {', '.join(equal)}: equal in all models; build the models one by one and "
            "pass them to BatchModule.from_modules",
            stacklevel=4,
        )
