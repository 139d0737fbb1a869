"""Softmax attention with windows and an output gate in plain PyTorch.

Half precision is computed in float32 and rounded once. The backward starts from the gated output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attnvariants._checks import state_dtype
from attnvariants.eager import _tiles
from attnvariants.eager._gate import activate, log_derivative
from attnvariants.eager._parts import by_length, by_mask, put_heads, take_heads


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    cu_seqlens: Tensor | None,
    windows: list[int],
    causal: bool,
    scale: float,
    activation: str | None,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the operator ``softmax_forward``."""
    dtype, wide = v.dtype, state_dtype(v.dtype)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if cu_seqlens is None:
        out, lse, max_logit = _attend(q, k, v, windows, causal, scale)
    else:
        out, lse = q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3])
        max_logit = q.new_full((q.shape[2],), float("-inf"))
        for tokens in by_length(cu_seqlens, q.shape[1]):
            parts = _attend(q[0, tokens], k[0, tokens], v[0, tokens], windows, causal, scale)
            out[0, tokens], lse[0, tokens] = parts[0], parts[1]
            max_logit = torch.maximum(max_logit, parts[2])
    if gate is not None and activation is not None:
        out.mul_(activate(activation, _per_channel(gate.to(wide))))
    return out.to(dtype), lse, max_logit if stats else q.new_empty(0)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    windows: list[int],
    causal: bool,
    scale: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the operator ``softmax_backward``."""
    wide = state_dtype(v.dtype)
    dgate = q.new_empty(0)
    dout = dout.to(wide)
    if gate is not None and activation is not None:
        logits = gate.to(wide)
        product = dout * out
        product = product if gate.dim() == 4 else product.sum(dim=-1)
        dgate = _finish(product * log_derivative(activation, logits), gate)
        dout = dout * activate(activation, _per_channel(logits))
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    options = (windows, causal, scale)
    inputs = (dout, dlse, q.to(wide), k.to(wide), v.to(wide))
    if cu_seqlens is None:
        dq, dk, dv = _attend_backward(inputs, *options)
    else:
        dq, dk, dv = (torch.empty_like(x) for x in inputs[2:])
        for tokens in by_length(cu_seqlens, q.shape[1]):
            parts = _attend_backward([x[0, tokens] for x in inputs], *options)
            dq[0, tokens], dk[0, tokens], dv[0, tokens] = parts
    return _finish(dq, q), _finish(dk, k), _finish(dv, v), dgate


def _attend(
    q: Tensor,  # [N, T, H, K]
    k: Tensor,  # [N, S, Hkv, K]
    v: Tensor,  # [N, S, Hkv, V]
    windows: list[int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and largest logits of sequences of one length."""
    runs = by_mask(windows, causal, k.shape[1])
    if len(runs) == 1:
        return _attend_alike(q, k, v, scale, *next(iter(runs)))
    group = q.shape[2] // k.shape[2]
    out, lse = q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3])
    max_logit = q.new_empty(q.shape[2])
    for mask, heads in runs.items():
        inputs = take_heads(q, heads, group), take_heads(k, heads), take_heads(v, heads)
        parts = _attend_alike(*inputs, scale, *mask)
        put_heads(out, parts[0], heads, group)
        put_heads(lse, parts[1], heads, group)
        put_heads(max_logit[None, None], parts[2][None, None], heads, group)
    return out, lse, max_logit


def _attend_alike(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_attend` of heads with one mask."""
    blind = _blind_queries(q, k, causal)
    out, lse, max_logit = _tiles.forward(q[:, blind:], k, v, scale, causal, window)
    if blind:
        out = F.pad(out, (0, 0, 0, 0, blind, 0))
        lse = F.pad(lse, (0, 0, blind, 0), value=float("-inf"))
    return out, lse, max_logit


def _attend_backward(
    inputs: Sequence[Tensor], windows: list[int], causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`_attend`; ``inputs`` are dout, dlse, q, k and v."""
    dout, dlse, q, k, v = inputs
    runs = by_mask(windows, causal, k.shape[1])
    if len(runs) == 1:
        return _backward_alike(dout, dlse, q, k, v, scale, *next(iter(runs)))
    group = q.shape[2] // k.shape[2]
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for mask, heads in runs.items():
        parts = _backward_alike(
            take_heads(dout, heads, group),
            take_heads(dlse, heads, group),
            take_heads(q, heads, group),
            take_heads(k, heads),
            take_heads(v, heads),
            scale,
            *mask,
        )
        put_heads(dq, parts[0], heads, group)
        put_heads(dk, parts[1], heads)
        put_heads(dv, parts[2], heads)
    return dq, dk, dv


def _backward_alike(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_attend_backward` of heads with one mask."""
    blind = _blind_queries(q, k, causal)
    dout, dlse, q = (x[:, blind:] for x in (dout, dlse, q))
    dq, dk, dv = _tiles.backward(dout, dlse, q, k, v, scale, causal, window)
    return F.pad(dq, (0, 0, 0, 0, blind, 0)) if blind else dq, dk, dv


def _blind_queries(q: Tensor, k: Tensor, causal: bool) -> int:
    """How many leading queries stand before the first key and see nothing."""
    return max(0, q.shape[1] - k.shape[1]) if causal else 0


def _per_channel(gate: Tensor) -> Tensor:
    """A gate that broadcasts over ``[B, T, H, V]``."""
    return gate if gate.dim() == 4 else gate[..., None]


def _finish(gradient: Tensor, like: Tensor) -> Tensor:
    return gradient.to(like.dtype).contiguous()
