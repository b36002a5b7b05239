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

# By owner, the oldest first: the name under which it has its lock, and that.
_owners: weakref.WeakKeyDictionary[Any, tuple[str, threading.RLock]] = weakref.WeakKeyDictionary()
_registry = threading.RLock()  # taken last and held briefly
_of_this_fork = threading.local()


def lock(owner: object, name: str = "_lock") -> threading.RLock:
    """A lock for this attribute of an object or module, re-entrant."""
    made = threading.RLock()
    with _registry:
        _owners[owner] = name, made
    return made


def module_lock(module: str, name: str = "_lock") -> threading.RLock:
    """A lock for this global of a module."""
    return lock(sys.modules[module], name)


def _before() -> None:
    end = time.monotonic() + _PATIENCE
    with _registry:
        owners = list(_owners.items())
    # As nested code takes them: what a cache is made of is younger, and modules' own come last.
    owners.sort(key=lambda item: isinstance(item[0], types.ModuleType))
    locks = [*(made for _, (_, made) in owners), _registry]
    _of_this_fork.held = [item for item in locks if item.acquire(timeout=max(0.0, end - time.monotonic()))]


def _in_parent() -> None:
    for item in reversed(_of_this_fork.held):
        item.release()


def _in_child() -> None:
    global _registry
    _registry = threading.RLock()
    for owner, (name, _) in list(_owners.items()):
        setattr(owner, name, lock(owner, name))


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
