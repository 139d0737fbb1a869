"""Decay inside a chunk of ``BT`` tokens, exact for every gate: sums over intervals, no differences.

A query i and an earlier key j lie in the two halves of exactly one block of ``2 S`` rows, for one
S = 1, 2, 4, ...: that is their level. With b the last row of the lower half

    exp(G_i - G_j) = exp(G_i - G_b) exp(G_b - G_j),

and both exponents are sums of log-decays over the rows between, never positive. A row is either a
query or a key of a level, so one exponential serves it. No difference of cumulative sums appears:
nothing overflows, and no digits cancel.

Sums per channel are products with matrices of zeros and ones on tensor cores. bf16 holds those, and
two or three bf16 parts hold a log-decay; products and sums of them are exact or rounded to float32.
Log-decays end at ``NOTHING``: where one is smaller, its exponential is 0 in any case.
"""

from __future__ import annotations

import triton
import triton.language as tl
from attnvariants.kernels._tiles import INTERPRETED, LOG2_E, product

NOTHING = tl.constexpr(-8192.0)  # 0 times it is 0, unlike 0 times -inf
LN_2_HIGH = tl.constexpr(0.693359375)  # few bits, so that multiples of it are exact
LN_2_REST = tl.constexpr(-2.12194440e-4)


@triton.jit
def fresh(x, step, walk):
    """``x``, to be computed anew in every ``step``.

    A compiler would compute masks and addresses once, before a loop, and run out of registers; it
    does not know that this adds zero in every step, because sizes are odd, see :func:`odd`.
    """
    return x + (step & ((walk.heads & 1) - 1))


