"""Builds the distribution: compiles csrc/ against the user's torch, or packs the sources alone.

Sources and flags are those of torchcache/_native/build.py, which compiles on first use what was packed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import setuptools
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(
        f"error: torchcache needs setuptools 77 or newer to build, found {setuptools.__version__}: "
        "pip install --upgrade setuptools"
    )


def load_build() -> ModuleType:
    """torchcache._native.build, without torchcache/__init__.py, which would import torch."""
    package = ModuleType("torchcache")
    package.__path__ = [str(ROOT / "torchcache")]
    sys.modules["torchcache"] = package
    return importlib.import_module("torchcache._native.build")


def see_the_users_packages() -> None:
    """Appends to sys.path what the user's interpreter sees and build isolation hides: torch."""
    hidden_by = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden_by}
    code = r"import sys; print('\n'.join(sys.path))"
    printed = subprocess.check_output([sys.executable, "-c", code], cwd="/", env=environment, text=True)
    sys.path += [path for path in printed.splitlines() if path and path not in sys.path]


class BuildPython(build_py):
    """Packs the C++ sources too, so that they can be compiled on first use."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            packed = Path(self.build_lib, "torchcache", "_native", "csrc")
            shutil.rmtree(packed, ignore_errors=True)  # of an earlier build
            shutil.copytree(ROOT / "csrc", packed)


def native() -> dict[str, Any]:
    """The part of setup()'s arguments that needs torch; empty without one."""
    if importlib.util.find_spec("torch") is None:
        print("torchcache: without torch, installing the sources only, to be compiled on first use")
        return {}
    try:
        import torch
    except (ImportError, OSError) as error:
        raise BuildError(f"torch is installed but cannot be imported: {error}") from error
    build.check_torch(torch.__version__)
    found = build.installed_torch()
    print(f"torchcache: building against torch {found.version} in {found.folder}")
    if cuda := build.cuda_for(found):
        print(f"torchcache: with CUDA by {cuda.home}, for {', '.join(cuda.codes)}")

    class BuildNative(build_ext):
        def build_extension(self, extension: Any) -> None:
            target = Path(self.get_ext_fullpath(extension.name)).absolute()
            target.parent.mkdir(parents=True, exist_ok=True)
            build.check_toolchain()
            build.compile_library(ROOT / "csrc", found, target)

    extension = setuptools.Extension("torchcache._native._C", sources=[], py_limited_api=True)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildNative}}


build: Any = load_build()
BuildError: Any = build.BuildError
see_the_users_packages()
try:
    if clash := build.clash(str(ROOT)):
        print(f"torchcache: {clash}")
    arguments = native()
    arguments.setdefault("cmdclass", {})["build_py"] = BuildPython
    setuptools.setup(options={"bdist_wheel": {"py_limited_api": "cp310"}}, **arguments)
except BuildError as error:
    sys.exit(f"error: {error}")
