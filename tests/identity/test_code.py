"""What the code in files computes: a change that matters changes it, the way back finds the old one."""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import pathlib
import subprocess
import sys
import types
from collections.abc import Iterator

import pytest
from source_harness import of

from torchcache.identity import origin

numbers = itertools.count()


class User:
    """A user's files, each time in another directory."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def load(self, text: str, **others: str) -> types.ModuleType:
        folder = self.path / str(next(numbers))
        folder.mkdir()
        for name, content in {"user": text, **others}.items():
            (folder / f"{name}.py").write_text(content)
            sys.modules.pop(name, None)
        sys.path.insert(0, str(folder))
        try:
            importlib.invalidate_caches()
            return importlib.import_module("user")
        finally:
            sys.path.remove(str(folder))

    def __call__(self, text: str, **others: str) -> bytes:
        module = self.load(text, **others)
        # Modules that a function imports itself are looked for while it is described.
        sys.path.insert(0, str(pathlib.Path(str(module.__file__)).parent))
        try:
            return of(module.M)
        finally:
            sys.path.pop(0)


@pytest.fixture
def user(tmp_path: pathlib.Path) -> Iterator[User]:
    yield User(tmp_path)
    for name in ("user", "helpers", "inner"):
        sys.modules.pop(name, None)


PROGRAM = """
import enum, functools
import torch, torch.nn.functional as F
from torch import nn
import helpers
from helpers import shift as moved

SCALE = 2.0
PAIR = (1, ("a", torch.float32))
TABLE = torch.tensor([1.0, 2.0])
ACT = nn.LeakyReLU(0.1)
LINEAR = nn.Linear(1, 1, bias=False)
nn.init.constant_(LINEAR.weight, 3.0)

class Mode(enum.Enum):
    A = 1

class Settings:
    width = 4

def double(x, by=2, *, plus=0):
    return deep(x) * by + plus

def deep(x):
    return x + 1

def scaled(factor):
    def wrap(function):
        @functools.wraps(function)
        def inner(*args):
            return function(*args) * factor
        return inner
    return wrap

half = functools.partial(double, by=0.5)
square = lambda x: x * x
MUTABLE = {"a": 1}

class Offset:
    def __call__(self, x):
        return x + 16

offset = Offset()

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = 1

    def pre(self, x):
        return x - 1

class M(Base):
    size = 3

    @property
    def twice(self):
        return self.size * 2

    @staticmethod
    def plus(x):
        return x + 5

    @classmethod
    def name(cls):
        return 6

    class Inner:
        depth = 7

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def cast(self, x):
        return x

    @scaled(8)
    def times(self, x):
        return x

    @torch.no_grad()
    def forward(self, x):
        x = double(half(square(moved(x)))) * SCALE + TABLE + PAIR[0]
        x = helpers.stretch(ACT(LINEAR(x))) + Settings.width + helpers.LIMIT + MUTABLE["a"]
        from helpers import late
        import inner as nested
        return [late(F.relu(offset(item))) + nested.far(item) for item in self.pre(x)], Mode.A
