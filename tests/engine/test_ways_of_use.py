"""What works without the cache keeps working with it: inputs, outputs, modes, threads, processes."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_harness import cache_of
from store_harness import forked, succeeded
from torch import Tensor, nn

from torchcache import torchcache


def twice(x: Tensor) -> Tensor:
    return x * 2


BASE = torch.randn(6, 3, 8, 8)
INPUTS = {
    "one-dimensional": torch.arange(5.0),
    "rows without elements": torch.empty(3, 0),
    "channels_last": BASE.to(memory_format=torch.channels_last),
    "transposed": BASE.transpose(0, 1),
    "every other row": BASE[::2],
    "every other column": BASE[..., ::2],
    "expanded rows": torch.randn(1, 4).expand(5, 4),
    "expanded columns": torch.randn(5, 1).expand(5, 4),
    "overlapping": torch.arange(10.0).as_strided((4, 3), (2, 1)),
    "backwards": BASE.flip(0),
    "bool": BASE > 0,
    "uint8": (BASE * 10).to(torch.uint8),
    "half": BASE.half(),
    "bfloat16": BASE.bfloat16(),
    "complex": BASE.to(torch.complex64),
    "conjugated": BASE.to(torch.complex64).conj(),
    "float8": BASE.to(torch.float8_e4m3fn),
}


def raw(t: Tensor) -> list[int]:
    flat = torch.empty(t.numel(), dtype=t.dtype).copy_(t.reshape(-1))
    return flat.view(torch.uint8).tolist()


@pytest.mark.parametrize("kind", INPUTS)
def test_any_layout_and_dtype_of_input_is_cached(kind: str) -> None:
    x = INPUTS[kind]
    cached = torchcache()(lambda x: x.clone())
    for _ in range(2):
        got = cached(x)
        assert got.dtype == x.dtype and got.shape == x.shape and raw(got) == raw(x)
    assert cache_of(cached).info().memory_hits >= len(x)


def test_rows_cached_under_inference_mode_can_be_trained_on() -> None:
    cached = torchcache()(twice)
    x = torch.randn(4, 3)
    with torch.inference_mode():
        cached(x)
    weight = torch.ones(3, requires_grad=True)
    (cached(x) * weight).sum().backward()
    assert weight.grad is not None and torch.allclose(weight.grad, (x * 2).sum(0))
    with torch.inference_mode():
        assert cached(x).is_inference()
    assert cache_of(cached).info().misses == 4


def test_weights_made_under_inference_mode_are_watched() -> None:
    with torch.inference_mode():
        module = torchcache()(nn.Linear(3, 2).requires_grad_(False))
        x = torch.randn(4, 3)
        before = module(x)
        assert torch.equal(module(x), before)
        module.weight.mul_(2)
        assert not torch.equal(module(x), before)


def test_a_default_device_does_not_lead_the_cache_astray() -> None:
    cached = torchcache()(twice)
    x = torch.randn(4, 3)
    with torch.device("meta"):
        for _ in range(2):
            assert torch.equal(cached(x), x * 2)
        assert torch.equal(cached(torch.cat([x, x + 1])), torch.cat([x, x + 1]) * 2)


def test_a_sequential_of_cached_and_trained_layers_trains() -> None:
    frozen = torchcache()(nn.Sequential(nn.Linear(4, 8), nn.ReLU()).requires_grad_(False).eval())
    model = nn.Sequential(frozen, nn.Linear(8, 1))
    names = list(model.state_dict())
    optimizer = torch.optim.Adam(model[1].parameters(), lr=0.1)
    x = torch.randn(32, 4)
    first = None
    for _ in range(20):
        loss = (model(x) - x[:, :1]).square().mean()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first is not None and loss.item() < first / 2
    assert cache_of(frozen).info().misses == 32 and list(model.state_dict()) == names


@dataclasses.dataclass
class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As Hugging Face's are: a dataclass that is a dict of its fields that are not None, and indexes like a tuple."""

    last_hidden_state: Any = None
    pooler_output: Any = None
    attentions: Any = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                super().__setitem__(field.name, getattr(self, field.name))

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


