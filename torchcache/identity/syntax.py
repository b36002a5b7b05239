"""The code of one function: its normal form, and the names by which it reaches other objects."""

from __future__ import annotations

import ast
import dis
import functools
import importlib.util
import linecache
import re
import types
from collections.abc import Iterator
from typing import NamedTuple

from torchcache.identity.encoding import encode

_MAX_SOURCES = 4096  # functions whose source is remembered
# Fields that do not belong to the program: the role of a name, u"" prefixes, type comments.
_IGNORED_FIELDS = frozenset(("ctx", "kind", "type_comment"))
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_IMPORTERS = {"import_module", "__import__"}
_MODULE_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@functools.lru_cache(maxsize=256)
def _functions_of(text: str) -> dict[tuple[int, str], tuple[list[ast.AST], list[types.CodeType]]]:
    """The functions in a source text by first line and name: syntax trees, and the code that they compile to."""
    functions: dict[tuple[int, str], tuple[list[ast.AST], list[types.CodeType]]] = {}
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, _FUNCTIONS):
            first = min([node.lineno, *(item.lineno for item in decorators(node))])
            functions.setdefault((first, getattr(node, "name", "<lambda>")), ([], []))[0].append(node)
    # A notebook's cell may await at its top level.
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    for code in nested(compile(tree, "", "exec", flags, dont_inherit=True)):
        if (code.co_firstlineno, code.co_name) in functions:
            functions[code.co_firstlineno, code.co_name][1].append(code)
    return functions


def nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function and of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from nested(constant)


def text_of(function: types.FunctionType) -> str:
    """The present text of the file, notebook cell or other source that the function came from."""
    file = function.__code__.co_filename
    linecache.checkcache(file)
    return "".join(linecache.getlines(file, function.__globals__))


class Source(NamedTuple):
    """The normal form of a function, and its decorators with theirs."""

    form: bytes
    decorators: list[tuple[ast.expr, bytes]]


# By the id of the code, which is kept: code objects are equal although their decorators differ.
_sources: dict[int, tuple[types.CodeType, Source]] = {}


def source_of(function: types.FunctionType) -> Source | None:
    """The function's source; None if it cannot be read, or compiles to other code than what runs."""
    code = function.__code__
    if id(code) not in _sources:
        try:
            nodes, codes = _functions_of(text_of(function)).get((code.co_firstlineno, code.co_name), ([], []))
        except (SyntaxError, ValueError, RecursionError):
            return None
        # Nothing tells several lambdas on one line apart.
        if len(nodes) != 1 or bytecode(code) not in map(bytecode, codes):
            return None
        if len(_sources) >= _MAX_SOURCES:
            _sources.clear()
        found = [(item, normal_form(item)) for item in decorators(nodes[0])]
        _sources[id(code)] = code, Source(normal_form(nodes[0]), found)
    return _sources[id(code)][1]


def decorators(node: ast.AST) -> list[ast.expr]:
    """The decorators of a function's syntax tree; a lambda has none."""
    return getattr(node, "decorator_list", [])


def normal_form(node: ast.AST, *, outermost: bool = True) -> bytes:
    """The syntax tree without positions and docstrings, the same in every version of Python.

    Args:
        node: the tree.
        outermost: whether to leave out the decorators of the function, since the caller describes these.
    """
    fields = []
    for name, value in ast.iter_fields(node):
        if name in _IGNORED_FIELDS or (name == "decorator_list" and outermost):
            continue
        if name == "body" and isinstance(node, _DOCUMENTED) and ast.get_docstring(node) is not None:
            value = value[1:]
        items = value if isinstance(value, list) else [value]
        forms = [normal_form(item, outermost=False) if isinstance(item, ast.AST) else encode(item) for item in items]
        # Fields that a later version of Python added are empty in the code of an earlier one.
        if items and value is not None:
            fields.append((name, forms))
    return encode((type(node).__name__, fields))


def bytecode(code: types.CodeType) -> bytes:
    """The bytecode without positions, which differs between versions of Python."""
    constants = [bytecode(item) if isinstance(item, types.CodeType) else encode(item) for item in code.co_consts]
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
    variables = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    flags = code.co_flags & 0xFF  # *args, **kwargs, generator, coroutine
    return encode((code.co_name, counts, flags, code.co_code, constants, variables))


@functools.lru_cache(maxsize=4096)
def reached(code: types.CodeType) -> frozenset[tuple[str, ...]]:
    """The names that the code and its nested functions read from outside, as (name, attribute, …)."""
    chains: set[tuple[str, ...]] = set()
    chain: tuple[str, ...] = ()
    for step in dis.get_instructions(code):
        if step.opname == "EXTENDED_ARG":
            continue
        if chain and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain = (*chain, step.argval)
            continue
        chains.add(chain)
        outside = step.opname.startswith("LOAD") and step.opname.endswith(("_GLOBAL", "_GLOBALS", "_NAME", "DEREF"))
        chain = (step.argval,) if outside else ()
    chains.add(chain)
    inner = (reached(item) for item in code.co_consts if isinstance(item, types.CodeType))
    return frozenset(chains.union(*inner) - {()})


@functools.lru_cache(maxsize=4096)
def imported(code: types.CodeType, package: str | None) -> frozenset[str]:
    """The full names of the modules that the code and its nested functions import themselves."""
    modules = set()
    steps = list(dis.get_instructions(code))
    for place, step in enumerate(steps):
        if step.opname == "IMPORT_NAME":
            before = [item for item in steps[:place] if item.opname != "EXTENDED_ARG"]
            level = before[-2].argval
            try:
                modules.add(importlib.util.resolve_name("." * level + step.argval, package))
            except ImportError:
                continue
    if _IMPORTERS.intersection(code.co_names):
        modules |= {name for name in code.co_consts if isinstance(name, str) and _MODULE_NAME.fullmatch(name)}
    inner = (imported(item, package) for item in code.co_consts if isinstance(item, types.CodeType))
    return frozenset(modules.union(*inner))


@functools.lru_cache(maxsize=4096)
def attribute_names(code: types.CodeType) -> frozenset[str]:
    """Every global, attribute and imported name in the code and its nested functions."""
    return frozenset(name for inner in nested(code) for name in inner.co_names)
