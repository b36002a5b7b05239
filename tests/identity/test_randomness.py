"""Random numbers are never frozen in a cache, whichever generator they come from, and with one warning."""

from __future__ import annotations

import copy
import functools
import logging
import pathlib
import queue
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from cache_harness import cache_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from torchcache import torchcache
from torchcache.identity.mersenne import NumpyTwister, PythonTwister, comparable, python_twister

X = torch.arange(6.0).view(3, 2)


def rows(module: nn.Module) -> int:
    return cache_of(module).info().memory_rows


class Noisy(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self.draw(x)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    caplog.set_level(logging.WARNING, "torchcache")
    yield lambda: [r.getMessage() for r in caplog.records if r.name == "torchcache"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.dropout(x, 0.5, True),
        lambda x: x + torch.randn_like(x),
        lambda x: x + random.random(),
        lambda x: x + numpy.random.rand(),
    ],
)
def test_randomness_is_never_cached_and_gives_one_warning(
    draw: Callable[[Tensor], Tensor], warnings: Callable[[], list[str]]
) -> None:
    module, plain = torchcache()(Noisy(draw)), Noisy(draw)
    x = torch.ones(4, 1000)  # equal rows: random numbers must differ between them as without the cache
    for seed in range(3):
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        got = module(x)
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        assert torch.equal(got, plain(x))
    assert rows(module) == 0
    assert len(warnings()) == 1 and "random numbers" in warnings()[0]


class Holder:
    """An object of the user's with a generator in it."""

    def __init__(self, generator: Any) -> None:
        self.held = {"generator": [generator]}


