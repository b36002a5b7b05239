"""Device code compiled for the host, to be called from tests."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def built(source: str) -> ctypes.CDLL:
    """The library of tests/native/`source`; what is undefined in C++ ends the process."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/device.so"
        path = str(_ROOT / "tests" / "native" / source)
        subprocess.run([*compiler.split(), *flags, f"-I{_ROOT / 'csrc'}", path, "-o", library], check=True)
        return ctypes.CDLL(library)
