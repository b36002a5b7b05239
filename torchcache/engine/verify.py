"""The cache checks itself: it computes a few rows again, in another batch, and compares them with those that it has.

No list of what an output may depend on is complete. So this measures what the cache promises: that a row depends on
nothing but its inputs and the state, not on its neighbours in the batch, and not on something that has changed unseen.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchcache._native.ops import Digest
from torchcache._utils.logs import WarnOnce, logger
from torchcache._utils.torch_private import is_compiled
from torchcache.engine.bypass import Bypassed
from torchcache.engine.compute import Computed, MissComputer
from torchcache.engine.counts import Counts
from torchcache.engine.decision import Request
from torchcache.engine.keys import CallVariant
from torchcache.engine.tolerance import Difference, Tolerance, compare, dtypes_of, intermediate_dtypes
from torchcache.options import STRICT, Options, verify_in_force
from torchcache.tiers.layout import Layout, select

Forward = Callable[..., Any]

FIRST_ROWS = 1000  # that are asked for before the first check
DEFAULT_SHARE = 0.01
_NEVER = math.inf
_GOLDEN = 0.6180339887498949  # its multiples, modulo 1, are evenly spread: these choose rows without random numbers
_MAYBE_NOISE = 0.1  # an error below this may come from low precision inside the forward

_DEPENDENT = "rows depend on the other rows of their batch, or on its size"
_CAUSES = (
    "{}. Usual causes: the batch is not dimension 0 (batch_first=False), statistics or similarities across the batch "
    "(x - x.mean(0), logits [B, B]), a mask [T, T] taken as rows because T equals the batch size, .squeeze(). Leave "
    "that part out of the cached module, or move the batch to dimension 0"
)
_STALE = "cached rows are no longer what the forward computes"
_CHANGED = (
    "{}. Something has changed that torchcache does not see: a file, an environment variable, a ContextVar or a global "
    "object that the forward reads, a patched function, or weights that were edited through NumPy or .data. The rows "
    "in memory were dropped, and no row is read any more{}"
)
_ON_DISK = "; rows in {} may be wrong, too: remove them by cache_instance.clear(persistent=True)"
_GIVEN = (
    "rows under the persistent_module_hash %r in %s are not what the forward computes: %s. They are served all the "
    "same, since rows under a given name stay valid whatever changes; if that is not meant, give another name, or "
    "remove them by cache_instance.clear(persistent=True)"
)


class Sample(NamedTuple):
    """Rows of a call that the cache has, or that were just computed.

    Attributes:
        forward: of the module.
        request: the call.
        positions: int64 ``[M]``, ascending: their positions in the batch.
        layout: of their output.
        leaves: ``[M, …]`` each, in the stored dtypes.
        is_computed: whether this call computed them.
        far: int64, the positions in the batch of rows that a farther tier had, which are checked first.
    """

    forward: Forward
    request: Request
    positions: Tensor
    layout: Layout
    leaves: list[Tensor]
    is_computed: bool
    far: Tensor | None = None


class _Recomputed(NamedTuple):
    """Rows computed again: their positions in the batch, and their leaves. No leaves: the forward cannot do that."""

    rows: list[int]
    leaves: list[Tensor] | None


class Budget:
    """Keeps the time of checks within a share of the time since the first call.

    Args:
        share: 0 to 1; 0: no check; 1: no limit.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._start = perf_counter()
        self._spent = 0.0
        self.due_at = _NEVER if share == 0 else -_NEVER

    def estimate(self, seconds: float) -> None:
        """How long a check takes, by the time of a forward; only until there was a check."""
        if not self._spent:
            self._plan(seconds)

    def spend(self, seconds: float) -> None:
        """Adds the time of a check, which is also the estimate for the next one."""
        self._spent += seconds
        self._plan(seconds)

    def lift(self) -> None:
        """Has every call checked from now on, whatever that costs."""
        self._share, self.due_at = 1.0, -_NEVER

    def _plan(self, seconds: float) -> None:
        if 0 < self._share < 1:
            self.due_at = self._start + (self._spent + seconds) / self._share


