"""The temporary directory of a process: for persistent caches that were given none.

It goes with a normal exit of the process that made it. One left by a kill is removed by the next
process that makes one: its owner held a lock on it, and the lock went with the owner.
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
_made: dict[int, tuple[Path, int]] = {}  # and the lock, by process, so that a forked child has none of its own


def directory() -> Path:
    """The directory of this process, made when first asked for; a forked child goes on using its parent's."""
    with _lock:
        if not _made:
            _sweep()
            _made[os.getpid()] = _make()
        return next(iter(_made.values()))[0]


def _make() -> tuple[Path, int]:
    path = Path(tempfile.mkdtemp(prefix=_PREFIX))
    new = path / (_OWNER + ".new")
    owner = os.open(new, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)  # locked as long as the process lives
    fcntl.flock(owner, fcntl.LOCK_EX)
    new.rename(path / _OWNER)  # only now, so that nobody finds it unlocked
    # Children of multiprocessing leave without atexit; their parent leaves through both, which is harmless.
    atexit.register(_remove, path, os.getpid())
    util.Finalize(None, _remove, args=(path, os.getpid()), exitpriority=-100)
    return path, owner


def _remove(path: Path, maker: int) -> None:
    if os.getpid() == maker:
        shutil.rmtree(path, ignore_errors=True)


def _sweep() -> None:
    for path in Path(tempfile.gettempdir()).glob(_PREFIX + "*"):
        with contextlib.suppress(OSError):
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            with open(path / _OWNER) as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
