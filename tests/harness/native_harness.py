"""Where the native parts of tests are, and what compiles them."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
NATIVE = ROOT / "tests" / "native"


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or "g++"]


def store_sources() -> list[Path]:
    """The store and what it needs: no torch."""
    return [CSRC / "core" / "fork.cpp", CSRC / "hash" / "digest.cpp", *sorted((CSRC / "store").rglob("*.cpp"))]


def store_program(source: str, folder: Path) -> Path:
    """The program of tests/native/`source`, linked with the store."""
    if not shutil.which(compiler()[0]) or not CSRC.is_dir():
        pytest.skip("no C++ compiler")
    program = folder / Path(source).stem
    flags = ["-std=c++17", "-O1", f"-I{CSRC}", "-pthread", "-o", str(program)]
    sources = map(str, [NATIVE / source, *store_sources()])
    subprocess.run([*compiler(), *flags, *sources, "-lzstd"], check=True)
    return program


def built(source: str) -> ctypes.CDLL:
    """The library of tests/native/`source`: device code for the host. What is undefined in C++ ends the process."""
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/device.so"
        subprocess.run([*compiler(), *flags, f"-I{CSRC}", str(NATIVE / source), "-o", library], check=True)
        return ctypes.CDLL(library)
