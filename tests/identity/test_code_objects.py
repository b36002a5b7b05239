"""What functions, classes and modules of a running program compute: what differs counts."""

from __future__ import annotations

import functools
import linecache
from collections.abc import Callable

import pytest
import torch
from cache_harness import cache_of
from source_harness import of
from torch import nn

from torchcache import torchcache
from torchcache.identity import code as source


def test_a_wrapper_around_a_decorated_function_still_counts() -> None:
    def make(factor: int) -> Callable[[int], int]:
        def original(x: int) -> int:
            return x

        def ours(x: int) -> int:
            return original(x)

        vars(ours)["__torchcache_original__"] = original

        @functools.wraps(ours)
        def outer(x: int) -> int:
            return ours(x) * factor

        return outer

    assert of(make(1)) != of(make(2))
    assert of(make(1)) == of(make(1))


def test_functions_of_one_name_differ() -> None:
    def make(n: int) -> list[Callable[[int], int]]:
        def f(x: int) -> int:
            return x + n

        return [f]

    first = make(1) + make(2)

    def f(x: int) -> int:
        return x * 2

    assert len({of(item) for item in [*first, f]}) == 3
    assert of(make(1)[0]) == of(first[0])


def test_lambdas_on_one_line_differ() -> None:
    pair = (lambda x: x + 1, lambda x: x + 2)
    assert of(pair[0]) != of(pair[1])
    assert of(pair[0]) == of(pair[0])


def test_classes_made_in_a_loop_differ_by_what_they_close_over() -> None:
    def make(n: int) -> type[nn.Module]:
        class M(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * n

        return M

    assert of(make(1)) != of(make(2))
    assert of(make(1)) == of(make(1))


def test_a_notebook_cell_is_read_and_the_number_of_the_cell_does_not_count() -> None:
    def run(number: int, text: str) -> bytes:
        name = f"<ipython-input-{number}>"
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)
        scope: dict[str, object] = {"__name__": "__main__"}
        exec(compile(text, name, "exec"), scope)
        return of(scope["M"])

    cell = "from torch import nn\nclass M(nn.Module):\n    def forward(self, x):\n        return x\n"
    first = run(1, cell)
    assert run(2, "\n" + cell + "        # the end") == first
    assert run(3, cell.replace("return x", "return -x")) != first
    assert b"source" in first


def test_code_without_source_is_described_by_bytecode_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run(text: str) -> bytes:
        scope: dict[str, object] = {}
        exec(text, scope)
        return of(scope["without_source"])

    source._without_source.subjects.clear()

    first = run("def without_source(x): return x + 1")
    assert run("def without_source(x): return x + 1") == first
    assert run("def without_source(x): return x + 2") != first
    assert run("def without_source(x): return x - 1") != first
    named = [item.message for item in caplog.records if "without_source" in item.message]
    assert len(named) == 1 and "bytecode" in named[0]


def test_the_parts_of_a_module_count_by_class_hook_and_function() -> None:
    def make(act: object = nn.ReLU, hook: object = None, forward: object = None) -> bytes:
        assert isinstance(act, type)
        module = nn.Sequential(nn.Linear(1, 1), act())
        if hook is not None:
            module[0].register_forward_hook(hook)  # type: ignore[arg-type]
        if forward is not None:
            module[1].forward = forward  # type: ignore[assignment]
        return of(module)

    described = {
        make(),
        make(nn.GELU),
        make(hook=lambda module, args, out: out + 1),
        make(hook=lambda module, args, out: out + 2),
        make(forward=torch.relu),
        make(forward=nn.functional.relu),
        make(forward=functools.partial(nn.functional.leaky_relu, negative_slope=0.1)),
        make(forward=functools.partial(nn.functional.leaky_relu, negative_slope=0.2)),
    }
    assert len(described) == 8
    assert make() in described


def test_the_state_of_the_described_module_does_not_count_even_where_a_hook_holds_it() -> None:
    class M(nn.Module):
        def __init__(self, weight: float) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 1)
            nn.init.constant_(self.linear.weight, weight)
            self.register_forward_hook(self.hook)

        def hook(self, module: nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
            return out

    assert of(M(1)) == of(M(2))


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda n: torch.jit.trace(lambda x: x * n, torch.ones(1)),
        lambda n: torch.jit.trace(lambda x: x + torch.arange(2000) * n, torch.ones(1)),
        lambda n: torch.jit.trace(Scaled(n), torch.ones(1)),
        lambda n: torch.jit.script(Scaled(n)),
        lambda n: torch.jit.script(nn.Sequential(Scaled(1.0), Scaled(n))),
        lambda n: torch.jit.freeze(torch.jit.script(Scaled(1 + n * 1e-12)).eval()),
    ],
)
def test_scripted_and_traced_code_counts(make: Callable[[float], nn.Module]) -> None:
    def held(n: float) -> bytes:
        holder = nn.Module()
        holder.part = make(n)
        return of(holder)

    first = held(2.0)
    assert held(3.0) != first
    assert held(2.0) == first


