"""Layers and networks in a batch of models do what they do in M separate ones: outputs, gradients, buffers."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from models_harness import LeNet, Own, ResNet18, Wrapped, assert_alike, close, indices, run_alike, separate, tensors

from torchmb import BatchModule

Case = tuple[Callable[[], nn.Module], tuple[int, ...]]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """The same numbers in every run, and no warning: nothing here is run model by model."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for of_torch in (
            "Using padding='same'",
            "LSTM with projections",
            "enable_nested_tensor",
            "Mismatch dtype",
            "The PyTorch API of nested",
        ):
            warnings.filterwarnings("ignore", of_torch)
        yield


LAYERS: dict[str, Case] = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (5,)),
    "linear on 3-d": (lambda: nn.Linear(5, 4), (7, 5)),
    "conv1d, groups": (lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1), (4, 9)),
    "conv2d, stride, dilation": (lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2), (4, 9, 9)),
    "conv2d, valid": (lambda: nn.Conv2d(4, 6, (1, 3), padding="valid"), (4, 5, 5)),
    "conv2d, same": (lambda: nn.Conv2d(4, 6, (3, 2), padding="same"), (4, 9, 9)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 6, 6)),
    "conv2d, reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=False), (2, 5, 5)),
    "conv1d, circular": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5)),
    "conv3d, replicate": (lambda: nn.Conv3d(2, 3, 3, padding=1, padding_mode="replicate"), (2, 4, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 4, 4, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, stride=2, output_padding=1), (4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, dilation=2, bias=False), (4, 5, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 4, 2), (2, 3, 3, 3)),
    "batch norm 1d on 3-d": (lambda: nn.BatchNorm1d(4), (4, 5)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4), (4, 3, 3)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(4), (4, 2, 3, 3)),
    "batch norm, momentum None": (lambda: nn.BatchNorm2d(4, momentum=None), (4, 3, 3)),
    "batch norm, affine False": (lambda: nn.BatchNorm2d(4, affine=False), (4, 3, 3)),
    "batch norm, no running stats": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (4, 3, 3)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 3)),
    "instance norm": (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (3, 4, 4)),
    "layer norm": (lambda: nn.LayerNorm(5), (3, 5)),
    "layer norm over two": (lambda: nn.LayerNorm((3, 5), bias=False), (3, 5)),
    "rms norm": (lambda: nn.RMSNorm(5), (5,)),
    "prelu": (lambda: nn.PReLU(4), (4, 3)),
    "max pool": (lambda: nn.MaxPool2d(2), (3, 6, 6)),
    "average pool": (lambda: nn.AvgPool1d(2), (3, 6)),
    "adaptive pool": (lambda: nn.AdaptiveAvgPool2d((2, 1)), (3, 6, 6)),
    "softmax": (lambda: nn.Softmax(dim=0), (3, 6)),
    "softmax, last": (lambda: nn.LogSoftmax(dim=-1), (3, 6)),
    "flatten": (lambda: nn.Flatten(1, 2), (3, 4, 2)),
    "flatten all": (lambda: nn.Flatten(0, -1), (3, 4)),
    "linear, relu, linear": (lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4)), (5,)),
    "deep, in place": (
        lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(True), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 6)),
        (3, 5),
    ),
    "convolutional": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 6, 2), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
        ),
        (2, 8, 8),
    ),
}

