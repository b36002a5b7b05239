"""The native library is compiled on first use, whole and once, or one line says what to install."""

from __future__ import annotations

import ctypes
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchcache._native import build
from torchcache.errors import BuildError

# Prints the path of the library; knows torch by its folder only, so that it starts at once.
COMPILE = """
import sys
from pathlib import Path
sys.path.append(sys.argv[1])
import build
torch = build.Torch(sys.argv[2], Path(sys.argv[3]))
print(build.compile_on_first_use(Path(sys.argv[4]), torch), flush=True)
"""

# Loads the library, which is found now, and uses it.
COMPUTE = """
import torch
without_cuda = build.installed_torch()._replace(cuda=None, codes=())
found = build.compile_on_first_use(Path(sys.argv[4]), without_cuda)
torch.ops.load_library(str(found))
print(torch.ops.torchcache.digests([torch.zeros(3)]).shape)
"""

# Lists the temporary folder after a child has ended in the ordinary way.
FORK = """
import os
if not os.fork():
    sys.exit()
os.wait()
print(os.listdir(os.environ["TMPDIR"]))
"""

# A compiler that notes its calls and, where $GATE is a folder, waits there before it compiles.
COMPILER = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/calls"
case " $* " in *" -c "*)
  if [ -n "$GATE" ]; then echo started > "$GATE/started"; read go < "$GATE/go"; fi ;;
esac
exec c++ "$@"
"""


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler, a cache and temporary files of this test alone."""
    compiler = tmp_path / "compiler" / "c++"
    compiler.parent.mkdir()
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    for variable in ("GATE", "CPPFLAGS", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)


def tree(folder: Path, answer: int) -> Path:
    """Sources that compile in no time into a library that knows one number."""
    folder.mkdir()
    (folder / "answer.h").write_text(f"#define ANSWER {answer}\n")
    (folder / "ops.cpp").write_text(
        '#include "answer.h"\nextern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }\n'
    )
    return folder


