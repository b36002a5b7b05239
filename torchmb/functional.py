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
    """Computes loss_func(inputs, targets, reduction=reduction, **kwargs) for each model.

    Backward from their sum gives each model its own gradients. For half and bfloat16 inputs the losses are computed
    model by model and equal to the last bit, otherwise up to rounding.

    Args:
        batch_inputs: Outputs of all models (M, B, …).
        batch_targets: Targets of all models (M, …), or `torchmb.shared` targets of one model.
        batch: M; by default the first dimension of the inputs.
        loss_func: The loss of one model.
        reduction: "none", "mean" or "sum".
        **kwargs: Further arguments of the loss, the same for all models.

    Returns:
        The losses [M], or (M, *shape of one model's loss) for reduction="none".

    Raises:
        ValueError: A first dimension is not M, or the reduction is unknown.

    Example:
        >>> logits, classes = torch.zeros(3, 5, 10), torch.arange(5)
        >>> torchmb.batch_loss(logits, torchmb.shared(classes))
        tensor([2.3026, 2.3026, 2.3026])
    """
    batch = len(batch_inputs) if batch is None else batch
    if isinstance(batch_targets, Shared):
        batch_targets = batch_targets.value.expand(batch, *batch_targets.value.shape)
    _check_batch(batch, inputs=batch_inputs, targets=batch_targets)
    if reduction not in REDUCTIONS and not (loss_func is F.kl_div and reduction == "batchmean"):
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")

    in_half = batch_inputs.dtype in _HALVES
    is_plain = loss_func is F.cross_entropy and kwargs.keys() <= {"ignore_index"}
    if is_plain and _are_classes(batch_inputs, batch_targets) and (not in_half or autocast_enabled(batch_inputs)):
        return _cross_entropy(batch_inputs, batch_targets, reduction, **kwargs)

    def one_model(inputs: Tensor, targets: Tensor) -> Tensor:
        return loss_func(inputs, targets, reduction=reduction, **kwargs)

    if not in_half:
        with suppress(Exception), quiet:  # where vmap refuses; below, the loss raises an error of its own again
            return torch.func.vmap(one_model, randomness="different")(batch_inputs, batch_targets)
    return torch.stack([one_model(i, t) for i, t in zip(batch_inputs, batch_targets, strict=True)])


# In these dtypes a result shows where a loss rounds and in which order it sums, which differs in a call for all models.
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


# With at most this many classes the CPU's softmax is 3-5 times faster if they are not last (measured with AVX-512).
_FEW_CLASSES = 16


def _cross_entropy(inputs: Tensor, targets: Tensor, reduction: str, ignore_index: int = -100) -> Tensor:
    """Cross entropy in one call for all models."""
    if targets.dtype is torch.uint8:
        targets = targets.long()  # one of the two calls below does not accept uint8
    if inputs.dim() == 3 and inputs.shape[2] <= _FEW_CLASSES and inputs.device.type == "cpu":
        loss = F.cross_entropy(inputs.mT, targets, ignore_index=ignore_index, reduction="none")
    else:
        first = 1 if inputs.stride(1) > inputs.stride(0) else 0  # models or images, in the order of memory
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
    """Computes the top-k accuracies of each model.

    Args:
        batch_inputs: Scores (M, B, C).
        batch_targets: Class numbers (M, B), or `torchmb.shared` ones (B,).
        batch: M; by default the first dimension of the scores.
        k: One or more numbers between 1 and C.
        count: Whether to count hits instead of dividing them by B.

    Returns:
        One row for each k: [len(k), M], fractions of B, or int64 counts.

    Raises:
        ValueError: A shape does not fit, or a k is not between 1 and C.

    Example:
        >>> scores = torch.eye(4).expand(2, 4, 4)
        >>> torchmb.batch_topk(scores, torchmb.shared(torch.tensor([0, 1, 2, 0])), k=(1, 4))
        tensor([[0.7500, 0.7500],
                [1.0000, 1.0000]])
    """
    batch = len(batch_inputs) if batch is None else batch
    if isinstance(batch_targets, Shared):
        batch_targets = batch_targets.value.expand(batch, -1)
    _check_batch(batch, inputs=batch_inputs, targets=batch_targets)
    if batch_inputs.dim() != 3 or batch_targets.shape != batch_inputs.shape[:2]:
        shapes = tuple(batch_inputs.shape), tuple(batch_targets.shape)
        raise ValueError(f"scores must be (M, B, C) and targets (M, B), got {shapes[0]} and {shapes[1]}")
    ks = _check_ks(k, classes=batch_inputs.shape[2])
    hits = batch_inputs.topk(max(ks), -1).indices == batch_targets.unsqueeze(-1)
    counts = torch.stack([hits[..., :one].any(-1).sum(1) for one in ks])
    return counts if count else torch.div(counts, batch_targets.shape[1])


