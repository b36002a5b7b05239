"""Native code of tests: where it is, what compiles it, and device code that is compiled for the host."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
NATIVE = ROOT / "tests" / "native"


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or "g++"]


def built(source: str) -> ctypes.CDLL:
    """The library of tests/native/`source`; what is undefined in C++ ends the process."""
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", f"-I{CSRC}"]
    flags += ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/device.so"
        subprocess.run([*compiler(), *flags, str(NATIVE / source), "-o", library], check=True)
        return ctypes.CDLL(library)
