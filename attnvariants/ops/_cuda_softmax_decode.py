"""One decode step of softmax attention by the CUDA C++ kernel, as one launch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from attnvariants._counters import counters
from attnvariants.ops._cuda import contiguous_rows
from attnvariants.ops._library import declare

_GATES = (None, "sigmoid", "ns_sigmoid", "softplus")  # in the order of csrc/activations.cuh

declare(
    "_softmax_decode(Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor(c!) lengths, int[] capacities, float softmax_scale, "
    "int gate_activation, Tensor(d!) arrivals, Tensor(e!) out, Tensor(f!) row_max, "
    "Tensor(g!) lse) -> ()"
)


def attend(
    q: Tensor,  # [B, Q, H, K]
    k: Tensor,  # [B, Q, Hkv, K]
    v: Tensor,  # [B, Q, Hkv, V]
    gate: Tensor | None,  # logits [B, Q, H, V] or [B, Q, H]
    k_cache: Tensor,  # [B, slots, K], contiguous as v_cache and lengths are
    v_cache: Tensor,  # [B, slots, V]
    lengths: Tensor,  # int32 [B]
    capacities: Sequence[int],
    max_filled: int,
    softmax_scale: float,
    gate_activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attends to the cache and to the new keys, then writes these to the cache.

    Returns:
        The gated output ``[B, Q, H, V]``, and per query the largest visible logit and the log of
        the denominator, fp32 ``[B, Q, H]``.
    """
    importlib.import_module("attnvariants._C")
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=v.dtype, device=v.device)
    row_max, lse = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    if q.shape[0]:
        activation = _GATES.index(None if gate is None else gate_activation)
        if gate is not None and gate.dim() == 4:
            gate = contiguous_rows(gate)
        torch.ops.attnvariants._softmax_decode(
            *(contiguous_rows(q), contiguous_rows(k), contiguous_rows(v), gate),
            *(k_cache, v_cache, lengths, capacities, softmax_scale, activation),
            *(counters(lengths, lengths.numel() * (len(capacities) + 1), q), out, row_max, lse),
        )
    return out, row_max, lse
