"""Scripts that use a cache in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def run(folder: Path, script: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a script that may use `cached`, `X` and the usual modules; ``sys.argv[1]`` is a directory for rows."""
    prelude = """
        import os, sys, signal, multiprocessing
        import torch, torch.nn as nn
        from torchcache import torchcache

        class Double(nn.Module):
            def forward(self, x):
                return x * 2

        def cached(directory=None):
            return torchcache(persistent=True, persistent_cache_dir=directory)(Double())

        X = torch.arange(12.).view(4, 3)
    """
    file = folder / "script.py"
    file.write_text(textwrap.dedent(prelude) + textwrap.dedent(script))
    return subprocess.run(
        [sys.executable, file, folder / "rows"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=check,
    )
