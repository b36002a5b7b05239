"""Why rows were not found: what a key is made of, against the last call and against what the directory remembers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torchcache.engine.call import CallTemplate
from torchcache.engine.decision import Request
from torchcache.engine.keys import KEY_FORMAT, CallVariant
from torchcache.identity.identity import Identity
from torchcache.options import Options
from torchcache.tiers.meta import META_FILE, read_meta

Parts = dict[str, bytes]


# Template and variant of a call, and the parts of the state: what its keys are made of but for its rows.
CallParts = tuple[CallTemplate, CallVariant, Parts]


def call_parts(request: Request) -> CallParts:
    """Does not keep the tensors of the call alive."""
    return request.call.template, request.variant, {} if request.state is None else request.state.snapshot.parts


def by_name(call: CallParts) -> Parts:
    """The parts of the keys of a call."""
    template, (_, mode, autocast, precision), state = call
    arguments: Parts = {}
    for name, part in zip(template.names, template.parts):
        arguments[f"argument {name}"] = arguments.get(f"argument {name}", b"") + part
    return {**arguments, "mode (train or eval)": mode, "autocast": autocast, "precision": precision, **state}


class Explanation(NamedTuple):
    """What ``cache_instance.explain(...)`` says; ``str()`` of it is for people.

    Attributes:
        rows: of the call; 0 for one that is not cached.
        in_memory: how many of them are in memory.
        on_disk: how many of the others a farther tier has, such as the directory.
        since_last_call: the parts of the key that differ from the last cached call; None: there was none.
        since_directory: the parts of the key that differ from the first call that wrote to the directory (or, where
            this module hash has none yet, to the newest directory of the same class); None: there is nothing to
            compare with.
        bypassed: why the call is not cached; None: it is.

    Example:
        >>> import torch
        >>> from torchcache import torchcache
        >>> module = torchcache()(torch.nn.Linear(4, 2).requires_grad_(False))
        >>> _ = module(torch.eye(4))
        >>> print(module.cache_instance.explain(torch.zeros(1, 4)))
        0 of 1 rows are in memory, 0 more on disk
        against the last call: nothing has changed but the rows themselves
        against the directory: nothing to compare with
    """

    rows: int
    in_memory: int
    on_disk: int
    since_last_call: list[str] | None
    since_directory: list[str] | None
    bypassed: str | None = None

    def __str__(self) -> str:
        if self.bypassed is not None:
            return f"this call is not cached: {self.bypassed}"
        lines = [f"{self.in_memory} of {self.rows} rows are in memory, {self.on_disk} more on disk"]
        if self.in_memory + self.on_disk < self.rows:
            lines.append("against the last call: " + _sentence(self.since_last_call))
            lines.append("against the directory: " + _sentence(self.since_directory))
        return "\n".join(lines)


def _sentence(changed: list[str] | None) -> str:
    if changed is None:
        return "nothing to compare with"
    if not changed:
        return "nothing has changed but the rows themselves"
    more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
    return "changed: " + ", ".join(changed[:8]) + more


def differing(now: Mapping[str, object], before: Mapping[str, object]) -> list[str]:
    """Names of the parts that differ, are new or are gone."""
    return [name for name in dict.fromkeys([*now, *before]) if now.get(name) != before.get(name)]


def meta(identity: Identity, options: Options, call: Parts) -> dict[str, Any]:
    """What a directory remembers of the module that it belongs to, and of the first call that wrote to it."""
    return {
        "class": identity.name,
        "key_format": KEY_FORMAT,
        "key_parts": _shortened(call),
        "hash_parts": _shortened(_hash_parts(identity)),
        "module_hash": identity.module_hash,
        "options": {name: str(value) for name, value in options.stored().items()},
        "torch": torch.__version__,
    }


def since_directory(directory: Path, identity: Identity, call: Parts) -> list[str] | None:
    """What differs from what a meta.json remembers: that of the directory, else the newest one of the same class."""
    own = read_meta(directory)
    if own:
        return _compared(call, own.get("key_parts"))
    others = [m.parent for m in directory.parent.glob(f"*/{META_FILE}")]
    others = [d for d in others if read_meta(d).get("class") == identity.name]
    if not others:
        return None
    newest = max(others, key=lambda d: (d / META_FILE).stat().st_mtime)
    return _compared(_hash_parts(identity), read_meta(newest).get("hash_parts"))


def _hash_parts(identity: Identity) -> Parts:
    """The parts of a module hash, with the code of each class by itself."""
    classes = {f"code of {name}": code for name, code in identity.classes().items()}
    return {**identity.parts, **classes}


def _compared(now: Parts, before: Any) -> list[str] | None:
    return differing(_shortened(now), before) if isinstance(before, dict) else None


def _shortened(parts: Parts) -> dict[str, str]:
    """64 bits of a digest are enough to tell that something changed."""
    return {name: hashlib.blake2b(part, digest_size=8).hexdigest() for name, part in parts.items()}
