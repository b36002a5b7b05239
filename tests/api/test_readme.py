"""Every code block of the README does what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run_without_a_word_on_stderr(block: str, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(block)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_shell_blocks_hold_the_commands_that_ci_runs() -> None:
    commands = [line.split("#")[0].strip() for block in SHELL for line in block.splitlines()]
    assert commands == ["make demo", "make test", "pip install ."]
    makefile = (ROOT / "Makefile").read_text()
    assert "\ntest:" in makefile and "\ndemo:" in makefile
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_option_is_explained() -> None:
    import inspect

    from torchcache import torchcache

    table = README[README.index("### Options") : README.index("## What it promises")]
    for name in inspect.signature(torchcache).parameters:
        explained = f"`{name}`" in table or (
            name.startswith("zstd_") and name.removeprefix("zstd_compression") in table
        )
        assert explained, name
