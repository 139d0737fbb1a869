"""Attention inside blocks of the sequence in plain PyTorch, many blocks at a time.

Half precision is computed in float32 and rounded once. The backward computes the scores again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from attnvariants._checks import sequence_bounds, state_dtype
from attnvariants.eager._tiles import (
    LOG2_E,
    by_group,
    by_head,
    exp_,
    products,
    put_rows,
    take_rows,
)

_SCORES = 2**18  # at a time


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    activation: str,
    causal: bool,
    scale: float,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the operator ``diag_forward``; no log-sum-exp, the backward needs none."""
    wide = state_dtype(v.dtype)
    blocks = Blocks(q, cu_seqlens, block_size, causal)
    queries, keys, values = (blocks.cut(x.to(wide)) for x in (q, k, v))
    out = queries.new_empty(*queries.shape[:3], v.shape[-1])
    max_logit = queries.new_full((q.shape[2],), float("-inf"))
    for part in blocks.parts(q.shape[2]):
        p = blocks.logits(queries[part], keys[part], part, scale)  # [n * Hkv, G * w, w]
        if stats:
            largest = p.view(part.stop - part.start, q.shape[2], -1).amax(dim=(0, 2))
            torch.maximum(max_logit, largest, out=max_logit)
        _activate_(p, activation)
        o = torch.bmm(p, by_head(values[part]))
        put_rows(by_group(out[part], k.shape[2]), slice(None), o)
    lse = max_logit.new_empty(q.shape[0], q.shape[2], 0).transpose(1, 2)
    return blocks.join(out).to(v.dtype), lse, max_logit if stats else max_logit.new_empty(0)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    cu_seqlens: Tensor | None,
    block_size: int,
    activation: str,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the operator ``diag_backward``."""
    wide, kv_heads = state_dtype(v.dtype), k.shape[2]
    blocks = Blocks(q, cu_seqlens, block_size, causal)
    queries, keys, values, douts = (blocks.cut(x.to(wide)) for x in (q, k, v, dout))
    douts = blocks.without_padding(douts)
    dq, dk, dv = (x.new_empty(x.shape) for x in (queries, keys, values))
    for part in blocks.parts(q.shape[2]):
        p = blocks.logits(queries[part], keys[part], part, scale)
        _activate_(p, activation)
        d = take_rows(by_group(douts[part], kv_heads), slice(None))  # [n * Hkv, G * w, V]
        ds = torch.bmm(d, by_head(values[part]).mT)
        _activation_backward_(ds, p, activation)
        put_rows(by_group(dv[part], kv_heads), slice(None), torch.bmm(p.mT, d))
        dq_part = torch.bmm(ds, by_head(keys[part])).mul_(scale)
        put_rows(by_group(dq[part], kv_heads), slice(None), dq_part)
        dk_part = torch.bmm(ds.mT, take_rows(by_group(queries[part], kv_heads), slice(None)))
        put_rows(by_group(dk[part], kv_heads), slice(None), dk_part.mul_(scale))
    return (
        blocks.join(dq).to(q.dtype),
        blocks.join(dk).to(k.dtype),
        blocks.join(dv).to(v.dtype),
    )


class Blocks:
    """Cuts ``[B, T, ...]`` into blocks ``[n, w, ...]`` and joins them again.

    A block that the end of its sequence shortens is filled up with copies of its last token, which
    never adds a logit that is not visible anyway.
    """

    def __init__(
        self, like: Tensor, cu_seqlens: Tensor | None, block_size: int, causal: bool
    ) -> None:
        self.batch, self.length = like.shape[:2]
        self.width = min(block_size, self.length)
        self.tokens: Tensor | None = None  # [blocks of a batch entry * w]: the token at each place
        self.places: Tensor | None = None  # [T]: the place of each token
        device = like.device
        if cu_seqlens is not None:
            self._plan_packed(sequence_bounds("diag_attention", cu_seqlens, self.length), device)
        elif self.length % self.width:
            places = torch.arange(-(-self.length // self.width) * self.width, device=device)
            self.tokens = places.clamp(max=self.length - 1)
            self.places = places[: self.length]
        self.padded = None if self.tokens is None else self._find_padding(self.tokens)
        self.limit = self._limit(causal, state_dtype(like.dtype), device)

    def _plan_packed(self, bounds: list[int], device: torch.device) -> None:
        sequences = list(itertools.pairwise(bounds))
        lengths = [last - first for first, last in sequences]
        self.width = min(self.width, max(lengths))
        starts: list[int] = []
        ends: list[int] = []
        shifts: list[int] = []
        for first, last in sequences:
            shifts.append(len(starts) * self.width - first)
            starts += range(first, last, self.width)
            ends += [min(start + self.width, last) - 1 for start in range(first, last, self.width)]
        within = torch.arange(self.width, device=device)
        begin, end = torch.tensor([starts, ends], device=device)[..., None]
        self.tokens = torch.minimum(begin + within, end).flatten()
        shift = torch.tensor(shifts, device=device)
        repeats = torch.tensor(lengths, device=device)
        offsets = torch.repeat_interleave(shift, repeats, output_size=self.length)
        self.places = torch.arange(self.length, device=device) + offsets

    def _find_padding(self, tokens: Tensor) -> Tensor:
        """``[n, w]``, true at the copies."""
        tokens = tokens.view(-1, self.width)
        copied = torch.zeros_like(tokens, dtype=torch.bool)
        copied[:, 1:] = tokens[:, 1:] == tokens[:, :-1]
        return copied.repeat(self.batch, 1)

    def _limit(self, causal: bool, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """The largest logits allowed, broadcasting over ``[n, H, w, w]``; ``None`` for any."""
        if causal:  # hides the copies from every real query too
            hidden = torch.ones(self.width, self.width, dtype=torch.bool, device=device).triu(1)
            hidden = hidden[None, None]
        elif self.padded is not None:
            hidden = self.padded[:, None, None, :]
        else:
            return None
        visible = torch.full(hidden.shape, float("inf"), dtype=dtype, device=device)
        return visible.masked_fill_(hidden, float("-inf"))

    def parts(self, heads: int) -> Iterator[slice]:
        """Slices of the blocks that are worked on at a time."""
        per_sequence = (self.length if self.tokens is None else len(self.tokens)) // self.width
        count = self.batch * per_sequence
        size = max(1, _SCORES // (heads * self.width**2))
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))

    def cut(self, x: Tensor) -> Tensor:
        """``[B, T, ...]`` as ``[n, w, ...]``."""
        x = x if self.tokens is None else x.index_select(1, self.tokens)
        return x.unflatten(1, (-1, self.width)).flatten(0, 1)

    def join(self, x: Tensor) -> Tensor:
        """``[n, w, ...]`` as contiguous ``[B, T, ...]``."""
        x = x.unflatten(0, (self.batch, -1)).flatten(1, 2)
        return x.contiguous() if self.places is None else x.index_select(1, self.places)

    def without_padding(self, x: Tensor) -> Tensor:
        """``[n, w, H, D]`` with zeros at the copies."""
        return x if self.padded is None else x.masked_fill(self.padded[..., None, None], 0.0)

    def logits(self, q: Tensor, k: Tensor, part: slice, scale: float) -> Tensor:
        """``[n * Hkv, G * w, w]`` of the blocks in ``part``, ``-inf`` where hidden."""
        count, heads = q.shape[0], q.shape[2]
        rows = take_rows(by_group(q, k.shape[2]), slice(None))
        buffer = q.new_empty(count * heads * self.width**2)
        logits = products(rows, by_head(k), buffer, scale)
        if self.limit is not None:
            view = logits.view(count, heads, self.width, self.width)
            limit = self.limit if self.limit.shape[0] == 1 else self.limit[part]
            torch.minimum(view, limit, out=view)
        return logits


def _activate_(logits: Tensor, activation: str) -> Tensor:
    """Probabilities, or the rectified logits of ReLA, in place."""
    if activation == "relu":
        return logits.relu_()
    _, total = exp_(logits.mul_(LOG2_E))
    return logits.div_(total)


def _activation_backward_(dp: Tensor, p: Tensor, activation: str) -> Tensor:
    """The gradient of the logits from that of :func:`_activate_`'s result, in place."""
    if activation == "relu":
        return dp.mul_(p.sign())
    delta = (p * dp).sum(dim=-1, keepdim=True)
    return dp.sub_(delta).mul_(p)
