"""Caches the outputs of frozen PyTorch modules, row by row, in memory and on disk."""

from torchcache import errors
from torchcache._utils.logs import set_logger_config
from torchcache._version import __version__
from torchcache.cached_rows import CachedRows
from torchcache.decorator import torchcache
from torchcache.engine.cache import Cache
from torchcache.engine.counts import CacheInfo
from torchcache.engine.explain import Explanation
from torchcache.precompute import precompute
from torchcache.verification import Verification, verify

__all__ = [
    "Cache",
    "CacheInfo",
    "CachedRows",
    "Explanation",
    "Verification",
    "__version__",
    "errors",
    "precompute",
    "set_logger_config",
    "torchcache",
    "verify",
]
