"""Computes missing rows with the forward, and says whether they may be kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchcache._native.ops import Digest
from torchcache._utils.locks import lock
from torchcache._utils.logs import logger
from torchcache.engine.bypass import KEEP_IN_EVAL_MODE, Bypassed, training_modules
from torchcache.engine.call import Call, Indivisible
from torchcache.engine.decision import Request
from torchcache.engine.keys import CallVariant
from torchcache.engine.observation import Hooks, Observation, hooks_of_users
from torchcache.engine.outputs import UnsupportedOutput, split
from torchcache.identity.identity import Identity
from torchcache.identity.randomness import GeneratorStates
from torchcache.identity.snapshot import Snapshot
from torchcache.tiers.layout import Layout, select

_RANDOM = "the forward draws random numbers"
_NO_TRAINING = "leave what draws them, such as augmentation or sampling, out of the cached module"
_CHANGES_STATE = "the forward changes the module's own state (buffers, tensors, submodules)"
_KEEP_OUTSIDE = "{}; return what the caller needs from the forward, and keep what changes outside of the cached module"
_UNSUPPORTED = "the output cannot be cached"
# These tell nothing of the next call.
_IMPORTED = Bypassed("the forward imported modules, which may have drawn random numbers", is_silent=True)
_MAYBE_RANDOM = Bypassed("random numbers were drawn while the forward ran, perhaps by another thread", is_silent=True)
_SET_UP = Bypassed("the forward changed the module's state, perhaps only to set it up", is_silent=True)
_NOT_ALONE = Bypassed("the module's state changed while several threads ran the forward", is_silent=True)
_PROFILED = Bypassed("a profiler runs, so nobody can tell whether hooks inside the module compute something")
_SEVERAL_LAYOUTS = Bypassed("the rows of the batch have outputs of different shapes or types", is_silent=True)

Forward = Callable[..., Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Computed(NamedTuple):
    """Rows that may be kept."""

    layout: Layout
    leaves: list[Tensor]  # [M, …] each


class Uncached(NamedTuple):
    """The output of the whole call, whose rows must not be kept, and why."""

    output: Any
    why: Bypassed


class _Run(NamedTuple):
    """What one forward gave, and why its rows must not be kept, if they must not."""

    output: Any
    objection: Bypassed | None
    restore: Callable[[], None]  # sets back the generators that it has moved


class MissComputer:
    """Runs forwards, and remembers of which variants of calls the rows must not be kept.

    Rows are computed without a graph, since outputs are detached: so grad mode is no part of their keys.

    Args:
        cache_dtype: the option.
        identity: of the module or function.
        refused: gets an entry for each variant that must not be cached from then on, or, for as long as the state of
            the module is what it is, for the digest of a request.
        whole: variants whose forward is only right for whole batches; gets those for which a forward shows it.
    """

    def __init__(
        self,
        identity: Identity,
        cache_dtype: torch.dtype | None,
        refused: dict[CallVariant | Digest, Bypassed],
        whole: set[CallVariant],
    ) -> None:
        self._lock = lock(self)
        self._identity = identity
        self._cache_dtype = cache_dtype
        self._refused = refused
        self._leave_inputs: set[CallVariant] = set()  # whose forwards have been seen not to edit their inputs
        self._changed_once: set[CallVariant] = set()  # whose forwards have changed the state
        self._with_grad: set[CallVariant] = set()  # whose forwards fail under no_grad
        self._whole = whole
        self._proven: set[CallVariant] = set()  # whose rows were kept
        self._last_hooks: tuple[Snapshot | None, Hooks] = None, {}
        self._draws_were_seen = False  # in the last forward, which may have been those of another thread
        self._running: set[object] = set()  # forwards, in all threads
        self._started = 0

    def compute(
        self, forward: Forward, request: Request, rows: Tensor, known: Layout | None = None
    ) -> Computed | Uncached:
        """Computes these rows of a call.

        Args:
            forward: of the module.
            request: the call.
            rows: int64 ``[M]``, positions in the batch, ascending.
            known: the layout of the other rows of the batch.

        Raises:
            Exception: what the forward raises for the whole batch.
        """
        some = self._some_arguments(request, rows)
        result = None if some is None else self._compute_some(forward, request, some, rows, known)
        is_sighting = isinstance(result, Uncached) and result.why is _MAYBE_RANDOM
        if result is not None and not is_sighting:
            return result if isinstance(result, Uncached) else self._kept(request, result)
        output, computed = self._compute_batch(forward, request, rows)
        if isinstance(computed, Bypassed):
            return Uncached(output, computed)
        if known not in (None, computed.layout):
            return Uncached(output, _SEVERAL_LAYOUTS)
        if some is not None and not is_sighting:
            self._compute_whole_from_now_on(request)
        return self._kept(request, computed)

    def _kept(self, request: Request, computed: Computed) -> Computed:
        self._proven.add(request.variant)
        return computed

    def recompute(self, forward: Forward, request: Request, rows: Tensor) -> Computed | Bypassed:
        """Computes rows of a call once more, on copies of them, for a comparison.

        Generators are set back if the forward moved them; what it changes in the state counts like any forward.

        Args:
            forward: of the module.
            request: the call.
            rows: int64 ``[M]``, positions in the batch: ascending and consecutive, or with the last one not above the
                first one.

        Raises:
            Exception: what the forward raises for such a batch, or Indivisible.
        """
        if request.call.template.positions is not None and rows.tolist() != list(range(request.call.batch)):
            raise Indivisible  # a tuple would have the values of other rows
        with_grad = request.variant in self._with_grad
        run = self._run(forward, request, request.call.select(rows, copy=True), with_grad)
        if run.objection is _MAYBE_RANDOM:  # this one is observed
            run = self._run(forward, request, request.call.select(rows, copy=True), with_grad)
        if run.objection is not None:
            run.restore()
        return run.objection or self._split(run.output, request.call, rows, len(rows))

    # ---- the missing rows alone

    def _some_arguments(self, request: Request, rows: Tensor) -> Arguments | None:
        """The arguments with these rows alone; None: the whole batch is to be computed."""
        call = request.call
        if rows.shape[0] == call.batch or request.variant in self._whole or call.template.positions is not None:
            return None
        try:
            return call.select(rows, copy=request.variant not in self._leave_inputs)
        except Indivisible:
            return None

    def _compute_some(
        self, forward: Forward, request: Request, arguments: Arguments, rows: Tensor, known: Layout | None
    ) -> Computed | Uncached | None:
        """None: the forward may be right only for whole batches."""
        try:
            run = self._run(forward, request, arguments, request.variant in self._with_grad)
        except Exception:  # the whole batch shows whose fault it is
            return None
        if run.objection is _MAYBE_RANDOM:
            return Uncached(None, _MAYBE_RANDOM)
        if run.objection is not None:
            run.restore()
            return Uncached(self._as_called(forward, request), run.objection)
        computed = self._split(run.output, request.call, rows, rows.shape[0])
        return computed if isinstance(computed, Computed) and known in (None, computed.layout) else None

    def _compute_whole_from_now_on(self, request: Request) -> None:
        self._whole.add(request.variant)
        logger.info(
            "%s: the forward fails, or its output has another layout, for a part of a batch: such calls are computed "
            "in whole batches from now on",
            self._identity.name,
        )

    # ---- the whole batch

    def _compute_batch(self, forward: Forward, request: Request, rows: Tensor) -> tuple[Any, Computed | Bypassed]:
        """The output of the whole call, and the rows of it that are asked for."""
        call = request.call
        arguments = call.args, call.kwargs
        has_graph = torch.is_grad_enabled() and self._is_trained(request)
        if has_graph and request.variant not in self._proven:
            return self._compute_with_and_without_graph(forward, request, rows)
        versions = call.versions()
        run = self._run_in_some_mode(forward, request, arguments)
        if versions is not None and versions == call.versions():
            self._leave_inputs.add(request.variant)
            if run.objection is _MAYBE_RANDOM:
                return self._confirm(forward, request, run, arguments, rows)
        computed = run.objection or self._split(run.output, call, rows, call.batch)
        if isinstance(computed, Bypassed) and has_graph and request.variant in self._leave_inputs:
            run.restore()
            return self._as_called(forward, request), computed
        return run.output, self._noted(request, computed)

    def _compute_with_and_without_graph(
        self, forward: Forward, request: Request, rows: Tensor
    ) -> tuple[Any, Computed | Bypassed]:
        """Only an output that is not cached may need its graph, and only its computation tells whether it is."""
        call = request.call
        copies = self._copies(call)
        run = self._run(forward, request, (call.args, call.kwargs), with_grad=True)
        if run.objection is _MAYBE_RANDOM:
            return self._confirm(forward, request, run, copies, rows)
        computed = run.objection or self._split(run.output, call, rows, call.batch)
        if isinstance(computed, Bypassed):
            return run.output, self._noted(request, computed)
        try:
            again = self._run(forward, self._now(request), copies, with_grad=False)
        except Exception:
            self._with_grad.add(request.variant)
            return run.output, computed
        return run.output, again.objection or self._split(again.output, call, rows, call.batch)

    def _confirm(
        self, forward: Forward, request: Request, first: _Run, arguments: Arguments, rows: Tensor
    ) -> tuple[Any, Computed | Bypassed]:
        """Tells by a second forward, which is observed, whether the first one or another thread drew numbers."""
        try:
            run = self._run(forward, self._now(request), arguments, request.variant in self._with_grad)
        except Exception:
            return first.output, _MAYBE_RANDOM
        if run.objection is not None:
            run.restore()
            return first.output, run.objection
        computed = self._split(run.output, request.call, rows, request.call.batch)
        return (run.output if isinstance(computed, Computed) else first.output), self._noted(request, computed)

    def _now(self, request: Request) -> Request:
        """The request after a forward that has changed nothing in the state that counts."""
        return request if request.state is None else request._replace(state=self._identity.state() or request.state)

    def _run_in_some_mode(self, forward: Forward, request: Request, arguments: Arguments) -> _Run:
        """Runs the forward without a graph, or in the caller's mode if it fails so."""
        if not torch.is_grad_enabled() or request.variant in self._with_grad:
            return self._run(forward, request, arguments, with_grad=True)
        versions = request.call.versions()
        try:
            return self._run(forward, request, arguments, with_grad=False)
        except Exception:
            if versions != request.call.versions():  # it has edited its inputs: a second time would be wrong
                raise
        run = self._run(forward, request, arguments, with_grad=True)
        self._with_grad.add(request.variant)
        return run

    def _copies(self, call: Call) -> Arguments:
        """The arguments for another forward, whatever the first one does to its inputs."""
        try:
            return call.select(torch.arange(call.batch, device="cpu"), copy=True)
        except Indivisible:
            return call.args, call.kwargs

    def _is_trained(self, request: Request) -> bool:
        if request.state is not None:
            return bool(request.state.snapshot.trained)
        return any(p.requires_grad for m in self._identity.modules(None) for p in m.parameters(recurse=False))

    # ---- one forward

    def _as_called(self, forward: Forward, request: Request) -> Any:
        """The output as if there were no cache."""
        return forward(*request.call.args, **request.call.kwargs)

    def _run(self, forward: Forward, request: Request, arguments: Arguments, with_grad: bool) -> _Run:
        """Runs a forward, and looks at what else it does.

        Args:
            forward: of the module.
            request: the call.
            arguments: of the forward.
            with_grad: whether to leave grad mode as it is.
        """
        generators = GeneratorStates(functools.partial(self._identity.generators, request.state))
        hooks = self._hooks_of(request)
        # Of a part of a batch nobody would know otherwise whether to set the generators back.
        is_new_part = arguments[0] is not request.call.args and request.variant not in self._proven
        draws = self._draws_were_seen or is_new_part
        observation = Observation(hooks, draws) if hooks or draws else None
        output, is_alone = self._output(forward, arguments, with_grad, observation)
        objection = self._objection(request, generators, is_alone, observation)
        is_own = observation is not None and observation.has_drawn
        return _Run(output, objection, functools.partial(generators.restore, with_global=is_own))

    def _hooks_of(self, request: Request) -> Hooks:
        """The hooks inside the module; its own run whether a row is found or not."""
        if request.state is None:
            return hooks_of_users(self._identity.modules(None))
        snapshot, hooks = self._last_hooks
        if snapshot is not request.state.snapshot:  # another hook makes another one
            snapshot, hooks = request.state.snapshot, hooks_of_users(request.state.snapshot.others)
            self._last_hooks = snapshot, hooks
        return hooks

    def _output(
        self, forward: Forward, arguments: Arguments, with_grad: bool, observation: Observation | None
    ) -> tuple[Any, bool]:
        """The output, and whether no other forward of this cache ran at the same time."""
        this = object()
        args, kwargs = arguments
        if observation is not None:
            forward = functools.partial(observation.run, forward)
        try:
            with self._lock:
                self._running.add(this)
                self._started += 1
                is_first, number = len(self._running) == 1, self._started
            if with_grad:
                output = forward(*args, **kwargs)
            else:
                try:
                    with torch.no_grad():
                        output = forward(*args, **kwargs)
                finally:  # autocast remembers weights without grad now, which a forward may be about to train
                    torch.clear_autocast_cache()
            with self._lock:
                return output, is_first and self._started == number
        finally:
            with self._lock:
                self._running.discard(this)

    # ---- what must not be kept

    def _objection(
        self, request: Request, generators: GeneratorStates, is_alone: bool, observation: Observation | None
    ) -> Bypassed | None:
        """Why rows that were just computed must not be kept."""
        changed = None if request.state is None else self._identity.after_forward(request.state)
        if changed is None and generators.has_new_generators():
            changed = "its generators of random numbers"
        why = self._randomness(request, generators, observation) or self._collector(request, observation)
        if changed is None or why not in (None, _MAYBE_RANDOM):
            return why
        if not is_alone:
            return _NOT_ALONE
        if request.variant in self._changed_once:
            return self._refuse(request.variant, Bypassed(_CHANGES_STATE, details=_KEEP_OUTSIDE.format(changed)))
        self._changed_once.add(request.variant)
        return _SET_UP

    def _randomness(
        self, request: Request, generators: GeneratorStates, observation: Observation | None
    ) -> Bypassed | None:
        """Numbers of the global generators may be another thread's: the next forward is watched more closely."""
        if generators.held_ones_have_drawn():
            return self._draws(request.variant)
        were_drawn = generators.global_ones_have_drawn()
        if not were_drawn:
            self._draws_were_seen = False
            return None
        if generators.modules_were_imported():
            return _IMPORTED
        self._draws_were_seen = True
        if observation is None or not observation.sees_draws:
            return _MAYBE_RANDOM
        return self._draws(request.variant) if observation.has_drawn else None

    def _collector(self, request: Request, observation: Observation | None) -> Bypassed | None:
        if observation is None or not observation.hooks:
            return None
        if observation.is_blind:
            return _PROFILED
        if observation.collector is not None:
            self._refused[request.digest] = observation.collector
        return observation.collector

    def _refuse(self, variant: CallVariant, why: Bypassed) -> Bypassed:
        self._refused[variant] = why
        return why

    def _noted(self, request: Request, computed: Computed | Bypassed) -> Computed | Bypassed:
        """An output that cannot be cached now cannot be later, as long as the module is what it is."""
        if isinstance(computed, Bypassed) and computed.reason == _UNSUPPORTED:
            self._refused[request.digest] = computed
        return computed

    def _draws(self, variant: CallVariant) -> Bypassed:
        """Refuses a variant whose forward draws random numbers."""
        modules = self._identity.modules(None)
        inside = list(modules[0].named_modules()) if modules else []
        training = training_modules(inside + [("", m) for m in modules if all(m is not other for _, other in inside)])
        hint = f"{', '.join(training[:3])} in train mode? Then {KEEP_IN_EVAL_MODE}" if training else _NO_TRAINING
        return self._refuse(variant, Bypassed(_RANDOM, details=hint))

    def _split(self, output: Any, call: Call, rows: Tensor, batch: int) -> Computed | Bypassed:
        """These rows of an output that has so many."""
        try:
            layout, leaves = split(output, batch, call.tensors, self._cache_dtype)
        except UnsupportedOutput as error:
            return Bypassed(_UNSUPPORTED, details=str(error))
        return Computed(layout, leaves if len(rows) == batch else [select(t, rows) for t in leaves])
