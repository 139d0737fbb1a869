"""Decay inside a chunk of ``BT`` tokens, exact for every gate: sums over intervals by additions only.

A query i and an earlier key j lie in the two halves of exactly one block of ``2 S`` rows, for one
S = 1, 2, 4, ...: that is their level. With b the last row of the lower half

    exp(G_i - G_j) = exp(G_i - G_b) exp(G_b - G_j),

and both exponents are sums of log-decays over the rows between, never positive. A row is either a
query or a key of a level, so one exponential serves it. No difference of cumulative sums appears:
nothing overflows, and no digits cancel.

Sums per channel are products with matrices of zeros and ones on tensor cores. bf16 holds those, and
two or three bf16 parts hold a log-decay; products and sums of them are exact or rounded to float32.
Log-decays are to base 2 and end at ``NOTHING``: where one is smaller, ``exp2`` is 0 in any case.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnvariants.kernels._tiles import LN_2, LOG2_E, dot, narrow, product

NOTHING = tl.constexpr(-8192.0)  # exp2 of it is 0, and 0 times it is 0, unlike of -inf


@triton.jit
def to_base_2(b_g):
    """Log-decays in float32 to base 2; ``-inf`` becomes finite."""
    return tl.maximum(b_g.to(tl.float32) * LOG2_E, NOTHING)


@triton.jit
def sum_rows(picks, b_x, like):
    """``picks @ x``: sums of the rows of ``x [BT, BD]`` that a mask ``[BT, BT]`` picks.

    Exact to 16 bits of every term for 16-bit inputs ``like``, and to all 24 for float32.
    """
    b_m = tl.where(picks, 1.0, 0.0).to(tl.bfloat16)
    b_part = narrow(b_x, tl.bfloat16)
    b_rest = b_x - b_part.to(tl.float32)
    b_sum = dot(b_m, b_part)
    b_part = narrow(b_rest, tl.bfloat16)
    b_sum += dot(b_m, b_part)
    if like.ptr.dtype.element_ty == tl.float32:
        b_rest -= b_part.to(tl.float32)
        b_sum += dot(b_m, narrow(b_rest, tl.bfloat16))
    return b_sum


@triton.jit
def level_decay(b_g, level, like):
    """The factors ``[BT, BK]`` of every row at a level, and whether a row is a query there."""
    BT: tl.constexpr = b_g.shape[0]
    rows = tl.arange(0, BT)
    half = rows >> level
    is_query = (half & 1) == 1
    # Of its half a query takes the rows up to itself, a key those behind it.
    near = (rows[None, :] <= rows[:, None]) == is_query[:, None]
    picks = (half[:, None] == half[None, :]) & near
    return tl.exp2(sum_rows(picks, b_g, like)), is_query[:, None]


@triton.jit
def same_block(level, BT: tl.constexpr):
    """Which pairs ``[BT, BT]`` lie in the same block of a level."""
    block = tl.arange(0, BT) >> (level + 1)
    return block[:, None] == block[None, :]


@triton.jit
def count_levels(BT: tl.constexpr):
    """``log2(BT)``, in a loop's bound that the compiler does not unroll by."""
    levels = 0
    for n in tl.static_range(16):
        if (1 << n) < BT:
            levels = n + 1
    return levels


@triton.jit
def add_channel_scores(b_a, b_q, b_k, b_g, like, TRANSPOSED: tl.constexpr):
    """``A + sum_x q_ix k_jx exp(G_ix - G_jx)`` for i >= j, ``[BT, BT]``, over a slice of channels.

    Queries along the rows, or keys if ``TRANSPOSED``.
    """
    BT: tl.constexpr = b_q.shape[0]
    rows = tl.arange(0, BT)
    b_a += tl.where(rows[:, None] == rows[None, :], tl.sum(b_q * b_k, 1)[:, None], 0.0)
    for level in tl.range(0, count_levels(BT), loop_unroll_factor=1):
        b_e, is_query = level_decay(b_g, level, like)
        b_qs = tl.where(is_query, b_q * b_e, 0.0)
        b_ks = tl.where(is_query, 0.0, b_k * b_e)
        if TRANSPOSED:
            b_pairs = product(b_ks, tl.trans(b_qs), like)
        else:
            b_pairs = product(b_qs, tl.trans(b_ks), like)
        b_a += tl.where(same_block(level, BT), b_pairs, 0.0)
    return b_a


@triton.jit
def token_decay(b_g, TRANSPOSED: tl.constexpr):
    """``exp(G_i - G_j)`` for i >= j, else 0, as ``[BT, BT]``, from ``g [BT, 1]``."""
    BT: tl.constexpr = b_g.shape[0]
    rows = tl.arange(0, BT)
    if TRANSPOSED:  # along the queries of a key, the sum begins behind the key
        b_sum = tl.cumsum(tl.where(rows[:, None] < rows[None, :], tl.trans(b_g), 0.0), 1)
        b_d = tl.where(rows[:, None] <= rows[None, :], tl.exp2(b_sum), 0.0)
    else:
        b_sum = tl.cumsum(tl.where(rows[:, None] > rows[None, :], b_g, 0.0), 0)
        b_d = tl.where(rows[:, None] >= rows[None, :], tl.exp2(b_sum), 0.0)
    return b_d


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
    """``exp2(total) * S`` with the factor in two parts, for ``total`` that broadcasts to S.

    One float32 close to 1 would be rounded the same way in every chunk of a constant decay.
    """
    b_near = expm1(tl.maximum(b_total, -1.0) * LN_2)
    b_factor = tl.where(b_total > -0.25, 1.0 + b_near, tl.exp2(b_total))
    b_rest = tl.where(b_total > -0.25, b_near - (b_factor - 1.0), 0.0)
    return b_factor * b_s + b_rest * b_s
