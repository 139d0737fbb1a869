"""One decode step of softmax attention in plain PyTorch, grouped by heads of equal capacity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnvariants._checks import state_dtype
from attnvariants.eager._gate import activate
from attnvariants.kv_cache import HeadRun, head_runs, write


def attend(
    q: Tensor,  # [B, Q, H, K]
    k: Tensor,  # [B, Q, Hkv, K]
    v: Tensor,  # [B, Q, Hkv, V]
    gate: Tensor | None,  # logits [B, Q, H, V] or [B, Q, H]
    k_cache: Tensor,  # [B, slots, K]
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
        the denominator, ``[B, Q, H]`` in float32 (float64 for float64 inputs).
    """
    wide, steps = state_dtype(v.dtype), q.shape[1]
    queries = q.to(wide).mul(softmax_scale).unflatten(2, (k.shape[2], -1))  # [B, Q, Hkv, G, K]
    parts = []
    for run in head_runs(capacities):
        # A step of one token overwrites only a key that it no longer sees.
        overwrites = steps > 1 and max_filled + steps > run.capacity
        keys, values = (
            _extended(run, buffer, lengths, new, max_filled + steps, overwrites)
            for buffer, new in ((k_cache, k), (v_cache, v))
        )
        held = _held(lengths, steps, run.capacity, overwrites)[:, : keys.shape[2]]  # [B, n]
        position = lengths[:, None] + torch.arange(steps, device=q.device)  # [B, Q]
        distance = position[:, :, None] - held[:, None]
        visible = (held >= 0)[:, None] & (distance >= 0) & (distance < run.capacity)
        parts.append(_softmax(queries[:, :, run.heads], keys.to(wide), values.to(wide), visible))
    lengths.add_(steps)
    out, row_max, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    if gate is not None and gate_activation is not None:
        opening = activate(gate_activation, gate.to(wide))
        out *= opening if gate.dim() == 4 else opening[..., None]
    return out.to(v.dtype), row_max, lse


def _extended(
    run: HeadRun, buffer: Tensor, lengths: Tensor, new: Tensor, filled: int, overwrites: bool
) -> Tensor:
    """Writes ``new`` and returns cached and new rows, ``[B, h, n, D]``: a view where it can be."""
    view = run.view(buffer)
    if overwrites:
        view = torch.cat([view, new[:, :, run.heads].transpose(1, 2)], dim=2)
    write(run, buffer, lengths, new)
    return view if overwrites else view[:, :, :filled]


def _held(lengths: Tensor, steps: int, capacity: int, overwrites: bool) -> Tensor:
    """The position of every row of :func:`_extended`, negative where the slot is still empty.

    Slot s of a ring holds the latest position that is s modulo the capacity.
    """
    step = torch.arange(steps, device=lengths.device)
    last = lengths[:, None] - 1 + (0 if overwrites else steps)
    held = last - (last - torch.arange(capacity, device=lengths.device)) % capacity
    return torch.cat([held, lengths[:, None] + step], dim=1) if overwrites else held


def _softmax(
    queries: Tensor,  # [B, Q, h, G, K]
    keys: Tensor,  # [B, h, n, K]
    values: Tensor,  # [B, h, n, V]
    visible: Tensor,  # [B, Q, n]
) -> tuple[Tensor, Tensor, Tensor]:
    rows = queries.shape[1], queries.shape[3]
    queries = queries.transpose(1, 2).flatten(2, 3)  # [B, h, Q * G, K]
    p = (queries @ keys.mT).unflatten(2, rows)  # [B, h, Q, G, n]
    p = p.masked_fill_(~visible[:, None, :, None], -torch.inf)
    row_max = p.amax(-1, keepdim=True)  # finite: a query sees at least its own key
    p = p.sub_(row_max).exp_()
    denominator = p.sum(-1, keepdim=True)
    out = (p.flatten(2, 3) @ values).unflatten(2, rows) / denominator
    out, row_max, lse = (
        x.transpose(1, 2).flatten(2, 3) for x in (out, row_max, row_max + denominator.log())
    )
    return out, row_max.squeeze(-1), lse.squeeze(-1)
