"""Every code block of the README and of docs/ does what it says, and every test that the limits name exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", PYTHON)
def test_python_blocks_run_without_a_word_on_stderr(block: str, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(block)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_the_design_says_what_each_room_is_for_as_its_package_does() -> None:
    design = (ROOT / "docs" / "design.md").read_text()
    for path in (ROOT / "torchcache").rglob("__init__.py"):
        sentence = ast.get_docstring(ast.parse(path.read_text()))
        assert f"| {sentence} |" in design, path


def test_shell_blocks_hold_the_commands_that_ci_runs() -> None:
    commands = [line.split("#")[0].strip() for block in SHELL for line in block.splitlines()]
    assert commands == ["make demo", "make test", "pip install ."]
    makefile = (ROOT / "Makefile").read_text()
    assert "\ntest:" in makefile and "\ndemo:" in makefile
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, section = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not section or section in sections(linked), target


def sections(page: Path) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_limit_names_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "limitations.md").read_text())
    assert len(named) > 25
    assert [name for file, name in named if f"\ndef {name}(" not in (ROOT / file).read_text()] == []


def test_every_path_that_contributors_are_sent_to_exists() -> None:
    paths = re.findall(r"`((?:csrc|docs|tests|torchcache|torchmb)/[\w./]*)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(paths) > 40
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_option_is_explained() -> None:
    import inspect

    from torchcache import torchcache

    table = README[README.index("### Options") : README.index("## What it promises")]
    for name in inspect.signature(torchcache).parameters:
        explained = f"`{name}`" in table or (
            name.startswith("zstd_") and name.removeprefix("zstd_compression") in table
        )
        assert explained, name
