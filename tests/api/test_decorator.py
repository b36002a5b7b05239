"""What is decorated stays what it was: classes, instances and functions keep their ways."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_harness import cache_of
from torch import Tensor, nn

from torchcache import torchcache


class Base(nn.Module):
    """A docstring."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor
        self.calls = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return x * self.factor * scale


@torchcache()
class Decorated(Base):
    def __init__(self, factor: float = 2.0) -> None:
        super(Decorated, self).__init__(factor)  # noqa: UP008  the old way must work too


X = torch.arange(6.0).view(3, 2)


def test_a_class_keeps_its_name_docstring_signature_and_bases() -> None:
    assert Decorated.__name__ == "Decorated" and Decorated.__mro__[1] is Base
    assert str(inspect.signature(Decorated.forward)) == str(inspect.signature(Base.forward))
    assert str(inspect.signature(Decorated)) == str(inspect.signature(Base))
    assert isinstance(Decorated(), Base)
    assert list(Decorated().state_dict()) == []


def test_the_base_of_a_decorated_class_is_not_cached() -> None:
    plain = Base()
    plain(X), plain(X)
    assert plain.calls == 2 and not hasattr(plain, "cache_instance")


def test_a_second_call_is_served() -> None:
    module = Decorated()
    assert torch.equal(module(X), X * 2) and torch.equal(module(X), X * 2)
    assert module.calls == 1


def test_instances_have_caches_of_their_own() -> None:
    one, two = Decorated(), Decorated(3.0)
    assert torch.equal(one(X), X * 2) and torch.equal(two(X), X * 3)
    assert one.cache_instance is not two.cache_instance
    assert cache_of(one).module_hash != cache_of(two).module_hash
    assert cache_of(Decorated(3.0)).module_hash == cache_of(two).module_hash


def test_a_subclass_is_cached_with_its_own_forward() -> None:
    class Inheriting(Decorated):
        pass

    class Overriding(Decorated):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x, scale) + 1

    assert torch.equal(Inheriting()(X), X * 2)
    module = Overriding()
    assert torch.equal(module(X), X * 2 + 1) and torch.equal(module(X), X * 2 + 1)
    assert module.calls == 1 and cache_of(module).info().memory_rows == 3


def test_a_decorated_subclass_of_a_decorated_class_gives_its_own_rows() -> None:
    @torchcache()
    class Twice(Decorated):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x, scale) + 1

    module = Twice()
    for _ in range(3):
        assert torch.equal(module(X), X * 2 + 1)
        assert torch.equal(Decorated.forward(module, X), X * 2)


def test_an_existing_instance_keeps_its_type_and_others_of_its_class_are_left_alone() -> None:
    module, other = Base(), Base()
    assert torchcache()(module) is module and type(module) is Base
    for m in (module, other):
        assert torch.equal(m(X), X * 2) and torch.equal(m(X), X * 2)
    assert module.calls == 1 and other.calls == 2
    assert not hasattr(other, "cache_instance")


def test_layers_of_torch_can_be_decorated() -> None:
    layer, plain = nn.Linear(2, 3), nn.Linear(2, 3)
    layer.requires_grad_(False)
    right = layer(X)
    torchcache()(layer)
    assert torch.equal(layer(X), right) and torch.equal(layer(X), right)
    assert cache_of(layer).info().memory_hits == 3
    assert plain(X).requires_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_layers_of_a_decorated_layers_class_can_still_be_scripted() -> None:
    torchcache()(nn.Linear(2, 3))
    layer = nn.Linear(2, 3)
    assert torch.equal(torch.jit.script(layer)(X), layer(X))
    scripted = torchcache()(nn.Sequential(torch.jit.script(layer), nn.ReLU()).requires_grad_(False))
    for _ in range(2):
        assert torch.equal(scripted(X), layer(X).relu())
    assert cache_of(scripted).info().memory_hits == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", [torch.jit.script, lambda m: torch.jit.trace(m, X), torch.fx.symbolic_trace])
def test_scripted_traced_and_symbolic_modules_can_be_decorated(way: Callable[[nn.Module], nn.Module]) -> None:
    layer = nn.Linear(2, 3).requires_grad_(False)
    module = torchcache()(way(nn.Sequential(layer, nn.ReLU())))
    for _ in range(2):
        assert torch.equal(module(X), layer(X).relu())
    assert cache_of(module).info().memory_hits == 3
    layer.weight.mul_(2)
    assert torch.equal(module(X), layer(X).relu())


def test_an_instance_with_a_forward_of_its_own_is_cached_with_that() -> None:
    module: Any = Base()
    module.forward = lambda x: x - 1
    torchcache()(module)
    for _ in range(2):
        assert torch.equal(module(X), X - 1)
    assert cache_of(module).info().memory_hits == 3


def test_a_function_keeps_its_name_and_is_cached() -> None:
    calls = []

    @torchcache()
    def add(x: Tensor, offset: int = 1) -> Tensor:
        """Adds."""
        calls.append(offset)
        return x + offset

    assert (
        add.__name__ == "add" and add.__doc__ == "Adds." and list(inspect.signature(add).parameters) == ["x", "offset"]
    )
    assert torch.equal(add(X), X + 1) and torch.equal(add(X), X + 1) and torch.equal(add(X, 5), X + 5)
    assert calls == [1, 5]
    assert len(cache_of(add).cache) == 6


def test_functions_of_different_code_have_different_module_hashes() -> None:
    one, two = torchcache()(lambda x: x + 1), torchcache()(lambda x: x + 2)
    assert cache_of(one).module_hash != cache_of(two).module_hash


