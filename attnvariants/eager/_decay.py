"""Decay inside chunks: the scores, what enters and leaves a chunk, and the gradients of both.

``G_i`` is the sum of the log-decays from the start of a chunk to row i. Every factor is ``exp`` of
a sum over an interval, built by additions only: a difference of cumulative sums would lose digits
and turn ``-inf`` into NaN. Shapes: n chunks, H heads, C rows, W = K (per channel) or 1 (per token).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from attnvariants.eager._chunks import CHUNK, Segment
from attnvariants.eager._rows import Inputs

Operands = list[tuple[Tensor, Tensor]]


class Level(NamedTuple):
    """Decay across the middle of each block of ``2 * size`` rows, b the last row before it.

    A query i and an earlier key j are on the two sides of exactly one such middle, and
    ``exp(G_i - G_j) = exp(G_i - G_b) exp(G_b - G_j)`` with both factors at most 1.
    """

    size: int
    queries: Tensor  # exp(G_i - G_b) of the upper halves, [n, H, C / 2 size, size, W]
    keys: Tensor  # exp(G_b - G_j) of the lower halves, [n, H, C / 2 size, size, W]

    def lower(self, x: Tensor) -> Tensor:
        """The lower halves of the rows of ``x [n, H, C, D]``, ``[n, H, blocks, size, D]``."""
        return x.unflatten(-2, (-1, 2, self.size))[..., 0, :, :]

    def upper(self, x: Tensor) -> Tensor:
        """The upper halves."""
        return x.unflatten(-2, (-1, 2, self.size))[..., 1, :, :]

    def pairs(self, scores: Tensor) -> Tensor:
        """Upper rows, lower columns of ``scores [n, H, C, C]``: ``[n, H, blocks, size, size]``."""
        rows = scores.unflatten(-1, (-1, 2 * self.size)).unflatten(-3, (-1, 2 * self.size))
        blocks = rows.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        return blocks[..., self.size :, : self.size]


class Factors(NamedTuple):
    """Decay over every interval that a chunk needs."""

    levels: list[Level]
    prefix: Tensor  # exp(G_i), [n, H, C, W]
    suffix: Tensor  # exp(G_C - G_i), [n, H, C, W]


def decay_factors(g: Tensor, inside: bool) -> Factors:
    """The factors of ``g [n, H, C, W]``; levels only if what is ``inside`` the chunk is asked for.

    The sums over blocks of 2, 4, 8, ... rows grow from those over their halves.
    """
    before = g.clone()  # from the start of the block to the row, itself included
    after = torch.zeros_like(g)  # from behind the row to the end of the block
    levels = []
    size = 1
    while size < g.shape[-2]:
        block = Level(size, before, after)
        before_upper, after_lower = block.upper(before), block.lower(after)
        if inside:
            levels.append(Level(size, before_upper.exp(), after_lower.exp()))
        after_lower += before_upper[..., -1:, :]
        before_upper += block.lower(before)[..., -1:, :]
        size *= 2
    return Factors(levels, before.exp_(), after.exp_())


class NoDecay:
    """The causal mask alone."""

    def from_start(self, x: Tensor) -> Tensor:
        """``exp(G_i) x_i``, ``x [n, H, C, K]``: a query's decay since the start of its chunk."""
        return x

    def to_end(self, x: Tensor) -> Tensor:
        """``exp(G_C - G_j) x_j``: a key's decay until the end of its chunk."""
        return x

    def faintest_first(self, x: Tensor) -> Tensor:
        """Rows of ``x [n, H, C, D]`` in the order in which a sum over later rows rounds least."""
        return x

    def across(self, chunk: int, state: Tensor, write: Tensor, out: Tensor) -> None:
        """``out = exp(G_C) state + write`` for one chunk, all ``[H, K, V]``."""
        torch.add(state, write, out=out)

    def age(self, chunk: int, keys: Tensor) -> None:
        """``keys *= exp(G_C)`` for one chunk, ``keys [H, rows, K]``."""

    def operands(self, q: Tensor, k: Tensor) -> Operands:
        """Queries and keys, and for each level their halves decayed to its middles."""
        return [(q, k)]

    def scores(self, operands: Operands) -> Tensor:
        """``q_i . (exp(G_i - G_j) k_j)`` for ``i >= j``, else 0, ``[n, H, C, C]``."""
        q, k = operands[0]
        return (q @ k.mT).tril_()

    def backward(
        self,
        operands: Operands,
        scores: Tensor,
        dscores: Tensor,
        dq: Tensor,
        dk: Tensor,
        dg: LogDecayGradient | None,
    ) -> None:
        """Adds the gradients through the scores to ``dq``, ``dk`` and ``dg``."""
        q, k = operands[0]
        dscores = dscores.tril()
        dq += dscores @ k
        dk += dscores.mT @ q

    def gradient(self, through: Tensor, queries: Tensor, keys: Tensor) -> LogDecayGradient | None:
        """The gradient of the log-decay, begun with what enters, leaves or crosses the chunk.

        Args:
            through: ``S * dS`` summed over the values, ``[n, H, 1, K]``.
            queries: ``q * dq`` of the part of dq that comes from S, ``[n, H, C, K]``.
            keys: ``k * dk`` of the part of dk that comes from dS.
        """
        return None


