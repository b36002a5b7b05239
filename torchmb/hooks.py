"""Hooks and registered batch modules in a run under vmap: both run outside vmap, on all models at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import BackwardHook

from .base import AbstractBatchModule, merge_batch, split_batch
from .functorch import Batched, lift_all, models_first
from .pytree import extract_tensors, insert_tensors, map_tensors
from .torch_private import HOOKS, hooks_of


def call_outside_vmap(function: Callable[..., Any], batch: int, *values: Any) -> Any:
    """Calls function(*values) outside vmap. All tensors are (M, B, …) there, also those that all models share."""
    tensors, rest = extract_tensors(values)
    result: list[Any] = []

    def kernel(*given: Batched) -> list[Batched]:
        output = function(*insert_tensors(rest, [models_first(x, dim, batch) for x, dim in given]))
        found, remains = extract_tensors(output)
        result.append(remains)
        return [(t, 0) for t in found]

    outputs = lift_all(kernel, *tensors)
    return insert_tensors(result[0], outputs)


def run_registered(module: AbstractBatchModule, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls the forward of a registered module, on merged data, from within vmap."""

    def merged(args: Any, kwargs: Any) -> Any:
        given, named = map_tensors(merge_batch, (args, kwargs))
        return map_tensors(lambda x: split_batch(x, module.batch), forward(*given, **named))

    return call_outside_vmap(merged, module.batch, args, kwargs)


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks of the forward or the backward."""
    return any(hooks_of(module))


def _computes_weights(hook: Any) -> bool:
    """Whether it is a hook of weight_norm, spectral_norm or pruning, which is a part of one model's forward."""
    return type(hook).__module__.startswith("torch.nn.utils.")


class _Hooked:
    """Runs the hooks of one module outside vmap, by one pre-hook and one hook in their place."""

    def __init__(self, module: nn.Module, batch: int) -> None:
        self._batch = batch
        self._own = {name: vars(module)[name] for name in HOOKS}
        self._pre, self._pre_with_kwargs, self._post, self._post_with_kwargs, *backward = hooks_of(module)
        self._backward_pre, self._backward = backward
        self._has_backward = any(backward)

    def _call(self, function: Callable[..., Any], *values: Any) -> Any:
        return call_outside_vmap(function, self._batch, *values)

    def pre(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Runs the pre-hooks, and sets up those of the backward."""
        for number, hook in list(self._pre.items()):
            if _computes_weights(hook):
                hook(module, args)
            elif number in self._pre_with_kwargs:
                changed = self._call(lambda a, k, h=hook: h(module, a, k), args, kwargs)
                args, kwargs = (args, kwargs) if changed is None else changed
            else:
                changed = self._call(lambda a, h=hook: h(module, a), args)
                if changed is not None:
                    args = changed if isinstance(changed, tuple) else (changed,)
        if self._has_backward:
            self._hook = BackwardHook(module, list(self._backward.values()), list(self._backward_pre.values()))
            args = self._call(lambda a: self._hook.setup_input_hook(a), args)  # type: ignore[no-untyped-call]
        return args, kwargs

    def post(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Runs the forward hooks."""
        for number, hook in list(self._post.items()):
            if number in self._post_with_kwargs:
                changed = call_outside_vmap(
                    lambda a, k, o, h=hook: h(module, a, k, o), self._batch, args, kwargs, output
                )
            else:
                changed = self._call(lambda a, o, h=hook: h(module, a, o), args, output)
            output = output if changed is None else changed
        if self._has_backward:
            output = self._call(lambda o: self._hook.setup_output_hook(o), output)  # type: ignore[no-untyped-call]
        return output

    def replace(self, module: nn.Module) -> None:
        vars(module).update({name: OrderedDict() for name in HOOKS})
        module.register_forward_pre_hook(self.pre, with_kwargs=True)
        module.register_forward_hook(self.post, with_kwargs=True)

    def restore(self, module: nn.Module) -> None:
        vars(module).update(self._own)


@contextmanager
def outside_vmap(
    modules: Sequence[nn.Module], batch_modules: Sequence[AbstractBatchModule], batch: int
) -> Iterator[None]:
    """Lets hooks get tensors (M, B, …), and registered modules merged data, in a run under vmap."""
    hooked = [(_Hooked(m, batch), m) for m in (*modules, *batch_modules) if has_hooks(m)]
    for hooks, module in hooked:
        hooks.replace(module)
    for batch_module in batch_modules:
        forward = batch_module.forward

        def inside(*args: Any, m: AbstractBatchModule = batch_module, f: Any = forward, **kwargs: Any) -> Any:
            return run_registered(m, f, *args, **kwargs)

        batch_module.__dict__["forward"] = inside
    try:
        yield
    finally:
        for hooks, module in hooked:
            hooks.restore(module)
        for batch_module in batch_modules:
            del batch_module.__dict__["forward"]
