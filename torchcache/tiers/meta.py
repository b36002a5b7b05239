"""``meta.json``: what a directory remembers, for people and for explaining misses. Nothing needs it to read rows."""

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
    """What the meta.json of a directory says; nothing where that is missing, damaged or something else."""
    path = directory / META_FILE
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:  # reading a fifo would wait
            return {}
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_meta(directory: Path, meta: Mapping[str, Any]) -> None:
    """Writes the meta.json of a directory that has none, whole or not at all. Raises OSError."""
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
