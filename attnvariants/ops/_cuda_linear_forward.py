"""Linear attention over whole sequences by the CUDA C++ kernels: inference, no gradients."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from attnvariants.ops._cuda import MAPS, NORMS, channels, contiguous_rows
from attnvariants.ops._library import declare

declare(
    "_linear_forward(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? initial_state, "
    "Tensor? cu_seqlens, Tensor? norm_weight, Tensor? gate, Tensor(a!) out, Tensor(b!) state, "
    "int feature_map, bool causal, float scale, int norm, float eps, int gate_activation) -> ()"
)


def forward(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, H, V]
    g: Tensor | None,  # [B, T, H, K], [B, T, H] or [H]
    initial_state: Tensor | None,  # fp32 [N, H, K, V]
    cu_seqlens: Tensor | None,  # int32 [N + 1]
    norm_weight: Tensor | None,  # [H, V] or [V]
    gate: Tensor | None,  # [B, T, H, V] or [B, T, H]
    feature_map: str | None,
    causal: bool,
    scale: float,
    norm: str | None,
    eps: float,
    gate_activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of the operator ``linear_forward``; those for a backward are left empty."""
    importlib.import_module("attnvariants._C")
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    state = q.new_empty(sequences, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    torch.ops.attnvariants._linear_forward(
        *(contiguous_rows(q), contiguous_rows(k), contiguous_rows(v), channels(g)),
        None if initial_state is None else initial_state.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        None if norm_weight is None else contiguous_rows(norm_weight),
        *(channels(gate), out, state, MAPS.index(feature_map), causal, scale, NORMS.index(norm)),
        *(eps, MAPS.index(gate_activation)),
    )
    return out, v.new_empty(0), q.new_empty(0, dtype=torch.float32), state
