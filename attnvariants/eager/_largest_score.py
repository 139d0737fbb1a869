"""The largest score of a linear attention over all visible pairs: a pass of O(T^2)."""

from __future__ import annotations

import torch
from torch import Tensor

from attnvariants.eager._chunks import segments
from attnvariants.eager._decay import decay_of
from attnvariants.eager._rows import Inputs

_QUERIES, _KEYS = 256, 4096  # at a time


def largest_score(inputs: Inputs, causal: bool) -> Tensor:
    """``max |phi(q_i) . phi(k_j) * decay_ij|`` per head, ``[H]``."""
    search = _causal if causal else _bidirectional
    largest = torch.zeros(inputs.heads, dtype=inputs.wide, device=inputs.device)
    for start, end in zip(inputs.bounds[:-1], inputs.bounds[1:], strict=True):
        if end > start:
            largest = torch.maximum(largest, search(inputs, start, end))
    return largest


def _causal(inputs: Inputs, start: int, end: int) -> Tensor:
    """One sequence, chunk by chunk, with all earlier keys decayed to the start of the chunk."""
    found = []
    decayed = inputs.k.new_empty(inputs.heads, end - start, inputs.key_dim, dtype=inputs.wide)
    for segment in segments([start, end], inputs.heads, inputs.device):
        queries = segment.tiles(inputs.queries(segment.rows))
        keys = segment.tiles(inputs.keys(segment.rows))
        decay = decay_of(inputs, segment)
        found.append(_largest(decay.scores(decay.operands(queries, keys)).transpose(0, 1)))
        queries, keys = decay.from_start(queries), decay.to_end(keys)
        for index, chunk in enumerate(segment.chunks):
            first, last = chunk.start - start, chunk.end - start
            found += _against(queries[index], decayed[:, :first])
            decay.age(index, decayed[:, :first])
            decayed[:, first:last] = keys[index, :, : last - first]
    return torch.stack(found).amax(0)


def _bidirectional(inputs: Inputs, start: int, end: int) -> Tensor:
    found = []
    keys = inputs.keys(slice(start, end)).transpose(0, 1)  # [H, L, K]
    for first in range(start, end, _QUERIES):
        rows = slice(first, min(first + _QUERIES, end))
        found += _against(inputs.queries(rows).transpose(0, 1), keys)
    return torch.stack(found).amax(0)


def _against(queries: Tensor, keys: Tensor) -> list[Tensor]:
    """The largest scores ``[H]`` of ``queries [H, C, K]`` with each block of ``keys [H, L, K]``."""
    blocks = keys.split(_KEYS, dim=1) if keys.shape[1] else ()
    return [_largest(queries @ block.mT) for block in blocks]


def _largest(scores: Tensor) -> Tensor:
    """``max |scores|`` per head, of ``[H, ...]``."""
    return scores.flatten(1).abs().amax(1)
