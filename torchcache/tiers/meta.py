"""``meta.json``: metadata of a directory, for people and for explaining misses. It is not needed to read rows."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

META_FILE = "meta.json"
_MAX_BYTES = 16 << 20


def read_meta(directory: Path) -> dict[str, Any]:
    """The content of the meta.json of a directory; empty if that is missing or damaged, or not a file."""
    path = directory / META_FILE
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:  # reading a fifo would wait
            return {}
        meta = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def write_meta(directory: Path, meta: Mapping[str, Any]) -> None:
    """Writes the meta.json of a directory atomically, unless there is one.

    Raises:
        OSError: it cannot be written.
    """
    path = directory / META_FILE
    if path.exists():
        return
    temporary = directory / f".{META_FILE}.{os.getpid()}.{threading.get_ident()}"
    try:
        temporary.write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