def answer(library: str | Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


def compiled(csrc: Path) -> Path:
    return build.compile_on_first_use(csrc, build.installed_torch())


def start(csrc: Path, code: str = COMPILE, **environment: str) -> subprocess.Popen[str]:
    """Another process that does what `compiled` does."""
    found = build.installed_torch()
    arguments = [str(Path(build.__file__).parent), found.version, str(found.folder), str(csrc)]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What the process printed: the library's path, and what it said on standard error."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip(), err


class Gate:
    """Where a compiler waits."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.path = str(folder)
        os.mkfifo(folder / "started")
        os.mkfifo(folder / "go")
        self._started = os.open(folder / "started", os.O_RDONLY | os.O_NONBLOCK)

    def wait_for_the_compiler(self) -> None:
        assert select.select([self._started], [], [], 120)[0], "the compiler was not started"
        os.close(self._started)

    def open(self) -> None:
        Path(self.path, "go").write_text("go\n")


def compilations(tmp_path: Path) -> int:
    calls = (tmp_path / "compiler" / "calls").read_text().splitlines()
    return sum(" -c " in call for call in calls)


@pytest.mark.slow
def test_the_sources_compile_on_first_use_and_compute(tmp_path: Path) -> None:
    out, err = finish(start(build.sources_folder(), COMPILE + COMPUTE))
    path, shape = out.splitlines()
    assert Path(path).is_relative_to(tmp_path / "extensions")
    assert shape == "torch.Size([1, 2])"
    assert err.count("compiling torchcache's native library") == 1


def test_a_killed_build_does_not_hinder_the_next_one(tmp_path: Path) -> None:
    csrc = tree(tmp_path / "csrc", 42)
    gate = Gate(tmp_path / "gate")
    process = start(csrc, GATE=gate.path)
    gate.wait_for_the_compiler()
    process.send_signal(signal.SIGKILL)
    process.communicate()

    library = compiled(csrc)
    gate.open()  # the orphaned compiler goes on now, too late to do harm
    assert answer(library) == 42
    assert {path.name for path in library.parent.iterdir()} == {build.LIBRARY, "lock"}


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    csrc = tree(tmp_path / "csrc", 42)
    gate = Gate(tmp_path / "gate")
    first = start(csrc, GATE=gate.path)
    gate.wait_for_the_compiler()
    second = start(csrc)
    assert second.stderr is not None
    assert "another process is compiling" in second.stderr.readline()
    gate.open()
    assert finish(first)[0] == finish(second)[0]
    assert compilations(tmp_path) == 1


def test_versions_that_are_built_together_do_not_mix(tmp_path: Path) -> None:
    answers = (1, 2)
    gates = [Gate(tmp_path / f"gate{n}") for n in answers]
    trees = [tree(tmp_path / f"csrc{n}", n) for n in answers]
    running = [start(csrc, GATE=gate.path) for csrc, gate in zip(trees, gates, strict=True)]
    for gate in gates:
        gate.wait_for_the_compiler()
    for gate in reversed(gates):
        gate.open()
    assert [answer(finish(process)[0]) for process in running] == [1, 2]


def test_an_edited_header_makes_another_library(tmp_path: Path) -> None:
    csrc = tree(tmp_path / "csrc", 1)
    first = compiled(csrc)
    (csrc / "answer.h").write_text("#define ANSWER 2\n")
    second = compiled(csrc)
    assert (answer(first), answer(second)) == (1, 2)


def test_another_version_of_torch_makes_another_library(tmp_path: Path) -> None:
    csrc = tree(tmp_path / "csrc", 1)
    found = build.installed_torch()
    other = build.Torch(found.version + ".other", found.folder)
    assert compiled(csrc) != build.compile_on_first_use(csrc, other)


def test_without_a_writable_home_one_process_compiles_for_itself(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder can be made in here")
    csrc = tree(tmp_path / "csrc", 42)
    unusable = str(tmp_path / "file" / "extensions")
    out, err = finish(start(csrc, COMPILE + FORK, TORCH_EXTENSIONS_DIR=unusable))
    path, listing = out.splitlines()
    assert "for this process only" in err
    assert Path(path).is_relative_to(tmp_path / "tmp")
    assert Path(path).parent.name in listing, "a forked child removed it"
    assert not list((tmp_path / "tmp").iterdir()), "it was not removed at exit"


def test_a_built_library_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csrc = tree(tmp_path / "csrc", 42)
    library = compiled(csrc)
    monkeypatch.setenv("PATH", "")
    assert compiled(csrc) == library


def test_without_a_compiler_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX")
    with pytest.raises(BuildError, match=r"^no C\+\+ compiler .*apt-get install g\+\+.*$"):
        compiled(tree(tmp_path / "csrc", 42))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"^CXX names no-such-compiler, which is not there"):
        build.check_toolchain()


def test_without_zstds_headers_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", os.environ["CXX"] + " -nostdinc")
    with pytest.raises(BuildError, match=r"^zstd's header .*apt-get install .*libzstd-dev.*$"):
        compiled(tree(tmp_path / "csrc", 42))


@pytest.mark.parametrize("version", ["1.13.1", "2.9.1+cu128"])
def test_an_older_torch_is_refused_in_one_line(version: str) -> None:
    with pytest.raises(BuildError, match=r"needs torch 2\.10 or newer, found ") as error:
        build.check_torch(version)
    assert version in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.14.1+cu130", "3.0.0a0+git1234"])
def test_newer_torches_are_accepted(version: str) -> None:
    build.check_torch(version)


def test_sources_that_do_not_compile_are_reported_in_one_line(tmp_path: Path) -> None:
    csrc = tree(tmp_path / "csrc", 42)
    (csrc / "ops.cpp").write_text("this is not C++\n")
    with pytest.raises(BuildError, match=r"^compiling .* failed: .*ops.cpp:1:\d+: error: .*$"):
        compiled(csrc)


# ---- CUDA

NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
--list-gpu-code) printf "sm_75\\nsm_80\\nsm_90\\nsm_120\\n" ;;
*) echo "nvcc cannot compile here: error" >&2; exit 1 ;;
esac
"""

CUDA_TORCH = build.Torch("2.14.1+cu130", Path("torch"), "13.0", ("sm_50", "sm_80", "sm_90", "sm_120"))
CPU_TORCH = build.Torch("2.14.1+cpu", Path("torch"))


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit of version 13.0 in CUDA_HOME."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    return tmp_path / "cuda"


def codes(torch: build.Torch) -> tuple[str, ...] | None:
    found = build.cuda_for(torch)
    return None if found is None else found.codes


def test_cuda_is_built_for_what_torch_was_built_for_and_ptx_of_the_newest(toolkit: Path) -> None:
    found = build.cuda_for(CUDA_TORCH)
    assert found == (toolkit, ("sm_80", "sm_90", "sm_120", "compute_120"))  # nvcc does not know sm_50


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("9.0", ("sm_90",)),
        ("8.0 9.0a+PTX", ("sm_80", "sm_90a", "compute_90a")),
        (" 7.5;12.0+PTX ", ("sm_75", "sm_120", "compute_120")),
        ("", ("sm_80", "sm_90", "sm_120", "compute_120")),
    ],
)
@pytest.mark.usefixtures("toolkit")
def test_cuda_is_built_for_the_architectures_asked_for(
    chosen: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", chosen)
    assert codes(CUDA_TORCH) == expected


@pytest.mark.usefixtures("toolkit")
def test_architectures_that_cannot_be_read_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0 hopper")
    with pytest.raises(BuildError, match=r"TORCH_CUDA_ARCH_LIST must be .* got 'hopper'"):
        build.cuda_for(CUDA_TORCH)


@pytest.mark.usefixtures("toolkit")
def test_a_torch_without_cuda_gets_a_library_without_cuda_unless_it_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert codes(CPU_TORCH) is None
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(BuildError, match="set TORCH_CUDA_ARCH_LIST"):
        build.cuda_for(CPU_TORCH)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert codes(CPU_TORCH) == ("sm_90",)


def test_without_a_toolkit_the_library_is_one_for_the_cpu_unless_cuda_is_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert codes(CUDA_TORCH) is None
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(BuildError, match=r"there is no CUDA toolkit in .*: set CUDA_HOME"):
        build.cuda_for(CUDA_TORCH)


@pytest.mark.usefixtures("toolkit")
def test_a_toolkit_of_another_major_version_is_not_used_and_both_versions_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed = build.installed_torch()
    older = installed._replace(cuda="12.8")
    library = build.compile_library(tree(tmp_path / "csrc", 42), older, tmp_path / build.LIBRARY)
    assert answer(library) == 42
    assert re.search(r"is 13\.0, but torch .* was built with 12\.8.*building without CUDA", caplog.text)
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(BuildError, match=r"is 13\.0, but torch .* was built with 12\.8"):
        build.cuda_for(older)


@pytest.mark.usefixtures("toolkit")
def test_the_sources_of_cuda_are_compiled_by_nvcc_and_its_complaint_is_told(tmp_path: Path) -> None:
    csrc = tree(tmp_path / "csrc", 42)
    (csrc / "kernels.cu").write_text("")
    torch = build.installed_torch()._replace(cuda="13.0", codes=("sm_90",))
    with pytest.raises(BuildError, match="nvcc cannot compile here"):
        build.compile_on_first_use(csrc, torch)
    plain = build.compile_on_first_use(csrc, torch._replace(cuda=None))  # the .cu file is not one of its sources
    assert answer(plain) == 42


def run_command_line(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torchcache"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_the_command_line_says_how_the_library_is_there(tmp_path: Path) -> None:
    done = run_command_line()
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout
    assert re.search("^cuda +(not built in|built in for)", done.stdout, re.MULTILINE)
    ahead = build.ahead()
    assert ("compiled ahead" if ahead else "compiled on first use") in done.stdout
    assert str(ahead or tmp_path / "extensions") in done.stdout


def test_the_command_line_says_why_the_library_is_missing(tmp_path: Path) -> None:
    package = tmp_path / "site" / "torchcache"
    shutil.copytree(Path(build.__file__).parents[1], package, ignore=shutil.ignore_patterns("*.so", "csrc"))
    shutil.copytree(build.sources_folder(), package / "_native" / "csrc")
    done = run_command_line(PYTHONPATH=str(tmp_path / "site"), CXX="no-such-compiler")
    assert done.returncode == 1, done.stderr
    assert "missing: CXX names no-such-compiler" in done.stdout


def test_the_public_torchmb_is_pointed_out_with_the_commands_that_mend_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build.clash("source") is None
    info = tmp_path / "torchmb-0.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchmb\nVersion: 0.2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    message = build.clash("the source")
    assert message is not None
    assert "torchmb 0.2" in message
    assert "pip uninstall --yes torchmb" in message
    assert "pip install --force-reinstall --no-deps 'the source'" in message
