"""Losses, accuracies, clipping and learning rates of a batch are those of separate models."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models_harness import close, separate
from torch import Tensor

from torchmb import (
    BatchModule,
    batch_accuracy,
    batch_loss,
    batch_topk,
    clip_grad_norm_,
    inner_batch_size,
    merge_batch,
    per_model_lr,
    shared,
    split_batch,
)


def classes(*shape: int, c: int = 5) -> Tensor:
    return torch.randint(c, shape)


CROSS_ENTROPIES: dict[str, tuple[tuple[int, ...], Any, dict[str, Any]]] = {
    "few classes": ((6, 5), lambda: classes(6), {}),
    "many classes": ((6, 40), lambda: classes(6, c=40), {}),
    "images": ((6, 5, 3, 2), lambda: classes(6, 3, 2), {}),
    "one row each": ((5,), lambda: classes(), {}),
    "weights": ((6, 5), lambda: classes(6), {"weight": torch.tensor([1.0, 2.0, 0.5, 3.0, 0.0])}),
    "label smoothing": ((6, 5), lambda: classes(6), {"label_smoothing": 0.1}),
    "probabilities": ((6, 5), lambda: torch.rand(6, 5).softmax(1), {}),
    "other ignored index": ((6, 5), lambda: classes(6), {"ignore_index": 2}),
    "all of it": ((6, 5), lambda: classes(6), {"weight": torch.rand(5), "label_smoothing": 0.2, "ignore_index": 1}),
    "some ignored": ((6, 5), lambda: classes(6).where(torch.arange(6) > 1, -100), {}),
    "all ignored": ((6, 5), lambda: torch.full((6,), -100), {}),
    "ignored in images": ((6, 40, 3), lambda: classes(6, 3).where(torch.arange(3) > 1, -100), {}),
}


def check_loss(
    inputs: Tensor, targets: Tensor, loss: Any, reduction: str, exactly: bool = False, **kwargs: Any
) -> None:
    own, others = inputs.clone().requires_grad_(), [i.clone().requires_grad_() for i in inputs]
    got = batch_loss(own, targets, len(inputs), loss, reduction, **kwargs)
    expected = [loss(i, t, reduction=reduction, **kwargs) for i, t in zip(others, targets)]
    compare = equal if exactly else close
    compare(got, expected, "loss")
    got.sum().backward()
    for e in expected:
        e.sum().backward()
    assert own.grad is not None
    compare(own.grad, [o.grad for o in others], "gradient")


def equal(batched: Tensor, others: Sequence[Tensor], what: str) -> None:
    torch.testing.assert_close(batched, torch.stack(list(others)), rtol=0, atol=0, equal_nan=True, msg=what)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", CROSS_ENTROPIES)
def test_cross_entropy_is_what_separate_calls_give(name: str, reduction: str) -> None:
    shape, draw, kwargs = CROSS_ENTROPIES[name]
    for models in (1, 3, 17):
        targets = torch.stack([draw() for _ in range(models)])
        check_loss(torch.randn(models, *shape), targets, F.cross_entropy, reduction, **kwargs)
        if len(shape) > 1:
            rows_first = torch.randn(shape[0], models, *shape[1:]).transpose(0, 1)
            check_loss(rows_first, targets, F.cross_entropy, reduction, **kwargs)


def a_loss_with_a_branch(x: Tensor, y: Tensor, reduction: str) -> Tensor:
    errors = (x - y).abs()
    errors = errors if errors.max() > 2 else errors.square()
    reduced: dict[str, Callable[[], Tensor]] = {"mean": errors.mean, "sum": errors.sum, "none": lambda: errors}
    return reduced[reduction]()


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")  # torch's, of kl_div
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "loss",
    [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.binary_cross_entropy_with_logits, F.kl_div, a_loss_with_a_branch],
)
def test_any_loss_with_a_reduction_is_what_separate_calls_give(loss: Any, reduction: str) -> None:
    torch.manual_seed(0)
    check_loss(torch.randn(7, 6, 4), torch.rand(7, 6, 4), loss, reduction)


@pytest.mark.slow
@given(
    st.integers(1, 5), st.integers(1, 6), st.integers(2, 20), st.floats(0, 1), st.sampled_from(["mean", "sum", "none"])
)
def test_any_share_of_ignored_targets_is_right(m: int, b: int, c: int, share: float, reduction: str) -> None:
    targets = torch.randint(c, (m, b)).where(torch.rand(m, b) >= share, -100)
    check_loss(torch.randn(m, b, c), targets, F.cross_entropy, reduction)


def nll_of_logits(x: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
    return F.nll_loss(x.log_softmax(1), y, **kwargs)


ON_CLASSES = [F.cross_entropy, nll_of_logits]
ON_VALUES = [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy_with_logits, F.kl_div]


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")  # torch's, of kl_div
@given(
    st.integers(1, 4),
    st.sampled_from([1, 6, 300]),
    st.integers(2, 20),
    st.sampled_from([torch.half, torch.bfloat16, torch.float, torch.double]),
    st.sampled_from(["mean", "sum", "none"]),
    st.sampled_from(ON_CLASSES + ON_VALUES),
    st.data(),
)
def test_any_loss_of_any_dtype_is_what_separate_calls_give(
    m: int, b: int, c: int, dtype: torch.dtype, reduction: str, loss: Any, data: st.DataObject
) -> None:
    inputs = torch.randn(m, b, c).mul(3).to(dtype)
    targets = torch.randint(c, (m, b)) if loss in ON_CLASSES else torch.rand(m, b, c).to(dtype)
    options: dict[str, Any] = {}
    if loss in ON_CLASSES:
        options = {"ignore_index": 1, "weight": torch.rand(c, dtype=dtype) + 0.1}
    if loss is F.cross_entropy:
        options["label_smoothing"] = 0.3
    kwargs = {name: value for name, value in options.items() if data.draw(st.booleans(), name)}
    check_loss(inputs, targets, loss, reduction, exactly=dtype in (torch.half, torch.bfloat16), **kwargs)


@pytest.mark.parametrize("loss", [F.cross_entropy, F.nll_loss, F.mse_loss, F.binary_cross_entropy_with_logits])
def test_losses_under_autocast_have_the_dtype_of_separate_calls(loss: Any) -> None:
    inputs = torch.randn(3, 6, 5).bfloat16()
    targets = torch.rand(3, 6, 5) if loss in ON_VALUES else classes(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        close(batch_loss(inputs, targets, 3, loss), [loss(i, t) for i, t in zip(inputs, targets)], "loss")


def test_the_number_of_models_is_known_from_the_inputs() -> None:
    x, t = torch.randn(3, 6, 5), classes(3, 6)
    torch.testing.assert_close(batch_loss(x, t), batch_loss(x, t, 3, F.cross_entropy, "mean"))
    torch.testing.assert_close(batch_loss(x, shared(t[0])), batch_loss(x, t[:1].expand(3, 6)))
    assert torch.equal(batch_topk(x, shared(t[0])), batch_topk(x, t[:1].expand(3, 6)))


def test_bad_arguments_of_losses_are_named() -> None:
    x, t = torch.randn(3, 6, 5), classes(3, 6)
    with pytest.raises(ValueError, match="none, mean, sum, got 'average'"):
        batch_loss(x, t, 3, reduction="average")
    with pytest.raises(ValueError, match=r"inputs of 4.*\(3, 6, 5\)"):
        batch_loss(x, t, 4)
    with pytest.raises(ValueError, match=r"targets of 3.*\(2, 6\)"):
        batch_loss(x, t[:2])
    with pytest.raises(ValueError, match="0"):
        batch_loss(x, t, 0)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        batch_loss(x, t + 9)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 12), st.data())
def test_top_k_is_what_separate_models_have(m: int, b: int, c: int, data: st.DataObject) -> None:
    scores, targets = torch.randn(m, b, c), torch.randint(c, (m, b))
    ks = tuple(data.draw(st.lists(st.integers(1, c), min_size=1, max_size=3)))
    counts = batch_topk(scores, targets, m, ks, count=True)
    fractions = batch_accuracy(scores, targets, m, ks)
    assert counts.shape == fractions.shape == (len(ks), m)
    for i, k in enumerate(ks):
        for j in range(m):
            best = [row.topk(k).indices.tolist() for row in scores[j]]
            hits = sum(int(t) in row for t, row in zip(targets[j], best))
            assert counts[i, j] == hits and math.isclose(fractions[i, j], hits / b, rel_tol=1e-6)


def test_bad_arguments_of_top_k_are_named() -> None:
    scores, targets = torch.randn(3, 6, 5), classes(3, 6)
    for k in (6, 0):
        with pytest.raises(ValueError, match=rf"k must be .*got {k}"):
            batch_topk(scores, targets, 3, (1, k))
    for bad, what in (((), "()"), ((True,), "True"), ((1.5,), "1.5")):
        with pytest.raises(ValueError, match=f"k must .*{re.escape(what)}"):
            batch_topk(scores, targets, 3, bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(3, 6, 5\).*\(3, 5\)"):
        batch_topk(scores, targets[:, :5], 3)
    with pytest.raises(ValueError, match="4"):
        batch_topk(scores, targets, 4)


def test_merged_data_is_in_the_order_image_then_model() -> None:
    x = torch.randn(3, 4, 2)
    merged = merge_batch(x)
    assert all(torch.equal(merged[b * 3 + m], x[m, b]) for m in range(3) for b in range(4))
    assert torch.equal(split_batch(merged, 3), x) and inner_batch_size(merged, 3) == 4
    with pytest.raises(ValueError, match=r"3.*\(10, 2\)"):
        inner_batch_size(torch.zeros(10, 2), 3)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        merge_batch(torch.zeros(3))


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


@pytest.mark.parametrize("norm", [1.0, 2.0, math.inf])
def test_gradients_are_clipped_model_by_model(norm: float) -> None:
    models = separate(make, 4)
    batch, x = BatchModule.from_modules(models), torch.randn(4, 6, 5) * torch.tensor([0.1, 1, 5, 10]).view(4, 1, 1)
    batch(x).square().sum().backward()
    for m, one in zip(models, x):
        m(one).square().sum().backward()
    expected = [nn.utils.clip_grad_norm_(m.parameters(), 1.5, norm) for m in models]
    close(clip_grad_norm_(batch, 1.5, norm), expected, "norms")
    for name, p in batch.named_parameters():
        close(p.grad, [m.get_parameter(name).grad for m in models], name)


def test_a_limit_for_each_model_and_norms_that_are_not_finite() -> None:
    p = nn.Parameter(torch.ones(3, 4))
    p.grad = torch.ones(3, 4) * 2
    assert torch.equal(clip_grad_norm_([p], torch.tensor([1.0, 9.0, 2.0])), torch.full((3,), 4.0))
    torch.testing.assert_close(p.grad.norm(dim=1), torch.tensor([1.0, 4.0, 2.0]))
    p.grad[1, 0] = math.inf
    with pytest.raises(RuntimeError, match=r"\[1\]"):
        clip_grad_norm_(p, 1.0, error_if_nonfinite=True)
    without = nn.Parameter(torch.ones(3, dtype=torch.double))
    assert torch.equal(clip_grad_norm_([without], 1.0), torch.zeros(3, dtype=torch.double))
    assert clip_grad_norm_([], 1.0).numel() == 0
    other = nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"3.*\(2,\)"):
        clip_grad_norm_([p, other], 1.0)


OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr),
    "SGD, momentum, weight decay": lambda p, lr: torch.optim.SGD(p, lr, 0.9, weight_decay=0.1, nesterov=True),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr, weight_decay=0.01),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.1, amsgrad=True),
    "NAdam": lambda p, lr: torch.optim.NAdam(p, lr),
    "RAdam": lambda p, lr: torch.optim.RAdam(p, lr),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr, momentum=0.5, centered=True),
    "Adagrad": lambda p, lr: torch.optim.Adagrad(p, lr, lr_decay=0.1),
    "Adadelta": lambda p, lr: torch.optim.Adadelta(p, lr),
    "Adamax": lambda p, lr: torch.optim.Adamax(p, lr),
}
NOT_PROPORTIONAL = {"Rprop": torch.optim.Rprop, "ASGD": torch.optim.ASGD}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: list[Tensor], schedule: bool = False) -> None:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    for x in steps:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        if schedule:
            scheduler.step()


@pytest.mark.parametrize("name", OPTIMIZERS | NOT_PROPORTIONAL)
def test_five_steps_of_an_elementwise_optimizer_are_those_of_separate_models(name: str) -> None:
    models = [m.double() for m in separate(make, 3)]
    batch = BatchModule.from_modules(models)
    optimizer = (OPTIMIZERS | NOT_PROPORTIONAL)[name]
    steps = [torch.randn(3, 6, 5, dtype=torch.double) for _ in range(5)]
    train(batch, optimizer(batch.parameters(), 0.05), steps)
    for i, m in enumerate(models):
        train(m, optimizer(m.parameters(), 0.05), [x[i] for x in steps])
    for p_name, p in batch.named_parameters():
        close(p, [m.get_parameter(p_name) for m in models], p_name)


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_learning_rate_for_each_model_is_exact(name: str, schedule: bool) -> None:
    models = [m.double() for m in separate(make, 4)]
    batch, rates = BatchModule.from_modules(models), [0.05, 0.01, 0.2, 0.0]
    steps = [torch.randn(4, 6, 5, dtype=torch.double) for _ in range(5)]
    optimizer = OPTIMIZERS[name](batch.parameters(), 0.03)
    per_model_lr(optimizer, rates)
    train(batch, optimizer, steps, schedule)
    for i, (m, lr) in enumerate(zip(models, rates)):
        train(m, OPTIMIZERS[name](m.parameters(), lr), [x[i] for x in steps], schedule)
    for p_name, p in batch.named_parameters():
        close(p, [m.get_parameter(p_name) for m in models], p_name)


def test_learning_rates_of_each_model_can_be_taken_back() -> None:
    p = nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.SGD([p], 1.0)
    handle = per_model_lr(optimizer, torch.tensor([1.0, 0.5]))
    for expected in ([-1.0, -0.5], [-2.0, -1.5]):
        p.grad = torch.ones(2, 3)
        optimizer.step()
        assert p.detach().mean(1).tolist() == expected
        handle.remove()


@pytest.mark.parametrize("load_first", [True, False])
def test_learning_rates_of_each_model_go_on_where_an_optimizer_was_saved(load_first: bool) -> None:
    x = torch.randn(4, 3, 6, 5)

    def start() -> tuple[BatchModule, torch.optim.Optimizer, Any]:
        batch = BatchModule(make(), 3)
        optimizer = torch.optim.Adam(batch.parameters(), 0.1)
        return batch, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def step(batch: BatchModule, optimizer: torch.optim.Optimizer, scheduler: Any, i: int) -> None:
        optimizer.zero_grad()
        batch(x[i]).square().sum().backward()
        optimizer.step()
        scheduler.step()

    first, second = start(), start()
    per_model_lr(first[1], [0.1, 0.3, 0.0])
    for i in (0, 1):
        step(*first, i)
    if not load_first:
        per_model_lr(second[1], [0.1, 0.3, 0.0])
    for own, saved in zip(second, first):
        own.load_state_dict(copy.deepcopy(saved.state_dict()))
    if load_first:
        per_model_lr(second[1], [0.1, 0.3, 0.0])
    for i in (2, 3):
        step(*first, i)
        step(*second, i)
    for a, b in zip(first[0].parameters(), second[0].parameters()):
        assert torch.equal(a, b)


def test_another_call_replaces_learning_rates_and_later_groups_have_them_too() -> None:
    p, q = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2, 4))
    optimizer = torch.optim.SGD([p], 1.0)
    per_model_lr(optimizer, [5.0, 5.0])
    per_model_lr(optimizer, [1.0, 0.5])
    optimizer.add_param_group({"params": [q], "lr": 2.0})
    p.grad, q.grad = torch.ones(2, 3), torch.ones(2, 4)
    optimizer.step()
    assert [t.detach().mean(1).tolist() for t in (p, q)] == [[-1.0, -0.5]] * 2


def test_learning_rates_that_cannot_be_scaled_are_refused() -> None:
    p = nn.Parameter(torch.zeros(2, 3))
    for optimizer in (torch.optim.Rprop([p]), torch.optim.LBFGS([p]), torch.optim.ASGD([p])):
        with pytest.raises(ValueError, match=type(optimizer).__name__):
            per_model_lr(optimizer, [1.0, 0.5])
    with pytest.raises(ValueError, match=r"3.*\(2, 3\)"):
        per_model_lr(torch.optim.SGD([p], 0.1), [1.0, 0.5, 2.0])
    with pytest.raises(ValueError, match="0"):
        per_model_lr(torch.optim.SGD([p], 0.0), [1.0, 0.5])
    for rate in (-0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"at least 0.*{rate}"):
            per_model_lr(torch.optim.SGD([p], 0.1), [1.0, rate])


def test_targets_may_be_bytes() -> None:
    inputs, targets = torch.randn(2, 5, 4), torch.randint(0, 4, (2, 5), dtype=torch.uint8)
    assert torch.equal(batch_loss(inputs, targets), batch_loss(inputs, targets.long()))


def test_learning_rates_hold_for_steps_with_a_closure() -> None:
    batch = BatchModule(torch.nn.Linear(1, 1, bias=False), 2)
    before = batch.weight.detach().clone()
    optimizer = torch.optim.SGD(batch.parameters(), 1.0)
    per_model_lr(optimizer, [0.0, 1.0])

    def closure() -> float:
        optimizer.zero_grad()
        loss = batch(torch.ones(2, 1, 1)).sum()
        loss.backward()
        return loss.item()

    for step in (1, 2):
        optimizer.step(closure)
        assert torch.allclose(before - batch.weight, torch.tensor([0.0, float(step)]).view(2, 1, 1))
