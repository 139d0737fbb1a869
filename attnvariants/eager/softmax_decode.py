"""One decode step of softmax attention in plain PyTorch, grouped by heads of equal capacity."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attnvariants._checks import state_dtype
from attnvariants.kv_cache import HeadRun, head_runs, write

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "ns_sigmoid": lambda logits: 0.5 + 0.5 * torch.sigmoid(logits),
    "softplus": lambda logits: -F.logsigmoid(-logits),
}


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
    wide = state_dtype(v.dtype)
    queries = q.to(wide).mul(softmax_scale).unflatten(2, (k.shape[2], -1))  # [B, Q, Hkv, G, K]
    parts = []
    for run in head_runs(capacities):
        keys, values = k[:, :, run.heads].to(wide), v[:, :, run.heads].to(wide)
        parts.append(
            _attend_run(
                queries[:, :, run.heads],
                (run.view(k_cache)[:, :, :max_filled].to(wide), keys.transpose(1, 2)),
                (run.view(v_cache)[:, :, :max_filled].to(wide), values.transpose(1, 2)),
                _visible(run, lengths, max_filled, q.shape[1]),
            )
        )
    write(k_cache, v_cache, lengths, capacities, k, v)
    lengths.add_(q.shape[1])
    out, row_max, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    if gate is not None:
        gate = gate.to(wide)
        out *= ACTIVATIONS[gate_activation](gate if gate.dim() == 4 else gate[..., None])
    return out.to(v.dtype), row_max, lse


def _attend_run(
    queries: Tensor,  # [B, Q, h, G, K]
    keys: tuple[Tensor, Tensor],  # [B, h, n, K] cached, [B, h, Q, K] new
    values: tuple[Tensor, Tensor],  # [B, h, n, V], [B, h, Q, V]
    visible: Tensor,  # [B, Q, n + Q]
) -> tuple[Tensor, Tensor, Tensor]:
    steps, group = queries.shape[1], queries.shape[3]
    queries = queries.permute(0, 2, 1, 3, 4).flatten(2, 3)  # [B, h, Q * G, K]
    scores = torch.cat([queries @ part.mT for part in keys], dim=-1)  # [B, h, Q * G, n + Q]
    hidden = ~visible.repeat_interleave(group, dim=1)[:, None]
    scores = scores.masked_fill_(hidden, -torch.inf)
    row_max = scores.amax(-1, keepdim=True)  # finite: a query sees at least its own key
    p = scores.sub_(row_max).exp_()
    denominator = p.sum(-1, keepdim=True)
    old, new = p.split([p.shape[-1] - steps, steps], dim=-1)
    out = (old @ values[0] + new @ values[1]) / denominator
    lse = row_max + denominator.log()
    out, row_max, lse = (
        x.unflatten(2, (steps, group)).transpose(1, 2).flatten(2, 3) for x in (out, row_max, lse)
    )
    return out, row_max.squeeze(-1), lse.squeeze(-1)


def _visible(run: HeadRun, lengths: Tensor, max_filled: int, steps: int) -> Tensor:
    """Which keys each query of the step sees, ``[B, Q, n + Q]``: cached slots, then new keys.

    Positions are absolute. Slot s of a ring holds the latest position before ``length`` that is s
    modulo the capacity; it is negative where the slot is still empty.
    """
    length = lengths[:, None].long()
    slots = torch.arange(min(max_filled, run.capacity), device=lengths.device)
    old = length - 1 - (length - 1 - slots) % run.capacity  # [B, n]
    step = torch.arange(steps, device=lengths.device)
    positions = torch.cat([old, length + step], dim=1)[:, None]  # [B, 1, n + Q]
    distance = (length + step)[:, :, None] - positions
    return (positions >= 0) & (distance >= 0) & (distance < run.capacity)
