"""The block engine: operators and autograd behind diag_attention."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from attnvariants import _checks
from attnvariants.ops._library import once_differentiable, register

ACTIVATIONS = ("softmax", "relu")

_ENGINES = {"eager": "attnvariants.eager.diag"}


class BlockAttention(torch.autograd.Function):
    """Keeps the inputs only; the backward computes the small score blocks again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        block_size: int,
        activation: str,
        causal: bool,
        softmax_scale: float,
        stats: bool,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        options = (block_size, activation, causal, softmax_scale)
        out, max_logit = torch.ops.attnvariants.diag_forward(
            q, k, v, cu_seqlens, *options, stats, impl
        )
        ctx.save_for_backward(q, k, v, cu_seqlens)
        ctx.mark_non_differentiable(max_logit)
        ctx.options, ctx.impl = options, impl
        return out, max_logit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Any) -> tuple[Any, ...]:
        q, k, v, cu_seqlens = ctx.saved_tensors
        gradients = torch.ops.attnvariants.diag_backward(
            dout, q, k, v, cu_seqlens, *ctx.options, ctx.impl
        )
        return *gradients, *(None,) * 7


def _forward(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *inputs, impl = args
    return importlib.import_module(_ENGINES[impl]).forward(q, *inputs)


def _backward(dout: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, impl = args
    return importlib.import_module(_ENGINES[impl]).backward(dout, *inputs)


def _forward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    activation: str,
    causal: bool,
    softmax_scale: float,
    stats: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    statistics = q.new_empty(heads if stats else 0, dtype=_checks.state_dtype(q.dtype))
    return q.new_empty(batch, length, heads, v.shape[-1]), statistics


def _backward_shapes(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


register(
    "diag_forward(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, int block_size, "
    "str activation, bool causal, float softmax_scale, bool stats, str impl) "
    "-> (Tensor out, Tensor max_logit)",
    _forward,
    _forward_shapes,
)
register(
    "diag_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, "
    "int block_size, str activation, bool causal, float softmax_scale, str impl) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    _backward,
    _backward_shapes,
)
