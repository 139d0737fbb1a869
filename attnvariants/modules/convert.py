"""Weights of other implementations in the layout of the layers here.

Weights are those of ``nn.Linear``, ``[out, in]``; biases ``[out]`` go through the same functions.

"Official" is the layout of the gated attention paper's repository: per KV head, the rows of its
``H / Hkv`` query heads and then their gates. "HF" is that of Qwen3-Next in transformers: per query
head, its own rows and then its gate. They differ as soon as query heads share a KV head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_official(
    q_proj: Tensor, num_heads: int, num_kv_heads: int, gate: str = "elementwise"
) -> tuple[Tensor, Tensor]:
    """The official query projection as the weights of ``q_proj`` and ``gate_proj``.

    Args:
        q_proj: ``[2 H D, in]``, or ``[H D + H, in]`` for the headwise gate.
        num_heads: query heads ``H``.
        num_kv_heads: key/value heads ``Hkv``.
        gate: ``"elementwise"`` or ``"headwise"``.

    Returns:
        ``[H D, in]``, and ``[H D, in]`` or ``[H, in]``.

    Raises:
        ValueError: the rows do not divide as described.
    """
    group = _group(num_heads, num_kv_heads)
    head_dim = _head_dim(q_proj, num_heads, gate)
    sizes = [group * head_dim, group * (head_dim if gate == "elementwise" else 1)]
    q, logits = q_proj.unflatten(0, (num_kv_heads, sum(sizes))).split(sizes, dim=1)
    return q.flatten(0, 1), logits.flatten(0, 1)


def split_hf(q_proj: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """The HF query projection ``[2 H D, in]`` as ``q_proj`` and ``gate_proj``, ``[H D, in]`` each.

    Raises:
        ValueError: the rows do not divide as described.
    """
    return split_official(q_proj, num_heads, num_heads)  # one query head per group


def official_to_hf(q_proj: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """Reorders an elementwise query projection ``[2 H D, in]`` from official to HF.

    Raises:
        ValueError: the rows do not divide as described.
    """
    q, gate = split_official(q_proj, num_heads, num_kv_heads)
    return _merge(q, gate, num_heads)


def hf_to_official(q_proj: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """Reorders an elementwise query projection ``[2 H D, in]`` from HF to official.

    Raises:
        ValueError: the rows do not divide as described.
    """
    _group(num_heads, num_kv_heads)
    q, gate = split_hf(q_proj, num_heads)
    return _merge(q, gate, num_kv_heads)


def split_long_short(c_local_attn: Tensor, c_global_attn: Tensor, head_dim: int) -> list[Tensor]:
    """The two projections of the LS-attention author's 2026 code as q, k and v weights.

    Args:
        c_local_attn: ``[3 s D, in]``: q, k and v rows of the local heads.
        c_global_attn: ``[3 g D, in]``: those of the global heads.
        head_dim: ``D``.

    Returns:
        Three weights ``[(s + g) D, in]``, local heads first. (His 2025 code has them as one
        weight: ``c_attn.chunk(3)``.)

    Raises:
        ValueError: the rows do not divide as described.
    """
    for name, weight in (("c_local_attn", c_local_attn), ("c_global_attn", c_global_attn)):
        if weight.shape[0] % (3 * head_dim):
            raise ValueError(
                f"{name} has {weight.shape[0]} rows, expected a multiple of 3 * head_dim="
                f"{3 * head_dim}"
            )
    pairs = zip(c_local_attn.chunk(3), c_global_attn.chunk(3), strict=True)
    return [torch.cat(pair) for pair in pairs]


def _merge(q: Tensor, gate: Tensor, groups: int) -> Tensor:
    """Rows of ``q`` and ``gate`` in turns, one group of rows at a time."""
    halves = [rows.unflatten(0, (groups, -1)) for rows in (q, gate)]
    return torch.cat(halves, dim=1).flatten(0, 1)


def _group(num_heads: int, num_kv_heads: int) -> int:
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
    return num_heads // num_kv_heads


def _head_dim(q_proj: Tensor, num_heads: int, gate: str) -> int:
    if gate not in ("elementwise", "headwise"):
        raise ValueError(f"gate must be 'elementwise' or 'headwise', got {gate!r}")
    rows, rest = divmod(q_proj.shape[0], num_heads)
    head_dim, odd = divmod(rows, 2) if gate == "elementwise" else (rows - 1, 0)
    if rest or odd or head_dim < 1:
        expected = "2 * H * D" if gate == "elementwise" else "H * D + H"
        raise ValueError(
            f"q_proj has {q_proj.shape[0]} rows, expected {expected} for {num_heads} heads"
        )
    return head_dim
