"""The library with CUDA: it holds code for the GPUs asked for, and loads and works where there is none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from torchcache._native import build, ops

pytestmark = pytest.mark.skipif(
    not ops.cuda_architectures(), reason="the installed library was built without CUDA; `make cuda` makes one with it"
)


def cuda() -> build.Cuda:
    found = build.cuda_for(build.installed_torch())
    assert found is not None, "the toolkit that built the library is gone"
    return found


def cuobjdump() -> str:
    """NVIDIA's tool: of the toolkit, or the one that comes with Triton."""
    places = [cuda().home / "bin", *Path(build.installed_torch().folder.parent).glob("triton/backends/nvidia/bin")]
    found = shutil.which("cuobjdump", path=os.pathsep.join(map(str, places)))
    if found is None:
        pytest.skip("there is no cuobjdump in the CUDA toolkit and none of Triton's")
    return found


def listed(option: str) -> set[str]:
    """Architectures of what the library holds."""
    command = [cuobjdump(), option, str(build.library())]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {match for line in printed.splitlines() for match in re.findall(r"\bsm_\w+?(?=\.|$)", line)}


def test_the_library_holds_machine_code_and_ptx_for_what_was_asked() -> None:
    codes = cuda().codes
    assert listed("--list-elf") == {code for code in codes if code.startswith("sm_")}
    assert listed("--list-ptx") == {code.replace("compute_", "sm_") for code in codes if code.startswith("compute_")}


def test_the_library_says_what_it_holds() -> None:
    numbers = {int(code.partition("_")[2].rstrip("af")) for code in cuda().codes}
    assert set(ops.cuda_architectures()) == {10 * number for number in numbers}


def test_the_library_needs_no_library_of_cuda() -> None:
    """So that it loads beside a torch with another CUDA, or with none."""
    command = ["readelf", "--dynamic", "--wide", str(build.library())]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert not [name for name in re.findall(r"NEEDED.*\[(.*)\]", printed) if "cuda" in name]


def test_the_library_loads_and_works_without_a_gpu() -> None:
    script = """
        import torch
        from torchcache import torchcache

        module = torchcache()(torch.nn.Linear(4, 2).requires_grad_(False))
        x = torch.ones(3, 4)
        assert torch.equal(module(x), module(x))
        print(module.cache_instance.info().memory_hits, torch.cuda.is_available())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[1] == "False"
