"""Losses, accuracies, gradient clipping and learning rates of M models at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import as_integer, check_number_of_models, inner_batch_size, merge_batch, split_batch
from .functorch import quiet
from .rules.autocast import autocast_enabled
from .shared import Shared

Loss = Callable[..., Tensor]
Reduction = str
REDUCTIONS = ("none", "mean", "sum")

__all__ = [
    "batch_accuracy",
    "batch_loss",
    "batch_topk",
    "clip_grad_norm_",
    "inner_batch_size",
    "merge_batch",
    "per_model_lr",
    "split_batch",
    "to_batch_func",
]


def batch_loss(
    batch_inputs: Tensor,
    batch_targets: Any,
    batch: int | None = None,
    loss_func: Loss = F.cross_entropy,
    reduction: Reduction = "mean",
    **kwargs: Any,
) -> Tensor:
    """What loss_func(inputs, targets, reduction=reduction, **kwargs) gives for each model, stacked.

    batch_inputs: (M, B, …). batch_targets: (M, …), or `shared` targets of one model. kwargs: the same for all models.
    Returns [M], or (M, *shape of one call) for reduction="none". Its sum has each model's own gradients. Of half and
    bfloat16 inputs it is computed model by model, and equal to the last bit; otherwise as sums round in their dtype.
    ValueError if a first dimension is not M = `batch`, or the reduction is unknown.
    """
    batch = len(batch_inputs) if batch is None else batch
    if isinstance(batch_targets, Shared):
        batch_targets = batch_targets.value.expand(batch, *batch_targets.value.shape)
    _check_batch(batch, inputs=batch_inputs, targets=batch_targets)
    if reduction not in REDUCTIONS and not (loss_func is F.kl_div and reduction == "batchmean"):
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")

    in_half = batch_inputs.dtype in _HALVES
    as_one = loss_func is F.cross_entropy and kwargs.keys() <= {"ignore_index"}
    if as_one and _are_classes(batch_inputs, batch_targets) and (not in_half or autocast_enabled(batch_inputs)):
        return _cross_entropy(batch_inputs, batch_targets, reduction, **kwargs)

    def one_model(inputs: Tensor, targets: Tensor) -> Tensor:
        return loss_func(inputs, targets, reduction=reduction, **kwargs)

    if not in_half:
        with suppress(Exception), quiet:  # what vmap refuses; an error of the loss itself comes again
            return torch.func.vmap(one_model, randomness="different")(batch_inputs, batch_targets)
    return torch.stack([one_model(i, t) for i, t in zip(batch_inputs, batch_targets, strict=True)])


# Where a loss rounds and in which order it sums shows in these, and no call for all models does it as one of its own.
_HALVES = (torch.half, torch.bfloat16)


def _check_batch(batch: int, **tensors: Tensor) -> None:
    check_number_of_models(batch)
    for name, tensor in tensors.items():
        if tensor.dim() < 1 or len(tensor) != batch:
            raise ValueError(f"{name} of {batch} models must be ({batch}, ...), got {tuple(tensor.shape)}")


def _are_classes(inputs: Tensor, targets: Tensor) -> bool:
    """Whether these are logits (M, B, C, …) and class numbers (M, B, …)."""
    return (
        not targets.is_floating_point() and inputs.dim() >= 3 and targets.shape == inputs.shape[:2] + inputs.shape[3:]
    )


# Up to so many classes the CPU's softmax is 3-5× faster over a dimension that is not the last (measured with AVX-512).
_FEW_CLASSES = 16


def _cross_entropy(inputs: Tensor, targets: Tensor, reduction: str, ignore_index: int = -100) -> Tensor:
    """The most frequent loss in one call for all models."""
    if targets.dtype is torch.uint8:
        targets = targets.long()  # which not every way below takes
    if inputs.dim() == 3 and inputs.shape[2] <= _FEW_CLASSES and inputs.device.type == "cpu":
        loss = F.cross_entropy(inputs.mT, targets, ignore_index=ignore_index, reduction="none")
    else:
        first = 1 if inputs.stride(1) > inputs.stride(0) else 0  # models or images, as they lie in memory
        rows, classes = (x.transpose(0, first).flatten(0, 1) for x in (inputs, targets))
        loss = F.cross_entropy(rows, classes, ignore_index=ignore_index, reduction="none")
        loss = loss.view(targets.transpose(0, first).shape).transpose(0, first)
    if reduction == "none":
        return loss
    total = loss.flatten(1).sum(1)
    return total if reduction == "sum" else total / (targets != ignore_index).flatten(1).sum(1)


def batch_topk(
    batch_inputs: Tensor, batch_targets: Any, batch: int | None = None, k: Sequence[int] = (1,), count: bool = False
) -> Tensor:
    """Top-k accuracies of M models, one row for each k: [len(k), M], fractions of B, or int64 counts if `count`.

    batch_inputs: scores (M, B, C). batch_targets: class numbers (M, B), or `shared` ones (B,).
    ValueError if a shape does not fit, or a k is not between 1 and C.
    """
    batch = len(batch_inputs) if batch is None else batch
    if isinstance(batch_targets, Shared):
        batch_targets = batch_targets.value.expand(batch, -1)
    _check_batch(batch, inputs=batch_inputs, targets=batch_targets)
    if batch_inputs.dim() != 3 or batch_targets.shape != batch_inputs.shape[:2]:
        shapes = tuple(batch_inputs.shape), tuple(batch_targets.shape)
        raise ValueError(f"scores must be (M, B, C) and targets (M, B), got {shapes[0]} and {shapes[1]}")
    ks = [as_integer("k", one) for one in ((k,) if isinstance(k, int) else k)]
    if not ks:
        raise ValueError(f"k must hold at least one number, such as (1,), got {k}")
    classes = batch_inputs.shape[2]
    for one in ks:
        if not 1 <= one <= classes:
            raise ValueError(f"k must be between 1 and the {classes} classes, got {one}")
    hits = batch_inputs.topk(max(ks), -1).indices == batch_targets.unsqueeze(-1)
    counts = torch.stack([hits[..., :one].any(-1).sum(1) for one in ks])
    return counts if count else torch.div(counts, batch_targets.shape[1])


batch_accuracy = batch_topk


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor | nn.Module,
    max_norm: float | Tensor,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Clips the gradients of each model as torch.nn.utils.clip_grad_norm_ would those of the model alone.

    parameters: (M, …) each, or a BatchModule. max_norm: one number, or [M]. Returns the norms before, [M],
    zeros if there are no gradients.
    ValueError if the numbers of models differ; RuntimeError for a norm that is not finite, if `error_if_nonfinite`.
    """
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not given:
        return torch.zeros(0)
    batch = len(given[0]) if given[0].dim() else 1
    _check_batch(batch, **{f"parameter {i}": p for i, p in enumerate(given)})
    grads = [p.grad for p in given if p.grad is not None]
    if not grads:
        return given[0].new_zeros(batch)
    norms = [torch.linalg.vector_norm(g.reshape(len(g), -1), norm_type, dim=1) for g in grads]
    total: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]), norm_type, dim=0)
    if error_if_nonfinite and not total.isfinite().all():
        models = (~total.isfinite()).nonzero().flatten().tolist()
        raise RuntimeError(f"the gradients of models {models} have a norm that is not finite")
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factor.to(grad.device, grad.dtype).view(-1, *[1] * (grad.dim() - 1)))
    return total


