"""Decay inside a chunk of ``BT`` tokens, exact for every gate: sums over intervals by additions only.

A query i and an earlier key j lie in the two halves of exactly one block of ``2 S`` rows, for one
S = 1, 2, 4, ...: that is their level. With b the last row of the lower half

    exp(G_i - G_j) = exp(G_i - G_b) exp(G_b - G_j),

and both exponents are sums over the rows between, never positive. ``before`` holds the sum from
the start of a row's block of S rows to the row, itself included; ``after`` that from behind the row
to the end of its block. A row is a query or a key of a level, so one exponential serves it. From
level to level the blocks merge by adding the sum of the neighbour. No difference of cumulative
sums appears: nothing overflows, no digits cancel, and ``-inf`` stays a number.

Log-decays are to base 2. Their tiles are ``[BT, BD]``, ``BD`` = ``BK`` per channel or 1 per token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnvariants.kernels._tiles import LN_2, product


@triton.jit
def upper_half(S: tl.constexpr, BT: tl.constexpr):
    """Which rows ``[BT, 1]`` lie in the upper half of their block of ``2 S`` rows."""
    return (tl.arange(0, BT)[:, None] & S) != 0


@triton.jit
def same_block(SIZE: tl.constexpr, BT: tl.constexpr):
    """Which pairs ``[BT, BT]`` lie in the same block of ``SIZE`` rows."""
    rows = tl.arange(0, BT) // SIZE
    return rows[:, None] == rows[None, :]


@triton.jit
def merge(before, after, S: tl.constexpr):
    """``before`` and ``after`` of blocks of ``2 S`` rows, from those of blocks of S."""
    BT: tl.constexpr = before.shape[0]
    BD: tl.constexpr = before.shape[1]
    half = tl.arange(0, 2)[None, :, None, None]
    sums = tl.reshape(before + after, (BT // (2 * S), 2, S, BD))  # of a row's own block
    lower = tl.sum(tl.where(half == 0, sums, 0.0), axis=1, keep_dims=True)
    upper = tl.sum(tl.where(half == 1, sums, 0.0), axis=1, keep_dims=True)
    neighbour = tl.reshape(tl.where(half == 0, upper, lower), (BT, BD))
    is_upper = upper_half(S, BT)
    before = tl.where(is_upper, before + neighbour, before)
    after = tl.where(is_upper, after, after + neighbour)
    return before, after


@triton.jit
def chunk_sums(b_g):
    """``before`` and ``after`` with the whole chunk as one block."""
    BT: tl.constexpr = b_g.shape[0]
    before = b_g
    after = tl.zeros_like(b_g)
    S: tl.constexpr = 1
    for level in tl.static_range(16):
        if (S << level) < BT:
            before, after = merge(before, after, S << level)
    return before, after


@triton.jit
def channel_scores(b_q, b_k, b_g, like, TRANSPOSED: tl.constexpr):
    """``sum_x q_ix k_jx exp(G_ix - G_jx)`` for i >= j, else 0; and ``before``, ``after``.

    ``[BT, BT]``, queries along the rows, or keys if ``TRANSPOSED``.
    """
    BT: tl.constexpr = b_q.shape[0]
    rows = tl.arange(0, BT)
    diagonal = rows[:, None] == rows[None, :]
    b_a = tl.where(diagonal, tl.sum(b_q * b_k, 1)[:, None], 0.0)
    before = b_g
    after = tl.zeros_like(b_g)
    S: tl.constexpr = 1
    for level in tl.static_range(16):
        if (S << level) < BT:
            is_query = upper_half(S << level, BT)
            b_e = tl.exp2(tl.where(is_query, before, after))
            b_qs = tl.where(is_query, b_q * b_e, 0.0)
            b_ks = tl.where(is_query, 0.0, b_k * b_e)
            if TRANSPOSED:
                b_pairs = product(b_ks, tl.trans(b_qs), like)
            else:
                b_pairs = product(b_qs, tl.trans(b_ks), like)
            if (S << level) * 2 < BT:
                b_pairs = tl.where(same_block((S << level) * 2, BT), b_pairs, 0.0)
            b_a += b_pairs
            before, after = merge(before, after, S << level)
    return b_a, before, after


@triton.jit
def token_decay(b_g, TRANSPOSED: tl.constexpr):
    """``exp(G_i - G_j)`` for i >= j, else 0, as ``[BT, BT]``; and ``before``, ``after``."""
    BT: tl.constexpr = b_g.shape[0]
    rows = tl.arange(0, BT)
    b_d = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)
    before = b_g
    after = tl.zeros_like(b_g)
    S: tl.constexpr = 1
    for level in tl.static_range(16):
        if (S << level) < BT:
            is_query = upper_half(S << level, BT)
            b_e = tl.exp2(tl.where(is_query, before, after))
            b_qs = tl.where(is_query, b_e, 0.0)
            b_ks = tl.where(is_query, 0.0, b_e)
            if TRANSPOSED:
                b_pairs = b_ks * tl.trans(b_qs)
            else:
                b_pairs = b_qs * tl.trans(b_ks)
            b_d += tl.where(same_block((S << level) * 2, BT), b_pairs, 0.0)
            before, after = merge(before, after, S << level)
    return b_d, before, after


@triton.jit
def expm1(x):
    """``exp(x) - 1`` for x <= 0 with a small relative error."""
    series = 1.0 / 720 + x * (1.0 / 5040)
    series = 1.0 / 120 + x * series
    series = 1.0 / 24 + x * series
    series = 1.0 / 6 + x * series
    series = 0.5 + x * series
    return tl.where(x > -0.25, x + x * x * series, tl.exp(x) - 1.0)


@triton.jit
def age(b_s, b_total):
    """``exp(total) * S`` with the factor in two parts, for ``total`` that broadcasts to S.

    One float32 close to 1 would be rounded the same way in every chunk of a constant decay.
    """
    b_near = expm1(tl.maximum(b_total, -1.0) * LN_2)
    b_factor = tl.where(b_total > -0.25, 1.0 + b_near, tl.exp2(b_total))
    b_rest = tl.where(b_total > -0.25, b_near - (b_factor - 1.0), 0.0)
    return b_factor * b_s + b_rest * b_s
