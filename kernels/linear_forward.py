"""Linear attention forward: one pass over the inputs, with the state in registers.

A program walks over a segment of one head with a slice of the values, chunk by chunk:

    o_i = scale * (S^T (exp(G_i) q_i) + sum_{j <= i} A_ij v_j)
    S   = exp(G_C) S + sum_j (exp(G_C - G_j) k_j) v_j^T

Norm, weight and gate follow in the tile where it holds all that a norm runs over. Otherwise the
tile leaves its rows divided by their own root mean square, which fits every dtype, and the sums of
their squares; a second kernel puts those together.
"""

from __future__ import annotations

import triton
import triton.language as tl
from attnvariants.kernels._decay import (
    add_channel_scores,
    age,
    chunk_total,
    fresh_rows,
    token_decay,
)
from attnvariants.kernels._tiles import load_slice, locate, product, store_slice
from attnvariants.kernels._walk import (
    find_segment,
    load_features,
    load_log_decay,
    load_row_scale,
    load_state,
    locate_state,
    running_decay,
)
from attnvariants.kernels.linear_epilogue import divisor, weigh_and_gate


@triton.jit
def chunk_scores(
    q,
    k,
    g,
    rstd,
    scale,
    walk,
    i_b,
    i_h,
    t,
    rows,
    live,
    dims: tl.constexpr,
    kind: tl.constexpr,
    T: tl.constexpr,
    NORMED: tl.constexpr,
):
    """``A_ij`` of a chunk for i >= j, else 0, ``[BT, BT]``, with keys along the rows if ``T``.

    Takes a slice of the channels at a time, so that few tiles live at once.
    """
    BT: tl.constexpr = dims.BT
    BC: tl.constexpr = dims.BC
    DECAY: tl.constexpr = kind.DECAY
    MAP: tl.constexpr = kind.FEATURE_MAP
    b_a = tl.zeros([BT, BT], tl.float32)
    for i_k in tl.range(0, dims.K, BC, loop_unroll_factor=1):
        b_q = load_features(q, i_b, i_h, t, rows, live, i_k, dims.K, BC, MAP)
        b_k = load_features(k, i_b, i_h, t, rows, live, i_k, dims.K, BC, MAP)
        b_q = b_q * load_row_scale(rstd, scale, i_b, i_h, t, rows, live, NORMED)
        if DECAY == "channel":
            b_g = load_log_decay(g, i_b, i_h, t, rows, live, i_k, dims.K, BC, "channel")
            b_a = add_channel_scores(b_a, b_q, b_k, b_g, walk, q, T)
        elif T:
            b_a += product(b_k, tl.trans(b_q), q)
        else:
            b_a += product(b_q, tl.trans(b_k), q)
    if DECAY == "token":
        b_g = load_log_decay(g, i_b, i_h, t, rows, live, 0, dims.K, BC, "token")
        b_a = b_a * token_decay(b_g, rows, q, T)
    elif DECAY is None:
        if T:
            b_a = tl.where(rows[:, None] <= rows[None, :], b_a, 0.0)
        else:
            b_a = tl.where(rows[:, None] >= rows[None, :], b_a, 0.0)
    return b_a


