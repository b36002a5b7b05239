"""Who ships a piece of code: an installed distribution, Python, this library, or the user."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import json
import os
import sys
import types
from collections.abc import Mapping

OURS = __name__.partition(".")[0]
ORIGINAL = "__torchcache_original__"

_STDLIB = os.path.realpath(os.path.dirname(os.__file__)) + os.sep

# A distribution and its version; None means the user's own code.
Origin = tuple[str, str] | None


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


@functools.cache
def _installed(top: str) -> Origin:
    """The distributions that own the top-level name `top` and their versions."""
    try:
        distributions = [importlib.metadata.distribution(top)]
    except importlib.metadata.PackageNotFoundError:
        owners = sorted(set(importlib.metadata.packages_distributions().get(top, ())))
        distributions = [importlib.metadata.distribution(owner) for owner in owners]
    versions = []
    for distribution in distributions:
        came_from = json.loads(distribution.read_text("direct_url.json") or "{}")
        if "dir_info" in came_from:  # a directory changes without its version
            return None
        commit = came_from.get("vcs_info", {}).get("commit_id")
        versions.append(str(commit or distribution.version.partition("+")[0]))
    if distributions:
        return "+".join(_canonical(item.metadata["Name"]) for item in distributions), "+".join(versions)
    version = getattr(sys.modules.get(top), "__version__", None)
    return None if version is None else (top, str(version).partition("+")[0])


@functools.lru_cache(maxsize=4096)
def of_file(file: str, module: str) -> Origin:
    """The origin of a file that a module of this name was loaded from; "" for a module without a file."""
    top = module.partition(".")[0]
    if top == OURS:
        return OURS, ""
    parts = file.replace("\\", "/").split("/")
    for folder in ("site-packages", "dist-packages"):
        if folder in parts[:-1]:
            place = len(parts) - parts[::-1].index(folder)
            return _installed(parts[place].partition(".")[0])
    built_in = not file and top in sys.stdlib_module_names
    if built_in or file.startswith("<frozen ") or os.path.realpath(file).startswith(_STDLIB):
        return "python", ""
    return None


def of_module(name: str | None) -> Origin:
    """The origin of an imported module; ``__main__`` is the user's, whatever started the process."""
    if name == "__main__":
        return None
    module = sys.modules.get(name or "")
    return of_file(getattr(module, "__file__", None) or "", name or "")


def of_function(function: types.FunctionType) -> Origin:
    """The origin of a function's code, which its ``__module__`` need not name."""
    file = function.__code__.co_filename
    if file.startswith("<") and not file.startswith("<frozen "):  # made at run time
        file = str(function.__globals__.get("__file__") or "<>")
    return of_file(file, str(function.__globals__.get("__name__")))


def is_ours(obj: object) -> bool:
    """Whether this library made the function or object."""
    home = obj.__globals__.get("__name__") if isinstance(obj, types.FunctionType) else None
    return str(home or type(obj).__module__).partition(".")[0] == OURS


def attributes_of(obj: object) -> Mapping[str, object]:
    """The object's own attributes; none if it raises when asked for them."""
    try:
        attributes = obj.__dict__
    except Exception:  # a lazy object may load what it stands for, and fail
        return {}
    return attributes if isinstance(attributes, (dict, types.MappingProxyType)) else {}


def _marked(obj: object) -> bool:
    """Whether our decorator marked the object itself: functools.wraps copies the mark to others."""
    attributes = attributes_of(obj)
    below = attributes_of(attributes.get("__wrapped__"))
    return ORIGINAL in attributes and below.get(ORIGINAL, below) is not attributes[ORIGINAL]


def is_added(obj: object) -> bool:
    """Whether this library's decorator added a function to a class that had none of this name."""
    return _marked(obj) and vars(obj)[ORIGINAL] is None


def unwrap(obj: object) -> object:
    """What this library's decorator replaced by the object; other objects as they are."""
    while True:
        if _marked(obj):
            obj = vars(obj)[ORIGINAL]
        elif "__wrapped__" in attributes_of(obj) and is_ours(obj):
            obj = vars(obj)["__wrapped__"]
        else:
            return obj


def is_users(member: object) -> bool:
    """Whether a function, also as a member of a class, is one that the user wrote."""
    function = getattr(member, "__func__", member)
    if getattr(function, "__dict__", None):
        function = unwrap(function)
    return isinstance(function, types.FunctionType) and of_function(function) is None


def is_our_decorator(node: ast.expr, scope: dict[str, object]) -> bool:
    """Whether a decorator is this library's, by what it names or, if the name is a local one, by name."""
    chain = []
    node = node.func if isinstance(node, ast.Call) else node
    while isinstance(node, ast.Attribute):
        chain.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return False
    if (chain[0] if chain else node.id) == OURS:
        return True
    value = scope.get(node.id)
    for name in reversed(chain):
        value = getattr(value, name, None)
    return is_ours(value)


def import_users(name: str) -> types.ModuleType | None:
    """Imports one of the user's modules; None for installed ones, which code describes by name."""
    if name in sys.modules:
        return sys.modules[name]
    top = name.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
        if spec is None or of_file(spec.origin or "", top) is not None:
            return None
        return importlib.import_module(name)
    except Exception:  # the function's import may fail as well, or never run
        return None
