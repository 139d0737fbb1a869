"""Attention inside blocks by the CUDA C++ kernel for whole sequences; no backward."""

from __future__ import annotations

from torch import Tensor

from attnvariants import _checks
from attnvariants.ops import _cuda_softmax_forward


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    activation: str,
    causal: bool,
    softmax_scale: float,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the operator ``diag_forward``."""
    return _cuda_softmax_forward.forward(
        *(q, k, v, None, cu_seqlens, [_checks.UNLIMITED] * k.shape[2], causal, softmax_scale),
        *(None, stats),
        block_size=min(block_size, q.shape[1]),
        relu=activation == "relu",
    )
