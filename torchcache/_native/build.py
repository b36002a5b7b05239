"""Finds the native library: compiled ahead by the installer, or compiled here on first use.

The one place that says which sources and flags make it. setup.py imports this module too, where there may be no torch:
so it imports torch in functions only.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torchcache._utils.logs import logger
from torchcache.errors import BuildError

LIBRARY = "_C.abi3.so"
OLDEST_TORCH = (2, 10)  # the first one with this stable ABI, and what TORCH_TARGET_VERSION names
COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-g0",
    "-DNDEBUG",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
LIBRARIES = ("zstd",)
CUDA_LIBRARIES = ("cudart_static", "rt", "pthread", "dl")
INSTALL = (
    "Debian and Ubuntu: sudo apt-get install g++ libzstd-dev; "
    "Fedora: sudo dnf install gcc-c++ libzstd-devel; conda: conda install cxx-compiler zstd"
)

_FOLDER = Path(__file__).resolve().parent


class NoCuda(BuildError):
    """There is no CUDA toolkit that fits torch. The message says why, or is empty where nobody expects one."""


class Torch(NamedTuple):
    """An installed torch: its version and the folder that holds its ``include`` and ``lib``."""

    version: str
    folder: Path
    cuda: str | None = None  # the version of CUDA that it was built with
    codes: tuple[str, ...] = ()  # what it was built for, such as sm_90


class Cuda(NamedTuple):
    """A CUDA toolkit, and what to compile for: sm_90 is machine code, compute_90 what later GPUs can translate."""

    home: Path
    codes: tuple[str, ...]

    @property
    def nvcc(self) -> str:
        return str(self.home / "bin" / "nvcc")


@functools.cache
def library() -> Path:
    """Path of the native library, compiled now if nobody has done it before.

    Raises:
        BuildError: torch is too old, or a compiler, zstd's header or the sources are missing.
    """
    torch = installed_torch()
    check_torch(torch.version)
    return ahead() or compile_on_first_use(sources_folder(), torch)


def ahead() -> Path | None:
    """The library that the installer compiled, if it did."""
    path = _FOLDER / LIBRARY
    return path if path.is_file() else None


def sources_folder() -> Path:
    """The folder of the sources: inside an installed package, next to the package in a checkout."""
    for folder in (_FOLDER / "csrc", _FOLDER.parents[1] / "csrc"):
        if (folder / "ops.cpp").is_file():
            return folder
    raise BuildError(f"torchcache's C++ sources are not in {_FOLDER}: install torchcache again")


def installed_torch() -> Torch:
    import torch

    # torch.cuda.get_arch_list() says the same, but only where there is a GPU.
    codes = getattr(torch._C, "_cuda_getArchFlags", str)() or ""
    return Torch(torch.__version__, Path(torch.__file__).parent, torch.version.cuda, tuple(codes.split()))


def check_torch(version: str) -> None:
    """Raises BuildError for a torch that is too old."""
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise BuildError(
            f"torchcache needs torch {oldest} or newer, found {version}: pip install --upgrade 'torch>={oldest}'"
        )


def check_toolchain() -> None:
    """Raises BuildError unless a program that uses zstd can be compiled and linked."""
    with tempfile.TemporaryDirectory(prefix="torchcache-") as work:
        probe = Path(work, "probe.cpp")
        probe.write_text("#include <zstd.h>\nint main() { return !ZSTD_versionNumber(); }\n")
        complaint = _run([*_compiler(), str(probe), "-o", f"{work}/probe", *_link_flags()])
    if "zstd" in complaint:
        raise BuildError(f"zstd's header or library is missing ({complaint}): install it ({INSTALL})")
    if complaint:
        raise BuildError(f"the C++ compiler does not work ({complaint}); {INSTALL}")


def cuda_for(torch: Torch) -> Cuda | None:
    """What to compile the CUDA sources with; None where the library is to be one for the CPU only.

    Raises:
        BuildError: FORCE_CUDA=1 and there is no toolkit that fits torch, or TORCH_CUDA_ARCH_LIST cannot be read.
    """
    try:
        return _toolkit(torch)
    except NoCuda:
        if _forced():
            raise
        return None


def _forced() -> bool:
    return os.environ.get("FORCE_CUDA") == "1"


def _toolkit(torch: Torch) -> Cuda:
    if torch.cuda is None and not _forced():
        raise NoCuda
    chosen = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = Cuda(Path(chosen), ()).nvcc
    if not os.path.isfile(nvcc):
        raise NoCuda(f"there is no CUDA toolkit in {chosen}: set CUDA_HOME to one")
    version = re.search(r"release (\d+)\.(\d+)", _output([nvcc, "--version"]))
    if version is None:
        raise NoCuda(f"{nvcc} does not say its version")
    if torch.cuda is not None and version[1] != torch.cuda.partition(".")[0]:
        raise NoCuda(
            f"the CUDA toolkit in {chosen} is {version[1]}.{version[2]}, but torch {torch.version} was built with "
            f"{torch.cuda}: set CUDA_HOME to one of the same major version"
        )
    return Cuda(Path(chosen), _codes(torch, nvcc))


def _codes(torch: Torch, nvcc: str) -> tuple[str, ...]:
    """Those of TORCH_CUDA_ARCH_LIST, else what torch was built for, as far as nvcc knows it, and the newest as PTX."""
    codes = []
    for word in re.split(r"[ ;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()):
        if match := re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", word):
            number = match[1] + match[2]
            codes += [f"sm_{number}"] + [f"compute_{number}"] * bool(match[3])
        elif word:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST must be a list such as '8.0 9.0+PTX', got {word!r} in it")
    if codes:
        return tuple(codes)
    known = _output([nvcc, "--list-gpu-code"]).split()
    numbers = sorted(int(code[3:]) for code in torch.codes if code in known and code[3:].isdecimal())
    if not numbers:
        raise NoCuda("torch does not say which GPUs it is for: set TORCH_CUDA_ARCH_LIST, such as '8.0 9.0+PTX'")
    return (*(f"sm_{number}" for number in numbers), f"compute_{numbers[-1]}")


def compile_on_first_use(csrc: Path, torch: Torch) -> Path:
    """The library of these sources and this torch, kept in the folder of torch's own extensions.

    A process that is killed leaves nothing that hinders the next one: the lock dies with it, and
    the library gets its name only when it is whole. Several processes compile once.
    """
    folder = extensions_folder() / f"torchcache-{_digest(csrc, torch)}"
    target = folder / LIBRARY
    if os.path.isfile(target):  # unlike Path.is_file, false where looking is not allowed
        return target
    check_toolchain()
    try:
        with _alone_in(folder):
            if not target.is_file():
                _compile(csrc, torch, target)
            return target
    except OSError as error:
        logger.warning("%s cannot be used (%s): compiling for this process only", folder, error)
    return _compile(csrc, torch, _private_folder() / LIBRARY)


def extensions_folder() -> Path:
    """Where torch keeps extensions that were compiled on first use."""
    if chosen := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "torch_extensions")


def clash(source: str) -> str | None:
    """What to say if the public torchmb, whose files have our names, is installed; else None."""
    try:
        version = importlib.metadata.version("torchmb")
    except importlib.metadata.PackageNotFoundError:
        return None
    return (
        f"the distribution torchmb {version} is installed too and has files of the same names; "
        "mend it with these two commands:\n"
        "  pip uninstall --yes torchmb\n"
        f"  pip install --force-reinstall --no-deps {shlex.quote(source)}"
    )


def _digest(csrc: Path, torch: Torch) -> str:
    """Names everything that the compiled library depends on."""
    named = hashlib.sha256()
    words = [word for command in _compile_commands(csrc, torch).values() for word in command]
    words += [*_link_flags(), torch.version]
    words += [platform.machine(), *platform.libc_ver()]
    named.update("\0".join(words).replace(str(csrc), "csrc").encode())
    for path in sorted(path for path in csrc.rglob("*") if path.is_file()):
        content = path.read_bytes()
        named.update(f"\0{path.relative_to(csrc)}\0{len(content)}\0".encode() + content)
    return named.hexdigest()[:16]


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the kernel releases however the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process is compiling torchcache's native library: waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(csrc: Path, torch: Torch, target: Path) -> Path:
    logger.warning(
        "compiling torchcache's native library for torch %s, once, into %s (half a minute)",
        torch.version,
        target.parent,
    )
    return compile_library(csrc, torch, target)


def compile_library(csrc: Path, torch: Torch, target: Path) -> Path:
    """Compiles in a temporary folder next to the target, which it then renames."""
    try:
        _toolkit(torch)
    except NoCuda as reason:
        if str(reason):
            logger.warning("%s; building without CUDA: rows on a GPU will be hashed through the host", reason)
    # A fresh name each time: compilers of a killed process may still be writing in the old folder.
    for left_by_a_kill in target.parent.glob("build-*"):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as work:
        built = Path(work, LIBRARY)
        _link(_objects(csrc, torch, work), torch, built)
        os.replace(built, target)
    return target


def _objects(csrc: Path, torch: Torch, work: str) -> list[str]:
    """Compiles every source, several at a time."""
    commands = _compile_commands(csrc, torch)
    # Those of CUDA first: they take longest.
    sources = [path for suffix in sorted(commands, reverse=True) for path in sorted(csrc.rglob(f"*{suffix}"))]
    objects = {f"{work}/{number}.o": source for number, source in enumerate(sources)}
    threads = {".cu": [f"--threads={_jobs()}"]}  # one for each kind of GPU
    with concurrent.futures.ThreadPoolExecutor(_jobs()) as pool:
        done = [
            pool.submit(
                _must, [*commands[source.suffix], *threads.get(source.suffix, []), "-c", str(source), "-o", result]
            )
            for result, source in objects.items()
        ]
        for one in done:
            one.result()
    return list(objects)


def _link(objects: list[str], torch: Torch, result: Path) -> None:
    # No run path: torch is in the process before this library is.
    flags = [f"-L{torch.folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", *_link_flags()]
    if cuda := cuda_for(torch):
        # Its runtime is our own, and must neither give its symbols to torch's nor take that one's.
        flags += ["-Wl,--exclude-libs,libcudart_static.a", f"-L{cuda.home / 'lib64'}", f"-L{cuda.home / 'lib'}"]
        flags += [f"-l{name}" for name in CUDA_LIBRARIES]
    _must([*_compiler(), "-shared", *objects, "-o", str(result), *flags])


def _compile_commands(csrc: Path, torch: Torch) -> dict[str, list[str]]:
    """How a file is compiled, by its suffix."""
    paths = [f"-I{csrc}", "-isystem", f"{torch.folder / 'include'}", *_words("CPPFLAGS")]
    commands = {".cpp": [*_compiler(), *COMPILE_FLAGS, "-fPIC", *paths, *_words("CXXFLAGS")]}
    if cuda := cuda_for(torch):
        for_the_host = [flag for flag in COMPILE_FLAGS if flag.startswith(("-f", "-g"))]
        flags = [flag for flag in COMPILE_FLAGS if flag not in for_the_host]
        flags += ["-Xcompiler", ",".join(["-fPIC", *for_the_host])]
        compiler = _compiler()
        if len(compiler) == 1:  # nvcc takes no more than a name
            flags += ["-ccbin", *compiler]
        targets = [f"-gencode=arch={re.sub('^sm', 'compute', code)},code={code}" for code in cuda.codes]
        commands[".cu"] = [cuda.nvcc, *flags, *targets, *paths]
    return commands


def compilation_database(csrc: Path) -> list[dict[str, str | list[str]]]:
    """How each source is compiled, as editors and clang-tidy read it from compile_commands.json."""
    commands = _compile_commands(csrc, installed_torch())
    return [
        {"directory": str(csrc), "file": str(source), "arguments": [*command, "-c", str(source)]}
        for suffix, command in commands.items()
        for source in sorted(csrc.rglob(f"*{suffix}"))
    ]


def _link_flags() -> list[str]:
    return [*_words("LDFLAGS"), *(f"-l{name}" for name in LIBRARIES)]


def _compiler() -> list[str]:
    chosen = _words("CXX")
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    what = f"CXX names {chosen[0]}, which is not there" if chosen else "no C++ compiler was found"
    raise BuildError(f"{what}: install one ({INSTALL}), or name one in CXX")


def _words(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


def _jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def _run(command: list[str]) -> str:
    """Runs a compiler: its first complaint, "" if it succeeds. All it says is logged at INFO."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return ""
    logger.info("%s\n%s", shlex.join(command), done.stdout)
    lines = done.stdout.strip().splitlines() or [f"exit status {done.returncode}"]
    complaints = (line for line in lines if "error" in line or "cannot find" in line)
    return next(complaints, lines[-1]).strip()


def _output(command: list[str]) -> str:
    """What a program prints; "" where it fails."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return done.stdout if done.returncode == 0 else ""


def _must(command: list[str]) -> None:
    if complaint := _run(command):
        raise BuildError(
            f"compiling torchcache's native library failed: {complaint} (TORCHCACHE_LOG_LEVEL=INFO shows everything)"
        )


def _private_folder() -> Path:
    """A folder that this process, not a forked child, removes when it exits."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="torchcache-"))
    except OSError as error:
        raise BuildError(
            f"no folder is writable for the compiled library ({error}): set TORCH_EXTENSIONS_DIR to one that is"
        ) from error
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
