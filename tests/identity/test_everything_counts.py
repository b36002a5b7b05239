"""Whatever an output depends on, and however it is changed: the cache gives what the module gives without it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dependences_harness
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cache_harness import cache_of
from dependences_harness import KINDS, VALUES, restore
from torch import nn

from torchcache import torchcache

X = torch.arange(1.0, 7.0).view(3, 2)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    restore()


def uncached(module: Any) -> torch.Tensor:
    module.torchcache_enabled = False
    output: torch.Tensor = module(X)
    module.torchcache_enabled = True
    return output


@pytest.mark.parametrize("name", KINDS)
def test_a_change_counts_and_its_way_back_finds_the_rows(name: str) -> None:
    part = KINDS[name](VALUES[0])
    module = torchcache()(nn.Sequential(part))
    for value in (*VALUES, *VALUES):
        part.set_value(value)
        for _ in range(2):
            assert torch.equal(module(X), uncached(module))
            assert torch.allclose(module(X), X * value)
    assert cache_of(module).info().misses == len(VALUES) * len(X)


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(data=st.data())
def test_any_combination_of_changes_counts(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=4, unique=True))
    parts = [KINDS[name](VALUES[0]) for name in names]
    own = data.draw(st.booleans()) and len(parts) == 1
    module = torchcache()(parts[0] if own else nn.Sequential(*parts))
    for _ in range(6):
        assert torch.equal(module(X), uncached(module))
        part = data.draw(st.sampled_from(parts))
        part.set_value(data.draw(st.sampled_from(VALUES)))
    assert torch.equal(module(X), uncached(module))


PROCESS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from dependences_harness import KINDS
from torch import nn
from torchcache import torchcache
X = torch.arange(1.0, 7.0).view(3, 2)
value, hits = float(sys.argv[3]), {}
for name, kind in KINDS.items():
    module = torchcache(persistent=True, persistent_cache_dir=sys.argv[2])(nn.Sequential(kind(value)))
    assert torch.allclose(module(X), X * value), (name, module(X), value)
    module.cache_instance.flush()
    hits[name] = module.cache_instance.info().disk_hits
print([name for name, found in hits.items() if not found])
"""


@pytest.mark.slow
def test_no_process_reads_rows_of_another_value_and_each_finds_its_own(tmp_path: Path) -> None:
    harness = str(Path(dependences_harness.__file__).parent)

    def run(value: float) -> list[str]:
        command = [sys.executable, "-c", PROCESS, harness, str(tmp_path), str(value)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        missed: list[str] = eval(done.stdout)  # a list of names, which the process above has printed
        return missed

    assert run(2.0) == list(KINDS)
    assert run(3.0) == list(KINDS)
    assert run(2.0) == []