@triton.jit
def linear_forward_kernel(
    q,  # Strided [B, T, H, K]
    k,  # Strided [B, T, H, K]
    v,  # Strided [B, T, H, V]
    g,  # Strided [B, T, H, K] or [B, T, H], log-decay; None
    start,  # [segments, H, K, V]; [N, H, K, V], of whole sequences, if not causal; None for zeros
    finish,  # [segments, H, K, V], states behind the segments; None
    gate,  # Strided [B, T, H, V] or [B, T, H], logits; None
    weight,  # Strided [1, 1, H, V]; None
    outputs,  # Outputs
    rstd,  # Strided [B, T, H]; None without a norm
    squares,  # [B, T, H, slices of V], sums of squares of a deferred norm; None
    walk,  # Walk
    scale,
    eps,
    dims: tl.constexpr,  # Dims
    kind: tl.constexpr,  # Kind
    norm: tl.constexpr,  # Norm
):
    BT: tl.constexpr = dims.BT
    NV: tl.constexpr = (dims.V + dims.BV - 1) // dims.BV
    V: tl.constexpr = dims.V
    BV: tl.constexpr = dims.BV
    ACT: tl.constexpr = norm.ACTIVATION
    GATE: tl.constexpr = norm.GATE
    WEIGHT: tl.constexpr = norm.WEIGHT
    dtype: tl.constexpr = q.ptr.dtype.element_ty
    DECAY: tl.constexpr = kind.DECAY
    MAP: tl.constexpr = kind.FEATURE_MAP
    i_program = tl.program_id(0)
    i_slice = i_program % NV
    i_v = i_slice * dims.BV
    heads = walk.heads >> 1
    i_h = i_program // NV % heads
    i_s = i_program // NV // heads
    i_n, i_b, _, _, _, begin, end = find_segment(walk, i_s)

    i_start = i_s if kind.CAUSAL else i_n
    b_s = load_state(start, walk, i_start, i_h, 0, dims, 0, i_v, False)  # [BK, BV]
    for t in tl.range(begin, end, BT):
        rows = fresh_rows(t, walk, BT)
        live = t + rows < end
        if kind.CAUSAL:
            b_a = chunk_scores(
                q, k, g, None, 1.0, walk, i_b, i_h, t, rows, live, dims, kind, False, False
            )
            b_q = load_features(q, i_b, i_h, t, rows, live, 0, dims.K, dims.BK, MAP)
            b_k = load_features(k, i_b, i_h, t, rows, live, 0, dims.K, dims.BK, MAP)
            b_v = load_slice(locate(v, i_b, i_h, t), v, rows, live, i_v, dims.V, dims.BV)
            b_g = None
            if DECAY is not None:
                b_g = load_log_decay(g, i_b, i_h, t, rows, live, 0, dims.K, dims.BK, DECAY)
            b_o = product(b_a, b_v, q)  # [BT, BV]
            if DECAY is not None:
                b_q = b_q * running_decay(
                    b_g, g, i_b, i_h, t, rows, end, 0, q, dims.K, dims.BK, "up to", DECAY
                )
                b_k = b_k * running_decay(
                    b_g, g, i_b, i_h, t, rows, end, 0, q, dims.K, dims.BK, "behind", DECAY
                )
            b_o += product(b_q, b_s, q)
            b_write = product(tl.trans(b_k), b_v, q)
            if DECAY is not None:
                b_s = age(b_s, b_write, chunk_total(b_g, DECAY, False), dtype)
            else:
                b_s += b_write
        else:
            b_q = load_features(q, i_b, i_h, t, rows, live, 0, dims.K, dims.BK, MAP)
            b_o = product(b_q, b_s, q)
        b_o = b_o * scale

        store = outputs.y if norm.KEEP_Y else outputs.out
        if norm.KIND is not None:
            b_squares = tl.sum(b_o * b_o, 1)  # [BT]
            if norm.DEFERRED:
                b_r = 1.0 / divisor(b_squares, BV)
                row = (tl.cast(i_b, tl.int64) * (walk.length >> 1) + t + rows) * heads + i_h
                tl.store(squares + row * NV + i_slice, b_squares, mask=live)
            else:
                b_r = 1.0 / tl.sqrt_rn(b_squares / V + eps)
                p_r = locate(rstd, i_b, i_h, t) + rows * rstd.time
                tl.store(p_r, b_r, mask=live)
            b_o = b_o * b_r[:, None]
        if norm.DEFERRED or norm.KEEP_Y:
            store_slice(locate(store, i_b, i_h, t), store, rows, live, b_o, i_v, dims.V, dims.BV)
        if not norm.DEFERRED:
            out = outputs.out
            b_o = weigh_and_gate(
                b_o,
                gate,
                weight,
                i_b,
                i_h,
                t,
                rows,
                live,
                i_v,
                dims.V,
                dims.BV,
                ACT,
                GATE,
                WEIGHT,
            )
            store_slice(locate(out, i_b, i_h, t), out, rows, live, b_o, i_v, dims.V, dims.BV)

    if finish is not None:
        p_s, mask = locate_state(finish, walk, i_s, i_h, 0, dims, 0, i_v, False)
        tl.store(p_s, b_s, mask=mask)
