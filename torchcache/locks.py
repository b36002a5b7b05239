"""Locks that are free in a forked child, whichever threads used them in its parent."""

from __future__ import annotations

import os
import sys
import threading
import time
import types
import weakref
from typing import Any

_PATIENCE = 10.0  # seconds that a fork waits for other threads; what takes longer is not worth a deadlock

_owners: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()  # the oldest first; where the lock is
_of_this_fork = threading.local()


def lock(owner: object, name: str = "_lock") -> threading.RLock:
    """A lock for this attribute of an object or module, re-entrant."""
    _owners[owner] = name
    return threading.RLock()


def module_lock(module: str, name: str = "_lock") -> threading.RLock:
    """A lock for this global of a module."""
    return lock(sys.modules[module], name)


def _in_order() -> list[tuple[object, str]]:
    """As nested code takes them: what a cache is made of is younger, and modules' own come last."""
    return sorted(_owners.items(), key=lambda item: isinstance(item[0], types.ModuleType))


def _before() -> None:
    end = time.monotonic() + _PATIENCE
    locks = [getattr(owner, name) for owner, name in _in_order()]
    _of_this_fork.held = [item for item in locks if item.acquire(timeout=max(0.0, end - time.monotonic()))]


def _in_parent() -> None:
    for item in reversed(_of_this_fork.held):
        item.release()


def _in_child() -> None:
    for owner, name in _in_order():
        setattr(owner, name, threading.RLock())


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