class ScalarDecay(NoDecay):
    """One log-decay per token and head, ``g [n, H, C, 1]``, or ``[1, H, C, 1]`` for all chunks."""

    def __init__(self, g: Tensor, chunks: int, inside: bool) -> None:
        self.levels, self.prefix, self.suffix = decay_factors(g, inside)
        # exp(G_C) [n, H, W, 1] in two parts: the rounding of one would compound over the chunks.
        total = g.sum(-2, dtype=torch.float64).exp().unsqueeze(-1)
        total = total.expand(chunks, *total.shape[1:])
        self.total = total.to(g.dtype)
        self.rest = (total - self.total).to(g.dtype)

    def from_start(self, x: Tensor) -> Tensor:
        return x * self.prefix

    def to_end(self, x: Tensor) -> Tensor:
        return x * self.suffix

    def faintest_first(self, x: Tensor) -> Tensor:
        return x.flip(-2)

    def across(self, chunk: int, state: Tensor, write: Tensor, out: Tensor) -> None:
        torch.addcmul(write, self.rest[chunk], state, out=out)
        out.addcmul_(self.total[chunk], state)

    def age(self, chunk: int, keys: Tensor) -> None:
        keys *= self.total[chunk].mT

    def scores(self, operands: Operands) -> Tensor:
        q, k = operands[0]
        return (q @ k.mT).mul_(self.matrix)

    def backward(
        self,
        operands: Operands,
        scores: Tensor,
        dscores: Tensor,
        dq: Tensor,
        dk: Tensor,
        dg: LogDecayGradient | None,
    ) -> None:
        if dg is not None:
            flow = scores * dscores  # what each pair adds to the log-decays between its rows
            for level in reversed(self.levels):
                pairs = level.pairs(flow)
                dg.split(level)
                level.upper(dg.queries).add_(pairs.sum(-1, keepdim=True))
                level.lower(dg.keys).add_(pairs.sum(-2).unsqueeze(-1))
        q, k = operands[0]
        dscores = dscores * self.matrix
        dq += dscores @ k
        dk += dscores.mT @ q

    def gradient(self, through: Tensor, queries: Tensor, keys: Tensor) -> LogDecayGradient | None:
        through, queries, keys = (x.sum(-1, keepdim=True) for x in (through, queries, keys))
        return LogDecayGradient(through * self.total.mT, queries, keys)

    @functools.cached_property
    def matrix(self) -> Tensor:
        """``exp(G_i - G_j)`` for ``i >= j``, else 0, ``[n, H, C, C]``."""
        size = self.prefix.shape[-2]
        matrix = torch.eye(size, dtype=self.prefix.dtype, device=self.prefix.device)
        matrix = matrix.repeat(*self.prefix.shape[:2], 1, 1)
        for level in self.levels:
            level.pairs(matrix).copy_(level.queries * level.keys.mT)
        return matrix


