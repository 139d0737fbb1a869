"""Gradients of the queries and keys of a chunk of linear attention through its scores; flows.

The flow of a pair (j, i) is its part of ``q_i . dq_i``, or of ``k_j . dk_j``: the log-decay of a
token between them has the sum of what flows across it as its gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl
from attnvariants.kernels._decay import (
    chunk_decay,
    count_levels,
    fresh,
    fresh_chunk,
    fresh_rows,
    level_decay,
    partners,
    sum_rows,
    within,
)
from attnvariants.kernels._feature_map import map_gradient
from attnvariants.kernels._tiles import cast, load_slice, locate, product
from attnvariants.kernels._walk import load_features, load_log_decay, load_row_scale


@triton.jit
def pair_cotangents(a, b, walk, i_b, i_h, t, end, step, dims: tl.constexpr, like):
    """``a_i . b_j`` for the rows of a chunk, ``[BT, BT]``."""
    BT: tl.constexpr = dims.BT
    b_da = tl.zeros([BT, BT], tl.float32)
    i_b, i_h, t, rows = fresh_chunk(step, walk, i_b, i_h, t, BT)
    live = t + rows < end
    for i_v in tl.range(0, fresh(dims.V, step, walk), dims.BV):
        b_a = load_slice(locate(a, i_b, i_h, t), a, rows, live, i_v, dims.V, dims.BV)
        b_b = load_slice(locate(b, i_b, i_h, t), b, rows, live, i_v, dims.V, dims.BV)
        b_da += product(b_a, tl.trans(b_b), like)
    return b_da


@triton.jit
def load_side(
    q,
    k,
    rstd,
    scale,
    i_b,
    i_h,
    t,
    rows,
    live,
    i_k,
    dims: tl.constexpr,
    MAP: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """The queries of a chunk with their factors, or else its keys, ``[BT, BK]``."""
    if QUERIES:
        b_x = load_features(q, i_b, i_h, t, rows, live, i_k, dims.K, dims.BK, MAP)
        b_x = b_x * load_row_scale(rstd, scale, i_b, i_h, t, rows, live, rstd is not None)
    else:
        b_x = load_features(k, i_b, i_h, t, rows, live, i_k, dims.K, dims.BK, MAP)
    return b_x


@triton.jit
def add_decayed_gradient(
    b_d,
    b_dg,
    b_pairs,
    q,
    k,
    g,
    rstd,
    scale,
    walk,
    i_b,
    i_h,
    t,
    end,
    i_k,
    dims: tl.constexpr,
    kind: tl.constexpr,
    QUERIES: tl.constexpr,
    WITH_DG: tl.constexpr,
):
    """Adds the gradient of the queries (or else keys) through the scores of pairs i > j.

    ``pairs`` are the cotangents of the scores with their own rows first, ``[BT, BT]``.
    """
    BT: tl.constexpr = dims.BT
    DECAY: tl.constexpr = kind.DECAY
    MAP: tl.constexpr = kind.FEATURE_MAP
    for level in tl.range(0, count_levels(BT), loop_unroll_factor=1):
        i_b, i_h, t, rows = fresh_chunk(level, walk, i_b, i_h, t, BT)
        live = t + rows < end
        b_zero = tl.where(level < 0, b_pairs.to(tl.float32), 0.0)
        b_g = load_log_decay(g, i_b, i_h, t, rows, live, i_k, dims.K, dims.BK, DECAY)
        b_e = level_decay(b_g, rows, level, q, b_zero, DECAY)
        b_x = load_side(q, k, rstd, scale, i_b, i_h, t, rows, live, i_k, dims, MAP, not QUERIES)
        b_met = tl.where(partners(rows, level, QUERIES), b_pairs, 0.0)
        b_part = b_e * product(b_met, b_x * b_e, q)
        b_d += b_part
        if WITH_DG:
            # A query's flow crosses the rows of its half up to itself, a key's those behind it.
            rows = fresh_rows(level + 1, walk, BT)
            half = (rows >> level) << level
            if QUERIES:
                last = half + (1 << level) - 1
                crosses = within(-rows, -last, last + 1 - rows)
            else:
                crosses = within(rows, half, rows - half)
            b_x = load_side(q, k, rstd, scale, i_b, i_h, t, rows, live, i_k, dims, MAP, QUERIES)
            b_dg += sum_rows(crosses, b_x * b_part, q, b_zero)
    return b_d, b_dg


@triton.jit
def complete_gradient(
    b_d,
    b_dg,
    q,
    k,
    v,
    g,
    do,
    rstd,
    scale,
    walk,
    i_b,
    i_h,
    t,
    end,
    i_k,
    dims: tl.constexpr,
    kind: tl.constexpr,
    QUERIES: tl.constexpr,
    WITH_DG: tl.constexpr,
):
    """dq (or else dk) and what it adds to dg, from its part ``[BT, BK]`` through a state."""
    BT: tl.constexpr = dims.BT
    BK: tl.constexpr = dims.BK
    DECAY: tl.constexpr = kind.DECAY
    MAP: tl.constexpr = kind.FEATURE_MAP
    step = 16 * t + (1 if QUERIES else 2)
    if kind.CAUSAL:
        if QUERIES:
            b_da = pair_cotangents(do, v, walk, i_b, i_h, t, end, step, dims, q)
        else:
            b_da = pair_cotangents(v, do, walk, i_b, i_h, t, end, step, dims, q)
    i_b, i_h, t, rows = fresh_chunk(step + 2, walk, i_b, i_h, t, BT)
    live = t + rows < end
    if DECAY is not None:
        b_g = load_log_decay(g, i_b, i_h, t, rows, live, i_k, dims.K, BK, DECAY)
        b_d = b_d * chunk_decay(b_g, rows, q, "up to" if QUERIES else "behind", DECAY)
        b_own = load_side(q, k, rstd, scale, i_b, i_h, t, rows, live, i_k, dims, MAP, QUERIES)
        if WITH_DG:
            # Across a row goes what comes from before the chunk to it and to those behind it, or
            # what leaves for behind the chunk from those before it.
            if QUERIES:
                crosses = rows[None, :] >= rows[:, None]
            else:
                crosses = rows[None, :] < rows[:, None]
            b_dg += sum_rows(crosses, b_own * b_d, q)
    if kind.CAUSAL:
        b_other = load_side(q, k, rstd, scale, i_b, i_h, t, rows, live, i_k, dims, MAP, not QUERIES)
        if DECAY is not None:
            same = rows[:, None] == fresh(rows, step + 2, walk)[None, :]
            b_d += tl.sum(tl.where(same, b_da, 0.0), 1)[:, None] * b_other
            if q.ptr.dtype.element_ty == tl.bfloat16:  # as the products take it
                b_da = cast(b_da, tl.bfloat16)
            b_d, b_dg = add_decayed_gradient(
                b_d,
                b_dg,
                b_da,
                q,
                k,
                g,
                rstd,
                scale,
                walk,
                i_b,
                i_h,
                t,
                end,
                i_k,
                dims,
                kind,
                QUERIES,
                WITH_DG,
            )
        else:
            seen = rows[:, None] >= rows[None, :] if QUERIES else rows[:, None] <= rows[None, :]
            b_d += product(tl.where(seen, b_da, 0.0), b_other, q)
    i_b, i_h, t, rows = fresh_chunk(step + 4, walk, i_b, i_h, t, BT)
    live = t + rows < end
    if QUERIES:
        b_d = b_d * load_row_scale(rstd, scale, i_b, i_h, t, rows, live, rstd is not None)
    if MAP is not None:
        x = q if QUERIES else k
        b_x = load_slice(locate(x, i_b, i_h, t), x, rows, live, i_k, dims.K, BK)
        b_d = b_d * map_gradient(b_x.to(tl.float32), MAP)
    return b_d, b_dg
