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

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """``q_i . (exp(G_i - G_j) k_j)`` for ``i >= j``, else 0, ``[n, H, C, C]``."""
        return (q @ k.mT).tril_()

    def backward(
        self, q: Tensor, k: Tensor, scores: Tensor, dscores: Tensor, dg: LogDecayGradient | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of q and k through :meth:`scores`; adds those of the log-decay to ``dg``."""
        dscores = dscores.tril()
        return dscores @ k, dscores.mT @ q

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

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT).mul_(self.matrix)

    def backward(
        self, q: Tensor, k: Tensor, scores: Tensor, dscores: Tensor, dg: LogDecayGradient | None
    ) -> tuple[Tensor, Tensor]:
        if dg is not None:
            flow = scores * dscores  # what each pair adds to the log-decays between its rows
            for level in reversed(self.levels):
                pairs = level.pairs(flow)
                dg.split(level, pairs.sum(-1, keepdim=True), pairs.sum(-2).unsqueeze(-1))
        dscores = dscores * self.matrix
        return dscores @ k, dscores.mT @ q

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

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        scores = q.new_zeros(*q.shape[:-1], q.shape[-2])
        scores.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
        for level in self.levels:
            queries, keys = level.upper(q) * level.queries, level.lower(k) * level.keys
            level.pairs(scores).copy_(queries @ keys.mT)
        return scores

    def backward(
        self, q: Tensor, k: Tensor, scores: Tensor, dscores: Tensor, dg: LogDecayGradient | None
    ) -> tuple[Tensor, Tensor]:
        diagonal = dscores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        dq, dk = diagonal * k, diagonal * q
        for level in reversed(self.levels):
            upper, lower, pairs = level.upper(q), level.lower(k), level.pairs(dscores)
            dupper = _product(pairs, lower * level.keys).mul_(level.queries)
            dlower = _product(pairs.mT, upper * level.queries).mul_(level.keys)
            level.upper(dq).add_(dupper)
            level.lower(dk).add_(dlower)
            if dg is not None:
                dg.split(level, dupper.mul_(upper), dlower.mul_(lower))
        return dq, dk

    def gradient(self, through: Tensor, queries: Tensor, keys: Tensor) -> LogDecayGradient | None:
        return LogDecayGradient(through * self.total.mT, queries, keys)


class LogDecayGradient:
    """Sums what crosses each token into the gradient of its log-decay, by additions only.

    A term that decays from row j to row i belongs to the log-decays of the rows ``j < t <= i``.
    ``queries`` holds per row what came from before the block, due to all rows of the block up to
    this one; ``keys`` what goes beyond it, due to all rows behind this one. Blocks are split from
    the chunk down to single rows.
    """

    def __init__(self, through: Tensor, queries: Tensor, keys: Tensor) -> None:
        self.total = through.expand_as(queries).clone()  # [n, H, C, W]
        self.queries, self.keys = queries, keys

    def split(self, level: Level, queries: Tensor, keys: Tensor) -> None:
        """Halves the blocks and adds the terms across their middles, of upper and lower rows."""
        upper, lower = level.upper(self.queries), level.lower(self.keys)
        level.lower(self.total).add_(upper.sum(-2, keepdim=True))
        level.upper(self.total).add_(lower.sum(-2, keepdim=True))
        upper += queries
        lower += keys

    def result(self) -> Tensor:
        """The gradient ``[n, H, C, W]``, after the split into single rows."""
        return self.total + self.queries


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
    """``pairs @ rows``; products of one or two terms are faster without the matrix routine."""
    if pairs.shape[-1] > 2:
        return pairs @ rows
    terms = (pairs[..., j : j + 1] * rows[..., j : j + 1, :] for j in range(pairs.shape[-1]))
    return sum(terms, start=torch.zeros_like(rows))