def uniform(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return float(torch.rand((), generator=generator))
    return float(generator.random_sample() if hasattr(generator, "random_sample") else generator.random())


def own_generators() -> list[Any]:
    return [
        torch.Generator().manual_seed(3),
        random.Random(3),
        numpy.random.default_rng(3),
        numpy.random.Generator(numpy.random.MT19937(3)),
        numpy.random.RandomState(3),
    ]


class OwnGenerator(nn.Module):
    def __init__(self, generator: Any, place: str) -> None:
        super().__init__()
        self.place = place
        if place == "attribute":
            self.generator = generator
        elif place == "submodule":
            self.part = nn.Identity()
            self.part.generator = generator
        elif place == "container":
            self.generators: list[Any] = [None, {"here": generator}]
        elif place == "object":
            self.holder = Holder(generator)
        elif place == "closure":
            self.draw = lambda: uniform(generator)
        elif place == "method":
            self.draw = functools.partial(uniform, generator)
        else:
            self.later = lambda: copy.deepcopy(generator)

    def get(self) -> float:
        if self.place == "first call" and not hasattr(self, "generator"):
            self.generator = self.later()
        if hasattr(self, "draw"):
            return self.draw()
        if self.place == "submodule":
            return uniform(self.part.generator)
        if self.place == "container":
            return uniform(self.generators[1]["here"])
        if self.place == "object":
            return uniform(self.holder.held["generator"][0])
        return uniform(self.generator)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.get()


@pytest.mark.parametrize("place", ["attribute", "submodule", "container", "object", "closure", "method", "first call"])
@pytest.mark.parametrize("kind", range(len(own_generators())))
def test_randomness_of_a_generator_of_ones_own_is_never_cached(
    place: str, kind: int, warnings: Callable[[], list[str]]
) -> None:
    module = torchcache()(OwnGenerator(own_generators()[kind], place))
    plain = OwnGenerator(own_generators()[kind], place)
    for _ in range(4):
        assert torch.equal(module(X), plain(X))
    assert rows(module) == 0
    assert len(warnings()) == 1 and "random numbers" in warnings()[0]


GENERATOR = random.Random(3)


def test_randomness_of_a_global_generator_of_ones_own_is_never_cached(warnings: Callable[[], list[str]]) -> None:
    @torchcache()
    def noisy(x: Tensor) -> Tensor:
        return x + GENERATOR.random()

    assert not torch.equal(noisy(X), noisy(X))
    assert len(warnings()) == 1 and "random numbers" in warnings()[0]


def test_a_second_forward_draws_what_the_first_one_drew() -> None:
    class Half(nn.Module):
        """Where rows of an earlier call are found, it first runs for the others alone."""

        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(3)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(x.shape, generator=self.generator) if x.sum() > 100 else x + 0

    module, plain = torchcache()(Half()), Half()
    module(X)
    loud = torch.cat([X, X + 1000])
    assert torch.equal(module(loud), plain(loud))


def test_a_generator_that_every_forward_creates_with_the_same_seed_is_not_random() -> None:
    class Seeded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.generator = torch.Generator().manual_seed(3)
            return x + torch.rand((), generator=self.generator)

    module, plain = torchcache()(Seeded()), Seeded()
    for _ in range(4):
        assert torch.equal(module(X), plain(X))
    assert rows(module) == len(X)


def test_a_first_forward_that_imports_what_draws_costs_one_computation(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    (tmp_path / "drawn_at_import.py").write_text("import random\nNUMBER = random.random()\n")
    monkeypatch.syspath_prepend(tmp_path)

    def draw(x: Tensor) -> Tensor:
        import drawn_at_import  # type: ignore[import-not-found]

        return x + len(drawn_at_import.__name__)

    module = torchcache()(Noisy(draw))
    outputs = [module(X) for _ in range(3)]
    assert rows(module) == 3 and cache_of(module).info().misses == 3
    assert all(torch.equal(output, X + 15) for output in outputs) and warnings() == []
    monkeypatch.delitem(sys.modules, "drawn_at_import")


def test_a_forward_that_imports_and_draws_is_never_cached(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    (tmp_path / "imported_with_random_numbers.py").touch()
    monkeypatch.syspath_prepend(tmp_path)

    def draw(x: Tensor) -> Tensor:
        import imported_with_random_numbers  # type: ignore[import-not-found]  # noqa: F401

        return x + torch.rand(())

    module = torchcache()(Noisy(draw))
    assert len({float(module(X).sum()) for _ in range(4)}) == 4
    assert rows(module) == 0 and len(warnings()) == 1
    monkeypatch.delitem(sys.modules, "imported_with_random_numbers")


@pytest.mark.slow
def test_a_forward_that_begins_to_use_numpys_generator_in_a_new_process_is_cached_where_it_draws_nothing(
    tmp_path: pathlib.Path,
) -> None:
    program = tmp_path / "program.py"
    program.write_text("""
import sys, torch
from torch import nn
from torchcache import torchcache

class M(nn.Module):
    def forward(self, x):
        import numpy.random
        return x * 2

module = torchcache()(M())
for _ in range(3):
    module(torch.ones(2, 2))
print(module.cache_instance.info().memory_rows)
""")
    result = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("1\n", "")


# ---- other threads


DRAWS: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.rand(()),
    "random": random.random,
    "numpy": numpy.random.rand,
}


OWN: dict[str, Callable[[Tensor], Tensor]] = {
    "torch": lambda x: x + torch.rand(()),
    "random": lambda x: x + random.random(),
    "numpy": lambda x: x + numpy.random.rand(),
}


class Calling(nn.Module):
    """Has another thread draw a number and waits for it, as a prefetching loader may draw at any time."""

    def __init__(self, draw: Callable[[], object]) -> None:
        super().__init__()
        self.asked: Any = queue.SimpleQueue()
        self.numbers: Any = queue.SimpleQueue()
        threading.Thread(target=answer, args=(draw, self.asked, self.numbers), daemon=True).start()

    def forward(self, x: Tensor) -> Tensor:
        self.asked.put(True)
        return x + 0 * float(self.numbers.get())


def answer(draw: Callable[[], object], asked: Any, numbers: Any) -> None:
    while asked.get():
        numbers.put(draw())


@pytest.mark.parametrize("kind", sorted(DRAWS))
def test_a_thread_that_draws_meanwhile_does_not_stop_caching(kind: str, warnings: Callable[[], list[str]]) -> None:
    linear = nn.Linear(2, 3)
    module = torchcache()(nn.Sequential(Calling(DRAWS[kind]), linear).requires_grad_(False))
    for offset in (0, 0, 100, 100):
        assert torch.equal(module(X + offset), linear(X + offset))
    assert rows(module) == 6 and cache_of(module).info().memory_hits == 6
    assert not [text for text in warnings() if "random numbers" in text]


@pytest.mark.parametrize("kind", sorted(DRAWS))
def test_the_numbers_of_another_thread_are_never_drawn_again(kind: str) -> None:
    drawn: list[object] = []

    def draw() -> object:
        drawn.append(DRAWS[kind]())
        return drawn[-1]

    module = torchcache()(nn.Sequential(Calling(draw), Noisy(lambda x: x * 2)))
    for part in (X, X[:1], torch.cat([X, X + 100]), torch.cat([X, X + 200])):
        module(part)
    assert len(drawn) >= 3 and len(set(map(float, drawn))) == len(drawn)  # type: ignore[arg-type]


@pytest.mark.parametrize("own", sorted(DRAWS))
@pytest.mark.parametrize("others", sorted(DRAWS))
def test_a_forward_that_draws_next_to_another_thread_is_never_cached(
    own: str, others: str, warnings: Callable[[], list[str]]
) -> None:
    module = torchcache()(nn.Sequential(Calling(DRAWS[others]), Noisy(OWN[own])))
    assert len({float(module(X).sum()) for _ in range(4)}) == 4
    assert rows(module) == 0 and len([text for text in warnings() if "random numbers" in text]) == 1


def test_a_layer_that_is_built_in_the_first_call_is_cached_from_the_second_one_on() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer: nn.Linear | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.layer is None:
                self.layer = nn.Linear(x.shape[1], 4).requires_grad_(False)
            output: Tensor = self.layer(x)
            return output

    module = torchcache()(Lazy())
    right = module(X)
    for _ in range(3):
        assert torch.equal(module(X), right)
    assert cache_of(module).info()[:3] == (6, 0, 3)


# ---- the states of global generators, which are read from memory


@given(st.lists(st.sampled_from(["random", "gauss", "choice", "seed", "restore"]), max_size=12))
def test_a_snapshot_of_python_changes_with_every_number_and_brings_them_back(steps: list[str]) -> None:
    twister = python_twister()
    for step in steps:
        snapshot, state = twister.snapshot(), random.getstate()
        assert twister.snapshot() == snapshot
        drawn = PYTHON_STEPS[step]()
        assert (twister.snapshot() == snapshot) == (random.getstate() == state)
        twister.restore(snapshot)
        assert random.getstate() == state and PYTHON_STEPS[step]() == drawn


PYTHON_STEPS: dict[str, Callable[[], object]] = {
    "random": random.random,
    "gauss": lambda: random.gauss(0, 1),
    "choice": lambda: random.choice(range(1000)),
    "seed": lambda: random.seed(3),
    "restore": lambda: random.setstate(random.getstate()),
}


@given(st.lists(st.sampled_from(["rand", "randn", "one of a pair", "seed", "nothing", "restore"]), max_size=12))
def test_a_snapshot_of_numpy_changes_with_every_number_and_brings_them_back(steps: list[str]) -> None:
    twister = NumpyTwister(numpy.random)
    for step in steps:
        snapshot, state = twister.snapshot(), comparable(numpy.random.get_state(legacy=False))
        assert not twister.has_drawn(snapshot)
        drawn = NUMPY_STEPS[step]()
        assert twister.has_drawn(snapshot) == (comparable(numpy.random.get_state(legacy=False)) != state)
        twister.restore(snapshot)
        assert comparable(numpy.random.get_state(legacy=False)) == state
        assert numpy.array_equal(NUMPY_STEPS[step](), drawn)


NUMPY_STEPS: dict[str, Callable[[], Any]] = {
    "rand": lambda: numpy.random.rand(3),
    "randn": lambda: numpy.random.randn(2),
    "one of a pair": lambda: numpy.random.randn(),
    "seed": lambda: numpy.random.seed(3) or 0,
    "nothing": lambda: 0,
    "restore": lambda: numpy.random.set_state(numpy.random.get_state()) or 0,
}


def test_a_forward_that_swaps_the_generator_of_numpy_has_drawn() -> None:
    module: Any = numpy.random
    twister, own = NumpyTwister(module), module.get_bit_generator()
    try:
        module.set_bit_generator(numpy.random.PCG64(1))
        before = twister.snapshot()
        assert not twister.has_drawn(before)
        module.set_bit_generator(own)
        assert twister.has_drawn(before)
    finally:
        module.set_bit_generator(own)


def test_both_twisters_are_read_from_memory_here() -> None:
    assert len(python_twister().snapshot()) == 2
    assert NumpyTwister(numpy.random)._words()


def test_states_that_cannot_be_read_from_memory_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    twister = NumpyTwister(numpy.random)
    monkeypatch.delattr(numpy.random, "get_bit_generator")
    snapshot = twister.snapshot()
    drawn = numpy.random.rand()
    assert twister.has_drawn(snapshot)
    twister.restore(snapshot)
    assert numpy.random.rand() == drawn
    python = PythonTwister()
    python._is_readable = False
    state = python.snapshot()
    drawn = random.random()
    assert python.snapshot() != state
    python.restore(state)
    assert random.random() == drawn
