"""The walk back through a sequence that finds dv, see ``linear_backward_qk.py``."""

from __future__ import annotations

import triton
import triton.language as tl
from attnvariants.kernels._decay import age, chunk_total, fresh_rows
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
from attnvariants.kernels.linear_forward import chunk_scores


@triton.jit
def linear_backward_v_kernel(
    q,  # Strided [B, T, H, K]
    k,  # Strided [B, T, H, K]
    g,  # Strided [B, T, H, K] or [B, T, H]; None
    do,  # Strided [B, T, H, V]
    rstd,  # Strided [B, T, H]; None
    ends,  # [segments, H, K, V], cotangents of states; of sequences if not causal; None for zeros
    dv,  # Strided [B, T, H, V]
    dstart,  # [segments, H, K, V], cotangents of the states that segments start from; None
    walk,  # Walk
    scale,
    dims: tl.constexpr,  # Dims, all of K in a tile
    kind: tl.constexpr,  # Kind
):
    BT: tl.constexpr = dims.BT
    NV: tl.constexpr = (dims.V + dims.BV - 1) // dims.BV
    dtype: tl.constexpr = q.ptr.dtype.element_ty
    DECAY: tl.constexpr = kind.DECAY
    MAP: tl.constexpr = kind.FEATURE_MAP
    NORMED: tl.constexpr = rstd is not None
    i_program = tl.program_id(0)
    i_v = i_program % NV * dims.BV
    heads = walk.heads >> 1
    i_h = i_program // NV % heads
    i_s = i_program // NV // heads
    i_n, i_b, _, _, _, begin, end = find_segment(walk, i_s)

    i_end = i_s if kind.CAUSAL else i_n
    b_ds = load_state(ends, walk, i_end, i_h, 0, dims, 0, i_v, False)  # [BK, BV]
    chunks = tl.cdiv(end - begin, BT)
    for n in tl.range(0, chunks):
        t = begin + (chunks - 1 - n) * BT
        rows = fresh_rows(t, walk, BT)
        live = t + rows < end
        if kind.CAUSAL:
            b_at = chunk_scores(
                q, k, g, rstd, scale, walk, i_b, i_h, t, rows, live, dims, kind, True, NORMED
            )
        b_k = load_features(k, i_b, i_h, t, rows, live, 0, dims.K, dims.BK, MAP)
        if DECAY is not None:
            b_g = load_log_decay(g, i_b, i_h, t, rows, live, 0, dims.K, dims.BK, DECAY)
            b_k = b_k * running_decay(
                b_g, g, i_b, i_h, t, rows, end, 0, q, dims.K, dims.BK, "behind", DECAY
            )
        b_dv = product(b_k, b_ds, q)  # [BT, BV]
        if kind.CAUSAL:
            b_do = load_slice(locate(do, i_b, i_h, t), do, rows, live, i_v, dims.V, dims.BV)
            b_dv += product(b_at, b_do, q)
            # Late queries have decayed most; sums that begin with them round least.
            back = BT - 1 - rows
            live = t + back < end
            b_do = load_slice(locate(do, i_b, i_h, t), do, back, live, i_v, dims.V, dims.BV)
            b_q = load_features(q, i_b, i_h, t, back, live, 0, dims.K, dims.BK, MAP)
            b_q = b_q * load_row_scale(rstd, scale, i_b, i_h, t, back, live, NORMED)
            if DECAY is not None:
                b_g = load_log_decay(g, i_b, i_h, t, back, live, 0, dims.K, dims.BK, DECAY)
                b_q = b_q * running_decay(
                    b_g, g, i_b, i_h, t, rows, end, 0, q, dims.K, dims.BK, "from", DECAY
                )
                b_total = chunk_total(b_g, DECAY, False)
                b_ds = age(b_ds, product(tl.trans(b_q), b_do, q), b_total, dtype)
            else:
                b_ds += product(tl.trans(b_q), b_do, q)
        store_slice(locate(dv, i_b, i_h, t), dv, rows, t + rows < end, b_dv, i_v, dims.V, dims.BV)
    if dstart is not None:
        p_s, mask = locate_state(dstart, walk, i_s, i_h, 0, dims, 0, i_v, False)
        tl.store(p_s, b_ds, mask=mask)
