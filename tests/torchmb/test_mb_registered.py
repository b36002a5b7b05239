"""Registered batch modules run on merged data; the batch layers on merged data are separate layers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.nn as nn
from models_harness import Own, close, indices, separate
from torch import Tensor

import torchmb
from torchmb import (
    AbstractBatchModule,
    BatchModule,
    check,
    inner_batch_size,
    merge_batch,
    register_batch_module,
    shared,
    split_batch,
)
from torchmb.base import _REGISTERED


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """As it was, afterwards; and no warning."""
    before = dict(_REGISTERED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    _REGISTERED.clear()
    _REGISTERED.update(before)


class Scale(nn.Module):
    calls: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.scale = nn.Parameter(torch.rand(size))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        self.calls += 1
        return x * self.scale + shift


class BatchScale(AbstractBatchModule):
    base_class = Scale
    calls: Tensor
    seen: ClassVar[list[tuple[int, ...]]] = []

    @classmethod
    def from_module(cls, module: Any, batch: int) -> BatchScale:
        return cls(batch, module.size)

    def __init__(self, batch: int, size: int) -> None:
        super().__init__(batch)
        self.scale = nn.Parameter(torch.empty(batch, size))
        self.register_buffer("calls", torch.zeros(batch))

    def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        self.seen.append(tuple(x.shape))
        self.calls += 1
        return x * self.scale.repeat(inner_batch_size(x, self.batch), 1) + shift


@pytest.mark.parametrize("given", [Scale, BatchScale])
@pytest.mark.parametrize("where", ["root", "in a tree", "in an own forward"])
def test_a_registered_module_runs_on_merged_data_with_its_own_weights(given: Any, where: str) -> None:
    def make() -> nn.Module:
        if where == "root":
            return Scale(4)
        layers = (nn.Linear(4, 4), Scale(4), nn.Linear(4, 2))
        return (
            nn.Sequential(*layers) if where == "in a tree" else Own(lambda m, x: m.tree(x), tree=nn.Sequential(*layers))
        )

    assert register_batch_module(given) is given
    models = separate(make, 3)
    batch, x = BatchModule.from_modules(models), torch.randn(3, 6, 4, requires_grad=True)
    BatchScale.seen.clear()
    out = batch(x)
    assert BatchScale.seen == [(18, 4)]
    others = [one.detach().requires_grad_() for one in x]
    expected = [m(one) for m, one in zip(models, others)]
    close(out, expected, "output")
    out.square().sum().backward()
    for e in expected:
        e.square().sum().backward()
    close(x.grad, [o.grad for o in others], "gradient of the input")
    for name, p in batch.named_parameters():
        close(p.grad, [m.get_parameter(name).grad for m in models], name)
    for state, m in zip(batch.state_dicts(), models):
        assert state.keys() == m.state_dict().keys()
        assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
    assert list(batch.state_dict()) == list(models[0].state_dict())
    other = BatchModule(make(), 3)
    other.load_state_dicts([m.state_dict() for m in models])
    torch.testing.assert_close(other(x), out)
    one = batch.unstack(2)
    assert type(one) is type(models[2])
    torch.testing.assert_close(one(x[2]), models[2](x[2]))


def test_arguments_of_a_registered_module_are_merged_wherever_they_stand() -> None:
    register_batch_module(BatchScale)
    models = separate(lambda: Own(lambda m, x, s: m.scale(x, shift=s), scale=Scale(4)), 3)
    batch, x, s = BatchModule.from_modules(models), torch.randn(3, 6, 4), torch.randn(3, 6, 1)
    close(batch(x, s), [m(a, b) for m, a, b in zip(models, x, s)], "output")
    close(batch(shared(x[0]), s), [m(x[0], b) for m, b in zip(models, s)], "shared")
    root = BatchModule.from_modules([m.scale for m in models])
    close(root(shared(x[0]), shift=s), [m.scale(x[0], b) for m, b in zip(models, s)], "root")


def test_hooks_of_registered_modules_and_their_neighbours_are_called() -> None:
    register_batch_module(BatchScale)
    batch, shapes = BatchModule(nn.Sequential(nn.Linear(4, 4), Scale(4)), 3), []
    for module in batch.children():
        module.register_forward_hook(lambda m, args, out: shapes.append((type(m).__name__, tuple(out.shape))))
    batch(torch.randn(3, 6, 4))
    assert shapes == [("Linear", (3, 6, 4)), ("BatchScale", (3, 6, 4))]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"1.scale": torch.zeros(7)}, ValueError, r"1\.scale of state dict 2 has shape \(7,\), expected \(4,\)"),
        ({"1.scale": [0.0] * 4}, TypeError, r"1\.scale of state dict 2 is a list"),
        ({"1.other": torch.zeros(4)}, ValueError, r"state dict 2 .*unexpected \['1\.other'\]"),
    ],
)
def test_a_state_that_does_not_fit_a_registered_module_changes_nothing(change: Any, error: Any, said: str) -> None:
    register_batch_module(BatchScale)
    batch = BatchModule(nn.Sequential(nn.Linear(4, 4), Scale(4)), 3)
    before = {k: v.clone() for k, v in batch.state_dict().items()}
    states = [nn.Sequential(nn.Linear(4, 4), Scale(4)).state_dict() for _ in range(3)]
    with pytest.raises(error, match=said):
        batch.load_state_dicts([*states[:2], states[2] | change])
    assert all(torch.equal(v, before[k]) for k, v in batch.state_dict().items())


class OtherScale(Scale):
    pass


class RenamedScale(AbstractBatchModule):
    """Keeps the parameter under another name."""

    base_class = OtherScale

    @classmethod
    def from_module(cls, module: Any, batch: int) -> RenamedScale:
        return cls(batch, module.size)

    def __init__(self, batch: int, size: int) -> None:
        super().__init__(batch)
        self.all_scales = nn.Parameter(torch.empty(batch, size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.all_scales.repeat(inner_batch_size(x, self.batch), 1)

    def load_state_dicts(self, state_dicts: Any, strict: bool = True) -> None:
        with torch.no_grad():
            self.all_scales.copy_(torch.stack([s["scale"] for s in state_dicts]))

    def state_dicts(self) -> Any:
        return [{"scale": one.detach().clone(), "calls": torch.zeros(())} for one in self.all_scales]


@pytest.mark.parametrize("cls", [BatchScale, RenamedScale])
def test_registered_modules_keep_requires_grad_dtype_and_device(cls: Any) -> None:
    register_batch_module(cls)

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), cls.base_class(4))

    for frozen in ("0", "1"):
        net = make()
        net.get_submodule(frozen).requires_grad_(False)
        batch = BatchModule(net, 3)
        flags = [p.requires_grad for p in net.parameters()]
        assert [p.requires_grad for p in batch.parameters()] == flags
        assert [p.requires_grad for p in batch.unstack(1).parameters()] == flags
        assert not any(p.requires_grad for p in batch.requires_grad_(False).unstack(1).parameters())
    for net in (make().double(), make().to("meta")):
        tensor = next(net.parameters())
        batch = BatchModule(net, 3)
        for module in (batch, batch.unstack(1)):
            assert {(p.dtype, p.device) for p in module.parameters()} == {(tensor.dtype, tensor.device)}
        assert batch(torch.ones(3, 6, 4).to(tensor)).dtype == tensor.dtype


def test_what_cannot_be_registered_is_named() -> None:
    class Unknown(nn.Module):
        pass

    for given in (Unknown, AbstractBatchModule):
        with pytest.raises(ValueError, match=given.__name__):
            register_batch_module(given)


def test_a_subclass_of_a_registered_module_is_not_taken_for_it() -> None:
    class Shifted(Scale):
        def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
            return super().forward(x) + 1

    register_batch_module(BatchScale)
    models = separate(lambda: Shifted(4), 3)
    x = torch.randn(3, 6, 4)
    close(BatchModule.from_modules(models)(x), [m(one) for m, one in zip(models, x)], "output")


def test_a_parameter_free_module_needs_no_registration() -> None:
    batch, x = BatchModule(Own(lambda m, x: x - x.mean(0)), 3), torch.randn(3, 6, 4)
    close(batch(x), [one - one.mean(0) for one in x], "output")


LAYERS: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "Linear": ((5, 4, True), {}, (5,)),
    "Conv1d": ((4, 6, 3, 1, 1, 1, 2, True, "circular"), {}, (4, 7)),
    "Conv2d": ((4, 6, 3), {"padding": "same", "padding_mode": "reflect"}, (4, 5, 5)),
    "Conv3d": ((2, 3, 2), {"bias": False}, (2, 3, 3, 3)),
    "ConvTranspose1d": ((4, 6, 3, 2, 0, 1, 2, True, 1), {}, (4, 5)),
    "ConvTranspose2d": ((4, 6, 3), {"stride": 2}, (4, 3, 3)),
    "ConvTranspose3d": ((2, 3, 2), {}, (2, 3, 3, 3)),
    "BatchNorm1d": ((4,), {}, (4,)),
    "BatchNorm2d": ((4, 1e-3, None, True, True), {}, (4, 3, 3)),
    "BatchNorm3d": ((4,), {"affine": False}, (4, 2, 3, 3)),
    "GroupNorm": ((2, 4), {}, (4, 3)),
    "LayerNorm": (((3, 4),), {}, (3, 4)),
    "Embedding": ((7, 4, 2), {}, (3,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_layer_on_merged_data_is_separate_layers(name: str) -> None:
    args, kwargs, shape = LAYERS[name]
    plain, cls = getattr(nn, name), getattr(torchmb, f"Batch{name}")
    models = separate(lambda: plain(*args, **kwargs), 3)
    for layer in (cls(*args, **kwargs, batch=3), cls.from_module(models[0], 3)):
        layer.load_state_dicts([m.state_dict() for m in models])
        for training in (True, False):
            layer.train(training)
            draw = indices(7) if name == "Embedding" else torch.randn
            x = draw(3, 6, *shape)
            out = split_batch(layer(merge_batch(x)), 3)
            close(out, [m.train(training)(one) for m, one in zip(models, x)], "output")
        for state, m in zip(layer.state_dicts(), models):
            for key, value in m.state_dict().items():
                torch.testing.assert_close(state[key], value)
        for m in models:
            m.load_state_dict(layer.state_dicts()[0])


@pytest.mark.parametrize("name", LAYERS)
def test_batch_follows_the_last_argument_that_is_neither_device_nor_dtype(name: str) -> None:
    def names(cls: type[nn.Module]) -> list[str]:
        given = inspect.signature(cls).parameters.values()
        return [p.name for p in given if p.kind is p.POSITIONAL_OR_KEYWORD and not p.name.startswith("_")]

    of_torch = [n for n in names(getattr(nn, name)) if n not in ("device", "dtype")]
    assert names(getattr(torchmb, f"Batch{name}")) == [*of_torch, "batch", "device", "dtype"]
    layer = getattr(torchmb, f"Batch{name}")(*LAYERS[name][0], **LAYERS[name][1], batch=3, dtype=torch.double)
    assert all(p.dtype == torch.double and len(p) == 3 for p in layer.parameters())
    assert "batch=3" in repr(layer)


@pytest.mark.parametrize("name", LAYERS)
def test_a_forward_takes_the_arguments_of_its_counterpart(name: str) -> None:
    own, of_torch = (inspect.signature(cls.forward) for cls in (getattr(torchmb, f"Batch{name}"), getattr(nn, name)))
    assert list(own.parameters) == list(of_torch.parameters)


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_the_size_that_a_transposed_convolution_puts_out_can_be_chosen(spatial: int) -> None:
    plain, cls = getattr(nn, f"ConvTranspose{spatial}d"), getattr(torchmb, f"BatchConvTranspose{spatial}d")
    models, x = separate(lambda: plain(4, 6, 3, stride=3, padding=1), 2), torch.randn(2, 5, 4, *[3] * spatial)
    layer = cls(4, 6, 3, stride=3, padding=1, batch=2)
    layer.load_state_dicts([m.state_dict() for m in models])
    for size in ([8] * spatial, [5, 6, *[9] * spatial], None):
        out = split_batch(layer(input=merge_batch(x), output_size=size), 2)
        close(out, [m(one, output_size=size) for m, one in zip(models, x)], "output")
    with pytest.raises(ValueError, match="valid sizes"):
        layer(merge_batch(x), output_size=[10] * spatial)


def test_layers_of_a_batch_are_initialised_one_by_one() -> None:
    layer = torchmb.BatchLinear(5, 4, True, 17)
    assert len(layer.get_parameter("weight").unique(dim=0)) == 17


def test_layers_name_the_shapes_that_they_cannot_take() -> None:
    with pytest.raises(ValueError, match=r"BatchConv2d.*\(6, 4, 5\)"):
        torchmb.BatchConv2d(4, 2, 3, batch=3)(torch.zeros(6, 4, 5))
    with pytest.raises(ValueError, match=r"3.*\(7, 5\)"):
        torchmb.BatchLinear(5, 2, batch=3)(torch.zeros(7, 5))
    with pytest.raises(ValueError, match="0"):
        torchmb.BatchLinear(5, 2, batch=0)


def test_module_paths_hold_what_their_names_say() -> None:
    from torchmb import base, batch, functional, layers

    assert base.AbstractBatchModule is batch.AbstractBatchModule is AbstractBatchModule
    assert batch.BatchModule is BatchModule and batch.register_batch_module is base.register_batch_module
    assert functional.batch_loss is torchmb.batch_loss and functional.merge_batch is batch.merge_batch
    assert layers.BatchConv2d is batch.BatchConv2d and callable(functional.to_batch_func)


def test_check_finds_no_difference_in_what_is_right() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert check(net, torch.randn(6, 2, 6, 6)) == []
    assert (
        check(Own(lambda m, x, y: {"a": m.l(x), "b": y}, l=nn.GRU(3, 2)), torch.randn(4, 2, 3), y=torch.ones(2)) == []
    )
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_check_names_the_first_submodule_that_differs() -> None:
    class Wrong(BatchScale):
        def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
            return x * self.scale[:1] + shift

    register_batch_module(Wrong)
    lines = check(nn.Sequential(nn.Linear(4, 4), Scale(4), nn.Linear(4, 2)), torch.randn(6, 4), batch=4)
    assert lines[0].startswith("output of 1:") and "models [1, 2, 3]" in lines[0]
    assert any(line.startswith("output:") for line in lines)
