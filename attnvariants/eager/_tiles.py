"""Softmax attention by blocks of queries, each against the keys it can see; any device.

Logits are kept to base 2, ``exp(s) = 2 ** (log2(e) * s)``: on a CPU exp2 takes a third of exp's
time, and the factor joins the scale of the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from attnvariants._checks import UNLIMITED

_BLOCK = 128  # queries at a time
_LOCAL_BLOCK = 64  # the same with a window: fewer hidden scores
_MIN_BLOCK = 16
_MAX_SCORES = 2**24  # scores at a time, down to _MIN_BLOCK queries
LOG2_E = math.log2(math.e)
LN_2 = math.log(2)


class Tiles:
    """Cuts attention into blocks of queries and computes the masked logits of each.

    Iterating gives ``(rows, columns)``: slices of the queries and of the keys that any of them
    sees. Query i stands at position ``i + S - T``. The query heads of one KV head are folded into
    the rows of a tile.
    """

    def __init__(self, q: Tensor, k: Tensor, scale: float, causal: bool, window: int) -> None:
        self.q, self.k = by_group(q, k.shape[2]), by_head(k)
        self.scale, self.causal, self.window = scale * LOG2_E, causal, window
        self.queries, self.keys = q.shape[1], k.shape[1]
        self.lead = self.keys - self.queries
        self.parallel = q.shape[0] * q.shape[2]
        self.block = self._block_size()
        # The largest logits allowed: all on and below the diagonal, none above it.
        above = torch.ones(self.block, self.block, dtype=torch.bool, device=q.device).triu(1)
        self.limit = q.new_full(above.shape, float("inf")).masked_fill_(above, float("-inf"))

    def _block_size(self) -> int:
        block = _BLOCK if self.window == UNLIMITED else _LOCAL_BLOCK
        while block > _MIN_BLOCK and self._scores_of(block) > _MAX_SCORES:
            block //= 2
        return min(block, self.queries)

    def _scores_of(self, block: int) -> int:
        local = self.window != UNLIMITED
        keys = min(self.keys, block + self.window - 1) if local else self.keys
        return self.parallel * block * keys

    def buffer(self) -> Tensor:
        """Memory for the scores of the largest tile."""
        return self.q.new_empty(self._scores_of(self.block))

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        for start in range(0, self.queries, self.block):
            stop = min(start + self.block, self.queries)
            first, last = 0, self.keys
            if self.causal:
                last = stop + self.lead
            if self.window != UNLIMITED:
                first = max(0, start + self.lead - self.window + 1)
            yield slice(start, stop), slice(first, last)

    def logits(self, rows: slice, columns: slice, buffer: Tensor) -> Tensor:
        """To base 2, ``[N * Hkv, G * rows, columns]`` in ``buffer``, ``-inf`` where hidden."""
        logits = products(take_rows(self.q, rows), self.k[:, columns], buffer, self.scale)
        if self.causal:
            self._hide(logits.unflatten(1, (self.q.shape[2], -1)), rows, columns)
        return logits

    def _hide(self, logits: Tensor, rows: slice, columns: slice) -> None:
        count = rows.stop - rows.start
        last = logits[..., -count:]
        torch.minimum(last, self.limit[:count, :count], out=last)
        if self.window == UNLIMITED:
            return
        # Row r no longer sees the first r - spared keys of the tile.
        spared = columns.start - (rows.start + self.lead - self.window + 1)
        if spared < count:
            first = logits[..., spared:, : count - spared]
            torch.minimum(first, self.limit.mT[: count - spared, : count - spared], out=first)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[N, T, H, V]``, log-sum-exp ``[N, T, H]`` and largest logit ``[H]``.

    Args:
        q: ``[N, T, H, K]``; with ``causal``, ``T <= S``.
        k: ``[N, S, Hkv, K]``.
        v: ``[N, S, Hkv, V]``.
        scale: of the logits.
        causal: whether a query sees only the keys up to its own.
        window: how many keys it sees, itself included, or ``UNLIMITED``.
    """
    tiles = Tiles(q, k, scale, causal, window)
    values, buffer = by_head(v), tiles.buffer()
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse, largest = q.new_empty(q.shape[:3]), q.new_empty(q.shape[:3])
    outs, lses, maxima = (by_group(x, k.shape[2]) for x in (out, lse, largest))
    for rows, columns in tiles:
        p = tiles.logits(rows, columns, buffer)
        row_max, total = exp_(p)
        put_rows(outs, rows, torch.bmm(p, values[:, columns]).div_(total))
        put_rows(lses, rows, row_max.add(total.log2()).squeeze(-1))
        put_rows(maxima, rows, row_max.squeeze(-1))
    return out, lse.mul_(LN_2), largest.amax(dim=(0, 1)).mul_(LN_2)


