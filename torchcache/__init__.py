"""Caches the outputs of frozen PyTorch modules, row by row, in memory and on disk."""

from torchcache._utils.logs import set_logger_config
from torchcache._version import __version__
from torchcache.cached_rows import CachedRows
from torchcache.decorator import torchcache
from torchcache.precompute import precompute

__all__ = ["CachedRows", "__version__", "precompute", "set_logger_config", "torchcache"]
