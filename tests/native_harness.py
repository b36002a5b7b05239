"""Where the native parts of tests are, and what compiles them."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
NATIVE = ROOT / "tests" / "native"


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or "g++"]
