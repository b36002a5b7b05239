"""How far a row that is computed again may lie from the row that was kept: by dtype, relative to the norm of the row.

Backends choose other kernels for batches of other sizes, so the last bits differ. In low precision they differ so much
that the distance to the other rows of the batch must count, too: a wrong row is as far away as another row is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchcache.engine.call import Call
from torchcache.tiers.layout import Layout, movable

# Measured: docs/benchmarks.md, "False alarms".
_FLOAT64 = 1e-9
_FLOAT32 = 1e-4
_TENSOR_FLOAT32 = 1e-3  # also for rows that another process, perhaps on a GPU, may have computed
_LOW = {torch.float16: 1e-2, torch.bfloat16: 2e-2}
_LOWER = 2e-1  # eight bits and fewer
_OF_SPREAD = 0.25  # of the distance to other rows; only in low precision
# Of the elements of integer outputs, which noise may flip where they come from floating-point numbers.
_FLIPPED, _FLIPPED_IN_LOW = 0.1, 0.5
_FEW = 8  # elements of which nothing can be concluded
_MAX_OTHERS = 16  # rows that a distance is averaged over


class Tolerance(NamedTuple):
    """What differences are noise.

    Attributes:
        relative: of floating-point rows, relative to the norm of the row.
        is_low: whether that is noise of low precision, so that the distance to other rows counts, too.
        is_exact: whether nothing is computed in floating point, so that integers never differ.
    """

    relative: float
    is_low: bool
    is_exact: bool

    @classmethod
    def of(cls, dtypes: Iterable[torch.dtype], device_type: str, is_foreign: bool = False) -> Tolerance:
        """The tolerance of a forward that uses these dtypes.

        Args:
            dtypes: of inputs, outputs, stored rows, weights and intermediate results, as far as they are known.
            device_type: where it runs.
            is_foreign: whether another process, perhaps on another device, may have computed the row.
        """
        floats = {dtype.to_real() if dtype.is_complex else dtype for dtype in dtypes if _is_inexact(dtype)}
        if not floats:
            return cls(0.0, False, True)
        relative = max(_relative(dtype, device_type, is_foreign) for dtype in floats)
        return cls(relative, relative > _TENSOR_FLOAT32, False)


def _is_inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _relative(dtype: torch.dtype, device_type: str, is_foreign: bool) -> float:
    if dtype is torch.float64:
        return _FLOAT64
    if dtype is not torch.float32:
        return _LOW.get(dtype, _LOWER)
    precision = torch.get_float32_matmul_precision()
    if precision == "medium":  # products of bfloat16, where the machine has them
        return _LOW[torch.bfloat16]
    on_tensor_cores = device_type == "cuda" and torch.backends.cudnn.allow_tf32
    return _TENSOR_FLOAT32 if precision == "high" or on_tensor_cores or is_foreign else _FLOAT32


def dtypes_of(call: Call, layout: Layout, modules: Iterable[nn.Module]) -> set[torch.dtype]:
    """The dtypes that a forward is known to use: of inputs, outputs, stored rows, weights and autocast."""
    dtypes = {t.dtype for t in call.tensors}
    dtypes |= {dtype for leaf in layout.leaves for dtype in (leaf.dtype, leaf.stored)}
    for module in modules:
        dtypes |= {t.dtype for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))}
    if torch.is_autocast_enabled(call.device_type):
        dtypes.add(torch.get_autocast_dtype(call.device_type))
    return dtypes


def intermediate_dtypes(run: Callable[[], Any]) -> set[torch.dtype]:
    """The dtypes of what torch's functions return in a forward: it may use autocast of its own, or ``x.half()``."""
    recorder = _DtypeRecorder()
    with recorder:
        run()
    return recorder.dtypes


class _DtypeRecorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.dtypes.add(value.dtype)
        return result


class Difference(NamedTuple):
    """How far rows lie from the same rows computed again.

    Attributes:
        error: the largest of all rows and leaves: the norm of the difference, relative to that of the row; of
            integers, the share of the elements that differ.
        is_wrong: whether that is more than noise.
        is_flip: whether only integers differ, of which a few rows prove nothing.
    """

    error: float = 0.0
    is_wrong: bool = False
    is_flip: bool = False

    def join(self, other: Difference) -> Difference:
        """The larger of two differences, of two leaves."""
        wrong = self.is_wrong or other.is_wrong
        return Difference(max(self.error, other.error), wrong, not wrong and (self.is_flip or other.is_flip))


def compare(kept: list[Tensor], again: list[Tensor], others: list[Tensor], tolerance: Tolerance) -> Difference:
    """Compares rows with the same rows computed again.

    Args:
        kept: leaves ``[K, …]`` of the rows.
        again: leaves ``[K, …]`` of the same rows, computed again.
        others: leaves ``[N, …]`` of the rows of the batch, which say how far rows lie from each other.
        tolerance: what is noise.
    """
    result = Difference()
    for a, b, rest in zip(kept, again, others):
        if a.numel():
            inexact = _is_inexact(a.dtype)
            result = result.join(_of_floats(a, b, rest, tolerance) if inexact else _of_integers(a, b, tolerance))
    return result


def _of_floats(kept: Tensor, again: Tensor, others: Tensor, tolerance: Tolerance) -> Difference:
    kept, again, others = _vectors(kept), _vectors(again), _vectors(others[:: max(1, len(others) // _MAX_OTHERS)])
    norms = torch.maximum(_norm(kept), _norm(again))
    scale = torch.maximum(norms, 1e-3 * _norm(others).mean()).clamp(min=torch.finfo(torch.float64).tiny)
    error = _distance(kept, again) / scale
    wrong = error > tolerance.relative
    if tolerance.is_low:
        spread = torch.stack([_distance(row, others) for row in kept.unsqueeze(1)]).mean(1) / scale
        wrong &= error > torch.where(spread > 0, _OF_SPREAD * spread, 4 * tolerance.relative)
    return Difference(float(error.max()), bool(wrong.any()))


def _of_integers(kept: Tensor, again: Tensor, tolerance: Tolerance) -> Difference:
    differ = movable(kept) != movable(again).to(kept.device)
    share = float(differ.flatten(1).double().mean(1).max()) if kept.dim() > 1 else float(differ.any())
    if tolerance.is_exact or not share:
        return Difference(share, share > 0)
    noise = _FLIPPED_IN_LOW if tolerance.is_low else _FLIPPED
    wrong = differ.numel() >= _FEW and float(differ.double().mean()) > noise
    return Difference(share, wrong, is_flip=True)


def _vectors(rows: Tensor) -> Tensor:
    """float64 ``[K, D]`` on the CPU."""
    rows = torch.view_as_real(rows.resolve_conj()) if rows.is_complex() else rows
    return rows.detach().to("cpu", torch.float64).reshape(len(rows), -1)


def _norm(rows: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.where(rows.isfinite(), rows, 0.0), dim=-1)
    return norm


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Equal infinities, and NaN next to NaN, are no distance; a number next to one of them is infinitely far away."""
    same = (a == b) | (a.isnan() & b.isnan())
    gaps = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    distance: Tensor = torch.linalg.vector_norm(gaps, dim=-1)
    return distance