class ChannelDecay(ScalarDecay):
    """One log-decay per token, head and key channel, ``g [n, H, C, K]``."""

    def operands(self, q: Tensor, k: Tensor) -> Operands:
        halves = [
            (level.upper(q) * level.queries, level.lower(k) * level.keys) for level in self.levels
        ]
        return [(q, k), *halves]

    def scores(self, operands: Operands) -> Tensor:
        (q, k), *halves = operands
        scores = q.new_zeros(*q.shape[:-1], q.shape[-2])
        scores.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
        for level, (upper, lower) in zip(self.levels, halves, strict=True):
            level.pairs(scores).copy_(upper @ lower.mT)
        return scores

    def backward(
        self,
        operands: Operands,
        scores: Tensor,
        dscores: Tensor,
        dq: Tensor,
        dk: Tensor,
        dg: LogDecayGradient | None,
    ) -> None:
        (q, k), *halves = operands
        diagonal = dscores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        dq.addcmul_(diagonal, k)
        dk.addcmul_(diagonal, q)
        for level, (upper, lower) in zip(reversed(self.levels), reversed(halves), strict=True):
            pairs = level.pairs(dscores)
            dupper, dlower = _product(pairs, lower), _product(pairs.mT, upper)
            level.upper(dq).addcmul_(level.queries, dupper)
            level.lower(dk).addcmul_(level.keys, dlower)
            if dg is not None:
                dg.split(level)
                level.upper(dg.queries).addcmul_(upper, dupper)
                level.lower(dg.keys).addcmul_(lower, dlower)

    def gradient(self, through: Tensor, queries: Tensor, keys: Tensor) -> LogDecayGradient | None:
        return LogDecayGradient(through * self.total.mT, queries, keys)


class LogDecayGradient:
    """Sums what crosses each token into the gradient of its log-decay, by additions only.

    A term that decays from row j to row i belongs to the log-decays of the rows ``j < t <= i``.
    Blocks are split from the chunk down to single rows. Every row of a block gets ``blocks``;
    ``queries`` holds what came to a row from before its block and belongs to all rows of the block
    up to this one; ``keys`` what left a row for behind its block, of all rows after this one.
    """

    def __init__(self, through: Tensor, queries: Tensor, keys: Tensor) -> None:
        self.blocks = through  # [n, H, blocks, W]
        self.queries, self.keys = queries, keys  # [n, H, C, W]

    def split(self, level: Level) -> None:
        """Halves the blocks; what crosses their middles is to be added to the halves' rows."""
        n, heads, count, width = self.blocks.shape
        halves = self.blocks.new_empty(n, heads, count, 2, width)
        torch.add(self.blocks, level.upper(self.queries).sum(-2), out=halves[..., 0, :])
        torch.add(self.blocks, level.lower(self.keys).sum(-2), out=halves[..., 1, :])
        self.blocks = halves.flatten(-3, -2)

    def result(self) -> Tensor:
        """The gradient ``[n, H, C, W]``, when the blocks are single rows."""
        return self.blocks + self.queries


def decay_of(inputs: Inputs, segment: Segment, inside: bool = True) -> NoDecay:
    """The decay in a segment; ``inside`` is whether scores are wanted."""
    g = inputs.log_decays(segment.rows)
    if g is None:
        return NoDecay()
    if inputs.constant_decay and segment.slots is None:  # one chunk stands for all
        tiles = g[:CHUNK].transpose(0, 1).unsqueeze(0)
    else:
        tiles = segment.tiles(g)
    kind = ScalarDecay if g.shape[-1] == 1 else ChannelDecay
    return kind(tiles, len(segment.chunks), inside)


def _product(pairs: Tensor, rows: Tensor) -> Tensor:
    """``pairs @ rows``; the matrix routine is slow for sums of one or two terms."""
    if pairs.shape[-1] > 2:
        return pairs @ rows
    product = pairs[..., :1] * rows[..., :1, :]
    if pairs.shape[-1] == 2:
        product.addcmul_(pairs[..., 1:], rows[..., 1:, :])
    return product
