"""The one place that says whether a call is cached, and if not, why."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from torchcache._native import ops
from torchcache._native.ops import Digest
from torchcache._utils.lazy import lazy
from torchcache._utils.locks import lock
from torchcache.engine import bypass
from torchcache.engine.binding import Binder, UnsupportedArgument
from torchcache.engine.bypass import Bypassed
from torchcache.engine.call import Call
from torchcache.engine.keys import CallVariant, Keys
from torchcache.engine.mode import Mode
from torchcache.identity.identity import Identity, State
from torchcache.identity.numerics import autocast, precision
from torchcache.identity.tensors import Uninitialized, Unwatchable
from torchcache.options import Options


class Request(NamedTuple):
    """A call, and what its keys are made of. Where `Decider.decide` returns one, the call is cached."""

    call: Call
    variant: CallVariant
    tensors: list[Tensor]  # to be hashed, row by row
    digest: Digest  # of everything else
    state: State | None  # of the module; None: it does not count
    mode_bypassed: Bypassed | None  # why calls in this mode are not cached, if they are not

    def keys(self) -> Tensor:
        """int64 ``[B, 2]``."""
        return ops.keys(self.tensors, self.digest)


class Decider:
    """Decides about the calls of one cache. Asking changes nothing that a later call would notice. Thread-safe.

    Args:
        target: the module, or the function itself.
        forward: the undecorated forward of the module, or the function.
        takes_self: whether the first parameter of `forward` is the module.
        init: encoded init arguments.
        options: gives the options in force.
        refused: variants of calls, or digests of requests, whose forward was seen to do what a cache must not
            repeat, and why.
    """

    def __init__(
        self,
        target: nn.Module | Callable[..., Any],
        forward: Callable[..., Any],
        takes_self: bool,
        init: bytes,
        options: Callable[[], Options],
        refused: Mapping[CallVariant | Digest, Bypassed],
    ) -> None:
        self._target_now = (lambda: target) if target is forward else weakref.ref(target)
        self._forward = forward
        self._takes_self = takes_self
        self._init = init
        self._options_now = options
        self._refused = refused
        self._lock = lock(self)

    @property
    def _target(self) -> nn.Module | Callable[..., Any]:
        """The module, which this object does not keep alive, or the function."""
        target = self._target_now()
        if target is None:
            raise ReferenceError(f"the module of this cache does not exist any more: {self._forward.__qualname__}")
        return target

    def renewed(self, refused: Mapping[CallVariant | Digest, Bypassed]) -> Decider:
        """A new one, which knows nothing yet."""
        return Decider(self._target, self._forward, self._takes_self, self._init, self._options_now, refused)

    def updated_options(self) -> Options:
        """The options that attributes give at present.

        Raises:
            ValueError: an attribute is unknown, wrong, or fixed by the options in force.
        """
        options = self._options_now()
        if "options" in self.__dict__:
            self.options.check_change(options)
        return options

    @property
    def name(self) -> str:
        """Of the class or function, for messages."""
        return type(self._target).__qualname__ if isinstance(self._target, nn.Module) else self._forward.__qualname__

    @property
    def forward(self) -> Callable[..., Any]:
        """The undecorated forward, with the module as its first argument."""
        return functools.partial(self._forward, self._target) if self._takes_self else self._forward

    @lazy
    def options(self) -> Options:
        """The options in force when they were first needed."""
        return self._options_now()

    @lazy
    def identity(self) -> Identity:
        """What makes two calls the same computation."""
        module = self._target if isinstance(self._target, nn.Module) else None
        return Identity(module, self._forward, self._init, self.options)

    @lazy
    def _binder(self) -> Binder:
        return Binder(self._forward, self._takes_self)

    @lazy
    def _keys(self) -> Keys:
        return Keys(self.options.subsample_count if self.options.subsample else None)

    @lazy
    def _mode(self) -> Mode:
        return Mode(self.identity.modules)

    def forget_state(self) -> None:
        """Has the next call look at every byte of the state again."""
        self.identity.forget()

    def decide(self, args: tuple[Any, ...], kwargs: dict[str, Any], probe: bool = True) -> Request | Bypassed:
        """Whether this call is cached.

        Args:
            args: of the forward.
            kwargs: of the forward.
            probe: whether to probe the weights natively. Else the caller does it (see `Identity.state`).

        Raises:
            ValueError: nothing in the arguments has rows (see `Binder.bind`).
        """
        why = bypass.of_surroundings()
        if why is not None:
            return why
        try:
            call = self._binder.bind(args, kwargs)
        except UnsupportedArgument as error:
            return Bypassed("an argument cannot be part of a key", details=str(error))
        if call is None:
            return self._without_keys()
        why = bypass.of_call(call)
        if why is not None:
            return why
        return self.decide_bound(call, probe)

    def decide_bound(self, call: Call, probe: bool = True) -> Request | Bypassed:
        """The same for a call whose arguments can be cached."""
        try:
            request = self._request(call, probe)
        except Uninitialized as error:
            return Bypassed(str(error), is_silent=True)
        except Unwatchable as error:
            return Bypassed(str(error))
        refused = self._refused
        if refused:
            why = refused.get(request.variant) or refused.get(request.digest)
            return request.mode_bypassed or why or request
        return request.mode_bypassed or request

    def request(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Request:
        """What the keys of a call are made of, whether it is cached or not.

        Raises:
            TypeError: it has no keys.
            ValueError: the arguments cannot be part of a key (see `Binder.bind`).
        """
        call = self._binder.bind(args, kwargs)
        if call is None:
            raise TypeError(f"this call has no keys: {self._without_keys().reason}")
        try:
            return self._request(call, probe=True)
        except Unwatchable as error:
            raise TypeError(f"this call has no keys: {error}") from error

    def _request(self, call: Call, probe: bool) -> Request:
        state = self.identity.state(probe)
        digest = b"" if state is None else state.snapshot.digest
        mode, mode_bypassed = self._mode.of(state)
        first = call.tensors[0]
        device_type = "cpu" if first.is_cpu else first.device.type
        variant = call.template.description, mode, autocast(device_type), precision(device_type)
        return Request(call, variant, *self._keys.hash_request(call, variant, digest), state, mode_bypassed)

    def _without_keys(self) -> Bypassed:
        return Bypassed(
            f"the arguments do not fit the signature of {self.identity.name}, or one of them is a tensor subclass "
            "or nested",
            is_silent=True,
        )
