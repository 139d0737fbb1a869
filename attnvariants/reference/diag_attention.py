"""DiagAttention: attention inside non-overlapping blocks of the sequence, ``O = act(Q K^T) V``."""

from __future__ import annotations

import torch
from einops import einsum, repeat
from torch import Tensor

from attnvariants._checks import sequence_bounds, state_dtype
from attnvariants._types import AttentionStats


def diag_attention(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, Hkv, K]
    v: Tensor,  # [B, T, Hkv, V]
    *,
    block_size: int = 64,
    activation: str = "softmax",
    causal: bool = True,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    return_stats: bool = False,
    upcast: bool = True,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """The definition; see :func:`attnvariants.diag_attention`.

    ``upcast`` computes half precision inputs in float32 and rounds the result once; without it
    every operation runs and rounds in the dtype of its operands.
    """
    dtype, group = v.dtype, q.shape[2] // k.shape[2]
    if upcast:
        wide = state_dtype(dtype)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    visible = same_block(q.shape[1], block_size, causal, cu_seqlens, q)

    k, v = (repeat(x, "b s h d -> b s (h group) d", group=group) for x in (k, v))
    logits = scale * einsum(q, k, "b t h k, b s h k -> b h t s")
    if activation == "softmax":
        p = logits.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    else:
        p = logits.relu().masked_fill(~visible, 0.0)
    out = einsum(p, v, "b h t s, b s h v -> b t h v").to(dtype)
    if not return_stats:
        return out
    largest = logits.detach().masked_fill(~visible, float("-inf")).amax(dim=(0, 2, 3))
    return out, AttentionStats(largest.to(state_dtype(dtype)), None)


def same_block(
    length: int, block_size: int, causal: bool, cu_seqlens: Tensor | None, like: Tensor
) -> Tensor:
    """Which keys each query sees, ``[T, T]``; blocks restart where a sequence starts."""
    i = torch.arange(length, device=like.device)
    document = torch.zeros_like(i)
    start = torch.zeros_like(i)
    if cu_seqlens is not None:
        if not torch.compiler.is_compiling():
            sequence_bounds("diag_attention", cu_seqlens, length)
        document = torch.bucketize(i, cu_seqlens[1:], right=True)
        start = cu_seqlens[document]
    block = (i - start) // block_size
    visible = (document[:, None] == document) & (block[:, None] == block)
    return visible & (i[:, None] >= i) if causal else visible
