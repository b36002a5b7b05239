"""The arrows of docs/design.md: who may import or include whom."""

from __future__ import annotations

import ast
import re
from collections.abc import Container, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

# Room of torchcache/ → the rooms that it may import besides itself. "" is what users call.
MAY_IMPORT = {
    "": {"cli", "engine", "identity", "tiers", "_utils"},
    "cli": {"", "tiers", "_native", "_utils"},
    "engine": {"", "identity", "tiers", "_native", "_utils"},
    "identity": {"", "_native", "_utils"},
    "tiers": {"", "_native", "_utils"},
    "_native": {"", "_utils"},
    "_utils": set(),
}
# What a room may use of the files at the top: what everybody knows, and no other.
KNOWN_TO_ALL = {"options", "errors", "_version"}

# Folder of csrc/ → the folders that it may include besides itself. "" is csrc/ops.cpp.
MAY_INCLUDE = {
    "": {"ops"},
    "ops": {"core", "hash", "memory", "store", "store/maintenance"},
    "core": set(),
    "hash": {"core"},
    "memory": {"core", "hash"},
    "store": {"core", "hash", "store/format", "store/os"},
    "store/format": {"core", "hash", "store/os"},
    "store/maintenance": {"core", "hash", "store/format", "store/os"},
    "store/os": {"core"},
}


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all that a Python file imports, also inside functions."""
    package = list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{name.name}" for name in node.names)


def modules(package: str = "torchcache") -> dict[str, set[str]]:
    """Module of a package → the modules of it that it imports, by their names below the package."""
    folder = ROOT / package
    paths = {".".join(path.relative_to(folder).with_suffix("").parts): path for path in folder.rglob("*.py")}
    prefix = package + "."
    return {
        name: {m.removeprefix(prefix) for m in imported(path)} & paths.keys()
        for name, path in paths.items()
        if path.name != "__init__.py"
    }


def room(module: str) -> str:
    return module.rpartition(".")[0]


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    ahead = {start}
    while ahead:
        seen |= ahead
        ahead = set().union(*(graph[name] for name in ahead)) - seen
    return seen


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def headers() -> dict[str, set[str]]:
    """File of csrc/ → what it includes, by the paths that it says."""
    files = [path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    graph = {str(path.relative_to(CSRC)): set(includes(path)) for path in files}
    system = set().union(*graph.values()) - graph.keys()
    return graph | {name: set() for name in system}


def test_the_two_libraries_never_import_each_other() -> None:
    for here, there in [("torchcache", "torchmb"), ("torchmb", "torchcache")]:
        for path in (ROOT / here).rglob("*.py"):
            assert not [m for m in imported(path) if m.split(".")[0] == there], path


@pytest.mark.parametrize("package", ["torchcache", "torchmb"])
def test_no_module_is_reached_from_what_it_imports(package: str) -> None:
    TopologicalSorter(modules(package)).prepare()  # raises CycleError, which names the cycle


def test_rooms_import_only_what_they_may() -> None:
    for name, imports in modules().items():
        for other in imports:
            here, there = room(name), room(other)
            assert there == here or there in MAY_IMPORT[here], f"{name} imports {other}"
            assert there or not here or other in KNOWN_TO_ALL, f"{name} imports {other}"


def test_only_the_package_itself_imports_the_decorator() -> None:
    assert not [name for name, imports in modules().items() if "decorator" in imports]


def test_tiers_do_not_know_each_other() -> None:
    tiers = {"tiers.memory", "tiers.disk"}
    graph = modules()
    for tier in tiers:
        assert not graph[tier] & tiers


def test_rules_know_vmap_and_no_models() -> None:
    for name, imports in modules("torchmb").items():
        if name.startswith("rules."):
            others = {other for other in imports if not other.startswith("rules.")}
            assert others <= {"functorch", "torch_private"}, name


def test_every_room_says_what_it_is_for() -> None:
    for path in [path for package in ("torchcache", "torchmb") for path in (ROOT / package).rglob("__init__.py")]:
        assert ast.get_docstring(ast.parse(path.read_text())), path


@pytest.mark.parametrize("package", ["torchcache", "torchmb"])
def test_the_design_names_every_module(package: str) -> None:
    design = (ROOT / "docs" / "design.md").read_text()
    named = set(re.findall(r"`([\w./]+)\.py`", design))
    for name in modules(package):
        assert name.rpartition(".")[2] in named, name


def private_names_of_torch(tree: ast.AST) -> Iterator[str]:
    """Imports of private names of torch, and private attributes of what was imported from torch."""
    of_torch: set[str] = set()
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [name.name for name in node.names if name.name.split(".")[0] == "torch"]
            of_torch |= {name.asname or "torch" for name in node.names if name.name in found}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            found = [f"{node.module}.{name.name}" for name in node.names]
            of_torch |= {name.asname or name.name for name in node.names}
        elif isinstance(node, ast.Attribute):
            found = [dotted(node)]
        elif isinstance(node, ast.Call) and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            found = [f"{dotted(node.args[0])}.{node.args[1].value!s}"]  # getattr(torch, "_name")
        yield from (
            name for name in found if name.split(".")[0] in of_torch | {"torch"} and re.search(r"\b_(?!_)", name)
        )


def dotted(node: ast.expr) -> str:
    """The names of an attribute of an attribute ... of a variable; an empty string for other expressions."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_one_module_names_what_is_private_in_torch() -> None:
    for path in (ROOT / "torchcache").rglob("*.py"):
        if path.relative_to(ROOT / "torchcache") not in {Path("_utils/torch_private.py"), Path("_native/build.py")}:
            assert not list(private_names_of_torch(ast.parse(path.read_text()))), path


