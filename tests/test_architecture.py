"""The arrows of docs/design.md: who may import or include whom."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

TIERS = {"memory", "disk"}
KNOW_MODULES = {"decorator", "cache", "call", "keys", "fingerprint", "source", "state", "bypass"}
BEHIND_THE_CACHE = TIERS | {"keys", "rows", "_ops", "_build"}

# Folder of csrc/ → the folders that it may include besides itself. "" is csrc/ itself.
MAY_INCLUDE = {
    "": {"hash", "memory", "store"},
    "hash": {""},
    "memory": {"", "hash"},
    "store": {"", "hash"},
}


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all that a Python file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = [path.parent.name] if node.level else []
            module = ".".join([*package, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{name.name}" for name in node.names)


def modules() -> dict[str, set[str]]:
    """Module of torchcache → the modules of torchcache that it imports."""
    names = {path.stem for path in (ROOT / "torchcache").glob("*.py")}
    graph = {}
    for name in names:
        parts = (m.split(".") for m in imported(ROOT / "torchcache" / f"{name}.py"))
        graph[name] = {p[1] for p in parts if p[0] == "torchcache" and len(p) > 1} & names
    return graph


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


def test_no_module_is_reached_from_what_it_imports() -> None:
    TopologicalSorter(modules()).prepare()  # raises CycleError, which names the cycle


def test_tiers_know_nothing_of_modules() -> None:
    graph = modules()
    for tier in TIERS:
        assert not reachable(graph, tier) & KNOW_MODULES, tier


def test_tiers_do_not_know_each_other() -> None:
    for tier, imports in modules().items():
        assert tier not in TIERS or not imports & TIERS


def test_the_decorator_knows_nothing_of_what_is_behind_the_cache() -> None:
    assert not modules()["decorator"] & BEHIND_THE_CACHE


def test_only_the_package_itself_imports_the_decorator() -> None:
    assert [name for name, imports in modules().items() if "decorator" in imports] == ["__init__"]


def test_the_build_is_known_to_the_operations_and_the_command_line_only() -> None:
    users = {name for name, imports in modules().items() if "_build" in imports}
    assert users == {"_ops", "__main__"}
    assert not modules()["_build"]


def test_one_file_names_the_native_operations() -> None:
    paths = [*(ROOT / "torchcache").glob("*.py"), *(ROOT / "torchmb").rglob("*.py")]
    named = {path.name for path in paths if "torch.ops.torchcache" in path.read_text()}
    assert named == {"_ops.py"}


def test_native_folders_include_only_what_they_may() -> None:
    graph = headers()
    own = [name for name in graph if (CSRC / name).is_file()]
    for name in own:
        folder = name.rpartition("/")[0].partition("/")[0]
        allowed = MAY_INCLUDE[folder] | {folder}
        if not folder and name != "ops.cpp":
            allowed = {""}
        used = {other.rpartition("/")[0].partition("/")[0] for other in graph[name] & set(own)}
        assert used <= allowed, f"csrc/{name}"


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
    users = {name for name in graph if any(header.startswith("cuda") for header in graph[name])}
    assert users == {name for name in graph if name.endswith((".cu", ".cuh"))}
    assert users == {"cuda.cuh", "hash/cuda.cu", "memory/cuda.cu"}


def test_what_the_kernels_do_is_known_without_cuda_and_torch() -> None:
    graph = headers()
    kernels = ("hash/layout.h", "hash/team.h", "hash/sources.h", "hash/batch.h", "hash/plan.h", "memory/gather.h")
    for name in (*kernels, "hash/device.h"):
        assert not [header for header in reachable(graph, name) if header.startswith(("torch/", "cuda"))], name
