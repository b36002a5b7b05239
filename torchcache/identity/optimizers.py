"""Which tensors optimizers have changed: a fused optimizer moves no version counter, and not every byte."""

from __future__ import annotations

import weakref
from collections.abc import Container
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from torchcache._utils.torch_private import untraced

UNKNOWN = -1  # steps are not counted yet

# By the id of an optimizer: the optimizer, and the number of its last step among those of all optimizers.
_last_steps: dict[int, tuple[weakref.ref[Optimizer], int]] = {}
_steps = UNKNOWN


def count_steps() -> None:
    """Counts the steps of all optimizers from now on."""
    global _steps
    if _steps == UNKNOWN:
        _steps = 0
        register_optimizer_step_post_hook(_after_step)


@untraced
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    global _steps
    _steps += 1
    _last_steps[id(optimizer)] = weakref.ref(optimizer), _steps


def steps() -> int:
    """How many steps were counted."""
    return _steps


def have_changed(ids: Container[int], since: int) -> bool:
    """Whether an optimizer that has one of these tensors, given by their ids, made a step since `steps` was `since`."""
    return _steps != since and any(
        number > since and _has_any(optimizer(), ids) for optimizer, number in list(_last_steps.values())
    )


def _has_any(optimizer: Optimizer | None, ids: Container[int]) -> bool:
    """Of an optimizer that is gone nobody knows."""
    return optimizer is None or any(id(p) in ids for group in optimizer.param_groups for p in group["params"])
