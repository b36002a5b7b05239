"""What reaches out of a forward, by hooks or attributes, is (M, B, …) and alive."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
from models_harness import Own, Wrapped, close, run_alike, separate
from torch import Tensor

from torchmb import BatchModule, shared


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def tree() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture(params=["tree", "own forward"])
def models(request: pytest.FixtureRequest) -> list[nn.Module]:
    return separate(tree if request.param == "tree" else lambda: Own(lambda m, x: m.inner(x), inner=tree()), 3)


def linear(module: nn.Module, number: int = 0) -> nn.Linear:
    return [m for m in module.modules() if isinstance(m, nn.Linear)][number]


def test_hooks_see_all_models_and_may_keep_what_they_see(models: list[nn.Module]) -> None:
    batch, x = BatchModule.from_modules(models), torch.randn(3, 6, 5)
    seen: list[Tensor] = []
    handles = [
        linear(batch).register_forward_pre_hook(lambda m, args: seen.append(args[0])),
        linear(batch).register_forward_hook(lambda m, args, out: seen.append(out)),
    ]
    for given in (x, shared(x[0])):
        seen.clear()
        batch(given)
        before, after = seen
        assert before.shape == (3, 6, 5) and after.shape == (3, 6, 4)
        rows = x if given is x else [x[0]] * 3
        close(after, [linear(m)(one) for m, one in zip(models, rows)], "what the hook saw")
        after.sum().backward()
    for handle in handles:
        handle.remove()
    seen.clear()
    batch(x)
    assert not seen


def test_hooks_may_change_inputs_and_outputs(models: list[nn.Module]) -> None:
    batch = BatchModule.from_modules(models)
    for module in (batch, *models):
        linear(module).register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        linear(module).register_forward_hook(lambda m, args, kwargs, out: out + args[0].sum(-1, True), with_kwargs=True)
        linear(module, 1).register_forward_pre_hook(lambda m, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)
    run_alike(batch, models, torch.randn(3, 6, 5))


def test_backward_hooks_see_gradients_of_all_models(models: list[nn.Module]) -> None:
    batch = BatchModule.from_modules(models)
    seen: list[Any] = []
    for module in (batch, *models):
        linear(module, 1).register_full_backward_hook(lambda m, inputs, outputs: (inputs[0] * 3,))  # type: ignore[index]
    linear(batch, 1).register_full_backward_hook(lambda m, i, o: seen.append((i[0].shape, o[0].shape)))  # type: ignore[index]
    linear(batch, 1).register_full_backward_pre_hook(lambda m, o: seen.append(o[0].shape))  # type: ignore[index]
    run_alike(batch, models, torch.randn(3, 6, 5))
    assert ((3, 6, 4), (3, 6, 2)) in seen and (3, 6, 2) in seen


def test_hooks_of_the_template_are_hooks_of_the_batch() -> None:
    net, shapes = Wrapped(tree()), []
    linear(net).register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
    BatchModule(net, 3)(torch.randn(3, 6, 5))
    assert shapes == [(3, 6, 4)]


def test_what_a_forward_keeps_in_attributes_is_alive() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.feature = m.l(x)
        m.listed.append(m.feature * 2)
        m.nested = {"a": (m.feature, "text")}
        return m.feature.sum(1)

    models = separate(lambda: Own(forward, l=nn.Linear(5, 4)), 3)
    for m in models:
        m.listed = []
    batch, x = BatchModule.from_modules(models), torch.randn(3, 6, 5)
    for _ in range(2):
        batch(x)
    for m, one in zip(models, x):
        m(one), m(one)
    inner: Any = batch._template
    close(inner.feature, [m.feature for m in models], "attribute")
    close(inner.listed[1], [m.listed[1] for m in models], "in a list")
    assert len(inner.listed) == 2 and inner.nested["a"][1] == "text"
    inner.nested["a"][0].sum().backward()
    assert batch.get_parameter("l.weight").grad is not None


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_the_older_weight_hooks_of_torch_belong_to_one_model(norm: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated
        models = separate(lambda: Wrapped(norm(nn.Linear(5, 4))), 3)
        batch = BatchModule.from_modules(models)
        run_alike(batch, models, torch.randn(3, 6, 5))


def test_pruned_models_stay_pruned() -> None:
    from torch.nn.utils import prune

    def make() -> nn.Module:
        net = tree()
        prune.l1_unstructured(linear(net), "weight", 0.5)
        return net

    models = [make() for _ in range(3)]
    run_alike(BatchModule.from_modules(models), models, torch.randn(3, 6, 5))


def test_an_own_forward_of_one_instance_is_used() -> None:
    net: Any = tree()
    net[0].forward = lambda x: x[..., :4] * 2
    batch, x = BatchModule(net, 3), torch.randn(3, 6, 5)
    close(batch(x), [net(one) for one in x], "output")