UNDER_VMAP: dict[str, Case] = {
    "bilinear": (lambda: Own(lambda m, x: m.l(x, 2 * x), l=nn.Bilinear(5, 5, 4)), (5,)),
    "attention, batch first": (
        lambda: Own(lambda m, x: m.l(x, x, x), l=nn.MultiheadAttention(8, 2, batch_first=True)),
        (4, 8),
    ),
    "attention": (lambda: Own(lambda m, x: m.l(x, x, x, need_weights=False)[0], l=nn.MultiheadAttention(8, 2)), (4, 8)),
    "attention with a mask": (
        lambda: Own(
            lambda m, x: F.scaled_dot_product_attention(m.l(x), x, x, torch.ones(4, 4).tril().bool()), l=nn.Linear(8, 8)
        ),
        (4, 8),
    ),
    "transformer layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (4, 8)),
    "transformer": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2),
        (4, 8),
    ),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), (5,)),
    "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), (4,)),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), (3, 6, 6)),
    "lstm": (lambda: nn.LSTM(5, 4, 2, batch_first=True), (7, 5)),
    "lstm, both ways, projections": (lambda: nn.LSTM(5, 4, 2, bidirectional=True, proj_size=2), (7, 5)),
    "lstm cell": (lambda: Own(lambda m, x: m.l(x, m.l(x)), l=nn.LSTMCell(5, 4)), (5,)),
    "gru cell": (lambda: nn.GRUCell(5, 4), (5,)),
    "gru": (lambda: nn.GRU(5, 4, 2, bidirectional=True), (7, 5)),
    "rnn": (lambda: nn.RNN(5, 4, nonlinearity="relu", bias=False, batch_first=True), (7, 5)),
    "lstm with a state": (
        lambda: Own(
            lambda m, x: m.l(x, (x[:, :1, :4].transpose(0, 1).contiguous(),) * 2), l=nn.LSTM(5, 4, batch_first=True)
        ),
        (7, 5),
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_right_as_a_tree_of_torchs_own_layers(name: str, training: bool) -> None:
    make, shape = LAYERS[name]
    for models, rows in ((1, 6), (3, 1), (3, 6), (17, 6)):
        assert_alike(make, *shape, models=models, rows=rows, training=training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [*LAYERS, *UNDER_VMAP])
def test_a_layer_is_right_under_an_own_forward(name: str, training: bool) -> None:
    make, shape = (LAYERS | UNDER_VMAP)[name]
    for models, rows in ((1, 1), (3, 6), (17, 1)):
        assert_alike(lambda: Wrapped(make()), *shape, models=models, rows=rows, training=training)


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapped], ids=["native", "vmap"])
def test_batch_norm_of_rows_is_right(wrap: Callable[[nn.Module], nn.Module]) -> None:
    for models in (1, 3, 17):
        assert_alike(lambda: wrap(nn.BatchNorm1d(4)), 4, models=models)
    assert_alike(lambda: wrap(nn.BatchNorm1d(4)), 4, rows=1, training=False)


ONE_VALUE: dict[str, Case] = {
    "batch norm": (lambda: nn.BatchNorm1d(4), (1, 4)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4), (1, 4, 1, 1)),
    "group norm": (lambda: nn.GroupNorm(4, 4), (1, 4)),
    "group norm 2d": (lambda: nn.GroupNorm(4, 4, affine=False), (1, 4, 1, 1)),
    "instance norm": (lambda: nn.InstanceNorm1d(4), (6, 4, 1)),
    "instance norm 2d": (lambda: nn.InstanceNorm2d(4, affine=True), (6, 4, 1, 1)),
}


