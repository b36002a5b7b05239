"""When a call is computed as if there were no cache, and why.

Everything here gives a reason in words, or None. Reasons of the first kind are normal (a call under
vmap), those of the second say that a cached row would be wrong or would change what is trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchcache._utils.torch_private import (
    BatchNorm,
    DeviceContext,
    dispatch_modes,
    forward_ad_level,
    function_mode_stack,
    function_modes,
    functorch_level,
    global_forward_hooks,
    global_forward_pre_hooks,
    tracing_state,
)
from torchcache.engine.call import Call

_grad_enabled = torch.is_grad_enabled
_strided = torch.strided
_is_compiling = torch.compiler.is_compiling


def of_call(call: Call) -> str | None:
    """Silent ones: the caller asked for something that a cache cannot give."""
    grad = _grad_enabled()
    for t in call.tensors:
        if grad and t.requires_grad:
            return "an input requires grad"
        if t.layout is not _strided or t.is_quantized or t.is_meta:
            return f"an input has no plain bytes ({t.layout}, {t.device})"
    if forward_ad_level() >= 0 and any(map(_is_dual, call.tensors)):
        return "an input carries a forward-mode tangent"
    return None


def of_surroundings() -> str | None:
    """Silent ones too: what is going on around the call."""
    if tracing_state() or _is_compiling():
        return "the call is being traced"
    if functorch_level() is not None:
        return "the call runs under a functorch transform"
    if dispatch_modes() > 0:
        return "a torch dispatch mode is active"
    if function_modes() > 0 and not all(isinstance(mode, DeviceContext) for mode in function_mode_stack()):
        return "a torch function mode is active"
    return None


def of_hooks() -> str | None:
    """What runs in every module of the process, and may change what the module's parts give."""
    if global_forward_hooks or global_forward_pre_hooks:
        return "forward hooks for all modules are registered (torch.nn.modules.module.register_module_forward_hook)"
    return None


def _is_dual(t: Tensor) -> bool:
    return torch.autograd.forward_ad.unpack_dual(t).tangent is not None  # type: ignore[no-untyped-call]


def of_modules(modules: Sequence[nn.Module]) -> str | None:
    """Rows that would depend on their neighbours, or ranks that would wait for each other."""
    for m in modules:
        kind = type(m).__name__
        if isinstance(m, nn.SyncBatchNorm) or kind in (
            "FullyShardedDataParallel",
            "DistributedDataParallel",
        ):
            return f"{kind} talks to other processes, which would wait for ranks without misses"
        if isinstance(m, BatchNorm) and (m.training or m.running_mean is None):
            return (
                f"{kind} uses the statistics of the batch, so rows depend on their neighbours; "
                "put the module in eval mode, after every model.train() (override train() to keep it there)"
            )
    return None
