"""A process may fork at any moment: whatever other threads do, its child can use the caches."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest
import torch
from cache_harness import cache_of
from store_harness import forked, succeeded
from torch import nn

from torchcache import torchcache
from torchcache.engine.cache import Cache
from torchcache.tiers import disk

X = torch.arange(6.0).view(3, 2)
before_fork: list[Callable[[], None]] = []
os.register_at_fork(before=lambda: [act() for act in before_fork])  # later than the library's, so it runs before


@pytest.mark.parametrize(
    "owner", [lambda cache: cache, lambda cache: cache.tiers().memory, lambda cache: cache._decider, lambda cache: disk]
)
def test_a_lock_that_another_thread_holds_is_free_in_a_forked_child(owner: Callable[[Cache], object]) -> None:
    module = torchcache(persistent=True)(nn.Linear(2, 2).requires_grad_(False))
    expected = module(X)
    held = owner(cache_of(module))
    name = "_stores_lock" if held is disk else "_lock"
    lock = getattr(held, name)
    taken, forking = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            forking.wait()

    def use() -> None:
        signal.alarm(60)  # rather than wait for ever
        assert getattr(held, name).acquire(blocking=False)
        assert torch.equal(module(X), expected) and module(X + 1).shape == (3, 2)
        cache_of(module).flush()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    before_fork.append(forking.set)
    try:
        assert succeeded(forked(use))
    finally:
        before_fork.clear()
        thread.join()
    assert torch.equal(module(X), expected)