@pytest.mark.parametrize("what", [object, int, 5, "x", torch.relu, Base.__init__.__class__])
def test_anything_else_cannot_be_decorated(what: object) -> None:
    with pytest.raises(TypeError, match=r"torchcache can only decorate nn.Module subclasses, .+ got"):
        torchcache()(what)


def test_options_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        torchcache(Base)  # type: ignore[call-arg, arg-type]


# ---- enabling, attributes


def test_enabled_is_live_and_a_disabled_instance_has_no_cache_instance() -> None:
    module: Any = Decorated()
    module(X)
    module.torchcache_enabled = False
    module(X)
    assert module.calls == 2 and not hasattr(module, "cache_instance")
    module.torchcache_enabled = True
    module(X)
    assert module.calls == 2 and cache_of(module).info().memory_rows == 3


def test_enabled_can_be_chosen_for_each_instance_or_turned_on_from_off() -> None:
    @torchcache(enabled=False)
    class Off(Base):
        def __init__(self, cached: bool) -> None:
            super().__init__()
            if cached:
                self.torchcache_enabled = True

    on, off = Off(True), Off(False)
    for m in (on, off):
        m(X), m(X)
    assert on.calls == 1 and off.calls == 2
    assert hasattr(on, "cache_instance") and not hasattr(off, "cache_instance")


def test_attributes_beat_options_and_are_checked_when_given() -> None:
    @torchcache(persistent=False, max_memory_cache_size=10)
    class Configured(Base):
        torchcache_cache_dtype = torch.half

        def __init__(self, **attributes: object) -> None:
            super().__init__()
            self.torchcache_persistent = True
            for name, value in attributes.items():
                setattr(self, name, value)

    module = Configured(torchcache_zstd_compression=True)
    options = cache_of(module).options
    assert cache_of(module).persistent and options.zstd_compression and options.max_memory_cache_size == 10
    assert options.cache_dtype is torch.half
    with pytest.raises(ValueError, match="zstd_compression_level must be between -131072 and 22, got 23"):
        Configured(torchcache_zstd_compression_level=23)
    with pytest.raises(ValueError, match="did you mean torchcache_cache_dtype"):
        Configured(torchcache_cache_dtyp=torch.half)


def test_cache_instance_can_be_read_before_the_first_call() -> None:
    cache = cache_of(Decorated())
    assert len(cache.cache) == 0 and cache.cache_dir is None and not cache.persistent
    assert not cache.is_memory_cache_full and not cache.is_persistent_cache_full
    assert cache.memory_cache_size == cache.persistent_cache_size == 0
    assert cache.hash_tensor(X).shape == (3,)


# ---- copies


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("kind", ["class", "instance"])
def test_a_copy_has_a_cache_of_its_own(way: str, kind: str) -> None:
    module = Decorated(3.0) if kind == "class" else torchcache()(Base(3.0))
    module(X)
    if way == "deepcopy":
        twin = copy.deepcopy(module)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert twin.cache_instance is not module.cache_instance
    assert len(cache_of(twin).cache) == 0
    assert cache_of(twin).module_hash == cache_of(module).module_hash
    assert torch.equal(twin(X), X * 3)
    with torch.no_grad():
        twin.factor = 5.0
    assert torch.equal(twin(X), X * 5) and torch.equal(module(X), X * 3)


def test_hooks_of_the_module_run_on_every_call() -> None:
    module = Decorated()
    seen: list[str] = []
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))

    @module.register_forward_hook
    def one_more(m: nn.Module, args: object, out: Tensor) -> Tensor:
        seen.append("after")
        return out + 1

    for _ in range(2):
        assert torch.equal(module(X), X * 2 + 1)
    assert seen == ["before", "after"] * 2 and module.calls == 1


def test_a_module_that_calls_itself_gives_right_rows() -> None:
    @torchcache()
    class Halving(nn.Module):
        def forward(self, x: Tensor, depth: int = 3) -> Tensor:
            return x if depth == 0 else self(x / 2, depth - 1) + x

    module = Halving()
    right = X + X / 2 + X / 4 + X / 8
    assert torch.equal(module(X), right) and torch.equal(module(X), right)
    assert torch.equal(module(X / 2, 2), X / 2 + X / 4 + X / 8)


def test_replicas_share_the_cache() -> None:
    module = Decorated()
    replica = module._replicate_for_data_parallel()
    module(X)
    assert torch.equal(replica(X), X * 2)
    assert replica.cache_instance is module.cache_instance and module.calls == 1


def test_a_forward_that_init_chooses_is_cached() -> None:
    @torchcache()
    class Choosing(nn.Module):
        def __init__(self, double: bool) -> None:
            super().__init__()
            self.calls = 0
            if double:
                self.forward = self.doubled  # type: ignore[method-assign]

        def doubled(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * 2

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x + 1

    for module, right in ((Choosing(True), X * 2), (Choosing(False), X + 1)):
        for twin in (module, copy.deepcopy(module)):
            before = twin.calls
            assert torch.equal(twin(X), right) and torch.equal(twin(X), right)
            assert twin.calls == before + 1 and cache_of(twin).info().memory_hits == 3


@pytest.mark.parametrize("kind", [staticmethod, classmethod])
def test_a_forward_of_the_class_is_refused_before_anything_is_changed(kind: Callable[..., object]) -> None:
    class Odd(nn.Module):
        forward = kind(lambda *args: args[-1])  # type: ignore[assignment]

    with pytest.raises(TypeError, match=r"forward of .*Odd must be a method of its instances"):
        torchcache()(Odd)
    assert not hasattr(Odd, "cache_instance") and torch.equal(Odd()(X), X)
