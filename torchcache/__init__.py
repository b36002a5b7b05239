"""Caches the outputs of frozen PyTorch modules, row by row, in memory and on disk."""

from torchcache._version import __version__
from torchcache.decorator import torchcache
from torchcache.logs import set_logger_config

__all__ = ["__version__", "set_logger_config", "torchcache"]