@pytest.mark.parametrize("wrap", [lambda layer: layer, Wrapped])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_batch_norm_of_no_rows_is_right(options: dict[str, Any], training: bool, wrap: Any) -> None:
    models = [m.train(training) for m in separate(lambda: wrap(nn.BatchNorm1d(4, **options)), 3)]
    batch = BatchModule.from_modules(models)
    for rows in (6, 0, 6):
        run_alike(batch, models, torch.randn(3, rows, 4))


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapped], ids=["native", "vmap"])
@pytest.mark.parametrize("name", ONE_VALUE)
def test_statistics_of_one_value_are_refused_as_in_separate_models(name: str, wrap: Any) -> None:
    make, shape = ONE_VALUE[name]
    with pytest.raises(ValueError) as expected:
        make()(torch.randn(shape))
    with pytest.raises(ValueError) as error:
        BatchModule(wrap(make()), 3)(torch.randn(3, *shape))
    assert str(error.value) == str(expected.value)


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapped], ids=["native", "vmap"])
@pytest.mark.parametrize("padding", [None, 2, -1])
def test_an_embedding_is_right(padding: int | None, wrap: Callable[[nn.Module], nn.Module]) -> None:
    for models in (1, 3, 17):
        assert_alike(lambda: wrap(nn.Embedding(7, 4, padding)), 3, models=models, draw=indices(7))
    for options in ({"scale_grad_by_freq": True}, {"max_norm": 0.5}, {"max_norm": 2.0, "norm_type": 1.0}):
        assert_alike(lambda o=options: wrap(nn.Embedding(7, 4, padding, **o)), 3, draw=indices(7))  # type: ignore[misc]


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapped], ids=["native", "vmap"])
def test_an_embedding_shortens_rows_in_place_as_separate_models(wrap: Any) -> None:
    models = separate(lambda: wrap(nn.Embedding(7, 4, max_norm=0.5)), 3)
    batch, x = BatchModule.from_modules(models), torch.randint(7, (3, 2, 2))
    close(batch(x), [m(one) for m, one in zip(models, x)], "output")
    for name, p in batch.named_parameters():
        close(p, [m.get_parameter(name) for m in models], name)


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapped], ids=["native", "vmap"])
def test_an_index_beyond_the_embedding_is_an_error_and_no_other_models_row(wrap: Any) -> None:
    batch = BatchModule(wrap(nn.Embedding(7, 4)), 3)
    for index in (7, -1):
        with pytest.raises(IndexError):
            batch(torch.full((3, 2), index))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_lenet_is_right(training: bool) -> None:
    assert_alike(LeNet, 1, 28, 28, training=training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_small_resnet_18_is_right(training: bool) -> None:
    assert_alike(ResNet18, 3, 16, 16, training=training, steps=1)


def test_rrelu_is_right_and_draws_for_each_model() -> None:
    from torchmb import shared

    def own_forward() -> nn.Module:
        return Own(lambda m, x: F.rrelu(m.l(x), 0.1, 0.4, m.training, inplace=True), l=nn.Linear(5, 5))

    for make in (lambda: nn.Sequential(nn.Linear(5, 5), nn.RReLU()), lambda: Wrapped(nn.RReLU()), own_forward):
        assert_alike(make, 5, training=False)
    for batch in (BatchModule(nn.RReLU(0.1, 0.4), 3), BatchModule(Wrapped(nn.RReLU(0.1, 0.4)), 3)):
        x = torch.tensor([-1.0, 2.0]).expand(50, 2).clone().requires_grad_()
        slopes, kept = batch(shared(x)).unbind(-1)
        assert len(slopes.unique()) == 150 and -0.4 <= slopes.min() < -0.3 and -0.2 < slopes.max() <= -0.1
        assert (kept == 2).all()
        (grad,) = torch.autograd.grad(slopes.sum(), x)
        torch.testing.assert_close(grad[:, 0], -slopes.sum(0))


def test_frozen_layers_stay_without_gradients() -> None:
    def make() -> nn.Module:
        net = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
        net[0].requires_grad_(False)
        return net

    assert_alike(make, 5)
    assert_alike(lambda: Wrapped(make()), 5)


def test_a_frozen_batch_norm_in_a_network_that_trains_keeps_its_statistics() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self[1].eval()
            return self

    assert_alike(lambda: Frozen(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()), 2, 5, 5)


AFTER_A_CONVOLUTION: dict[str, Callable[[], nn.Module]] = {
    "batch_norm": lambda: nn.BatchNorm2d(4),
    "group_norm": lambda: nn.GroupNorm(2, 4),
    "max_pool": lambda: nn.MaxPool2d(2),
    "avg_pool": lambda: nn.AvgPool2d(2),
    "adaptive_pool": lambda: nn.AdaptiveAvgPool2d(2),
    "convolution": lambda: nn.Conv2d(4, 3, 2, groups=1),
    "transposed": lambda: nn.ConvTranspose2d(4, 2, 2),
    "prelu": lambda: nn.PReLU(4),
}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", AFTER_A_CONVOLUTION)
def test_what_follows_a_convolution_is_right_for_one_image_and_for_more(name: str, training: bool, rows: int) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), AFTER_A_CONVOLUTION[name]())

    assert_alike(make, 3, 6, 6, rows=rows, training=training)
    assert_alike(lambda: Wrapped(make()), 3, 6, 6, rows=rows, training=training)


def test_a_forward_sees_whether_its_tensors_require_grad() -> None:
    def make() -> nn.Module:
        return Own(
            lambda m, x: m.l(x) * 2 if m.l(x).requires_grad and m.l.weight.requires_grad else x, l=nn.Linear(4, 4)
        )

    assert_alike(make, 4)
    with torch.no_grad():
        x = torch.randn(2, 3, 4)
        assert torch.equal(BatchModule(make(), batch=2)(x), x)


def test_padded_rows_of_a_transformer_are_masked_without_a_loop() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.t(x, src_key_padding_mask=torch.arange(4).expand(6, 4) > 2)[:, :3]

    def make() -> nn.Module:
        return Own(forward, t=nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2))

    assert_alike(make, 4, 8, training=False)


def test_no_grad_and_inference_mode_are_right() -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        for make in (ResNet18, lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)):
            shape = (3, 16, 16) if make is ResNet18 else (4, 8)
            with mode():
                assert_alike(make, *shape, training=False)


@pytest.mark.parametrize("make", [LAYERS["convolutional"][0], lambda: Wrapped(LAYERS["convolutional"][0]())])
def test_double_precision_is_exact_to_double_precision(make: Callable[[], nn.Module]) -> None:
    models = [m.double() for m in separate(make, 3)]
    x = torch.randn(3, 5, 2, 8, 8, dtype=torch.double)
    close(BatchModule.from_modules(models)(x), [m(one) for m, one in zip(models, x)], "output")