def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v: ``dS = P * (dP - D + dlse)`` with ``dP = dout v^T``.

    A tile holds whole rows of P, so that it needs neither their log-sum-exp nor the output:
    ``D = sum(P * dP)`` cancels exactly where a row sees a single key.
    """
    tiles = Tiles(q, k, scale, causal, window)
    values, p_buffer, ds_buffer = by_head(v), tiles.buffer(), tiles.buffer()
    dq, dk, dv = q.new_empty(q.shape), torch.zeros_like(tiles.k), torch.zeros_like(values)
    dqs, douts, dlses = (by_group(x, k.shape[2]) for x in (dq, dout, dlse))
    for rows, columns in tiles:
        p = tiles.logits(rows, columns, p_buffer)  # P = p / total
        _, total = exp_(p)
        d = take_rows(douts, rows) / total  # [N * Hkv, G * rows, V]
        dv[:, columns] += torch.bmm(p.mT, d)
        ds = products(d, values[:, columns], ds_buffer).mul_(p)
        delta = ds.sum(dim=-1, keepdim=True)
        ds.addcmul_(p, (take_rows(dlses, rows)[..., None] - delta) / total)
        put_rows(dqs, rows, torch.bmm(ds, tiles.k[:, columns]).mul_(scale))
        dk[:, columns] += torch.bmm(ds.mT, take_rows(tiles.q, rows))
    dk.mul_(scale)
    return dq, *(x.unflatten(0, (-1, k.shape[2])).transpose(1, 2) for x in (dk, dv))


def products(left: Tensor, right: Tensor, buffer: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * left @ right^T`` per batch in ``buffer``."""
    shape = (left.shape[0], left.shape[1], right.shape[1])
    out = buffer[: math.prod(shape)].view(shape)
    return out.baddbmm_(left, right.mT, beta=0, alpha=scale)


def by_group(x: Tensor, kv_heads: int) -> Tensor:
    """``[N, T, H, ...]`` as a view ``[N, Hkv, G, T, ...]``."""
    return x.unflatten(2, (kv_heads, -1)).movedim(1, 3)


def take_rows(x: Tensor, rows: slice) -> Tensor:
    """Rows of ``[N, Hkv, G, T, ...]`` as ``[N * Hkv, G * rows, ...]``."""
    return x[:, :, :, rows].flatten(2, 3).flatten(0, 1)


def put_rows(target: Tensor, rows: slice, x: Tensor) -> None:
    """Writes what :func:`take_rows` would take."""
    part = target[:, :, :, rows]
    part.copy_(x.view(part.shape))


def by_head(x: Tensor) -> Tensor:
    """``[N, S, Hkv, D]`` as contiguous ``[N * Hkv, S, D]``."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def exp_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``2 ** (logits - row maximum)`` in place; returns the maxima and the sums of the rows."""
    row_max = logits.amax(dim=-1, keepdim=True)
    logits.sub_(row_max).exp2_()
    return row_max, logits.sum(dim=-1, keepdim=True)