def test_private_names_of_torch_are_recognised() -> None:
    text = """
import torch, torch._a
from torch import nn as n, _b
from torch._c import d
torch.e._f(1)
n.modules._g.h
getattr(torch.i, "_j")
torch.k.__l__, self._m, n.o(1)._p
"""
    found = {"torch._a", "torch._b", "torch._c.d", "torch.e._f", "n.modules._g", "n.modules._g.h", "torch.i._j"}
    assert set(private_names_of_torch(ast.parse(text))) == found


def test_the_build_is_known_to_the_operations_and_the_command_line_only() -> None:
    users = {name for name, imports in modules().items() if "_native.build" in imports}
    assert users == {"_native.ops", "cli.main"}
    assert modules()["_native.build"] == {"errors", "_utils.logs"}  # neither needs torch: setup.py imports them, too


def test_one_file_names_the_native_operations() -> None:
    paths = [path for package in ("torchcache", "torchmb") for path in (ROOT / package).rglob("*.py")]
    named = {path.relative_to(ROOT) for path in paths if "torch.ops.torchcache" in path.read_text()}
    assert named == {Path("torchcache/_native/ops.py")}


def private_names(path: Path, of_torch: Container[str] = ()) -> Iterator[str]:
    """Private names that a file imports, has as strings or reads from objects; from `self`, only those of torch."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names) | ast.ImportFrom(module="torch", names=names):
                found = [name.name for name in names]
            case ast.ImportFrom(module=str(module), names=names, level=0):
                found = [module, *(name.name for name in names)]
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name) if name not in of_torch:
                continue
            case ast.Attribute(attr=name) | ast.Constant(value=str(name)):
                found = [name]
            case _:
                continue
        parts = [part for name in found for part in name.split(".")]
        yield from (part for part in parts if re.fullmatch(r"_(?!_)\w+", part))


def test_one_module_of_torchmb_uses_private_names_of_torch() -> None:
    module = ROOT / "torchmb" / "torch_private.py"
    of_torch = set(private_names(module))
    own = {"_root", "_per_model_lr"}
    for path in (ROOT / "torchmb").rglob("*.py"):
        if path != module:
            assert set(private_names(path, of_torch)) <= own, path


def test_native_folders_include_only_what_they_may() -> None:
    graph = headers()
    own = [name for name in graph if (CSRC / name).is_file()]
    for name in own:
        folder = name.rpartition("/")[0]
        used = {other.rpartition("/")[0] for other in graph[name] & set(own)}
        assert used <= MAY_INCLUDE[folder] | {folder}, f"csrc/{name}"


def test_a_native_folder_has_one_namespace() -> None:
    """So that two folders may use one name for different things."""
    for name in headers():
        if not (CSRC / name).is_file():
            continue
        expected = "torchcache" + "".join(f"::{folder}" for folder in Path(name).parts[:-1][:1])
        opened = re.findall(r"^namespace (torchcache[\w:]*)", (CSRC / name).read_text(), re.MULTILINE)
        assert all(f"{namespace}::".startswith(f"{expected}::") for namespace in opened), f"csrc/{name}"


def test_the_facade_of_the_store_shows_nothing_of_its_files() -> None:
    shown = {name for name in reachable(headers(), "store/store.h") if name.startswith("store/")}
    assert shown == {"store/store.h", "store/options.h"}


def test_no_header_of_torch_reaches_the_store() -> None:
    graph = headers()
    for name in graph:
        if name.startswith("store/"):
            torch = {other for other in reachable(graph, name) if other.startswith(("torch/", "c10"))}
            assert not torch, f"csrc/{name}"


def test_native_code_uses_the_stable_interface_alone() -> None:
    for name, included in headers().items():
        unstable = {
            header
            for header in included
            if header in {"Python.h", "omp.h", "torch/extension.h", "torch/torch.h"}
            or header.startswith(("ATen/", "c10/", "pybind11/"))
        }
        assert not unstable, f"csrc/{name}"


def test_cuda_is_known_to_its_kernels_alone() -> None:
    """A library without CUDA is the same sources without the .cu ones."""
    graph = headers()
    users = {name for name in graph if any("cuda" in header for header in graph[name])}
    assert users == {name for name in graph if name.endswith((".cu", ".cuh"))}
    assert users == {"core/cuda.cuh", "hash/cuda.cu", "memory/cuda.cu"}


def test_what_the_kernels_do_is_known_without_cuda_and_torch() -> None:
    graph = headers()
    kernels = ("hash/layout.h", "hash/team.h", "hash/sources.h", "hash/batch.h", "hash/plan.h", "memory/gather.h")
    for name in (*kernels, "hash/device.h"):
        assert not [header for header in reachable(graph, name) if header.startswith(("torch/", "cuda"))], name
