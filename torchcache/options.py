"""The keywords of the decorator: defaults, allowed values, and the ``torchcache_`` attributes that override them.

All values are checked when they are set, not at the first call.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torchcache._utils.logs import WarnOnce

ATTRIBUTE_PREFIX = "torchcache_"
# The options that may change while a cache is in use; decorator.py looks at the first two on every call.
_LIVE = ("enabled", "frozen", "max_memory_cache_size", "verify")
STRICT = "strict"  # verify: a wrong row is an error
_ZSTD_LEVELS = (-131072, 22)
_HASH_LENGTH = 200  # bytes; file systems allow 255


@dataclasses.dataclass(frozen=True)
class Options:
    """One set of checked options. The docstring of ``torchcache.torchcache`` explains each."""

    enabled: bool = True
    memory_cache_device: str = "cpu"
    subsample_count: int = 10000
    persistent: bool = False
    persistent_cache_dir: str | None = None
    persistent_module_hash: str | None = None
    max_persistent_cache_size: int = int(10e9)
    max_memory_cache_size: int = int(1e9)
    zstd_compression: bool = False
    zstd_compression_level: int = 3
    zstd_compression_threads: int = 1
    cache_dtype: torch.dtype | None = None
    use_mmap_on_load: bool = False
    subsample: bool = False
    frozen: bool = False
    verify: float | str = 0.01

    @classmethod
    def checked(cls, **given: Any) -> Options:
        """Options from the keywords of the decorator.

        Raises:
            ValueError: a value is out of its range, or needs another option.
        """
        checked: dict[str, Any] = {name: _CHECKS[name](name, value) for name, value in given.items()}
        options = cls(**checked)
        if options.zstd_compression and not options.persistent:
            raise ValueError(
                "zstd_compression=True needs persistent=True: only rows on disk are compressed; "
                "set persistent=True or leave zstd_compression out"
            )
        return options

    def with_attributes(self, attributes: dict[str, Any]) -> Options:
        """These options, overridden by the ``torchcache_*`` attributes of a module.

        Args:
            attributes: all attributes of the module and its class by name.

        Raises:
            ValueError: an attribute does not name an option, or its value is out of its range.
        """
        given = {
            name[len(ATTRIBUTE_PREFIX) :]: value
            for name, value in attributes.items()
            if name.startswith(ATTRIBUTE_PREFIX)
        }
        if not given:
            return self
        for name in given:
            if name not in _CHECKS:
                close = difflib.get_close_matches(name, _CHECKS, n=1)
                hint = f"did you mean {ATTRIBUTE_PREFIX}{close[0]}?" if close else "see help(torchcache)"
                raise ValueError(f"{ATTRIBUTE_PREFIX}{name} is not an option of torchcache: {hint}")
        return Options.checked(**{**dataclasses.asdict(self), **given})

    def check_change(self, new: Options) -> None:
        """Checks that a cache in use can go on with other options.

        Raises:
            ValueError: one of them is fixed from the first call on.
        """
        for field in dataclasses.fields(self):
            name = field.name
            if name not in _LIVE and getattr(self, name) != getattr(new, name):
                raise ValueError(
                    f"{ATTRIBUTE_PREFIX}{name} was set to {getattr(new, name)!r} after the first call, which fixed it "
                    f"at {getattr(self, name)!r}: set it before the first call, or call cache_instance.close(), which "
                    "starts the cache anew"
                )

    def stored(self) -> dict[str, Any]:
        """The options that change the bytes of stored rows, and so belong to the module hash."""
        return {
            "subsample_count": self.subsample_count,
            "subsample": self.subsample,
            "cache_dtype": self.cache_dtype,
            "zstd_compression": self.zstd_compression,
            "zstd_compression_level": self.zstd_compression_level if self.zstd_compression else 0,
        }


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def _size(name: str, value: Any) -> int:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or math.isnan(value) or value < 0:
        raise ValueError(f"{name} must be a number of bytes, 0 or more (such as 5e9), got {value!r}")
    return int(min(value, 2**62))


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**31:
        raise ValueError(f"{name} must be an integer between 1 and 2147483648, got {value!r}")
    return value


def _threads(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 256:
        raise ValueError(f"{name} must be an integer between 1 and 256, got {value!r}")
    return value


def _level(name: str, value: Any) -> int:
    low, high = _ZSTD_LEVELS
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value!r}")
    return value


def _device(name: str, value: Any) -> str:
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name} must be a device such as 'cpu' or 'cuda:0', got {value!r}") from error
    if device.type == "meta":
        raise ValueError(f"{name} must be a device that holds data, got {value!r}")
    return str(device)


def _directory(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) or "\0" in str(value):
        raise ValueError(f"{name} must be the path of a directory or None, got {value!r}")
    path = Path(os.fsdecode(value)).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{name} must be a directory, but {str(path)!r} is a file: name another path")
    return str(path)


def _module_hash(name: str, value: Any) -> str | None:
    if value is None:
        return None
    plain = (
        isinstance(value, str)
        and 0 < len(os.fsencode(value)) <= _HASH_LENGTH
        and not value.startswith(".")
        and value.isprintable()
        and not any(c in value for c in "/\\")
    )
    if not plain:
        raise ValueError(
            f"{name} must be one plain file name of 1 to {_HASH_LENGTH} bytes without slashes "
            f"and without a leading dot, got {value!r}"
        )
    return str(value)


def _dtype(name: str, value: Any) -> torch.dtype | None:
    if value is None:
        return None
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise ValueError(f"{name} must be a floating-point dtype such as torch.half, or None, got {value!r}")
    return value


def _share(name: str, value: Any) -> float | str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value == STRICT and isinstance(value, str):
        return STRICT
    if not is_number or not 0 <= value <= 1:
        raise ValueError(
            f'{name} must be a share of the time from 0 (no checks) to 1 (a check in every call), or "strict", '
            f"got {value!r}"
        )
    return float(value)


def verify_in_force(option: float | str) -> float | str:
    """The option `verify`, unless the environment variable ``TORCHCACHE_VERIFY`` holds a number or ``strict``."""
    text = os.environ.get("TORCHCACHE_VERIFY", "").strip()
    if not text:
        return option
    try:
        return _share("TORCHCACHE_VERIFY", STRICT if text.lower() == STRICT else float(text))
    except ValueError:
        _once.warn(
            text,
            'TORCHCACHE_VERIFY must be a number from 0 to 1 or "strict", got %r: it is ignored, and the option '
            "`verify` stays in force",
            text,
        )
        return option


_once = WarnOnce()

_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "enabled": _flag,
    "memory_cache_device": _device,
    "subsample_count": _count,
    "persistent": _flag,
    "persistent_cache_dir": _directory,
    "persistent_module_hash": _module_hash,
    "max_persistent_cache_size": _size,
    "max_memory_cache_size": _size,
    "zstd_compression": _flag,
    "zstd_compression_level": _level,
    "zstd_compression_threads": _threads,
    "cache_dtype": _dtype,
    "use_mmap_on_load": _flag,
    "subsample": _flag,
    "frozen": _flag,
    "verify": _share,
}
