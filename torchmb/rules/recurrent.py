"""LSTM, GRU and plain recurrent layers: one product with the inputs of all steps, then step by step for all models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functorch import Batched, Dim, batch_size, is_batched, lift_all, models_first
from .autocast import autocast_enabled, cast_as_autocast
from .linear import linear


class Layer(NamedTuple):
    """One direction of one layer; weights (M, gates · H, …), biases (M, gates · H), w_hr (M, P, H) of projections."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None


State = tuple[Tensor, ...]  # h (M, B, H or P), and c (M, B, H) of an LSTM
Cell = Callable[[Tensor, State, Layer], State]


def _hidden(h: Tensor, layer: Layer) -> Tensor:
    if layer.b_hh is None:
        return torch.bmm(h, layer.w_hh.mT)
    return torch.baddbmm(layer.b_hh.unsqueeze(1), h, layer.w_hh.mT)


def _lstm_cell(x: Tensor, state: State, layer: Layer) -> State:
    h, c = state
    i, f, g, o = (x + _hidden(h, layer)).chunk(4, -1)
    c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
    h = o.sigmoid() * c.tanh()
    return (h if layer.w_hr is None else torch.bmm(h, layer.w_hr.mT)), c


def _gru_cell(x: Tensor, state: State, layer: Layer) -> State:
    (h,) = state
    hidden = _hidden(h, layer)
    size = h.shape[-1]
    r, z = (x[..., : 2 * size] + hidden[..., : 2 * size]).sigmoid().chunk(2, -1)
    n = torch.addcmul(x[..., 2 * size :], r, hidden[..., 2 * size :]).tanh()
    return (torch.lerp(n.to(h.dtype), h, z.to(h.dtype)),)  # under autocast a state keeps its dtype


def _rnn_cell(activation: Callable[[Tensor], Tensor], x: Tensor, state: State, layer: Layer) -> State:
    return (activation(x + _hidden(state[0], layer)),)


def _direction(cell: Cell, x: Tensor, state: State, layer: Layer, reverse: bool) -> tuple[Tensor, State]:
    """Runs one direction of a layer on x (M, T, B, I) → outputs (M, T, B, H), last state."""
    steps = linear(x, layer.w_ih, layer.b_ih).unbind(1)
    outputs = []
    for step in reversed(steps) if reverse else steps:
        state = cell(step, state, layer)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs, 1), state


def _layers(params: Sequence[Tensor], has_biases: bool, directions: int) -> list[Layer]:
    size = len(params) // directions
    found = []
    for start in range(0, len(params), size):
        own = list(params[start : start + size])
        w_ih, w_hh = own[:2]
        b_ih, b_hh = own[2:4] if has_biases else (None, None)
        found.append(Layer(w_ih, w_hh, b_ih, b_hh, own[-1] if len(own) in (3, 5) else None))
    return found


def run_recurrent(
    cell: Cell, x: Tensor, state: State, layers: list[Layer], bidirectional: bool, dropout: float
) -> tuple[Tensor, State]:
    """Runs all layers on x (M, T, B, I), from states (M, layers, B, H) → outputs (M, T, B, H), last states."""
    per_layer = 2 if bidirectional else 1
    last: list[State] = []
    for i in range(0, len(layers), per_layer):
        outputs = []
        for j in range(i, i + per_layer):
            out, end = _direction(cell, x, tuple(s[:, j] for s in state), layers[j], reverse=j > i)
            outputs.append(out)
            last.append(end)
        x = torch.cat(outputs, -1)
        if dropout and i + per_layer < len(layers):
            x = F.dropout(x, dropout)
    return x, tuple(torch.stack(parts, 1) for parts in zip(*last))


@cache
@torch.no_grad()
def _check_onednn(dtype: torch.dtype, train: bool, enabled: bool) -> None:
    """Runs one step of the smallest LSTM, which raises torch's RuntimeError if this CPU cannot run it in `dtype`.

    Torch computes an LSTM by oneDNN, which refuses it on a CPU without instructions for the dtype. `enabled` is only
    part of the cache's key.
    """
    x = torch.ones(1, 1, 1)
    weight = torch.ones(4, 1)
    torch.lstm(x, (x, x), [weight, weight], False, 1, 0.0, train, False, False)


def _rule(
    cell: Cell,
    input: Tensor,
    hx: Any,
    params: Any,
    has_biases: Any,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    states = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
    packed = isinstance(params, Tensor) or isinstance(has_biases, (tuple, list))
    if packed or input.dim() != 3 or not any(is_batched(p) for p in params):
        return NotImplemented
    count, directions = len(states), num_layers * (2 if bidirectional else 1)
    is_plain_lstm = cell is _lstm_cell and len(params) // directions not in (3, 5)  # without projections
    if is_plain_lstm and input.is_cpu and autocast_enabled(input):
        _check_onednn(torch.get_autocast_dtype("cpu"), train, torch.backends.mkldnn.enabled)

    def kernel(x: tuple[Tensor, Dim], *given: tuple[Tensor, Dim]) -> list[Batched]:
        batch = batch_size(x, *given)
        first = [models_first(t, dim, batch) for t, dim in (x, *given)]
        if input.is_cuda or is_plain_lstm:  # torch uses one kernel, which casts everything
            first = list(cast_as_autocast(*first))
        steps = first[0].transpose(1, 2) if batch_first else first[0]
        layers = _layers(first[1 + count :], has_biases, directions)
        out, last = run_recurrent(cell, steps, tuple(first[1 : 1 + count]), layers, bidirectional, dropout * train)
        return [(out.transpose(1, 2) if batch_first else out, 0), *((s, 0) for s in last)]

    return tuple(lift_all(kernel, input, *states, *params))


def _single_lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes nn.LSTMCell in its parts, on one model's shapes: vmap has no batching rule for the whole."""
    h, c = hx
    i, f, g, o = (F.linear(input, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm: partial(_rule, _lstm_cell),
    torch.lstm_cell: _single_lstm_cell,
    torch.gru: partial(_rule, _gru_cell),
    torch.rnn_tanh: partial(_rule, partial(_rnn_cell, torch.tanh)),
    torch.rnn_relu: partial(_rule, partial(_rnn_cell, torch.relu)),
}
