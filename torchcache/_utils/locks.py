"""Locks that are free in a forked child, even if a thread of its parent held them."""

from __future__ import annotations

import os
import sys
import threading
import time
import types
import weakref
from typing import Any

_TIMEOUT = 10.0  # seconds that a fork waits for other threads; then it goes on without their locks

# By owner, the oldest first: the attribute in which it has its lock, and the lock.
_owners: weakref.WeakKeyDictionary[Any, tuple[str, threading.RLock]] = weakref.WeakKeyDictionary()
_registry = threading.RLock()  # acquired last and held briefly
_of_this_fork = threading.local()


def lock(owner: object, name: str = "_lock") -> threading.RLock:
    """A re-entrant lock, which the caller stores in the attribute `name` of its owner, an object or a module."""
    made = threading.RLock()
    with _registry:
        _owners[owner] = name, made
    return made


def module_lock(module: str, name: str = "_lock") -> threading.RLock:
    """A lock for the global `name` of a module."""
    return lock(sys.modules[module], name)


def _before() -> None:
    end = time.monotonic() + _TIMEOUT
    with _registry:
        owners = list(_owners.items())
    # In the order in which nested code acquires them: the parts of a cache are younger, and locks of modules come last.
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
