"""Checks a cache directory against a module: the rows of some batches are computed and compared with stored ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from torchcache.precompute import cache_of, parameter_names, split_batch
from torchcache.tiers.disk import DiskTier


class Verification(NamedTuple):
    """What ``torchcache.verify`` found; ``str()`` of it is for people.

    Attributes:
        rows: of the batches.
        found: how many of them the directory has.
        largest_error: the largest difference between a stored row and the same row computed now, relative to the norm
            of the row; infinite where the outputs have other shapes or dtypes.
        wrong: the keys of the rows that differ by more than noise, 32 hexadecimal digits each.

    Example:
        >>> import torchcache
        >>> print(torchcache.Verification(rows=64, found=64, largest_error=0.0, wrong=[]))
        64 rows, 64 of them stored: none differ, largest relative error 0
    """

    rows: int
    found: int
    largest_error: float
    wrong: list[str]

    def __str__(self) -> str:
        differ = f"{len(self.wrong):,} differ" if self.wrong else "none differ"
        error = f"largest relative error {self.largest_error:.2g}"
        return f"{self.rows:,} rows, {self.found:,} of them stored: {differ}, {error}"


def verify(
    module: nn.Module | Callable[..., Any], batches: Iterable[Any], directory: str | os.PathLike[str] | None = None
) -> Verification:
    """Computes the rows of these batches, and compares those that are stored in a directory with them.

    It changes nothing and stores nothing. ::

        >>> module = torchcache.torchcache(persistent=True, persistent_cache_dir=folder)(nn.Linear(3, 8))
        >>> module = module.requires_grad_(False)
        >>> images = torch.rand(10, 3)
        >>> _ = module(images)
        >>> torchcache.verify(module, images.split(4), folder).found
        10

    Args:
        module: a module or function with a cache.
        batches: as for `precompute`; extra columns are ignored.
        directory: a ``persistent_cache_dir``, or the folder of a module hash in it. None: the module's own cache, with
            its rows in memory.

    Returns:
        How many rows were found, and which of them differ.

    Raises:
        TypeError: the module has no cache.
        ValueError: a batch has no input, there is no such directory, or the module has hooks.
        WrongRow: the forward draws random numbers or changes its state, so that it cannot be compared.
    """
    cache = cache_of(module)
    names = parameter_names(module)
    tier = cache.tiers() if directory is None else DiskTier(_folder(Path(directory), cache.module_hash), cache.options)
    if directory is None:
        cache.flush()
    total = Verification(0, 0, 0.0, [])
    for batch in batches:
        args, kwargs, _ = split_batch(batch, names)
        one = cache.compare(tier, *args, **kwargs)
        total = Verification(
            total.rows + one.rows,
            total.found + one.found,
            max(total.largest_error, one.largest_error),
            [*total.wrong, *one.wrong],
        )
    return total


def _folder(directory: Path, module_hash: str) -> Path:
    if not directory.is_dir():
        raise ValueError(f"there is no directory {str(directory)!r}: name the persistent_cache_dir of a cache")
    own = directory / module_hash
    return own if own.is_dir() else directory
