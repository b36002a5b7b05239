"""The state of a batch: names of the template, a leading dimension of models, in and out."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
from models_harness import LeNet, Own, Wrapped, close, run_alike, separate
from torch import Tensor

from torchmb import BatchLinear, BatchModule, check


def make() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2)))
    net.register_buffer("constant", torch.ones(2), persistent=False)
    return net


def test_names_are_the_templates_and_tensors_have_a_leading_m() -> None:
    net = make()
    batch = BatchModule(net, 3)
    assert list(batch.state_dict()) == list(net.state_dict())
    assert [n for n, _ in batch.named_modules()] == [n for n, _ in net.named_modules()]
    for own, of_net in (
        (dict(batch.named_parameters()), dict(net.named_parameters())),
        (dict(batch.named_buffers()), dict(net.named_buffers())),
        (batch.state_dict(), net.state_dict()),
    ):
        assert own.keys() == of_net.keys()
        for name, tensor in of_net.items():
            assert torch.equal(own[name], torch.stack([tensor] * 3)), name
    assert isinstance(batch.get_submodule("2.0"), nn.Linear) and batch.get_parameter("0.weight").shape == (3, 4, 5)


def test_the_module_itself_is_left_alone_unless_inplace() -> None:
    net = make()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    batch = BatchModule(net, 3)
    batch(torch.randn(3, 6, 5)).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    inplace = BatchModule(net, 3, inplace=True)
    assert net.get_parameter("0.weight") is inplace.get_parameter("0.weight")
    assert inplace.get_parameter("0.weight").shape == (3, 4, 5)


def test_state_dicts_go_out_and_in_again() -> None:
    models = separate(make, 3)
    batch = BatchModule(make(), 3)
    batch.load_state_dicts([m.state_dict() for m in models])
    for state, model in zip(batch.state_dicts(), models):
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        make().load_state_dict(state)
        model.get_buffer("constant").fill_(1)  # in no state dict
    run_alike(batch, models, torch.randn(3, 6, 5))
    batch.load_state_dicts(models[0].state_dict())
    close(batch.get_parameter("0.weight"), [models[0].get_parameter("0.weight")] * 3, "one for all")


def test_state_dicts_are_copies_of_one_model_each() -> None:
    batch = BatchModule(make(), 50)
    state = batch.state_dicts()[0]
    with torch.no_grad():
        batch.get_parameter("0.weight").zero_()
    assert state["0.weight"].any()
    file = io.BytesIO()
    torch.save(state, file)
    assert len(file.getvalue()) < 10_000


def test_a_batch_loads_its_own_state_dict_also_within_another_module() -> None:
    outer, other = (nn.Sequential(BatchModule(make(), 3), nn.Identity()) for _ in range(2))
    other.load_state_dict(outer.state_dict())
    for (name, a), b in zip(outer.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        (lambda s: [s] * 2, ["3", "2"]),
        (lambda s: [s, s, s | {"0.weight": torch.zeros(4, 6)}], ["(4, 6)", "(4, 5)", "0.weight", "2"]),
        (lambda s: [s, {k: v for k, v in s.items() if k != "0.bias"}, s], ["0.bias", "1"]),
        (lambda s: s | {"extra": torch.zeros(1)}, ["extra"]),
    ],
)
def test_state_dicts_that_do_not_fit_change_nothing_and_are_named(given: Any, numbers: list[str]) -> None:
    batch = BatchModule(make(), 3)
    before = {k: v.clone() for k, v in batch.state_dict().items()}
    with pytest.raises(ValueError) as error:
        batch.load_state_dicts(given(separate(make, 1)[0].state_dict()))
    assert all(number in str(error.value) for number in numbers), error.value
    assert all(torch.equal(v, before[k]) for k, v in batch.state_dict().items())


@pytest.mark.parametrize("value", [np.ones((2, 4)), [[1.0] * 4] * 2, None])
def test_what_is_no_tensor_is_not_loaded_but_named(value: Any) -> None:
    batch, state = BatchModule(make(), 3), separate(make, 1)[0].state_dict()
    before = {k: v.clone() for k, v in batch.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(TypeError, match=rf"2\.0\.weight of state dict 1 is a {type(value).__name__}, not a tensor"):
            batch.load_state_dicts([state, state | {"2.0.weight": value}, state], strict=strict)
    assert all(torch.equal(v, before[k]) for k, v in batch.state_dict().items())


class Extra(nn.Linear):
    """Multiplies by what is in its extra state."""

    def __init__(self) -> None:
        super().__init__(5, 4)
        self.factor = torch.tensor([1.0, 2.0])

    def get_extra_state(self) -> Any:
        return {"factor": self.factor}

    def set_extra_state(self, state: Any) -> None:
        self.factor = state["factor"]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor.sum()


@pytest.mark.parametrize("wrap", [Extra, lambda: nn.Sequential(nn.Sequential(Extra()))])
def test_an_extra_state_is_loaded_if_all_models_have_the_same(wrap: Any) -> None:
    models = separate(wrap, 3)
    for model in models:
        list(model.modules())[-1].factor = torch.tensor([3.0, 4.0])
    batch, states = BatchModule(wrap(), 3), [m.state_dict() for m in models]
    batch.load_state_dicts(states)
    run_alike(batch, models, torch.randn(3, 6, 5))
    wrap().load_state_dict(batch.state_dicts()[2])
    (name,) = (name for name in states[0] if name.endswith("_extra_state"))
    before = {k: v.clone() for k, v in batch.state_dict().items() if k != name}
    for strict in (True, False):
        other = {k: v + 1 for k, v in states[0].items() if k != name}
        with pytest.raises(ValueError, match=rf"{name} differs between state dicts 0 and 2"):
            batch.load_state_dicts([states[0], states[1], other | {name: {"factor": torch.zeros(2)}}], strict)
    assert all(torch.equal(batch.state_dict()[k], v) for k, v in before.items())


def test_names_that_do_not_fit_may_be_allowed() -> None:
    batch = BatchModule(make(), 3)
    batch.load_state_dicts({"0.bias": torch.ones(4), "extra": torch.zeros(1)}, strict=False)
    assert torch.equal(batch.get_parameter("0.bias"), torch.ones(3, 4))


@pytest.mark.parametrize("wrap", [lambda: make(), lambda: Wrapped(make())])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b)), copy.copy])
def test_a_copy_computes_the_same_and_trains_on_its_own(how: Any, wrap: Any) -> None:
    models = separate(wrap, 3)
    batch = BatchModule.from_modules(models)
    other = how(batch)
    run_alike(other, models, torch.randn(3, 6, 5))
    shared = how is copy.copy
    assert all((a is b) == shared for a, b in zip(batch.parameters(), other.parameters()))
    assert type(other.unstack(0)) is type(models[0])


def test_dtype_requires_grad_and_mode_are_kept() -> None:
    net: Any = make().double().eval()
    net[0].requires_grad_(False)
    batch = BatchModule(net, 3)
    assert not batch.training and not batch.get_submodule("1").training
    assert all(p.dtype == torch.double for p in batch.parameters())
    assert [p.requires_grad for p in batch.parameters()] == [p.requires_grad for p in net.parameters()]


def test_to_train_and_apply_reach_every_layer() -> None:
    batch = BatchModule(nn.Sequential(nn.LSTM(5, 4), Own(lambda m, x: m.l(x[0]), l=nn.Linear(4, 2))), 3)
    assert batch.double()(torch.randn(3, 2, 6, 5).double()).dtype == torch.double
    assert not any(m.training for m in batch.eval().modules())
    assert all(m.training for m in batch.train().modules())
    assert BatchModule(make(), 3).to("meta").get_parameter("0.weight").is_meta


def test_own_train_methods_are_respected() -> None:
    class Frozen(nn.Linear):
        def train(self, mode: bool = True) -> Frozen:
            return super().train(False)

    assert not BatchModule(Frozen(2, 2), 3).train()._template.training


def test_existing_models_become_a_batch_and_one_of_it_a_model() -> None:
    models = separate(LeNet, 4)
    batch = BatchModule.from_modules(models)
    x = torch.randn(4, 2, 1, 28, 28)
    run_alike(batch, models, x)
    for i in (0, 3, -1):
        one = batch.unstack(i)
        assert type(one) is LeNet
        torch.testing.assert_close(one(x[i]), models[i](x[i]))
        assert all(a.shape == b.shape and a.is_leaf for a, b in zip(one.parameters(), models[i].parameters()))
    with pytest.raises(IndexError, match="4"):
        batch.unstack(4)


def test_models_that_do_not_fit_together_are_named() -> None:
    with pytest.raises(ValueError, match="0"):
        BatchModule.from_modules([])
    with pytest.raises(ValueError, match="module 1 is a Conv1d"):
        BatchModule.from_modules([nn.Linear(2, 2), nn.Conv1d(2, 2, 1)])
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(2, 3\).*module 1"):
        BatchModule.from_modules([nn.Linear(2, 2), nn.Linear(3, 2)])
    with pytest.raises(ValueError, match=r"module 1.*bias"):
        BatchModule.from_modules([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)])


def linears() -> Any:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))


def tied() -> Any:
    net = linears()
    net[1].weight = net[0].weight
    return net


def frozen() -> Any:
    net = linears()
    net[0].weight.requires_grad_(False)
    return net


def scaled(factor: Any) -> Any:
    net = linears()
    net[1].factor = factor
    return net


@pytest.mark.parametrize(
    ("first", "other", "difference"),
    [
        (nn.Sequential(nn.ReLU()), nn.Sequential(nn.Tanh()), "0 is a ReLU in module 0, a Tanh in module 1"),
        (linears(), nn.Sequential(*linears(), nn.ReLU()), "module 0 has no 2, which is a ReLU in module 1"),
        (linears(), linears()[:1], "module 1 has no 1, which is a Linear in module 0"),
        (tied(), linears(), "the tensor that 1.weight is tied to is '0.weight' in module 0, None in module 1"),
        (linears(), tied(), "the tensor that 1.weight is tied to is None in module 0, '0.weight' in module 1"),
        (linears(), frozen(), "0.weight.requires_grad is True in module 0, False in module 1"),
        (linears(), linears().double(), "0.weight.dtype is torch.float32 in module 0, torch.float64 in module 1"),
        (nn.Sequential(nn.Dropout(0.1)), nn.Sequential(nn.Dropout(0.2)), "0.p is 0.1 in module 0, 0.2 in module 1"),
        (nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, 2), "stride is (1, 1) in module 0, (2, 2) in module 1"),
        (scaled(2.0), scaled(3.0), "1.factor is 2.0 in module 0, 3.0 in module 1"),
        (scaled(None), scaled(torch.ones(3)), "1.factor is None in module 0, a Tensor in module 1"),
        (scaled(nn.ReLU()), scaled(None), "1.factor is a ReLU in module 0, None in module 1"),
        (linears(), scaled(2.0), "module 0 has no 1.factor, which is 2.0 in module 1"),
    ],
)
def test_models_that_would_compute_something_else_are_refused(first: Any, other: Any, difference: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(difference)}$"):
        BatchModule.from_modules([first, other])


def test_models_may_differ_in_mode_and_in_what_a_forward_has_left() -> None:
    models = [scaled(torch.ones(3)), scaled(torch.zeros(3)).eval(), linears()]
    assert BatchModule.from_modules(m for m in models).training


def test_two_classes_of_one_name_are_told_apart() -> None:
    def net(module: str) -> nn.Module:
        cls = type("Net", (nn.Linear,), {"__module__": module})
        return cls(2, 2)

    with pytest.raises(ValueError, match=r"module 1 is a b\.Net, module 0 a a\.Net"):
        BatchModule.from_modules([net("a"), net("b")])
    with pytest.raises(ValueError, match=r"module 1 is a a\.Net, module 0 a a\.Net of an earlier definition"):
        BatchModule.from_modules([net("a"), net("a")])


def test_seeds_give_the_weights_of_new_models() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 3), nn.TransformerEncoderLayer(8, 2, 4)
            self.c = nn.Sequential(nn.Linear(3, 2), nn.GRU(2, 2), nn.Embedding(3, 2), nn.BatchNorm1d(2))

    net, before = Net(), torch.get_rng_state()
    batch = BatchModule(net, seeds=[5, 6, 5])
    assert torch.equal(torch.get_rng_state(), before)
    for i, seed in enumerate((5, 6, 5)):
        torch.manual_seed(seed)
        for name, p in Net().named_parameters():
            assert torch.equal(batch.get_parameter(name)[i], p), name


def test_a_parameter_that_seeds_cannot_reach_is_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.l, self.zero = nn.Parameter(torch.randn(3)), nn.Linear(2, 2), nn.Parameter(torch.zeros(3))

    with pytest.warns(UserWarning, match=r"draws own:") as caught:
        BatchModule(Net(), 2, seeds=[0, 1])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BatchModule(Net(), 2, seeds=[1, 1])


@pytest.mark.parametrize(
    ("arguments", "numbers"),
    [
        ({"batch": 0}, "number of models.*0"),
        ({"batch": -3}, "-3"),
        ({"batch": 2.0}, "2.0"),
        ({"batch": True}, "number of models, must be an integer, got True"),
        ({"batch": "3"}, "'3'"),
        ({"batch": 2, "seeds": [1]}, "2.*1"),
    ],
)
def test_a_bad_number_of_models_is_named(arguments: Any, numbers: str) -> None:
    with pytest.raises(ValueError, match=numbers):
        BatchModule(nn.Linear(2, 2), **arguments)


def test_what_is_no_module_and_what_are_no_seeds_is_named() -> None:
    for given in (None, nn.Linear):
        with pytest.raises(TypeError, match=f"module must be a torch.nn.Module, got {re.escape(repr(given))}"):
            BatchModule(given, 3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=f"module 1 must be a torch.nn.Module, got {re.escape(repr(given))}"):
            BatchModule.from_modules([nn.Linear(2, 2), given])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="seeds must be integers, one for each model, got 3"):
        BatchModule(nn.Linear(2, 2), seeds=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a seed must be an integer, got 0\.5"):
        BatchModule(nn.Linear(2, 2), seeds=[0.5])  # type: ignore[list-item]


def test_the_number_of_models_may_be_any_integer() -> None:
    three: Any
    for three in (np.int64(3), torch.tensor(3)):
        assert BatchModule(nn.Linear(5, 2), three)(torch.randn(3, 6, 5)).shape == (3, 6, 2)
        assert BatchLinear(5, 2, True, three).batch == 3


def test_inputs_without_the_dimension_of_models_are_named() -> None:
    batch = BatchModule(nn.Linear(5, 2), 3)
    with pytest.raises(ValueError, match=r"3 models.*\(4, 6, 5\)"):
        batch(torch.randn(4, 6, 5))
    with pytest.raises(ValueError, match=r"3.*\(\)"):
        batch(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"\(7, 5\)"):
        batch(torch.randn(7, 5), merge=False)


def test_a_batch_in_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="0 is a BatchModule"):
        BatchModule(nn.Sequential(BatchModule(nn.Linear(2, 2), 3)), 2)


def test_a_lazy_module_that_has_no_shape_yet_is_named() -> None:
    with pytest.raises(ValueError, match=r"^weight has no shape yet"):
        BatchModule(nn.LazyLinear(3), 3)


def test_modules_whose_weights_a_hook_computes_may_have_seeds_and_be_checked() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated
        net = nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 4)), nn.ReLU())
    assert BatchModule(net, seeds=[1, 1])(torch.randn(2, 6, 5)).shape == (2, 6, 4)
    assert check(net, torch.randn(6, 5)) == []


def test_merged_data_may_be_passed_through() -> None:
    batch, x = BatchModule(nn.Linear(5, 2), 3), torch.randn(3, 6, 5)
    merged = torch.stack([x[m, b] for b in range(6) for m in range(3)])
    expected = batch(x)
    torch.testing.assert_close(batch(merged, merge=False), expected)
    out = batch(merged, merge=False, split=False)
    torch.testing.assert_close(out, torch.stack([expected[m, b] for b in range(6) for m in range(3)]))
    torch.testing.assert_close(batch(x, split=False), out)
