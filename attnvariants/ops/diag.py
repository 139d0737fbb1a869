"""The block engine: operators and autograd behind diag_attention."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from attnvariants import _checks
from attnvariants.ops._library import once_differentiable, register

ACTIVATIONS = ("softmax", "relu")

_ENGINES = {
    "eager": "attnvariants.eager.diag",
    "triton": "attnvariants.kernels.diag",
    "cuda": "attnvariants.ops._cuda_diag",  # without a backward
}


class BlockAttention(torch.autograd.Function):
    """Keeps the inputs, and the output where there is a log-sum-exp to go with it.

    The backward computes the scores again. Engines that hold whole blocks get their row sums with
    them and return no log-sum-exp, nor is there any of a relu.
    """

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
        out, lse, max_logit = torch.ops.attnvariants.diag_forward(
            q, k, v, cu_seqlens, *options, stats, impl
        )
        kept = (out, lse) if lse.numel() else (None, None)
        ctx.save_for_backward(q, k, v, *kept, cu_seqlens)
        ctx.mark_non_differentiable(max_logit)
        ctx.options, ctx.impl = options, impl
        return out, max_logit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Any) -> tuple[Any, ...]:
        gradients = torch.ops.attnvariants.diag_backward(
            dout, *ctx.saved_tensors, *ctx.options, ctx.impl
        )
        return *gradients, *(None,) * 7


def _forward(q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
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
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    wide = _checks.state_dtype(q.dtype)
    out = q.new_empty(batch, length, heads, v.shape[-1])
    rows = 0 if impl == "eager" or activation == "relu" else length
    lse = q.new_empty(batch, heads, rows, dtype=wide).transpose(1, 2)
    return out, lse, q.new_empty(heads if stats else 0, dtype=wide)


def _backward_shapes(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


register(
    "diag_forward(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, int block_size, "
    "str activation, bool causal, float softmax_scale, bool stats, str impl) "
    "-> (Tensor out, Tensor lse, Tensor max_logit)",
    _forward,
    _forward_shapes,
)
register(
    "diag_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? out, Tensor? lse, "
    "Tensor? cu_seqlens, int block_size, str activation, bool causal, float softmax_scale, "
    "str impl) -> (Tensor dq, Tensor dk, Tensor dv)",
    _backward,
    _backward_shapes,
)
