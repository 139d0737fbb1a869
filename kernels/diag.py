"""Attention inside blocks: the softmax engine with every block as a sequence of its own."""

from __future__ import annotations

from attnvariants.kernels._schedule import UNLIMITED
from attnvariants.kernels.softmax import SoftmaxCall, backward_rows
from torch import Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    activation: str,
    causal: bool,
    scale: float,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the operator ``diag_forward``."""
    call = _call(q, k, v, cu_seqlens, block_size, activation, causal, scale)
    return call.forward(gate=None, activation=None, stats=stats)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    cu_seqlens: Tensor | None,
    block_size: int,
    activation: str,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the operator ``diag_backward``."""
    call = _call(q, k, v, cu_seqlens, block_size, activation, causal, scale)
    delta = None  # relu has no row sums
    if out is not None:
        _, delta, _ = backward_rows(dout, None, None, out, None)
    return call.backward(dout, lse, delta)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    activation: str,
    causal: bool,
    scale: float,
) -> SoftmaxCall:
    windows = [UNLIMITED] * k.shape[2]
    relu = activation == "relu"
    return SoftmaxCall(q, k, v, cu_seqlens, windows, causal, scale, block_size, relu)
