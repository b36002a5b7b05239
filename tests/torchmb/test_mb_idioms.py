"""A forward sees one model's shapes, whatever it does with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models_harness import Own, assert_alike, close, run_alike, separate
from torch import Tensor

from torchmb import BatchModule, shared


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def twice(m: Any, x: Tensor) -> Tensor:
    return m.l(m.l(x).relu())


# y is (B, 4).
def masked(y: Tensor, mask: Tensor, value: Any) -> Tensor:
    y = y.clone()
    y[mask] = value
    return y


IDIOMS: dict[str, Callable[[Tensor], Tensor]] = {
    "less its mean": lambda y: y - y.mean(0),
    "by the number of rows": lambda y: y / y.size(0),
    "softmax over rows": lambda y: y.softmax(0),
    "by the largest": lambda y: y / y.abs().max(),
    "rows by rows": lambda y: (y @ y.T) @ y,
    "flipped": lambda y: y.flip(0) + y,
    "reshaped and back": lambda y: y.reshape(-1, 8).cumsum(0).reshape(-1, 4),
    "viewed and back": lambda y: y.view(-1).cumsum(0).view(y.shape),
    "squeezed": lambda y: y.squeeze() * 2,
    "batch norm": lambda y: F.batch_norm(y, None, None, training=True),
    "sorted": lambda y: y.sort(0).values,
    "first row": lambda y: y - y[0],
    "by position": lambda y: y * torch.arange(len(y)).unsqueeze(1),
    "into zeros": lambda y: torch.zeros_like(y).index_add(0, torch.zeros(len(y), dtype=torch.long), y),
    "in place": lambda y: y.clone().mul_(2).add_(y),
    "in place on a part": lambda y: torch.cat([y[:1].clone().zero_(), y[1:]]),
    "transposed": lambda y: y.T.contiguous().view(4, -1).T,
    "chunks": lambda y: torch.stack(y.chunk(2, 1)).sum(0).repeat(1, 2),
    "shape as numbers": lambda y: y.view(y.shape[0], 2, y.shape[1] // 2).transpose(1, 2).reshape(y.shape),
    "einsum": lambda y: torch.einsum("bi,bj->ij", y, y) + y.sum(0),
    "norm": lambda y: F.normalize(y, dim=0),
    "masked": lambda y: masked(y, y > 0.1, 0.5),
    "masked by its mean": lambda y: masked(y, y > 0.1, y.mean()),
    "masked rows": lambda y: masked(y, y[:, 0] > 0.1, y.mean(0)),
    "outer": lambda y: (y.unsqueeze(1) - y.unsqueeze(0)).square().sum(1),
}


@pytest.mark.parametrize("name", IDIOMS)
def test_an_idiom_sees_the_rows_of_one_model(name: str) -> None:
    function = IDIOMS[name]
    for models, rows in ((1, 6), (3, 6), (17, 2), (3, 1)):
        if rows == 1 and name in ("reshaped and back", "batch norm"):
            continue  # no model alone can do that
        assert_alike(
            lambda: Own(lambda m, x: function(m.l(x)), l=nn.Linear(5, 4)), 5, models=models, rows=rows, steps=1
        )


@pytest.mark.slow
@given(
    st.lists(st.sampled_from(sorted(IDIOMS.keys() - {"squeezed", "einsum"})), min_size=1, max_size=4),
    st.integers(1, 4),
    st.sampled_from([2, 4, 6]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_any_sequence_of_idioms_does(names: list[str], models: int, rows: int, training: bool, random: Any) -> None:
    torch.manual_seed(random.randrange(1000))

    def forward(m: Any, x: Tensor) -> Tensor:
        for name in names:
            x = torch.tanh(m.l(x) + 0.1 * IDIOMS[name](x))
        return m.n(x)

    def make() -> nn.Module:
        return Own(
            forward, l=nn.Linear(4, 4), n=nn.BatchNorm1d(4)
        ).double()  # batch norm of two rows magnifies rounding

    draw = partial(torch.randn, dtype=torch.double)
    assert_alike(make, 4, models=models, rows=rows, training=training, draw=draw, steps=1)


def test_a_layer_may_be_used_twice() -> None:
    assert_alike(lambda: Own(twice, l=nn.Linear(5, 5)), 5)


def test_weights_may_be_tied() -> None:
    assert_alike(lambda: Own(lambda m, x: F.linear(m.l(x), m.l.weight), l=nn.Linear(5, 5)), 5)

    def tied() -> nn.Module:
        net = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
        net[2].weight = net[0].weight
        return net

    assert_alike(tied, 5)
    assert sum(1 for _ in BatchModule(tied(), 3).parameters()) == 3


def test_weights_in_a_list_of_the_users_own_are_those_of_the_model() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(5, 5)
            self.listed: list[Any] = [self.l.weight, {"bias": self.l.bias}]

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.listed[0], self.listed[1]["bias"])

    models = separate(Listed, 3)
    for m in models:
        m.listed = [m.l.weight, {"bias": m.l.bias}]
    run_alike(BatchModule.from_modules(models), models, torch.randn(3, 2, 5))


@pytest.mark.parametrize("branch", [False, True], ids=["vmap", "one by one"])
def test_a_forward_sees_which_of_its_tensors_are_parameters(branch: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        assert isinstance(m.l.weight, nn.Parameter) and isinstance(m.n.bias, nn.Parameter)
        assert not isinstance(m.n.running_mean, nn.Parameter) and not isinstance(m.l.weight * 1, nn.Parameter)
        y = m.n(m.l(x))
        return -y if branch and y.sum() + y[0, 0] > 0 else y

    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if branch else "error")
        assert_alike(lambda: Own(forward, l=nn.Linear(5, 4), n=nn.BatchNorm1d(4)), 5)


def test_a_forward_sees_what_autograd_knows() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.l(x)
        assert m.l.weight.is_leaf and m.l.weight.grad_fn is None
        factor = 2 if y.grad_fn is not None and not y.is_leaf else 3
        return y * factor if m.l.weight.grad is None else y * m.l.weight.grad.mean()

    models = separate(lambda: Own(forward, l=nn.Linear(5, 4)), 3)
    batch = BatchModule.from_modules(models)
    for _ in range(2):
        x = torch.randn(3, 6, 5)
        out, expected = batch(x), [m(one) for m, one in zip(models, x)]
        close(out, expected, "output")
        out.square().sum().backward()
        for e in expected:
            e.square().sum().backward()
    close(batch.get_parameter("l.weight").grad, [m.get_parameter("l.weight").grad for m in models], "gradient")


@pytest.mark.parametrize("branch", [False, True], ids=["vmap", "one by one"])
def test_buffers_that_the_first_forward_registers_are_each_models_own(branch: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if not hasattr(m, "first"):
            m.register_buffer("first", x.detach().mean(0))
            m.l.register_buffer("positions", torch.arange(3.0), persistent=False)
        y = m.l(x - m.first) + m.l.positions
        return -y if branch and y.sum() > 0 else y

    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if branch else "error")
        assert_alike(lambda: Own(forward, l=nn.Linear(5, 3)), 5, steps=3)


def test_a_parameter_that_the_first_forward_makes_is_named_and_taken_back() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if not hasattr(m, "late"):
            m.late = nn.Parameter(torch.ones(5))
        return m.l(x * m.late)

    batch = BatchModule(Own(forward, l=nn.Linear(5, 3)), 3)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="late is created by the first forward"):
            batch(torch.randn(3, 6, 5))
    assert [name for name, _ in batch.named_parameters()] == ["l.weight", "l.bias"]


def test_a_forward_may_tie_weights() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.decoder.weight = m.encoder.weight
        m.alias = m.encoder.bias
        return m.decoder(m.encoder(x)) + m.alias

    models = separate(lambda: Own(forward, encoder=nn.Linear(5, 5), decoder=nn.Linear(5, 5)), 3)
    batch, x = BatchModule.from_modules(models), torch.randn(3, 6, 5)
    out, expected = batch(x), [m(one) for m, one in zip(models, x)]
    close(out, expected, "output")
    out.square().sum().backward()
    for e in expected:
        e.square().sum().backward()
    for name in ("encoder.weight", "encoder.bias", "decoder.bias"):
        close(batch.get_parameter(name).grad, [m.get_parameter(name).grad for m in models], name)
    assert batch.get_parameter("alias") is batch.get_parameter("encoder.bias")


def test_a_custom_module_with_its_own_parameter_and_buffer() -> None:
    class Scale(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4))
            self.register_buffer("seen", torch.zeros(4))
            self.register_buffer("last", None)

        def forward(self, x: Tensor) -> Tensor:
            self.seen += x.detach().mean(0)
            self.last = x.detach().sum()
            return self.scale * x + self.seen

    assert_alike(Scale, 4, steps=3)


class Pair(NamedTuple):
    first: Tensor
    rest: Any


@dataclass
class Result:
    logits: Tensor
    name: str
    loss: Tensor | None = None


def test_inputs_and_outputs_may_be_any_nest() -> None:
    def forward(m: Any, given: dict[str, Any], factor: float = 1.0) -> Any:
        y = m.l(given["x"]) * factor + given["more"][0]
        return {"pair": Pair(y, [y.sum(), None, "text"]), "result": Result(y * 2, "a"), "number": 3}

    models = separate(lambda: Own(forward, l=nn.Linear(5, 4)), 3)
    x, more = torch.randn(3, 6, 5), torch.randn(3, 6, 4)
    out = BatchModule.from_modules(models)({"x": x, "more": (more,)}, factor=2.0)
    expected = [m({"x": a, "more": (b,)}, factor=2.0) for m, a, b in zip(models, x, more)]
    close(out["pair"].first, [e["pair"].first for e in expected], "first")
    close(out["pair"].rest[0], [e["pair"].rest[0] for e in expected], "a number for each model")
    close(out["result"].logits, [e["result"].logits for e in expected], "in a dataclass")
    assert out["pair"].rest[1:] == [None, "text"] and out["number"] == 3 and out["result"].name == "a"
    assert type(out["pair"]) is Pair and type(out["result"]) is Result and out["result"].loss is None


def test_a_forward_may_return_nothing_and_take_nothing() -> None:
    assert BatchModule(Own(lambda m, x: None, l=nn.Linear(2, 2)), 3)(torch.ones(3, 1, 2)) is None
    out = BatchModule(Own(lambda m: m.l.weight.sum(), l=nn.Linear(2, 2)), 3)()
    assert out.shape == (3,)


@pytest.mark.parametrize("native", [True, False])
def test_a_shared_input_is_what_every_model_sees(native: bool) -> None:
    def make() -> nn.Module:
        tree = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4))
        return tree if native else Own(lambda m, x: m.l(x), l=tree)

    for one in (make, lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.Tanh(), nn.Linear(5, 2))):
        models = separate(one, 3)
        batch, x = BatchModule.from_modules(models), torch.randn(6, 2, 6, 6)
        out = batch(shared(x))
        close(out, [m(x) for m in models], "output")
        out.square().sum().backward()
        for m in models:
            m(x).square().sum().backward()
        for name, p in batch.named_parameters():
            close(p.grad, [m.get_parameter(name).grad for m in models], name)


def test_a_shared_input_gets_the_sum_of_all_gradients() -> None:
    models = separate(lambda: Own(lambda m, x, y: m.l(x) * y, l=nn.Linear(5, 4)), 3)
    x, y = torch.randn(6, 5, requires_grad=True), torch.randn(3, 6, 4)
    (grad,) = torch.autograd.grad(BatchModule.from_modules(models)(shared(x), y).square().sum(), x)
    (expected,) = torch.autograd.grad(sum(m(x, b).square().sum() for m, b in zip(models, y)), x)
    close(grad, expected.unbind(), "gradient")


def test_dropout_masks_differ_between_models_and_rows() -> None:
    x = torch.ones(5, 8, 50)
    for batch, argument in (
        (BatchModule(nn.Dropout(0.5), 5), x),
        (BatchModule(nn.Sequential(nn.Dropout(0.5)), 5), shared(x[0])),
        (BatchModule(Own(lambda m, x: F.dropout(x, 0.5)), 5), x),
        (BatchModule(Own(lambda m, x: m.d(x) + 0, d=nn.Dropout(0.5)), 5), shared(x[0])),
    ):
        rows = batch(argument).flatten(0, 1)
        assert len(rows.unique(dim=0)) == 40


def test_noise_differs_between_models() -> None:
    out = BatchModule(Own(lambda m, x: x + torch.randn(4)), 3)(torch.zeros(3, 2, 4))
    assert len(out[:, 0].unique(dim=0)) == 3 and torch.equal(out[:, 0], out[:, 1])


def test_gradients_of_other_models_are_exactly_zero() -> None:
    for make in (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
        lambda: Own(lambda m, x: F.softmax(m.l(x.flatten(1)), 0), l=nn.Linear(32, 3)),
    ):
        batch = BatchModule.from_modules(separate(make, 5))
        inputs = torch.randn(5, 6, 2, 4, 4, requires_grad=True)
        batch(inputs)[2].square().sum().backward()
        for p in (inputs, *batch.parameters()):
            assert p.grad is not None and p.grad[2].any()
            assert not p.grad[[0, 1, 3, 4]].any()


def test_transforms_of_torch_func_go_through_a_batch() -> None:
    from torch.func import functional_call, grad

    def loss(batch: nn.Module, parameters: Any, x: Tensor) -> Tensor:
        return functional_call(batch, parameters, (x,)).square().sum()

    tree = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    for net in (tree, Own(lambda m, x: m.tree(x).softmax(0), tree=tree)):
        batch, x = BatchModule(net, 3), torch.randn(3, 5, 4)
        parameters = dict(batch.named_parameters())
        grads = grad(loss, 1)(batch, parameters, x)
        batch(x).square().sum().backward()
        for name, p in parameters.items():
            torch.testing.assert_close(grads[name], p.grad)


def test_second_derivatives_are_right() -> None:
    models = separate(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), 3)
    batch, x = BatchModule.from_modules(models), torch.randn(3, 5, 4, requires_grad=True)

    def penalty(m: nn.Module, x: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
        return grad.square().sum()

    penalty(batch, x).backward()
    for m, one in zip(models, x.detach()):
        penalty(m, one.clone().requires_grad_()).backward()
    for name, p in batch.named_parameters():
        close(p.grad, [m.get_parameter(name).grad for m in models], name)