def test_a_compiled_function_is_the_same_after_its_first_call() -> None:
    function = torch.compile(lambda x: x + 1, backend="eager")
    first = of(function)
    function(torch.ones(1))
    assert of(function) == first


@pytest.mark.parametrize(
    "make",
    [
        lambda n: torch.compile(lambda x: x + n),
        lambda n: torch.no_grad()(lambda x: x + n),
        lambda n: functools.lru_cache(lambda x: x + n),
        lambda n: functools.partial(lambda x, y: x + y, n),
        lambda n: nn.LeakyReLU(n).forward,
        lambda n: nn.utils.parametrizations.weight_norm(nn.Linear(1, 1)) if n == 1 else nn.Linear(1, 1),
    ],
)
def test_wrapped_functions_count_with_what_they_wrap(make: Callable[[int], object]) -> None:
    assert of(make(1)) != of(make(2))
    assert of(make(1)) == of(make(1))


def test_methods_of_one_name_of_a_library_differ() -> None:
    assert of(nn.ReLU.forward) != of(nn.GELU.forward)
    assert of(torch.relu) != of(torch.sigmoid)
    assert of(torch.Tensor.add) != of(torch.Tensor.mul)


def test_a_patched_method_of_a_library_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    first = of(nn.Sequential(nn.ReLU()))
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x)
    assert of(nn.Sequential(nn.ReLU())) != first
    monkeypatch.undo()
    assert of(nn.Sequential(nn.ReLU())) == first


def test_the_cases_of_a_generic_function_count() -> None:
    def make(factor: int) -> Callable[..., object]:
        @functools.singledispatch
        def generic(x: object) -> object:
            return x

        generic.register(torch.Tensor, lambda x: x * factor)

        def function(x: torch.Tensor) -> object:
            return generic(x)

        return function

    assert of(make(2)) != of(make(3))
    assert of(make(2)) == of(make(2))


def test_the_cases_of_a_generic_method_count() -> None:
    def make(factor: int) -> type:
        class M(nn.Module):
            @functools.singledispatchmethod
            def scaled(self, x: object) -> object:
                return x

            @scaled.register
            def _(self, x: torch.Tensor) -> object:
                return x * factor

            def forward(self, x: torch.Tensor) -> object:
                return self.scaled(x)

        return M

    assert of(make(2)) != of(make(3))
    assert of(make(2)) == of(make(2))


def test_operators_that_python_code_defines_count_by_name_and_by_namespace() -> None:
    def make(factor: int) -> list[Callable[[torch.Tensor], object]]:
        @torch.library.custom_op("torchcache_tests::scaled", mutates_args=())
        def scaled(x: torch.Tensor) -> torch.Tensor:
            return x * factor

        def by_local_names(x: torch.Tensor) -> torch.Tensor:
            import torch as t

            space = t.ops.torchcache_tests
            return space.scaled(x)

        ops = torch.ops
        return [
            by_local_names,
            lambda x: scaled(x),
            lambda x: torch.ops.torchcache_tests.scaled(x),
            lambda x: ops.torchcache_tests.scaled.default(x),
            functools.partial(torch.ops.torchcache_tests.scaled.default),
        ]

    first = [of(function) for function in make(2)]
    assert all(of(function) != before for function, before in zip(make(3), first, strict=True))
    assert [of(function) for function in make(2)] == first


def test_attributes_of_functions_that_code_reads_count() -> None:
    def make(value: int) -> Callable[[int], int]:
        def helper(x: int) -> int:
            return x * helper._factor  # type: ignore[attr-defined]

        vars(helper)["_factor"] = value
        return lambda x: helper(x)

    assert of(make(2)) != of(make(3))
    assert of(make(2)) == of(make(2))


class Unpicklable:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __reduce__(self) -> str:
        raise TypeError("never")


def test_objects_that_forbid_pickling_count_by_what_they_hold() -> None:
    def make(factor: int) -> Callable[[int], int]:
        held = Unpicklable(factor)
        return lambda x: x * held.factor

    assert of(make(2)) != of(make(3))
    assert of(make(2)) == of(make(2))


def test_an_attribute_of_a_decorated_function_that_it_reads_itself_counts() -> None:
    def make(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
        @torchcache()
        def scaled(x: torch.Tensor) -> torch.Tensor:
            return x * scaled.factor  # type: ignore[attr-defined]

        scaled.factor = value  # type: ignore[attr-defined]
        return scaled

    hashes = [cache_of(make(value)).module_hash for value in (2, 3, 2)]
    assert hashes[0] == hashes[2] != hashes[1]