class Verifier:
    """Checks rows of one cache. It decides when, which rows, and what a difference means.

    Args:
        name: of the module or function, for messages.
        options: those in force.
        directory: where rows are on disk, for messages; None: nowhere.
        computer: computes rows again.
        modules: gives the modules that the forward may use.
        refused: gets an entry for each variant whose rows are wrong.
        whole: variants whose forward can only compute whole batches; gets those for which a check shows it.
        counts: counts the checks.
    """

    def __init__(
        self,
        name: str,
        options: Options,
        directory: object,
        computer: MissComputer,
        modules: Callable[[], Sequence[nn.Module]],
        refused: dict[CallVariant | Digest, Bypassed],
        whole: set[CallVariant],
        counts: Counts,
    ) -> None:
        option = verify_in_force(options.verify)
        self.is_strict = option == STRICT
        self._budget = Budget(DEFAULT_SHARE if isinstance(option, str) else option)
        self._name = name
        self._given = options.persistent_module_hash
        self._directory = directory
        self._computer = computer
        self._modules = modules
        self._refused = refused
        self._whole = whole
        self._counts = counts
        self._warnings = WarnOnce(name)
        self._independent: set[CallVariant] = set()  # whose rows were seen not to depend on their neighbours
        self._settled: set[CallVariant] = set()  # which need no more checks, or whose forward fails in each
        self._number = 0  # of the next check
        self._checking: int | None = None  # the process in which a check runs, perhaps in another thread
        self._stale: Bypassed | None = None  # why all calls are refused

    def is_due(self) -> bool:
        """Whether the next call may be checked. It takes a fraction of a microsecond."""
        is_time = perf_counter() >= self._budget.due_at
        return is_time and (self._counts.rows >= FIRST_ROWS or self._stale is not None)

    def forward_took(self, seconds: float, rows: int) -> None:
        """Notes how long a forward took for so many rows, from which the time of the first check is estimated."""
        self._budget.estimate(seconds * max(0.25, min(1.0, 3 / rows)))  # a small batch is not that much faster

    def check(self, sample: Sample) -> Bypassed | None:
        """Compares rows of a call with the same rows computed again, if it is time for that.

        Returns:
            Why the call must be computed without the cache, and its rows not be kept, if they are wrong.
        """
        variant = sample.request.variant
        if self._stale is not None:  # something changed unseen, which may concern all calls
            self._refused[variant] = self._stale
            return self._stale
        if self._checking == os.getpid() or not self._is_worth(sample):
            return None
        started = perf_counter()
        self._checking = os.getpid()
        try:
            return self._check(sample)
        finally:
            self._checking = None
            self._budget.spend(perf_counter() - started)

    def _is_worth(self, sample: Sample) -> bool:
        variant = sample.request.variant
        if variant in self._settled:
            return False
        return not sample.is_computed or (len(sample.positions) > 1 and variant not in self._independent)

    # ---- one check

    def _check(self, sample: Sample) -> Bypassed | None:
        chosen = self._choose(sample)
        first, second = self._arrangements(sample, chosen)
        tolerance = self._tolerance(sample, set())
        again = self._recompute(sample, first)
        difference = self._compare(sample, again, chosen, tolerance)
        if difference is not None and not difference.is_wrong and not difference.is_flip:
            self._agrees(sample, chosen, difference)
            return None
        if difference is not None and difference.error < _MAYBE_NOISE and not tolerance.is_low:
            tolerance = self._tolerance(sample, self._intermediate_dtypes(sample, first))
            difference = self._compare(sample, again, chosen, tolerance)
        return self._judge(sample, chosen, again, difference, self._recompute(sample, second), tolerance)

    def _judge(
        self,
        sample: Sample,
        chosen: list[int],
        first: _Recomputed,
        difference: Difference | None,
        second: _Recomputed,
        tolerance: Tolerance,
    ) -> Bypassed | None:
        """What it means that rows differ in the first batch, given what they are in the second one."""
        rows = [row for row in dict.fromkeys(second.rows) if row in set(sample.positions.tolist())]
        confirmed = self._compare(sample, second, rows, tolerance)
        if difference is None:  # the forward fails in such a batch, or returns something else
            return self._judge_whole(sample, confirmed)
        if not difference.is_wrong and not (difference.is_flip and confirmed is not None and confirmed.is_wrong):
            self._agrees(sample, chosen, difference)
            return None
        self._counts.add_check(len(chosen), difference.error, True)
        between = self._between(sample, first, second, chosen, tolerance)
        if sample.is_computed or (between is not None and between.is_wrong):
            return self._refuse_dependent(sample, difference)
        return self._refuse_stale(sample, chosen, difference)

    def _judge_whole(self, sample: Sample, whole: Difference | None) -> Bypassed | None:
        variant = sample.request.variant
        if whole is None:
            logger.debug("%s: rows cannot be checked, since the forward fails when it runs again", self._name)
            self._settled.add(variant)
            return None
        self._counts.add_check(1, whole.error, whole.is_wrong)
        if not whole.is_wrong:
            logger.info("%s: the forward is only right for whole batches, so rows are computed in those", self._name)
            self._whole.add(variant)
            self._independent.add(variant)
            return None
        return self._refuse_dependent(sample, whole)

    def _agrees(self, sample: Sample, chosen: list[int], difference: Difference) -> None:
        self._counts.add_check(len(chosen), difference.error, False)
        if sample.is_computed:
            self._independent.add(sample.request.variant)

    # ---- which rows, in which batches

    def _choose(self, sample: Sample) -> list[int]:
        """Positions in the batch of the rows to compare, in descending order."""
        positions = sample.positions
        count = len(positions)
        if sample.is_computed:
            return [int(positions[i]) for i in sorted({count - 1, count // 2, 0}, reverse=True)[: count - 1]]
        self._number += 1
        candidates = positions if sample.far is None or not len(sample.far) else sample.far
        return [int(candidates[int(self._number * _GOLDEN % 1 * len(candidates))])]

    def _arrangements(self, sample: Sample, chosen: list[int]) -> tuple[list[int], list[int]]:
        """Two batches with the chosen rows: a small one, and one of the size of the call with other neighbours."""
        batch = sample.request.call.batch
        half = sorted({*chosen, *(range(0, batch, 2) if batch > 3 else ())}, reverse=True)
        repeated = [half[i % len(half)] for i in range(batch)]
        if sample.request.variant in self._whole or self._is_compiled(sample):
            return repeated, list(range(batch))  # a batch of another size would fail, or be compiled
        return chosen, repeated

    def _is_compiled(self, sample: Sample) -> bool:
        return is_compiled(sample.forward) or any(map(is_compiled, self._modules()))

    def _recompute(self, sample: Sample, rows: list[int]) -> _Recomputed:
        try:
            at = torch.tensor(rows, dtype=torch.int64, device="cpu")
            computed = self._computer.recompute(sample.forward, sample.request, at)
        except Exception as error:  # a check must not stop the training
            logger.debug("%s: a check of %d rows failed: %s", self._name, len(rows), error)
            return _Recomputed(rows, None)
        is_same = isinstance(computed, Computed) and computed.layout == sample.layout
        return _Recomputed(rows, computed.leaves if isinstance(computed, Computed) and is_same else None)

    # ---- comparing

    def _tolerance(self, sample: Sample, dtypes: set[torch.dtype]) -> Tolerance:
        call = sample.request.call
        known = dtypes_of(call, sample.layout, self._modules()) | dtypes
        from_afar = self._counts.found > self._counts.hits["memory"] or bool(sample.far is not None and len(sample.far))
        return Tolerance.of(known, call.device_type, is_foreign=from_afar)

    def _intermediate_dtypes(self, sample: Sample, rows: list[int]) -> set[torch.dtype]:
        if self._is_compiled(sample):
            return set()
        return intermediate_dtypes(functools.partial(self._recompute, sample, rows))

    def _compare(self, sample: Sample, again: _Recomputed, rows: list[int], tolerance: Tolerance) -> Difference | None:
        """The difference of these rows to those of the sample; None if they could not be computed."""
        if again.leaves is None:
            return None
        index = {position: i for i, position in enumerate(sample.positions.tolist())}
        kept = _at(sample.leaves, [index[row] for row in rows])
        return compare(kept, _at(again.leaves, [again.rows.index(row) for row in rows]), sample.leaves, tolerance)

    def _between(
        self, sample: Sample, first: _Recomputed, second: _Recomputed, rows: list[int], tolerance: Tolerance
    ) -> Difference | None:
        """The difference between the two batches."""
        if first.leaves is None or second.leaves is None:
            return None
        one = _at(first.leaves, [first.rows.index(row) for row in rows])
        other = _at(second.leaves, [second.rows.index(row) for row in rows])
        return compare(one, other, sample.leaves, tolerance)

    # ---- findings

    def _refuse_dependent(self, sample: Sample, difference: Difference) -> Bypassed:
        why = Bypassed(_DEPENDENT, details=_CAUSES.format(_said(difference)))
        self._refused[sample.request.variant] = why
        return why

    def _refuse_stale(self, sample: Sample, rows: list[int], difference: Difference) -> Bypassed | None:
        key = hexadecimal(sample.request.keys()[rows[0]])
        said = f"row {key} {_said(difference)}"
        if self._given is not None and not self.is_strict:
            self._warnings.warn("given", _GIVEN, self._given, self._directory or "memory", said)
            self._settled.add(sample.request.variant)
            return None
        on_disk = "" if self._directory is None else _ON_DISK.format(self._directory)
        self._stale = self._refused[sample.request.variant] = Bypassed(_STALE, details=_CHANGED.format(said, on_disk))
        self._budget.lift()
        return self._stale


def _at(leaves: Iterable[Tensor], rows: list[int]) -> list[Tensor]:
    return [select(t, torch.tensor(rows, dtype=torch.int64, device=t.device)) for t in leaves]


def _said(difference: Difference) -> str:
    return f"differs by {difference.error:.2g} of its norm when it is computed again in another batch"


def hexadecimal(key: Tensor) -> str:
    """A key (int64 ``[2]``) as docs/format.md writes it: the high half first."""
    low, high = (number % 2**64 for number in key.tolist())
    return f"{high:016x}{low:016x}"
