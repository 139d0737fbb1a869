"""Decode steps of linear attention by the CUDA C++ kernel, as one launch."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from attnvariants._counters import counters
from attnvariants.ops._cuda import MAPS, NORMS, channels, contiguous_rows
from attnvariants.ops._library import declare

declare(
    "_linear_decode(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor(a!) state, "
    "Tensor(b!)? lengths, Tensor? norm_weight, Tensor? gate, Tensor(c!)? arrivals, "
    "Tensor(d!) out, int feature_map, float scale, int norm, float eps, int gate_activation) -> ()"
)


def attend(
    q: Tensor,  # [B, Q, H, K]
    k: Tensor,  # [B, Q, H, K]
    v: Tensor,  # [B, Q, H, V]
    g: Tensor | None,  # [B, Q, H, K], [B, Q, H] or [H]
    state: Tensor,  # fp32 or bf16 [B, H, K, V]
    lengths: Tensor | None,  # int32 [B]
    norm_weight: Tensor | None,  # [H, V] or [V]
    gate: Tensor | None,  # [B, Q, H, V] or [B, Q, H]
    feature_map: str | None,
    scale: float,
    norm: str | None,
    eps: float,
    gate_activation: str | None,
) -> Tensor:
    """Carries on from ``state``, in place, and advances ``lengths``."""
    importlib.import_module("attnvariants._C")
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    rows = contiguous_rows(state)
    torch.ops.attnvariants._linear_decode(
        *(contiguous_rows(q), contiguous_rows(k), contiguous_rows(v), channels(g)),
        *(rows, lengths, None if norm_weight is None else contiguous_rows(norm_weight)),
        channels(gate),
        None if norm is None else counters(lengths, q.shape[0] * q.shape[2], q),
        *(out, MAPS.index(feature_map), scale, NORMS.index(norm), eps),
        MAPS.index(gate_activation),
    )
    if rows is not state:
        state.copy_(rows)
    return out
