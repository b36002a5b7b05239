"""The command line: what is installed, and how the native library is there."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch

from torchcache import _build
from torchcache._version import __version__


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; the result is the exit status, 1 if the native library is missing."""
    parser = argparse.ArgumentParser(
        prog="torchcache", description="Says what is installed and how the native library is there."
    )
    parser.add_argument("--version", action="version", version=f"torchcache {__version__}")
    parser.parse_args(arguments)
    return report()


def report() -> int:
    """Prints versions, the state of the native library and where it is."""
    print(f"torchcache  {__version__} in {Path(__file__).parent}")
    print(f"python      {platform.python_version()}")
    print(f"torch       {torch.__version__}")
    state, status = library_state()
    print(f"library     {state}")
    if clash := _build.clash(_source()):
        print(f"warning: {clash}")
    return status


def library_state() -> tuple[str, int]:
    """How the native library is there, and the exit status; compiles it if that is still to do."""
    try:
        path = _build.library()
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except (ImportError, OSError) as error:
        return f"missing: {error}", 1
    return f"{'compiled ahead' if path == _build.ahead() else 'compiled on first use'}: {path}", 0


def _source() -> str:
    """What to give to pip to install the same torchcache again."""
    try:
        recorded = importlib.metadata.distribution("torchcache").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        recorded = None
    url = urlparse(json.loads(recorded)["url"] if recorded else "")
    return unquote(url.path) if url.scheme == "file" else "the folder of torchcache's sources"


if __name__ == "__main__":
    sys.exit(main())