# Their step is not proportional to the learning rate, or not a model's own.
_NOT_PROPORTIONAL = (torch.optim.Rprop, torch.optim.ASGD, torch.optim.LBFGS, torch.optim.Adafactor)


# In the optimizer's groups, and so in its state: the learning rate to which those of the models are relative.
_BASE = "per_model_base_lr"


class PerModelLR:
    """See `per_model_lr`. `remove` gives the models their common learning rate back."""

    def __init__(self, optimizer: torch.optim.Optimizer, learning_rates: Tensor) -> None:
        self._optimizer, self._rates = optimizer, learning_rates
        for group in optimizer.param_groups:
            self._base(group)
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._scale),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for group in self._optimizer.param_groups:
            group.pop(_BASE, None)

    def _base(self, group: dict[str, Any]) -> float:
        if _BASE not in group:
            if group["lr"] == 0:
                raise ValueError("the learning rate of the optimizer is 0: there is no step to scale")
            _check_batch(self._rates.numel(), **{f"parameter {i}": p for i, p in enumerate(group["params"])})
            group[_BASE] = float(group["lr"])
        return float(group[_BASE])

    @torch.no_grad()
    def _remember(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._before = [
            (p, p.clone(), factor)
            for group in optimizer.param_groups
            for factor in [self._rates / self._base(group)]
            for p in group["params"]  # also without a gradient: a closure may make it within the step
        ]

    @torch.no_grad()
    def _scale(self, *_: Any) -> None:
        for p, before, factor in self._before:
            weight = factor.to(p.device, p.dtype).view(-1, *[1] * (p.dim() - 1))
            torch.lerp(before, p, weight, out=p)
        self._before = []


def per_model_lr(optimizer: torch.optim.Optimizer, learning_rates: Sequence[float] | Tensor) -> PerModelLR:
    """From now on each step of `optimizer` moves model m as one with the learning rate learning_rates[m] would.

    The step is taken with the optimizer's own rate and then scaled by learning_rates[m] / lr, as lr is now: schedulers
    go on and change all models alike. Exact for SGD, Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad, Adadelta and Adamax.
    Another call replaces the rates. An optimizer that loads the state of this one needs a call of its own, before or
    after; what lr was at first is in the state.
    ValueError for an optimizer whose step is not proportional to its learning rate, for lr = 0, rates below 0 or
    infinite and for parameters that are not (M, …).
    """
    rates = torch.as_tensor(learning_rates, dtype=torch.float64)
    if not rates.isfinite().all() or (rates < 0).any():
        raise ValueError(f"learning rates must be finite and at least 0, got {rates.tolist()}")
    if isinstance(optimizer, _NOT_PROPORTIONAL):
        raise ValueError(f"the steps of {type(optimizer).__name__} are not proportional to its learning rate")
    if isinstance(before := vars(optimizer).get("_per_model_lr"), PerModelLR):
        before.remove()
    handle = PerModelLR(optimizer, rates)
    vars(optimizer)["_per_model_lr"] = handle
    return handle


def to_batch_func(function: Callable[..., Any], batch: int) -> Callable[..., Any]:
    """`function` of one model's tensors → the same of (M, …) ones, model by model alike."""

    def batched(*args: Any, **kwargs: Any) -> Any:
        return torch.func.vmap(lambda *own: function(*own, **kwargs), randomness="different")(*args)

    return batched
