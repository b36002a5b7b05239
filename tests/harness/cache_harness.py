"""The cache of something that was decorated, with its type."""

from __future__ import annotations

from typing import Any

from torchcache.engine.cache import Cache


def cache_of(decorated: Any) -> Cache:
    """What `cache_instance` holds: type checkers take every attribute of a module for a tensor or another module."""
    cache = decorated.cache_instance
    assert isinstance(cache, Cache)
    return cache
