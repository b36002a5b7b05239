"""The temporary directory of a process: for persistent caches without a directory of their own.

The process that made it deletes it at a normal exit. If that process is killed, the system releases its lock on the
directory, and the next process that makes a temporary directory deletes it.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
from multiprocessing import util
from pathlib import Path

from torchcache._utils.locks import module_lock

_PREFIX = "torchcache-"
_OWNER = ".owner"

_lock = module_lock(__name__)
_made: dict[int, tuple[Path, int]] = {}  # process → directory and locked file; a forked child has its parent's


def directory() -> Path:
    """The directory of this process, made at the first call. A forked child uses its parent's."""
    with _lock:
        if not _made:
            _delete_abandoned()
            _made[os.getpid()] = _make()
        return next(iter(_made.values()))[0]


def _make() -> tuple[Path, int]:
    path = Path(tempfile.mkdtemp(prefix=_PREFIX))
    new = path / (_OWNER + ".new")
    owner = os.open(new, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)  # locked until the process ends
    fcntl.flock(owner, fcntl.LOCK_EX)
    new.rename(path / _OWNER)  # only now, so that no process sees it unlocked
    # Children of multiprocessing exit without atexit. Their parent runs both, which is harmless.
    atexit.register(_remove, path, os.getpid())
    util.Finalize(None, _remove, args=(path, os.getpid()), exitpriority=-100)
    return path, owner


def _remove(path: Path, maker: int) -> None:
    if os.getpid() == maker:
        shutil.rmtree(path, ignore_errors=True)


def _delete_abandoned() -> None:
    for path in Path(tempfile.gettempdir()).glob(_PREFIX + "*"):
        with contextlib.suppress(OSError):
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            with open(path / _OWNER) as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
