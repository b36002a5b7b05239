"""A cache finds out by itself that its rows are wrong, stops serving them, and never says so of rows that are right."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from cache_harness import cache_of
from torch import Tensor

from torchcache import errors, torchcache

WIDTH = 8
Forward = Callable[..., Any]


class Own(nn.Module):
    """A custom forward on one frozen layer."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.function = function
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, *args: Any) -> Any:
        return self.function(self.layer, x, *args)


def cached(function: Forward, verify: float | str = 1, **options: Any) -> Any:
    return torchcache(verify=verify, **options)(Own(function))


def train(module: Any, data: Tensor, epochs: int = 3, batch: int = 16, *args: Tensor) -> None:
    """The calls of an ordinary training run: shuffled epochs."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(data), generator=generator).split(batch):
            module(data[rows], *args)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in warned(caplog) if "calls are not cached" in message]


def serves_nothing_wrong(module: Any, data: Tensor, *args: Tensor) -> None:
    """Whole and partial batches give what the uncached module gives."""
    for part in (data[:16], data[8:24]):
        got = module(part, *args)
        module.torchcache_enabled = False
        expected = module(part, *args)
        module.torchcache_enabled = True
        assert torch.equal(got, expected)


# ---- rows that depend on their neighbours


def logits_against_the_batch(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x) @ x.T


def centred(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return y - y.mean(0)


def normalised_by_the_batch(layer: nn.Module, x: Tensor) -> Tensor:
    return F.softmax(layer(x), dim=0)


def scaled_by_the_size(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return y / len(x)


def in_eights(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return (y.view(8, -1, WIDTH) + y.view(8, -1, WIDTH).mean(1, keepdim=True)).view(-1, WIDTH)


DEPENDENT = [logits_against_the_batch, centred, normalised_by_the_batch, scaled_by_the_size, in_eights]


@pytest.mark.parametrize("forward", DEPENDENT)
def test_rows_that_depend_on_their_batch_are_found_and_not_served_again(
    forward: Forward, caplog: pytest.LogCaptureFixture
) -> None:
    module, data = cached(forward), torch.randn(640, WIDTH)
    train(module, data)
    assert ["depend on the other rows" in message for message in warned(caplog)] == [True]
    assert module.cache_instance.info().wrong_rows and module.cache_instance.info().memory_rows == 0
    serves_nothing_wrong(module, data)


@pytest.mark.parametrize("forward", DEPENDENT)
def test_such_rows_are_found_while_they_are_computed_and_are_not_kept(
    forward: Forward, caplog: pytest.LogCaptureFixture
) -> None:
    module = cached(forward)
    train(module, torch.randn(1600, WIDTH), epochs=1)
    assert len(warned(caplog)) == 1 and module.cache_instance.info().memory_rows == 0
    assert module.cache_instance.info().misses < 1600


def test_a_transformer_with_the_sequence_in_dimension_0_and_padding_is_found(caplog: pytest.LogCaptureFixture) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval().requires_grad_(False)
    module: Any = torchcache(verify=1)(encoder)
    assert "batch_first=True" in caplog.text
    data = torch.randn(640, 4, WIDTH)
    data[:, 2:] = 0  # padding
    train(module, data)
    assert "depend on the other rows" in caplog.text
    serves_nothing_wrong(module, data)


def test_a_mask_that_is_taken_for_rows_is_found(caplog: pytest.LogCaptureFixture) -> None:
    def attend(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    module, length = cached(attend), 16
    train(module, torch.randn(1600, length, WIDTH), 1, length, torch.ones(length, length).tril().bool())
    assert "depend on the other rows" in caplog.text and "mask [T, T]" in caplog.text


def test_a_forward_that_is_right_in_batches_of_its_size_is_no_finding(caplog: pytest.LogCaptureFixture) -> None:
    module, data = cached(lambda layer, x: layer(x.view(8, WIDTH))), torch.randn(640, WIDTH)
    for _ in range(4):  # whole batches: rows are only computed together
        for part in data.split(8):
            module(part)
    info = module.cache_instance.info()
    assert not warned(caplog) and info.wrong_rows == 0 < info.checks and info.misses == 640


# ---- what changes unseen


def through_a_file(path: Path) -> tuple[Forward, Callable[[float], None]]:
    def write(scale: float) -> None:
        path.write_text(str(scale))

    return lambda layer, x: layer(x) * float(path.read_text()), write


def through_the_environment(path: Path) -> tuple[Forward, Callable[[float], None]]:
    def write(scale: float) -> None:
        os.environ["TORCHCACHE_TEST_SCALE"] = str(scale)

    return lambda layer, x: layer(x) * float(os.environ["TORCHCACHE_TEST_SCALE"]), write


class Holder:
    """An object that no name in the forward leads to."""

    scale = 0.0


HOLDER = [Holder()]


def through_a_hidden_object(path: Path) -> tuple[Forward, Callable[[float], None]]:
    def write(scale: float) -> None:
        HOLDER[0].scale = scale

    return lambda layer, x: layer(x) * globals()["HOLDER"][0].scale, write


UNSEEN = [through_a_file, through_the_environment, through_a_hidden_object]


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    yield
    os.environ.pop("TORCHCACHE_TEST_SCALE", None)


@pytest.mark.parametrize("channel", UNSEEN)
def test_what_changes_unseen_is_found_and_old_rows_are_not_served_again(
    channel: Callable[[Path], tuple[Forward, Callable[[float], None]]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    forward, write = channel(tmp_path / "scale")
    write(1.0)
    directory = tmp_path / "rows"
    module, data = cached(forward, persistent=True, persistent_cache_dir=directory), torch.randn(1200, WIDTH)
    train(module, data)
    assert "not cached" not in caplog.text
    write(3.0)
    train(module, data, epochs=1)
    assert ["no longer what the forward computes" in message for message in refusals(caplog)] == [True]
    assert str(directory) in caplog.text
    serves_nothing_wrong(module, data)
    assert module.cache_instance.info().memory_rows == 0


def test_all_calls_are_refused_then_not_only_those_of_one_kind(tmp_path: Path) -> None:
    forward, write = through_a_file(tmp_path / "scale")
    write(1.0)
    module, data = cached(forward), torch.randn(1200, WIDTH)
    other = torch.randn(600, 2, WIDTH)
    train(module, data)
    train(module, other)
    write(3.0)
    module(data[:16])
    serves_nothing_wrong(module, other)


def test_a_patched_library_function_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = cached(lambda layer, x: getattr(F, "ge" + "lu")(layer(x))), torch.randn(1200, WIDTH)
    train(module, data)
    monkeypatch.setattr(F, "gelu", F.silu)
    train(module, data, epochs=1)
    serves_nothing_wrong(module, data)


def test_weights_that_are_edited_behind_every_watch_are_found(caplog: pytest.LogCaptureFixture) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(512, 512).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    module: Any = torchcache(verify=1)(Large())
    data = torch.randn(1200, 512)
    train(module, data)
    elements = numpy.random.default_rng(0).choice(512 * 512, 20)
    module.layer.weight.data.numpy().reshape(-1)[elements] += 1.0
    train(module, data, epochs=1)
    serves_nothing_wrong(module, data)


def test_rows_of_another_network_under_a_given_hash_are_warned_of_and_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"persistent": True, "persistent_cache_dir": tmp_path, "persistent_module_hash": "shared"}
    data = torch.randn(1200, WIDTH)
    one, other = (cached(lambda layer, x: layer(x), **options) for _ in range(2))
    train(one, data)
    one.cache_instance.close()
    train(other, data)
    (message,) = warned(caplog)
    assert "'shared'" in message and str(tmp_path) in message and "row " in message
    assert torch.equal(other(data[:16]), one(data[:16])) and other.cache_instance.info().bypassed_calls == 0


def test_rows_that_another_process_left_are_checked_first(tmp_path: Path) -> None:
    forward, write = through_a_file(tmp_path / "scale")
    options: dict[str, Any] = {"persistent": True, "persistent_cache_dir": tmp_path / "rows"}
    data = torch.randn(1100, WIDTH)
    write(1.0)
    first = Own(forward)
    torchcache(**options)(first)
    first(data)
    cache_of(first).close()
    write(2.0)
    second = Own(forward)
    second.load_state_dict(first.state_dict())
    torchcache(verify="strict", **options)(second)
    second(data)  # 1,000 rows are not enough for a check before this call
    with pytest.raises(errors.WrongRow, match="no longer what the forward computes"):
        for _ in range(100_000):
            second(data[:16])


# ---- options


def test_strict_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    module, data = cached(centred, verify="strict"), torch.randn(640, WIDTH)
    with pytest.raises(errors.WrongRow, match="depend on the other rows"):
        train(module, data, epochs=10_000)
    serves_nothing_wrong(module, data)


def test_nothing_is_checked_with_0_and_before_1000_rows() -> None:
    data = torch.randn(640, WIDTH)
    off, few = cached(centred, verify=0), cached(centred)
    train(off, data)
    few(data[:500])
    few(data[:500])
    assert off.cache_instance.info().checks == 0 == few.cache_instance.info().checks


@pytest.mark.parametrize(("text", "checks"), [("0", False), ("1", True), (" 1.0 ", True), ("x", True), ("2", True)])
def test_the_environment_overrides_the_option(
    text: str, checks: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHCACHE_VERIFY", text)
    module = cached(lambda layer, x: layer(x), verify=1)
    train(module, torch.randn(640, WIDTH))
    assert bool(module.cache_instance.info().checks) is checks
    assert len(warned(caplog)) == (text in ("x", "2"))


def test_the_attribute_works_and_the_module_hash_does_not_depend_on_it() -> None:
    modules = [Own(centred) for _ in range(2)]
    modules[0].torchcache_verify = 0.0  # type: ignore[assignment]
    for module in modules:
        torchcache(verify=1)(module)
        train(module, torch.randn(640, WIDTH))
    assert [bool(cache_of(m).info().checks) for m in modules] == [False, True]
    assert cache_of(modules[0]).module_hash == cache_of(modules[1]).module_hash


# ---- checks leave everything as it was


def numpy_state() -> Any:
    state: Any = numpy.random.get_state()
    return state[1].tolist()


def test_a_check_moves_no_generator_and_does_not_touch_the_inputs() -> None:
    def edits(layer: nn.Module, x: Tensor) -> Tensor:
        x.mul_(1.0)
        return layer(x)

    module, data = cached(edits), torch.randn(640, WIDTH)
    before = torch.get_rng_state(), random.getstate(), numpy_state(), data.clone()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for rows in torch.randperm(640, generator=generator).split(16):
            module(data[rows])
    assert module.cache_instance.info().checks
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert before[2] == numpy_state() and torch.equal(before[3], data)


BROKEN: list[bool] = []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_an_exception_in_a_check_leaves_the_cache_as_it_was(error: type[BaseException]) -> None:
    def fails(layer: nn.Module, x: Tensor) -> Tensor:
        if globals()["BROKEN"] and len(x) < 16:
            raise error
        return layer(x)

    module, data = cached(fails), torch.randn(640, WIDTH)
    module.cache_instance  # noqa: B018
    train(module, data)
    before = module.cache_instance.info()
    BROKEN.append(True)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            module(data[:16])
    else:
        module(data[:16])
    BROKEN.clear()
    after = module.cache_instance.info()
    assert after.memory_rows == before.memory_rows and after.wrong_rows == 0 and after.misses == before.misses
    train(module, data)
    assert module.cache_instance.info().checks > after.checks and module.cache_instance.info().bypassed_calls == 0


def test_a_check_runs_without_grad_in_the_mode_of_the_call() -> None:
    seen = set()

    def notes(layer: nn.Module, x: Tensor) -> Tensor:
        if len(x) < 16:
            seen.add((torch.is_grad_enabled(), layer.training, torch.is_autocast_enabled("cpu")))
        return layer(x)

    module = cached(notes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(module, torch.randn(640, WIDTH))
    assert seen == {(False, False, True)}


# ---- no false alarms


def low_precision_inside(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return layer(F.gelu(layer(x))).float()


def labels(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x).argmax(1)


def several(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    y = layer(x)
    return {"y": y, "label": y.argmax(1), "is_large": y > 0.5, "nan": y / 0 - y / 0, "complex": torch.fft.fft(y)}


@pytest.mark.parametrize("forward", [low_precision_inside, labels, several], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_noise_is_no_finding(forward: Forward, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    if dtype is not torch.float32 and forward is several:
        pytest.skip("there is no FFT in this precision" if dtype is torch.bfloat16 else "covered by float32")
    module = cached(forward).to(dtype)
    train(module, torch.randn(640, WIDTH, dtype=dtype))
    info = module.cache_instance.info()
    assert info.checks and not warned(caplog) and info.wrong_rows == 0


def architectures() -> Iterator[tuple[str, nn.Module, Tensor]]:
    images, words = torch.randn(320, 3, 16, 16), torch.randn(320, 6, 16)
    yield (
        "convolutions",
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 32)
        ),
        images,
    )
    yield (
        "vision transformer",
        nn.Sequential(
            nn.Conv2d(3, 16, 4, 4),
            nn.Flatten(2),
            nn.Linear(16, 16),
            nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2),
        ),
        images,
    )
    yield "encoder", nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2), words
    yield "recurrent", nn.LSTM(16, 16, 2, batch_first=True), words
    yield "normalised", nn.Sequential(nn.GroupNorm(2, 6), nn.LayerNorm(16), nn.Linear(16, 4), nn.Softmax(-1)), words


@pytest.mark.parametrize(("name", "network", "data"), [pytest.param(*a, id=a[0]) for a in architectures()])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast", "half rows"])
def test_architectures_give_no_false_alarm(
    name: str, network: nn.Module, data: Tensor, precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    options: dict[str, Any] = {"cache_dtype": torch.half} if precision == "half rows" else {}
    if name == "recurrent" and precision in ("bfloat16", "autocast"):
        pytest.skip("not every CPU can compute an LSTM in bfloat16")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network.to(dtype)

        def forward(self, x: Tensor) -> Tensor:
            y = self.network(x)
            return y[0] if isinstance(y, tuple) else y

    module = torchcache(verify=1, **options)(Net().eval().requires_grad_(False))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        for batch in (64, 32, 16, 7):
            train(module, data.to(dtype), 1, batch)
        train(module, data[:32].to(dtype), 1, batch=1)
    info = cache_of(module).info()
    assert info.checks and info.wrong_rows == 0 and not warned(caplog)


def test_a_compiled_forward_is_not_compiled_for_another_size(caplog: pytest.LogCaptureFixture) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Forward:
        graphs.append(graph)
        return graph.forward

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.compile(nn.Linear(WIDTH, WIDTH).requires_grad_(False), backend=backend)

        def forward(self, x: Tensor) -> Any:
            return self.layer(x)

    module = torchcache(verify=1)(Net())
    with torch.no_grad():  # with and without grad, torch.compile makes two graphs
        train(module, torch.randn(640, WIDTH))
    assert cache_of(module).info().checks and len(graphs) == 1 and not refusals(caplog)


# ---- when a module is decorated


def test_layers_with_the_sequence_first_are_warned_of_once_for_a_class(caplog: pytest.LogCaptureFixture) -> None:
    @torchcache()
    class SequenceFirst(nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.GRU(4, 4, batch_first=batch_first), nn.Linear(4, 4)])

    SequenceFirst(True)
    assert not warned(caplog)
    SequenceFirst(False), SequenceFirst(False)
    (message,) = warned(caplog)
    assert "SequenceFirst: GRU" in message and "batch_first=True" in message
    torchcache()(nn.MultiheadAttention(4, 2))
    assert len(warned(caplog)) == 2