"""


HELPERS = """
LIMIT = 10
UNUSED = 11
def shift(x): return x + 12
def stretch(x): return x * 13
def late(x): return x + 14
def unused(x): return x
"""


INNER = "def far(x): return x * 15\n"


MATTERS = {
    "the class": ("self.pre(x)], Mode.A", "self.pre(x) + 1], Mode.A"),
    "a base": ("return x - 1", "return x - 2"),
    "init of a base": ("self.n = 1", "self.n = 2"),
    "a class attribute": ("size = 3", "size = 3.0"),
    "a property": ("self.size * 2", "self.size * 3"),
    "a static method": ("x + 5", "x + 6"),
    "a class method": ("return 6", "return 7"),
    "a nested class": ("depth = 7", "depth = 8"),
    "a decorator's argument": ("dtype=torch.bfloat16", "dtype=torch.float16"),
    "what a decorator closes over": ("@scaled(8)", "@scaled(9)"),
    "a decorator": ("function(*args) * factor", "function(*args) / factor"),
    "a constant": ("SCALE = 2.0", "SCALE = 2.5"),
    "a constant's type": ("SCALE = 2.0", "SCALE = 2"),
    "a tuple": ('("a", torch.float32)', '("b", torch.float32)'),
    "a tensor": ("tensor([1.0, 2.0])", "tensor([1.0, 3.0])"),
    "a module's attribute": ("LeakyReLU(0.1)", "LeakyReLU(0.9)"),
    "a module's weight": ("weight, 3.0", "weight, 4.0"),
    "a function": ("return deep(x) * by", "return deep(x) / by"),
    "a function that a function calls": ("return x + 1\n", "return x + 2\n"),
    "a default": ("by=2, *", "by=3, *"),
    "a keyword default": ("plus=0", "plus=1"),
    "a partial": ("by=0.5", "by=0.25"),
    "a lambda": ("x: x * x", "x: x * x * x"),
    "a member of an enumeration": ("A = 1", "A = 2"),
    "an attribute of a class": ("width = 4", "width = 5"),
    "the class of an object": ("return x + 16", "return x + 17"),
    "a library's function": ("F.relu", "F.gelu"),
}


MATTERS_IN_HELPERS = {
    "a constant of an imported module": ("LIMIT = 10", "LIMIT = 11"),
    "a function imported by name": ("x + 12", "x + 13"),
    "a function of an imported module": ("x * 13", "x * 14"),
    "a function imported in the function": ("x + 14", "x + 15"),
}


MATTERS["a constant in a dict"] = ('MUTABLE = {"a": 1}', 'MUTABLE = {"a": 2}')


MATTERS_NOT = {
    "a comment": ("return x - 1", "return x - 1  # one less"),
    "a blank line": ("return x - 1", "\n\n        return x - 1"),
    "layout": ("return x - 1", "return (\n            x - 1\n        )"),
    "a docstring": ("def pre(self, x):", 'def pre(self, x):\n        "Less."'),
    "code that nothing reaches": ("SCALE = 2.0", "SCALE = 2.0\nOTHER = 3\ndef g(x): return x"),
}


@pytest.mark.parametrize("what", MATTERS)
def test_a_change_of_code_counts_and_its_way_back_too(user: User, what: str) -> None:
    before, after = MATTERS[what]
    assert PROGRAM.count(before) == 1
    first = user(PROGRAM, helpers=HELPERS, inner=INNER)
    assert user(PROGRAM.replace(before, after), helpers=HELPERS, inner=INNER) != first
    assert user(PROGRAM, helpers=HELPERS, inner=INNER) == first


@pytest.mark.parametrize("what", MATTERS_IN_HELPERS)
def test_a_change_in_the_users_other_files_counts(user: User, what: str) -> None:
    before, after = MATTERS_IN_HELPERS[what]
    assert HELPERS.count(before) == 1
    first = user(PROGRAM, helpers=HELPERS, inner=INNER)
    assert user(PROGRAM, helpers=HELPERS.replace(before, after), inner=INNER) != first
    assert user(PROGRAM, helpers=HELPERS, inner=INNER) == first


def test_a_module_that_a_function_imports_itself_counts(user: User) -> None:
    first = user(PROGRAM, helpers=HELPERS, inner=INNER)
    assert user(PROGRAM, helpers=HELPERS, inner=INNER.replace("15", "16")) != first
    assert user(PROGRAM, helpers=HELPERS, inner=INNER) == first


@pytest.mark.parametrize("what", MATTERS_NOT)
def test_what_changes_no_result_does_not_count(user: User, what: str) -> None:
    before, after = MATTERS_NOT[what]
    assert PROGRAM.count(before) == 1
    first = user(PROGRAM, helpers=HELPERS, inner=INNER)
    assert user(PROGRAM.replace(before, after), helpers=HELPERS, inner=INNER) == first


def test_what_a_function_does_not_use_of_a_module_does_not_count(user: User) -> None:
    first = user(PROGRAM, helpers=HELPERS, inner=INNER)
    changed = HELPERS.replace("UNUSED = 11", "UNUSED = 12").replace("return x\n", "return -x\n")
    assert changed != HELPERS
    assert user(PROGRAM, helpers=changed, inner=INNER) == first


@pytest.mark.parametrize(
    ("before", "after"),
    [("[1, 2]", "[2, 1]"), ("{1, 2}", "{1, 3}"), ("torch.tensor([1]).numpy()", "torch.tensor([2]).numpy()")],
)
def test_constants_in_lists_sets_and_arrays_count(user: User, before: str, after: str) -> None:
    text = "import torch\nMEAN = %s\ndef M(x):\n    return x - sum(MEAN)\n"
    assert user(text % before) == user(text % before) != user(text % after)


def test_what_is_left_out_is_named_once(user: User, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="torchcache"):
        name = f"LEFT_{next(numbers)}"
        for _ in range(2):
            user(f"{name} = []\ndef M(x):\n    return x + len({name})\n")
    assert [record.message for record in caplog.records if name in record.message] == [
        f"{name}, that M reads, of type list, may change and is left out of the module hash"
    ]


def test_the_decorator_and_its_options_are_not_part_of_what_it_decorates(user: User) -> None:
    # What the decorator leaves behind, in a function and in a class.
    function = "def M(x):\n    return x + 1\n"
    decorated = "def torchcache(**options):\n    def wrap(f):\n        g = lambda x: f(x)\n"
    decorated += "        g.__torchcache_original__ = f\n        return g\n    return wrap\n"
    plain = user(function)
    assert user(decorated + "@torchcache(memory=1)\n" + function) == plain
    assert user(decorated + "@torchcache(memory=2)\n" + function) == plain

    module = "from torch import nn\nclass M(nn.Module):\n    def forward(self, x):\n        return x\n"
    patch = "original = M.forward\ndef call(self, x): return original(self, x)\n"
    patch += "call.__torchcache_original__ = original\nM.forward = call\n"
    patch += "def init(self): pass\ninit.__torchcache_original__ = None\nM.__init__ = init\n"
    patch += "M._torchcache_state = 1\nM.torchcache_persistent = True\nM.cache_instance = None\n"
    assert user(module + patch) == user(module)


def test_a_file_that_was_edited_after_its_import_is_not_believed(user: User) -> None:
    old, new = "def M(x):\n    return x + 1\n", "def M(x):\n    return x + 2222\n"
    known, unknown = user.load(old), user.load(old)
    first = of(known.M)
    for module in (known, unknown):
        assert module.__file__ is not None
        pathlib.Path(module.__file__).write_text(new)
    assert of(known.M) == first != user(new)
    stale = of(unknown.M)
    assert stale not in (user(new), first) and b"bytecode" in stale


def test_a_generated_graph_counts_by_its_code_and_what_that_calls(user: User) -> None:
    text = "import torch\nfrom torch import nn, fx\ndef f(x): return x + 3\nfx.wrap('f')\n"
    text += "class N(nn.Module):\n    def forward(self, x): return f(x) * 2\n"
    text += "M = fx.symbolic_trace(N())\n"
    first = user(text)
    assert user(text.replace("* 2", "* 4")) != first
    assert user(text.replace("+ 3", "+ 4")) != first
    assert user(text) == first


@pytest.mark.parametrize("form", ["dataclasses.dataclass", "dataclasses.dataclass(frozen=True)"])
def test_a_dataclass_counts_by_its_fields_and_methods(user: User, form: str) -> None:
    text = f"import dataclasses\n@{form}\nclass M:\n    a: int = 1\n    b: list = "
    text += "dataclasses.field(default_factory=lambda: [1])\n    def area(self): return self.a * 2\n"
    first = user(text)
    assert user(text) == first
    for before, after in (("= 1", "= 2"), ("[1]", "[2]"), ("* 2", "* 3"), ("a: int", "c: int")):
        assert user(text.replace(before, after, 1)) != first


def test_an_installed_distribution_counts_by_version_and_one_under_work_by_code(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def install(version: str, code: str, **metadata: str) -> bytes:
        folder = tmp_path / str(next(numbers)) / "site-packages"
        info = folder / "shipped_tools-1.dist-info"
        info.mkdir(parents=True)
        (folder / "shipped.py").write_text(f"def f(x): return {code}\n")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: shipped-tools\nVersion: {version}\n")
        (info / "RECORD").write_text("shipped.py,,\n")
        (info / "top_level.txt").write_text("shipped\n")
        for name, content in metadata.items():
            (info / f"{name}.json").write_text(content)
        monkeypatch.syspath_prepend(folder)
        sys.modules.pop("shipped", None)
        origin._installed.cache_clear()
        try:
            return of(importlib.import_module("shipped").f)
        finally:
            monkeypatch.undo()
            sys.modules.pop("shipped")

    first = install("1.0", "x")
    assert install("1.0", "-x") == install("1.0+cu130", "x") == first
    assert install("1.1", "x") != first
    under_work = '{"url": "file:///work", "dir_info": {}}'
    assert install("1.0", "x", direct_url=under_work) != install("1.0", "-x", direct_url=under_work)


MAIN = f"""{PROGRAM}
from torchcache.identity.code import describe, describe_value
if __name__ == "__main__":
    tensors = lambda tensor: repr(tensor.tolist()).encode()
    import hashlib
    whole = describe(M, tensors=tensors) + describe(M(), tensors=tensors)
    whole += describe(torch.compile(double), tensors=tensors)
    whole += describe_value({{"a": {{double, "x", 1}}, "m": ACT}}, tensors=tensors)
    print(hashlib.blake2b(whole).hexdigest())
"""


@pytest.mark.slow
def test_a_program_is_the_same_as_a_file_as_a_module_and_with_any_hash_seed(
    tmp_path: pathlib.Path,
) -> None:
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "main.py").write_text(MAIN)
    for name, text in {"helpers": HELPERS, "inner": INNER}.items():
        (tmp_path / f"{name}.py").write_text(text)
    path = os.pathsep.join([str(tmp_path), *sys.path])

    def run(seed: str, *arguments: str) -> str:
        env = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed}
        command = [sys.executable, *arguments]
        result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    first = run("1", str(package / "main.py"))
    assert run("2", "-m", "pkg.main") == first != ""
