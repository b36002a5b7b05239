"""frozen=True: the module stays in eval mode and its parameters do not require grad, whatever a training loop does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_harness import cache_of
from torch import Tensor, nn

from torchcache import torchcache

X = torch.randn(6, 4)


class Plain(nn.Module):
    """Computes something else in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout())

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers(x)
        return output


@torchcache(frozen=True)
class Decorated(Plain):
    pass


class WithAnotherForward(Decorated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class WithAnotherTrain(Decorated):
    """Puts a layer into train mode itself, as fine-tuning code does."""

    def train(self, mode: bool = True) -> WithAnotherTrain:
        super().train(mode)
        self.layers[2].training = mode
        return self


@torchcache()
class ByAttribute(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.torchcache_frozen = True


def compiled() -> nn.Module:
    module: Any = torch.compile(Plain(), backend="eager")
    return torchcache(frozen=True)(module)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "class": Decorated,
    "subclass with another forward": WithAnotherForward,
    "subclass with another train": WithAnotherTrain,
    "attribute": ByAttribute,
    "instance": lambda: torchcache(frozen=True)(Plain()),
    "layers of torch": lambda: torchcache(frozen=True)(nn.Sequential(nn.Linear(4, 3), nn.Dropout())),
    "without a cache": lambda: torchcache(frozen=True, enabled=False)(Plain()),
    "compiled": compiled,
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda module: module,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


def is_frozen(module: nn.Module) -> bool:
    return not any(m.training for m in module.modules()) and not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("made", MAKERS)
def test_no_call_of_train_unfreezes_a_frozen_module_or_a_copy_of_it(made: str, way: str) -> None:
    if made == "compiled" and way != "itself":
        pytest.skip("torch makes a new module, which nobody has decorated")
    module = COPIES[way](MAKERS[made]())
    assert is_frozen(module)
    outer = nn.Sequential(nn.Dropout(), nn.Sequential(module), nn.Linear(3, 2))
    right = module(X)
    for call in (outer.train, module.train, lambda: module.train(True), lambda: nn.ModuleList([module]).train()):
        call()
        assert is_frozen(module) and torch.equal(module(X), right)
    outer.train()
    assert outer.training and outer[0].training and outer[2].weight.requires_grad
    assert module.train() is module


def test_every_step_of_a_loop_that_trains_a_head_finds_the_rows() -> None:
    backbone = Decorated()
    model = nn.Sequential(backbone, nn.Linear(3, 2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    before = copy.deepcopy(backbone.state_dict())
    for _ in range(4):
        model.train()
        model(X).sum().backward()
        optimizer.step()
        model.eval()
        model(X)
    info = cache_of(backbone).info()
    assert (info.misses, info.memory_hits, info.bypassed_calls) == (6, 42, 0)
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


def test_the_rows_of_a_frozen_module_are_those_of_one_that_the_user_froze() -> None:
    plain = Plain()
    frozen = torchcache(frozen=True)(copy.deepcopy(plain))
    by_hand = torchcache()(copy.deepcopy(plain).eval().requires_grad_(False))
    assert torch.equal(cache_of(frozen).keys(X), cache_of(by_hand).keys(X))


def test_what_is_unfrozen_or_added_by_hand_is_frozen_again_by_the_next_train() -> None:
    module = Decorated()
    module.layers.append(nn.Linear(3, 3))
    module.layers[2].train()
    module.requires_grad_(True)
    assert not is_frozen(module)
    nn.Sequential(module).train()
    assert is_frozen(module)


def test_frozen_can_be_switched_on_and_off_at_any_time() -> None:
    module: Any = torchcache()(Plain().requires_grad_(False))
    module(X)
    module.torchcache_frozen = True
    assert torch.equal(module(X), module(X)) and is_frozen(module)
    assert is_frozen(module.train())
    module.torchcache_frozen = False
    assert module.train().training


def test_other_instances_of_a_class_keep_their_train_mode() -> None:
    torchcache(frozen=True)(Plain())
    torchcache(frozen=True)(nn.Linear(2, 2))
    assert Plain().train().training and not Plain().eval().training
    assert nn.Linear(2, 2).train().training and nn.Linear(2, 2).weight.requires_grad


def test_a_lazy_module_is_frozen_when_it_is_made_and_stays_so() -> None:
    module = torchcache(frozen=True)(nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()))
    for _ in range(3):
        module.train()
        module(X)
        assert is_frozen(module)
    assert cache_of(module).info().memory_hits > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_can_be_frozen() -> None:
    module = torchcache(frozen=True)(torch.jit.script(Plain()))
    right = module(X)
    assert torch.equal(nn.Sequential(module).train()(X), right) and is_frozen(module)
    assert torch.jit.script(Plain()).train().training


def test_a_function_cannot_be_frozen() -> None:
    with pytest.raises(ValueError, match=r"frozen=True is for modules: .*decorate the module"):
        torchcache(frozen=True)(lambda x: x)

    @torchcache()
    def double(x: Tensor) -> Tensor:
        return x * 2

    double(X)
    double.torchcache_frozen = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="frozen=True is for modules"):
        double(X)