@triton.jit
def fresh_rows(step, walk, BT: tl.constexpr):
    """``arange(0, BT)``, to be computed anew in every ``step``.

    In two parts: numbers that a thread had to start from would otherwise stay in its registers.
    """
    eights = fresh(tl.arange(0, BT // 8) * 8, step, walk)
    return tl.reshape(eights[:, None] + tl.arange(0, 8)[None, :], [BT])


@triton.jit
def fresh_chunk(step, walk, i_b, i_h, t, BT: tl.constexpr):
    """Batch entry, head and first token of a chunk, and its rows; everything as :func:`fresh`."""
    i_b = fresh(i_b, step, walk)
    i_h = fresh(i_h, step, walk)
    t = fresh(t, step, walk)
    return i_b, i_h, t, fresh_rows(step, walk, BT)


@triton.jit
def decay(b_sum, dtype: tl.constexpr):
    """``exp(sum)`` of log-decays; for float32 inputs also where the sum is large.

    ``exp2(sum * log2(e))`` has the rounding of its argument as a relative error, 1e-6 where the sum
    is -20. Split into a power of two and the exponential of a small rest, there is none.
    """
    if dtype == tl.float32:
        power = tl.floor(b_sum * LOG2_E + 0.5)
        rest = (b_sum - power * LN_2_HIGH) - power * LN_2_REST
        b_e = tl.exp2(power) * tl.exp2(rest * LOG2_E)
    else:
        b_e = tl.exp2(b_sum * LOG2_E)
    return b_e


@triton.jit
def split(b_x):
    """``x`` as a bf16 part and the rest, exactly."""
    if INTERPRETED:  # whose conversions are slow; the part in float32
        b_part = (b_x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    else:
        b_part = b_x.to(tl.bfloat16)
    return b_part, b_x - b_part.to(tl.float32)


@triton.jit
def sum_rows(picks, b_x, like, b_zero=0.0):
    """``picks @ x``: sums of the rows of ``x [BT, BD]`` that a mask ``[BT, BT]`` picks.

    Of every term, the first 16 bits for 16-bit inputs ``like``, and all 24 for float32. ``b_zero``:
    zeros ``[BT, BT]`` in the layout of a product, where the mask becomes an operand right away.
    """
    b_part, b_rest = split(b_x)
    b_m = tl.where(picks, 1.0, b_zero).to(b_part.dtype)
    b_sum = tl.dot(b_m, b_part, input_precision="ieee")
    b_part, b_rest = split(b_rest)
    b_sum += tl.dot(b_m, b_part, input_precision="ieee")
    if like.ptr.dtype.element_ty == tl.float32:
        b_part, b_rest = split(b_rest)
        b_sum += tl.dot(b_m, b_part, input_precision="ieee")
    return b_sum


@triton.jit
def sum_columns(b_x, picks, like):
    """``x @ picks``, as :func:`sum_rows`."""
    b_part, b_rest = split(b_x)
    b_m = tl.where(picks, 1.0, 0.0).to(b_part.dtype)
    b_sum = tl.dot(b_part, b_m, input_precision="ieee")
    b_part, b_rest = split(b_rest)
    b_sum += tl.dot(b_part, b_m, input_precision="ieee")
    if like.ptr.dtype.element_ty == tl.float32:
        b_part, b_rest = split(b_rest)
        b_sum += tl.dot(b_part, b_m, input_precision="ieee")
    return b_sum


@triton.jit
def chunk_decay(b_g, rows, like, PART: tl.constexpr, KIND: tl.constexpr):
    """``exp`` of sums of log-decays, for every row: those "up to" it, "from" it on or "behind" it.

    ``[BT, BK]``, or ``[BT, 1]`` per "token".
    """
    if PART == "up to":
        picks = rows[None, :] <= rows[:, None]
    elif PART == "from":
        picks = rows[None, :] >= rows[:, None]
    else:
        picks = rows[None, :] > rows[:, None]
    b_sum = sum_rows(picks, b_g, like)
    if KIND == "token":
        b_sum = tl.max(b_sum, 1)[:, None]  # of equal columns
    return decay(b_sum, like.ptr.dtype.element_ty)


@triton.jit
def chunk_total(b_g, KIND: tl.constexpr, T: tl.constexpr):
    """The log-decay of a chunk for a state: ``[BK, 1]`` (``[1, BK]`` if ``T``), or a number."""
    b_sum = tl.sum(b_g, 0)
    if KIND == "token":
        b_sum = tl.max(b_sum, 0)
    elif T:
        b_sum = b_sum[None, :]
    else:
        b_sum = b_sum[:, None]
    return b_sum


@triton.jit
def within(rows, first, count):
    """A mask ``[BT, BT]``: along the columns, of each row the ``count`` rows from ``first`` on.

    Differences below 0 are large without a sign, so that one comparison finds both ends.
    """
    place = (rows[None, :] - first[:, None]).to(tl.uint32, bitcast=True)
    return place < count.to(tl.uint32, bitcast=True)[:, None]


@triton.jit
def level_decay(b_g, rows, level, like, b_zero, KIND: tl.constexpr):
    """The factors ``[BT, BK]`` of every row at a level, or ``[BT, 1]`` per "token"."""
    # Of its half a query takes the rows up to itself, a key those behind it.
    half = (rows >> level) << level
    is_query = ((rows >> level) & 1) == 1
    first = tl.where(is_query, half, rows + 1)
    count = tl.where(is_query, rows + 1, half + (1 << level)) - first
    b_sum = sum_rows(within(rows, first, count), b_g, like, b_zero)
    if KIND == "token":
        b_sum = tl.max(b_sum, 1)[:, None]  # of equal columns
    return decay(b_sum, like.ptr.dtype.element_ty)


@triton.jit
def partners(rows, level, QUERIES: tl.constexpr):
    """Which keys each query of a level meets (or queries each key), ``[BT, BT]``."""
    size = 1 << level
    half = (rows >> level) << level
    if QUERIES:
        mask = within(rows, half - size, half & size)
    else:
        mask = within(rows, half + size, size - (half & size))
    return mask


@triton.jit
def count_levels(BT: tl.constexpr):
    """``log2(BT)``."""
    levels = 0
    for n in tl.static_range(16):
        if (1 << n) < BT:
            levels = n + 1
    return levels


@triton.jit
def add_channel_scores(b_a, b_q, b_k, b_g, walk, like, TRANSPOSED: tl.constexpr):
    """``A + sum_x q_ix k_jx exp(G_ix - G_jx)`` for i >= j, ``[BT, BT]``, over a slice of channels.

    Queries along the rows, or keys if ``TRANSPOSED``.
    """
    BT: tl.constexpr = b_q.shape[0]
    b_own = tl.sum(b_q * b_k, 1)[:, None]
    for level in tl.range(0, count_levels(BT), loop_unroll_factor=1):
        rows = fresh_rows(level, walk, BT)
        b_e = level_decay(b_g, rows, level, like, tl.where(level < 0, b_a, 0.0), "channel")
        if TRANSPOSED:
            b_pairs = product(b_k * b_e, tl.trans(b_q * b_e), like)
        else:
            b_pairs = product(b_q * b_e, tl.trans(b_k * b_e), like)
        b_a += tl.where(partners(rows, level, not TRANSPOSED), b_pairs, 0.0)
        if level == 0:
            b_a += tl.where(rows[:, None] == rows[None, :], b_own, 0.0)
    return b_a


@triton.jit
def token_decay(b_g, rows, like, TRANSPOSED: tl.constexpr):
    """``exp(G_i - G_j)`` for i >= j, else 0, as ``[BT, BT]``, from the ``g`` of a token.

    Every exponent is a sum of its own rows, as in :func:`sum_rows`: one after the other, additions
    of a constant decay would all be rounded the same way.
    """
    b_row = tl.max(b_g, 1)[None, :]  # of equal columns
    up_to = rows[None, :] <= rows[:, None]
    b_g = tl.where(up_to != TRANSPOSED, b_row, 0.0)
    if TRANSPOSED:  # [j, t] times [t, i], for j < t <= i
        b_sum = sum_columns(b_g, rows[:, None] <= rows[None, :], like)
        seen = rows[:, None] <= rows[None, :]
    else:  # [i, t] times [t, j]
        b_sum = sum_columns(b_g, rows[:, None] > rows[None, :], like)
        seen = rows[:, None] >= rows[None, :]
    return tl.where(seen, decay(b_sum, like.ptr.dtype.element_ty), 0.0)


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
def age(b_s, b_write, b_total, dtype: tl.constexpr):
    """``exp(total) * S + write`` with the factor in two parts, for ``total`` that broadcasts to S.

    One float32 close to 1 would be rounded the same way in every chunk of a constant decay. What it
    leaves out is added to what is written, where it is not lost at once.
    """
    b_near = expm1(tl.maximum(b_total, -1.0))
    b_factor = tl.where(b_total > -0.25, 1.0 + b_near, decay(b_total, dtype))
    b_rest = tl.where(b_total > -0.25, b_near - (b_factor - 1.0), 0.0)
    return b_factor * b_s + (b_rest * b_s + b_write)
