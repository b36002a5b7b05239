"""What torchmb does on a torch that lacks one of the private names that it uses."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections import OrderedDict, defaultdict, deque, namedtuple
from operator import attrgetter
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from models_harness import Own, run_alike, separate
from torch import Tensor, nn

from torchmb import torch_private

Pair = namedtuple("Pair", ["first", "second"])


def import_again(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """torchmb, imported as if for the first time; the test's end restores the one from before."""
    for name in [name for name in sys.modules if name.split(".")[0] == "torchmb"]:
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module("torchmb")


def torchmb_without(monkeypatch: pytest.MonkeyPatch, path: str) -> ModuleType:
    """torchmb as it is after an import on a torch without the name at a path below torch."""
    owner, _, name = path.rpartition(".")
    with monkeypatch.context() as patch:
        if owner == "ops.aten":  # which makes its attributes when they are read
            patch.setattr(torch.ops, "aten", SimpleNamespace())
        else:
            patch.delattr(attrgetter(owner)(torch) if owner else torch, name)
        with pytest.raises(AttributeError):
            attrgetter(path)(torch)
        return import_again(monkeypatch)


def layers() -> nn.Module:
    """A tree of torch's own layers."""
    padded = [nn.Conv2d(1, 2, 3, padding=mode, padding_mode="reflect") for mode in (1, "same")]
    padded[1] = nn.Conv2d(2, 2, (3, 2), padding="same", padding_mode="circular")
    return nn.Sequential(*padded, nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))


def forward(model: Any, x: Tensor) -> Any:
    y = model.linear(x)
    z = model.normed(y.view(-1, 4))
    z += 1
    pair = Pair(z, [z.max(1)])
    return pair, OrderedDict(a=y), defaultdict(list, b=z), deque([y])


def custom() -> nn.Module:
    """A custom forward."""
    return Own(forward, linear=nn.Linear(6, 4), normed=nn.utils.weight_norm(nn.Linear(4, 5)))


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[1].register_full_backward_hook(lambda module, *grads: None)
    return model


def assert_works(torchmb: ModuleType, reason: str) -> None:
    """A batch computes what separate models compute; it warns if, and only if, there is a reason."""
    for make, shape in [(layers, (4, 1, 6, 6)), (custom, (5, 6)), (hooked, (5, 6))]:
        models = separate(make, 3)
        batch = torchmb.BatchModule.from_modules(models)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run_alike(batch, models, torch.randn(3, *shape))
        said = [str(warning.message) for warning in caught if "torchmb" not in str(warning.filename)]
        said = [line for line in said if "weight_norm" not in line]
        if make is layers or not reason:
            assert not said
        else:
            assert len(said) == 1 and "run one by one" in said[0] and reason in said[0]


def test_the_table_of_names_is_not_empty() -> None:
    assert set(torch_private.VMAP) < set(torch_private.OPTIONAL)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("path", sorted(set(torch_private.OPTIONAL) - set(torch_private.VMAP)))
def test_a_batch_computes_the_same_without(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_works(torchmb_without(monkeypatch, path), "")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("path", torch_private.VMAP)
def test_models_run_one_by_one_without(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = path.rpartition(".")[2]
    assert_works(torchmb_without(monkeypatch, path), f"torch {torch.__version__} lacks {name}")


def test_convolutions_pad_alike_without_the_padding_that_torch_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any
    for layer in [*layers().children()][:2]:
        stored = list(layer._reversed_padding_repeated_twice)
        del layer._reversed_padding_repeated_twice
        assert list(torch_private.reversed_padding(layer)) == stored


@pytest.mark.parametrize("name", torch_private.REQUIRED)
def test_an_import_names_what_torch_lacks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Any, asked: str) -> Any:
        if asked == name:
            raise AttributeError(asked)
        return object.__getattribute__(self, asked)

    class Module(nn.Module):
        __getattribute__ = missing

    class Empty:
        __getattribute__ = missing

    with monkeypatch.context() as patch:
        patch.setattr(nn, "Module", Module)
        if name == "_version":
            patch.setattr(torch, "empty", lambda *_: Empty())
        with pytest.raises(ImportError, match=re.escape(f"torch {torch.__version__}, which lacks {name}")):
            import_again(monkeypatch)
