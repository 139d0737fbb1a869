"""Softmax attention over whole sequences by the CUDA C++ kernel, as one launch; no backward."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnvariants.ops._cuda import contiguous_rows
from attnvariants.ops._library import declare

_GATES = (None, "sigmoid", "ns_sigmoid", "softplus")  # in the order of csrc/types.h
_MAX_BANDS = 128  # of csrc/softmax_forward.h

declare(
    "_softmax_forward(Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? cu_seqlens, "
    "int[] windows, bool causal, float softmax_scale, int gate_activation, int block_size, "
    "bool relu, Tensor(a!) out, Tensor(b!)? lse, Tensor(c!)? max_logit) -> ()"
)


def obstacles(windows: Sequence[int]) -> Mapping[str, str]:
    """Why the kernel cannot serve these windows, for ``select``."""
    bands = sum(1 for _ in itertools.groupby(windows))
    if bands <= _MAX_BANDS:
        return {}
    return {
        "cuda": f"it takes windows that change up to {_MAX_BANDS - 1} times from one KV head to "
        f"the next, got {bands - 1} times"
    }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    cu_seqlens: Tensor | None,
    windows: Sequence[int],
    causal: bool,
    softmax_scale: float,
    gate_activation: str | None,
    stats: bool,
    *,
    block_size: int = 0,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the operator ``softmax_forward``.

    ``block_size`` makes blocks of that many tokens see only each other, and ``relu`` weighs values
    by the relu of the logits; there is then no log-sum-exp.
    """
    importlib.import_module("attnvariants._C")
    batch, length, heads, _ = q.shape
    out = torch.empty(batch, length, heads, v.shape[3], dtype=v.dtype, device=v.device)
    lse = q.new_empty(batch, heads, 0 if relu else length, dtype=torch.float32)
    max_logit = q.new_full((heads if stats else 0,), -torch.inf, dtype=torch.float32)
    if softmax_scale < 0:  # the kernel takes the largest logit of a row before it scales it
        q, softmax_scale = q.neg(), -softmax_scale
    if gate is not None and gate.dim() == 4:
        gate = contiguous_rows(gate)
    torch.ops.attnvariants._softmax_forward(
        *(contiguous_rows(q), contiguous_rows(k), contiguous_rows(v), gate),
        *(None if cu_seqlens is None else cu_seqlens.contiguous(), windows, causal),
        *(softmax_scale, _GATES.index(gate_activation), block_size, relu),
        *(out, None if relu else lse, max_logit if stats else None),
    )
    return out, lse.transpose(1, 2), max_logit
