"""Checks a cache directory against a module that a function of the user's makes."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from torchcache import Verification, verify
from torchcache.errors import MaintenanceError, TorchcacheError


def recompute(factory: str, directory: Path) -> Verification:
    """Compares the stored rows of some batches with what the module computes now.

    Args:
        factory: ``module:function``; the function takes no arguments and returns a module with a cache, and batches as
            for ``torchcache.precompute``. The module is imported from the working directory or the installed packages.
        directory: a cache directory, or a folder in it.

    Raises:
        MaintenanceError: there is no such function, or it does not return that.
    """
    made = _function(factory)()
    if not isinstance(made, tuple) or len(made) != 2:
        raise MaintenanceError(
            f"{factory} must return a tuple (module, batches): a module with a cache, and batches as for precompute; "
            f"it returned {type(made).__name__}"
        )
    try:
        return verify(*made, directory)
    except (TypeError, ValueError, TorchcacheError) as error:
        raise MaintenanceError(f"the rows of {factory} cannot be compared: {error}") from error


def _function(factory: str) -> Any:
    name, _, function = factory.partition(":")
    if not name or not function:
        raise MaintenanceError(f"--recompute must be MODULE:FACTORY, such as train:frozen_backbone; got {factory!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(name), function)
    except (ImportError, AttributeError) as error:
        raise MaintenanceError(f"{factory!r} cannot be imported: {error}") from error