UNDER_AUTOCAST: dict[str, Case] = {
    "convolution, group norm": (lambda: nn.Sequential(nn.Conv1d(4, 4, 3), nn.GroupNorm(2, 4)), (4, 9)),
    "convolution, batch norm": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), (4, 6, 6)),
    "convolution, instance norm": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 3), nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
        (4, 9),
    ),
    "linear, layer norm": (lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)), (5,)),
    "linear, torch.layer_norm": (
        lambda: Own(lambda m, x: torch.layer_norm(m.l(x), (4,), m.n.weight), l=nn.Linear(5, 4), n=nn.LayerNorm(4)),
        (5,),
    ),
    "linear, prelu, linear": (lambda: nn.Sequential(nn.Linear(5, 6), nn.PReLU(6), nn.Linear(6, 2)), (5,)),
    "lstm, both ways": (lambda: nn.LSTM(5, 4, 2, bidirectional=True, bias=False), (7, 5)),
    "gru, linear": (lambda: Own(lambda m, x: m.l(m.g(x)[0]), g=nn.GRU(5, 4), l=nn.Linear(4, 2)), (7, 5)),
    "product": (lambda: Own(lambda m, x: m.l(x) @ m.l(x).mT, l=nn.Linear(5, 4)), (7, 5)),
    "lenet": (LeNet, (1, 28, 28)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("wrap", [lambda m: m, Wrapped], ids=["native", "vmap"])
@pytest.mark.parametrize("name", LAYERS | UNDER_VMAP | UNDER_AUTOCAST)
def test_a_layer_under_autocast_casts_forward_and_backward_as_separate_models(
    name: str, wrap: Any, training: bool
) -> None:
    make, shape = (LAYERS | UNDER_VMAP | UNDER_AUTOCAST)[name]
    models = [m.train(training) for m in separate(lambda: wrap(make()), 3)]
    exact = [copy.deepcopy(m) for m in models]
    batch, x = BatchModule.from_modules(models), torch.randn(3, 6, *shape)
    try:
        theirs = [results(m, one, autocast=True) for m, one in zip(models, x)]
    except RuntimeError as error:  # a CPU on which torch cannot run the layer in bfloat16: neither may the batch
        with pytest.raises(type(error), match=re.escape(str(error))):
            results(batch, x, autocast=True)
        return
    ours = results(batch, x, autocast=True)
    precise = [results(m, one, autocast=False) for m, one in zip(exact, x)]
    for i, own in enumerate(ours):
        plain, reference = (torch.stack([one[i] for one in each]) for each in (theirs, precise))
        assert own.dtype == plain.dtype and own.shape == plain.shape, i
        off, usual = ((t.float() - reference).abs().max() for t in (own, plain))
        assert off <= 3 * usual + 1e-2 * reference.abs().max(), f"{i}: {off} off, separate models {usual}"


def results(model: nn.Module, x: torch.Tensor, autocast: bool) -> list[torch.Tensor]:
    """Outputs, gradients of the input and of parameters, buffers."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = tensors(model(x))
    sum((t.float().square().sum() for t in outputs), torch.zeros(())).backward()
    grads = [t.grad for t in (x, *model.parameters()) if t.grad is not None]
    return [t.detach() for t in (*outputs, *grads, *model.buffers())]


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapped], ids=["native", "vmap"])
def test_complex_layers_are_right(wrap: Any) -> None:
    models = separate(lambda: wrap(nn.Linear(5, 4, dtype=torch.complex64)), 3)
    batch, x = BatchModule.from_modules(models), torch.randn(3, 6, 5, dtype=torch.complex64)
    for model, given in ((batch, x), *zip(models, x)):
        model(given).abs().sum().backward()
    for name, p in batch.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, torch.stack([m.get_parameter(name).grad for m in models]))


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapped], ids=["native", "vmap"])
def test_shapes_may_be_asked_for_on_meta_tensors(wrap: Any) -> None:
    net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.GroupNorm(2, 4), nn.PReLU(), nn.Flatten(), nn.Linear(12, 2))
    out = BatchModule(wrap(net), 3).to("meta")(torch.randn(3, 6, 3, 5, device="meta"))
    assert out.is_meta and out.shape == (3, 6, 2)


@pytest.mark.parametrize(
    "net",
    [
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)),
        lambda: Own(lambda m, x: m.bn(m.conv(x)), conv=nn.Conv2d(2, 3, 3), bn=nn.BatchNorm2d(3)),
        lambda: Own(lambda m, x: F.batch_norm(m.conv(x), None, None, training=True), conv=nn.Conv2d(2, 3, 3)),
    ],
)
def test_batch_statistics_over_many_rows_are_as_precise_as_those_of_separate_models(net: Any) -> None:
    models = separate(net, 4)
    exact = [copy.deepcopy(m).double() for m in models]
    batch, x = BatchModule.from_modules(models), torch.randn(4, 8, 2, 34, 34) + 1

    def error(of: torch.Tensor, like: torch.Tensor) -> float:
        return float(((of - like).abs().max() / like.abs().max()).detach())

    outputs = batch(x), torch.stack([m(one) for m, one in zip(models, x)])
    expected = torch.stack([m(one.double()) for m, one in zip(exact, x)])
    ours, theirs = (error(o, expected) for o in outputs)
    assert ours < 4 * theirs + 1e-6
