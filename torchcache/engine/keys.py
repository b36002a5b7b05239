"""Call → keys. What goes into a key is written down in docs/format.md, "Keys and digests"."""

from __future__ import annotations

import torch
from torch import Tensor

from torchcache._native import ops
from torchcache._native.ops import Digest
from torchcache._utils.locks import lock
from torchcache.engine.call import Call
from torchcache.identity.encoding import encode

KEY_FORMAT = 1

_FOREIGN = ops.FOREIGN_DTYPES

_MAX_DESCRIPTION = 64 << 10  # bytes of a description whose digest is remembered
_MAX_DIGESTS = 4096  # remembered call digests; a state that changes on every call must not pile them up


# What calls have in common whose rows may share a batch: description, mode (training flags), autocast, precision.
CallVariant = tuple[bytes, bytes, bytes, bytes]


class Keys:
    """Makes the keys of the calls of one cache. Thread-safe."""

    def __init__(self, subsample_count: int | None) -> None:
        """With a `subsample_count` only about so many elements of a row are hashed."""
        self._subsample_count = subsample_count
        self._digests: dict[tuple[bytes, ...], Digest] = {}
        self._lock = lock(self)

    def hash_request(self, call: Call, variant: CallVariant, state: bytes) -> tuple[list[Tensor], Digest]:
        """What the keys of a call are made of: the tensors to hash, row by row, and the call digest."""
        tensors = call.tensors
        if self._subsample_count is not None or not all(map(_is_plain, tensors)):
            tensors = [self._row_bytes(t) for t in tensors]
        if call.template.positions is not None:
            tensors = [*tensors, call.template.positions]
        description, mode, autocast, precision = variant
        parts = description, mode, autocast + precision, state
        return tensors, self._digests.get(parts) or self._new_digest(parts)

    def _new_digest(self, parts: tuple[bytes, ...]) -> Digest:
        encoded = encode((KEY_FORMAT, *parts))
        low, high = ops.digests([torch.frombuffer(bytearray(encoded), dtype=torch.uint8)])[0].tolist()
        if len(encoded) <= _MAX_DESCRIPTION:
            with self._lock:
                if len(self._digests) >= _MAX_DIGESTS:
                    self._digests.clear()
                self._digests[parts] = low, high
        return low, high

    def _row_bytes(self, t: Tensor) -> Tensor:
        if self._subsample_count is not None:
            t = t.flatten(1) if t.dim() > 1 else t.unsqueeze(1)
            t = t[:, :: max(1, t.shape[1] // self._subsample_count)]
        return ops.hashable(t)


def _is_plain(t: Tensor) -> bool:
    """Whether native code can hash the memory of the tensor as it is."""
    return t.is_cpu and not (t.is_neg() or t.is_conj() or t.dtype in _FOREIGN)