class Encoder(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = (input_ids * mask).float().unsqueeze(-1).expand(-1, -1, 4)
        return ModelOutput(hidden, hidden.mean(1), (hidden, hidden + 1) if output_attentions else None)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_hugging_face_style_model_takes_batches_and_gives_model_outputs(persistent: bool) -> None:
    module = torchcache(persistent=persistent, max_memory_cache_size=0 if persistent else 1e9)(Encoder())
    batch = {"input_ids": torch.randint(0, 9, (4, 6)), "attention_mask": torch.randint(0, 2, (4, 6))}
    for attentions in (False, True):
        right = Encoder()(**batch, output_attentions=attentions)
        for _ in range(2):
            got = module(**batch, output_attentions=attentions)
            assert type(got) is ModelOutput and list(got) == list(right)
            assert torch.equal(got[0], right.last_hidden_state) and torch.equal(
                got.pooler_output, right["pooler_output"]
            )
            assert (got.attentions is None) is (not attentions)
    masked = {**batch, "attention_mask": 1 - batch["attention_mask"]}
    assert torch.equal(module(**masked)[0], Encoder()(**masked)[0])


def test_tensors_nested_in_arguments_are_rows_and_are_given_to_forward_as_they_came() -> None:
    class Nested(nn.Module):
        def forward(self, batch: dict[str, Any], pair: tuple[Tensor, int]) -> Tensor:
            assert type(batch) is OrderedDict and type(pair) is tuple
            return batch["x"] * pair[1] + pair[0]

    module = torchcache()(Nested())
    x, y = torch.randn(4, 2), torch.randn(4, 2)
    for rows in (slice(0, 2), slice(0, 4), slice(1, 3)):
        batch = OrderedDict(x=x[rows], note="n")
        assert torch.equal(module(batch, (y[rows], 3)), x[rows] * 3 + y[rows])
    assert cache_of(module).info().misses == 4


def test_an_init_argument_without_a_stable_encoding_is_one_warning_and_shares_no_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    @torchcache(persistent=True, persistent_cache_dir=tmp_path)
    class Reading(nn.Module):
        def __init__(self, source: Any) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    with open(__file__) as file:
        one, two = Reading(file), Reading(i for i in range(3))
        again = Reading(file)
    hashes = {cache_of(m).module_hash for m in (one, two, again)}
    assert len(hashes) == 3
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 3 and all("not shared with other processes" in s for s in said)


def test_data_parallel_replicas_are_served() -> None:
    module = torchcache()(nn.Linear(3, 2).requires_grad_(False))
    x = torch.randn(4, 3)
    right = module(x)
    replica = module._replicate_for_data_parallel()
    assert torch.equal(replica(x), right) and cache_of(module).info().memory_hits == 4


def test_clones_and_copies_of_a_module_never_share_rows_after_they_part() -> None:
    import copy

    module = torchcache()(nn.Linear(3, 2).requires_grad_(False))
    x = torch.randn(4, 3)
    module(x)
    twin = copy.deepcopy(module)
    shallow = copy.copy(module)
    twin.weight.add_(1)
    assert torch.allclose(twin(x), module(x) + x.sum(1, keepdim=True), atol=1e-5)
    shallow._parameters = {**shallow._parameters, "weight": module.weight * 2}  # type: ignore[dict-item]
    for _ in range(2):
        assert torch.equal(shallow(x), nn.functional.linear(x, module.weight * 2, module.bias))
    assert shallow.cache_instance is not module.cache_instance


def test_two_modules_of_one_class_with_other_attributes_share_no_rows(tmp_path: Path) -> None:
    options: Any = {"persistent": True, "persistent_cache_dir": tmp_path, "max_memory_cache_size": 0}
    x = torch.randn(4, 3)
    for slope in (0.1, 0.9, 0.1):
        module = torchcache(**options)(nn.Sequential(nn.LeakyReLU(slope)))
        assert torch.equal(module(x), nn.functional.leaky_relu(x, slope))


def test_an_output_of_a_class_that_wants_more_than_its_fields_is_computed_on_every_call(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @dataclasses.dataclass
    class Wanting:
        rows: Tensor
        scale: dataclasses.InitVar[float]

        def __post_init__(self, scale: float) -> None:
            self.rows = self.rows * scale

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Wanting:
            return Wanting(x, 2.0)

    module, x = torchcache()(Net()), torch.randn(4, 3)
    for _ in range(2):
        assert torch.equal(module(x).rows, x * 2)
    (said,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert "cannot be rebuilt from its fields" in said and "scale" in said


def test_weights_without_a_storage_are_computed_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Offloaded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            self.weight.untyped_storage().resize_(12)
            self.weight.fill_(2.0)
            return x * self.weight

    module, x = torchcache()(Offloaded()), torch.ones(2, 3)
    for _ in range(3):
        assert torch.equal(module(x), x * 2)
        module.weight.untyped_storage().resize_(0)
    assert cache_of(module).explain(x).bypassed is not None
    with pytest.raises(TypeError, match="no keys"):
        cache_of(module).keys(x)


def test_misses_need_no_numpy() -> None:
    script = """
import sys
sys.modules["numpy"] = None
import torch
from torchcache import torchcache
module = torchcache()(torch.nn.Linear(3, 2).requires_grad_(False))
module(torch.ones(2, 3)), module(torch.ones(2, 3))
assert module.cache_instance.info().memory_hits == 3
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_thread_of_a_forked_child_computes_misses_while_a_thread_of_its_parent_does() -> None:
    module = torchcache()(nn.Linear(3, 2).requires_grad_(False))
    right = module(torch.ones(1, 3))
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with cache_of(module)._computer._lock:
            entered.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    before_fork.append(leave.set)

    def miss() -> None:
        signal.alarm(60)  # rather than wait for ever
        other = threading.Thread(target=lambda: module(torch.zeros(1, 3)))
        other.start()
        other.join()
        assert torch.equal(module(torch.ones(1, 3)), right)

    try:
        assert succeeded(forked(miss))
    finally:
        before_fork.clear()
        thread.join()


before_fork: list[Callable[[], None]] = []
os.register_at_fork(before=lambda: [act() for act in before_fork])
