"""Values that a function reaches by global, closure, default or attribute count by what they hold."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from torchcache.identity import code as source
from torchcache.identity.code import describe

Load = Callable[..., types.ModuleType]
numbers = itertools.count()

PRELUDE = """
import array, collections, dataclasses, datetime, decimal, fractions, functools, operator, pathlib, re, threading, types
import numpy, torch
from torch import nn

class Plain:
    def __init__(self, by): self.by = by
    def method(self, x): return x * self.by
    def __call__(self, x): return x * self.by

class Slots:
    __slots__ = ("by",)
    def __init__(self, by): self.by = by

@dataclasses.dataclass
class Data:
    by: object

Pair = collections.namedtuple("Pair", "a b")

def locked(by):
    found = Plain(by)
    found.lock = threading.RLock()
    return found

def circle(by):
    found = Plain([by])
    found.by.append(found)
    return found

def plus(x, by=0): return x + by
"""
# %s is 2 or 3.
VALUES = [
    *("slice(%s)", "decimal.Decimal(%s)", "fractions.Fraction(%s)", "datetime.date(2020, 1, %s)"),
    *("pathlib.Path('%s')", "re.compile('%s')", "types.MappingProxyType({'a': %s})", "collections.deque([%s])"),
    *("collections.defaultdict(int, a=%s)", "numpy.float32(%s)", "bytearray(b'%s')", "array.array('d', [%s])"),
    *("(1, [%s])", "Pair(1, [%s])", "[numpy.float32(%s)]", "{'a': numpy.array([%s])}", "[[], {'a': (%s,)}]"),
    *("(lambda x: x * %s,)", "(torch.tensor(%s),)", "[torch.tensor(%s)]", "{'a': lambda x: x * %s}"),
    *("[type('T', (), {'by': %s})]", "[nn.LeakyReLU(%s)]", "types.SimpleNamespace(by=%s)", "Data(%s)", "Data([%s])"),
    *("Plain(%s)", "Plain(Plain(%s))", "Slots(%s)", "Plain(%s).method", "[Plain(%s).method]", "locked(%s)"),
    *("circle(%s)", "functools.partial(plus, by=Plain(%s))", "functools.partial(plus, by=[%s])"),
    *("operator.itemgetter(%s)", "operator.methodcaller('a', %s)", "[functools.partial(plus, by=%s)]"),
    *("datetime.datetime(2020, 1, %s, tzinfo=datetime.timezone.utc)", "{'b': 1, 'a': %s}", "frozenset([(%s,)])"),
    *("torch.distributions.Normal(0.0, %s)",),
]
PLACES = {
    "global": "VALUE = {0}\ndef M(x):\n    return use(x, VALUE)\n",
    "closure": "def outer():\n    value = {0}\n    def M(x):\n        return value\n    return M\nM = outer()\n",
    "default": "def M(x, value={0}):\n    return use(x, value)\n",
    "class attribute": "class M(nn.Module):\n    value = {0}\n    def forward(self, x):\n        return self.value\n",
    "function attribute": "def M(x):\n    return use(x)\nM.value = {0}\n",
}


def tensors(tensor: torch.Tensor) -> bytes:
    return repr((tensor.dtype, tensor.tolist())).encode()


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    before = set(sys.modules)

    def program(text: str, prelude: str = PRELUDE) -> types.ModuleType:
        """As a file of its own. The text is compiled with the prelude, so that lines agree."""
        name = f"reached_{next(numbers)}"
        path = tmp_path / f"{name}.py"
        path.write_text(prelude + text)
        module = types.ModuleType(name)
        module.__file__ = str(path)
        sys.modules[name] = module
        exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
        return module

    yield program
    for name in set(sys.modules) - before:
        if name.startswith("reached_"):
            del sys.modules[name]


def of(module: types.ModuleType) -> bytes:
    return describe(module.M, tensors=tensors)


@pytest.mark.parametrize("value", VALUES)
def test_what_a_global_holds_counts(load: Load, value: str, caplog: pytest.LogCaptureFixture) -> None:
    text = PLACES["global"]
    with caplog.at_level(logging.INFO, logger="torchcache"):
        assert of(load(text.format(value % 2))) == of(load(text.format(value % 2)))
        assert of(load(text.format(value % 2))) != of(load(text.format(value % 3)))
    assert caplog.text == ""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", ["[%s]", "Plain(%s)", "Plain(%s).method", "{'a': lambda x: x * %s}"])
def test_what_is_held_counts_wherever_code_finds_it(load: Load, place: str, value: str) -> None:
    text = PLACES[place]
    assert of(load(text.format(value % 2))) == of(load(text.format(value % 2)))
    assert of(load(text.format(value % 2))) != of(load(text.format(value % 3)))


@pytest.mark.slow
def test_values_are_described_alike_in_processes_with_other_hash_seeds(tmp_path: Path) -> None:
    held = ", ".join(value % 2 for value in VALUES) + ", frozenset('abcdef'), {'a', 'b', 'c'}"
    path = tmp_path / "program.py"
    path.write_text(
        f"{PRELUDE}\nVALUE = [{held}]\ndef M(x):\n    return VALUE\n"
        "import hashlib\nfrom torchcache.identity.code import describe\n"
        "print(hashlib.blake2b(describe(M, tensors=lambda t: repr(t.tolist()).encode())).hexdigest())\n"
    )

    def run(seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": seed}
        return subprocess.run([sys.executable, path], env=env, check=True, capture_output=True, text=True).stdout

    assert run("1") == run("2") != ""


def test_the_class_of_an_object_counts_too(load: Load) -> None:
    text = PLACES["global"].format("Plain(2)")
    changed = PRELUDE.replace("def __call__(self, x): return x * self.by", "def __call__(self, x): return x + self.by")
    assert changed != PRELUDE and of(load(text)) != of(load(text, changed))


@pytest.mark.parametrize(
    "value", ["threading.Lock()", "__import__('logging').getLogger('a')", "__import__('sys').stdout"]
)
def test_what_carries_no_value_is_passed_over_in_silence(
    load: Load, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="torchcache"):
        of(load(PLACES["global"].format(value)))
    assert caplog.text == ""


HELPERS = "TABLE = [1]\nLIMIT = 2\ndef f(x):\n    return deep(x) * 2\ndef deep(x):\n    return x + 1\n"
USES = [
    "def M(x):\n    h = helpers\n    return h.f(x)\n",
    "def M(x):\n    return call(helpers, x)\n",
    "def M(x):\n    return getattr(helpers, 'f')(x)\n",
    "HELD = [helpers]\ndef M(x):\n    return HELD[0].f(x)\n",
]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("before", "after"), [("* 2", "* 3"), ("+ 1", "+ 2"), ("[1]", "[2]"), ("LIMIT = 2", "LIMIT = 3")]
)
def test_a_module_of_the_users_that_is_used_as_a_whole_counts(load: Load, use: str, before: str, after: str) -> None:
    def with_helpers(text: str) -> bytes:
        helpers = load(text, "")
        return of(load(f"import {helpers.__name__} as helpers\n{use}", ""))

    assert with_helpers(HELPERS) == with_helpers(HELPERS) != with_helpers(HELPERS.replace(before, after))


def test_libraries_that_are_used_as_a_whole_count_by_name(load: Load) -> None:
    text = "import {0} as library\ndef M(x):\n    return getattr(library, 'sqrt')(x)\n"
    assert of(load(text.format("math"), "")) != of(load(text.format("cmath"), ""))


def test_what_python_writes_into_a_dataclass_is_no_code_of_the_users(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    source._without_source.subjects.clear()
    of(load("def M(x):\n    return Data(x)\n"))
    assert caplog.text == ""


def test_functions_without_source_are_named_by_one_warning_in_all(caplog: pytest.LogCaptureFixture) -> None:
    source._without_source.subjects.clear()
    scope: dict[str, object] = {}
    exec("def inner(x): return x + 1\ndef M(x): return inner(x)\n", scope)
    for _ in range(2):
        describe(scope["M"], tensors=tensors)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