def _check_ks(k: int | Sequence[int], classes: int) -> list[int]:
    ks = [as_integer("k", one) for one in ((k,) if isinstance(k, int) else k)]
    if not ks:
        raise ValueError(f"k must hold at least one number, such as (1,), got {k}")
    for one in ks:
        if not 1 <= one <= classes:
            raise ValueError(f"k must be between 1 and the {classes} classes, got {one}")
    return ks


batch_accuracy = batch_topk


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor | nn.Module,
    max_norm: float | Tensor,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Clips the gradients of each model as torch.nn.utils.clip_grad_norm_ clips those of one model.

    Args:
        parameters: Tensors (M, …), or a BatchModule.
        max_norm: The largest norm: one number, or [M].
        norm_type: The p of the p-norm; it may be infinite.
        error_if_nonfinite: Whether a norm that is not finite is an error.

    Returns:
        The norms before clipping [M]; zeros if there are no gradients.

    Raises:
        RuntimeError: A norm is not finite, if `error_if_nonfinite`.
        ValueError: The parameters are not those of the same number of models.

    Example:
        >>> weight = torch.zeros(2, 3, requires_grad=True)
        >>> weight.grad = torch.tensor([[3.0, 0.0, 4.0], [0.1, 0.0, 0.0]])
        >>> torchmb.clip_grad_norm_([weight], max_norm=1.0)
        tensor([5.0000, 0.1000])
        >>> weight.grad
        tensor([[0.6000, 0.0000, 0.8000],
                [0.1000, 0.0000, 0.0000]])
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


# Optimizers whose step is not proportional to the learning rate, or depends on other models.
_NOT_PROPORTIONAL = (torch.optim.Rprop, torch.optim.ASGD, torch.optim.LBFGS, torch.optim.Adafactor)


# The learning rate that the models' rates are relative to: an entry of the optimizer's groups, and so of its state.
_BASE = "per_model_base_lr"


class PerModelLR:
    """Different learning rates for the models of one optimizer: the result of `per_model_lr`.

    Example:
        >>> optimizer = torch.optim.SGD(torchmb.BatchModule(nn.Linear(4, 2), batch=3).parameters(), lr=0.1)
        >>> torchmb.per_model_lr(optimizer, [0.1, 0.01, 0.0]).remove()
    """

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
        """Gives all models the optimizer's own learning rate again."""
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
            for p in group["params"]  # also those without a gradient: a closure may compute it within the step
        ]

    @torch.no_grad()
    def _scale(self, *_: Any) -> None:
        for p, before, factor in self._before:
            weight = factor.to(p.device, p.dtype).view(-1, *[1] * (p.dim() - 1))
            torch.lerp(before, p, weight, out=p)
        self._before = []


def per_model_lr(optimizer: torch.optim.Optimizer, learning_rates: Sequence[float] | Tensor) -> PerModelLR:
    """Lets each step of `optimizer` move model m as an optimizer with the learning rate learning_rates[m] would.

    The step is taken with the optimizer's own rate and then scaled by learning_rates[m] / lr, with lr as it is now, so
    schedulers change the rates of all models alike. This is exact for SGD, Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad,
    Adadelta and Adamax. Another call replaces the rates. An optimizer that loads the state of this one needs its own
    call, before or after; the initial lr is part of the state.

    Args:
        optimizer: An optimizer of parameters (M, …).
        learning_rates: M numbers.

    Returns:
        A handle whose `remove` gives all models the optimizer's own learning rate again.

    Raises:
        ValueError: The optimizer's step is not proportional to its learning rate, lr is 0, a rate is negative or
            infinite, or a parameter is not (M, …).

    Example:
        >>> batch = torchmb.BatchModule(nn.Linear(1, 1, bias=False), batch=2)
        >>> optimizer = torch.optim.SGD(batch.parameters(), lr=1.0)
        >>> handle = torchmb.per_model_lr(optimizer, [1.0, 0.5])
        >>> before = batch.weight.detach().clone()
        >>> batch(torch.ones(2, 1, 1)).sum().backward()
        >>> optimizer.step()
        >>> (before - batch.weight).flatten()
        tensor([1.0000, 0.5000], grad_fn=<ViewBackward0>)
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
    """Returns `function` of one model's tensors as a function of tensors (M, …), as torchmb 0.2 names it."""

    def batched(*args: Any, **kwargs: Any) -> Any:
        return torch.func.vmap(lambda *own: function(*own, **kwargs), randomness="different")(*args)

    return batched
