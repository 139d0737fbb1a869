"""Softmax attention with windows and an output gate, backward, in three kernels.

The first reads what depends on single rows: the gated output, its gradient and the gate. The others
compute the probabilities again, once by queries for dq and once by keys for dk and dv; so every
gradient has one owner, which adds up in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from attnvariants.kernels._gate import activate, log_derivative
from attnvariants.kernels._schedule import (
    find_band,
    find_rows,
    masked_tile,
    pick_tile,
    visible_keys,
    visible_tiles,
)
from attnvariants.kernels._tiles import LOG2_E, cast, dot, load_rows, locate, power, store_rows

SATURATED = tl.constexpr(0.999)  # a probability that leaves less of dS than the rounding of D


@triton.jit
def softmax_backward_rows_kernel(
    dout,  # Strided [B, T, H, V]
    gate,  # Strided [B, T, H, V] or [B, T, H], logits; None
    out,  # Strided [B, T, H, V], gated
    dpre,  # Strided [B, T, H, V], gradient before the gate, rounded; None without a gate
    dgate,  # Strided like gate; None
    delta,  # [B, H, T]
    length,
    heads,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """``dO = dY act(L)``, ``dL = dY Y (log act)'(L)`` and ``D = sum(dO O)`` per row.

    D is taken from the rounded dO that the other kernels multiply with, so that the rows of dS
    cancel as far as they can: ``O = Y / act(L)``.
    """
    length = length >> 1
    heads = heads >> 1
    tiles = tl.cdiv(length, BT)
    i_bh = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BT
    i_b = i_bh // heads
    i_h = i_bh % heads
    rows = tl.arange(0, BT)
    live = first + rows < length
    b_dy = load_rows(locate(dout, i_b, i_h, first), dout, rows, live, V, BV).to(tl.float32)
    b_y = load_rows(locate(out, i_b, i_h, first), out, rows, live, V, BV).to(tl.float32)
    b_product = b_dy * b_y  # [BT, BV]
    if ACTIVATION is None:  # Triton 3.6 fails to compare a gate that holds None with None
        b_delta = tl.sum(b_product, 1)
    else:
        p_gate = locate(gate, i_b, i_h, first)
        if gate.dim is None:  # one logit per head
            b_gate = tl.load(p_gate + rows * gate.time, mask=live, other=0.0).to(tl.float32)
            b_dgate = tl.sum(b_product, 1) * log_derivative(b_gate, ACTIVATION)
            p_dgate = locate(dgate, i_b, i_h, first) + rows * dgate.time
            tl.store(p_dgate, cast(b_dgate, dgate.ptr.dtype.element_ty), mask=live)
            b_gate = b_gate[:, None]
        else:
            b_gate = load_rows(p_gate, gate, rows, live, V, BV).to(tl.float32)
            b_dgate = b_product * log_derivative(b_gate, ACTIVATION)
            store_rows(locate(dgate, i_b, i_h, first), dgate, rows, live, b_dgate, V, BV)
        b_act = activate(b_gate, ACTIVATION)
        b_do = cast(b_dy * b_act, dpre.ptr.dtype.element_ty)  # [BT, BV]
        store_rows(locate(dpre, i_b, i_h, first), dpre, rows, live, b_do, V, BV)
        if dpre.ptr.dtype.element_ty == tl.float32:  # to divide would only add roundings
            b_delta = tl.sum(b_product, 1)
        else:
            open_gate = b_act > 0
            b_o = tl.where(open_gate, b_y / tl.where(open_gate, b_act, 1.0), 0.0)
            b_delta = tl.sum(b_do.to(tl.float32) * b_o, 1)
    p_delta = delta + tl.cast(i_bh, tl.int64) * length + first + rows
    tl.store(p_delta, b_delta, mask=live)


@triton.jit
def softmax_backward_dq_kernel(
    q,  # Strided [B, T, H, K]
    k,  # Strided [B, S, Hkv, K]
    v,  # Strided [B, S, Hkv, V]
    do,  # Strided [B, T, H, V], gradient before the gate
    lse,  # [B, H, T]; None for relu
    dlse,  # Strided [B, T, H]; None
    delta,  # [B, H, T], D, modified in place; None for relu
    dq,  # Strided [B, T, H, K]
    saturated,  # [programs]; None without a gate
    bands,  # of Band
    cu_seqlens,  # [N + 1]; None
    sizes,  # Sizes
    scale,
    dims: tl.constexpr,  # Dims
    config: tl.constexpr,  # Config
    AGAIN: tl.constexpr,  # only where saturated
):
    """dq of ``BT`` queries of one head, over the tiles of ``BS`` keys that they see.

    Leaves in ``delta`` what is to be subtracted from dP: D less the gradient of lse, and no D where
    a query sees one key. Behind a gate D comes from a rounded product, and what the rows of dS do
    not cancel is added to it. Where a probability is so close to 1 that this rest is larger than
    dS, the program asks to be run again, with the better D.
    """
    K: tl.constexpr = dims.K
    V: tl.constexpr = dims.V
    BK: tl.constexpr = dims.BK
    BV: tl.constexpr = dims.BV
    GROUP: tl.constexpr = dims.GROUP
    BT: tl.constexpr = config.BT
    BS: tl.constexpr = config.BS
    RELU: tl.constexpr = lse is None
    NATURAL: tl.constexpr = RELU or q.ptr.dtype.element_ty == tl.float32
    base = 1.0 if NATURAL else LOG2_E
    if AGAIN:
        if tl.load(saturated + tl.program_id(0)) == 0:
            return
    i_tile, i_b, i_rank, i_g = pick_tile(sizes, GROUP, LAST_FIRST=True)
    i_kv, left, right = find_band(i_rank, bands)
    i_h = i_kv * GROUP + i_g
    start, queries, first = find_rows(i_tile, sizes.queries >> 1, cu_seqlens, sizes, BT)
    keys = queries
    if cu_seqlens is None and sizes.block is None:
        keys = sizes.keys >> 1

    rows = tl.arange(0, BT)
    cols = tl.arange(0, BS)
    live = first + rows < queries
    b_q = load_rows(locate(q, i_b, i_h, start + first), q, rows, live, K, BK)
    b_do = load_rows(locate(do, i_b, i_h, start + first), do, rows, live, V, BV)
    heads = (sizes.kv_heads >> 1) * GROUP
    offset = tl.cast(i_b * heads + i_h, tl.int64) * (sizes.queries >> 1) + start + first
    b_lse = load_statistic(lse, offset, rows, live) * base
    p_k = locate(k, i_b, i_kv, start)
    p_v = locate(v, i_b, i_kv, start)

    begin, free, edge, end, low, high = visible_keys(first, queries, keys, left, right, BT, BS)
    alone = high - tl.maximum(low, 0) == 1
    b_delta = load_statistic(delta, offset, rows, live)
    b_dlse = tl.zeros([BT], tl.float32)
    if not AGAIN:
        if dlse is not None:
            p_dlse = locate(dlse, i_b, i_h, start + first) + rows.to(tl.int64) * dlse.time
            b_dlse = tl.load(p_dlse, mask=live, other=0.0)
        b_delta = tl.where(alone, 0.0, b_delta) - b_dlse
    REST: tl.constexpr = saturated is not None and not AGAIN
    factor = scale if NATURAL else scale * LOG2_E
    b_dq = tl.zeros([BT, BK], tl.float32)
    b_rest = tl.zeros([BT], tl.float32)  # sums of the rows of dS
    b_peak = tl.zeros([BT], tl.float32)  # largest probabilities
    for n in tl.range(0, free - begin + end - edge):
        i_s = masked_tile(n, begin, free, edge) * BS
        exists = i_s + cols < keys
        visible = (i_s + cols[None, :] >= low[:, None]) & (i_s + cols[None, :] < high[:, None])
        b_k = load_rows(p_k + tl.cast(i_s, tl.int64) * k.time, k, cols, exists, K, BK)
        b_v = load_rows(p_v + tl.cast(i_s, tl.int64) * v.time, v, cols, exists, V, BV)
        b_s = dot(b_q, tl.trans(b_k))  # [BT, BS]
        b_p = probabilities(b_s, factor, b_lse[:, None], visible, RELU, NATURAL)
        b_dp = dot(b_do, tl.trans(b_v))
        if not RELU:
            b_dp = tl.where(alone[:, None], 0.0, b_dp)
        b_ds = logit_gradients(b_p, b_dp, b_delta[:, None], visible, RELU)
        if REST:
            b_rest += tl.sum(b_ds, 1)
            b_peak = tl.maximum(b_peak, tl.max(b_p, 1))
        b_dq = dot(cast(b_ds, b_k.dtype), b_k, b_dq)
    for i_tile_s in tl.range(free, edge):
        i_s = i_tile_s * BS
        b_k = load_rows(p_k + tl.cast(i_s, tl.int64) * k.time, k, cols, None, K, BK)
        b_v = load_rows(p_v + tl.cast(i_s, tl.int64) * v.time, v, cols, None, V, BV)
        b_s = dot(b_q, tl.trans(b_k))  # [BT, BS]
        b_p = probabilities(b_s, factor, b_lse[:, None], None, RELU, NATURAL)
        b_dp = dot(b_do, tl.trans(b_v))
        b_ds = logit_gradients(b_p, b_dp, b_delta[:, None], None, RELU)
        if REST:
            b_rest += tl.sum(b_ds, 1)
            b_peak = tl.maximum(b_peak, tl.max(b_p, 1))
        b_dq = dot(cast(b_ds, b_k.dtype), b_k, b_dq)
    if REST:
        b_delta += tl.where(alone, 0.0, b_rest - b_dlse)
        peak = tl.max(tl.where(alone | (first + rows >= queries), 0.0, b_peak), 0)
        tl.store(saturated + tl.program_id(0), (peak > SATURATED).to(tl.int32))
    if not RELU and not AGAIN:
        tl.store(delta + offset + rows, b_delta, mask=live)
    b_dq = b_dq * scale
    store_rows(locate(dq, i_b, i_h, start + first), dq, rows, live, b_dq, K, BK)


@triton.jit
def softmax_backward_dkdv_kernel(
    q,  # Strided [B, T, H, K]
    k,  # Strided [B, S, Hkv, K]
    v,  # Strided [B, S, Hkv, V]
    do,  # Strided [B, T, H, V], gradient before the gate
    lse,  # [B, H, T]; None for relu
    delta,  # [B, H, T], as the kernel of dq leaves it; None for relu
    dk,  # Strided [B, S, Hkv, K]
    dv,  # Strided [B, S, Hkv, V]
    bands,  # of Band
    cu_seqlens,  # [N + 1]; None
    sizes,  # Sizes
    scale,
    dims: tl.constexpr,  # Dims
    config: tl.constexpr,  # Config
):
    """dk and dv of ``BS`` keys of one KV head, over its query heads and the queries that see them.

    Scores are computed transposed, ``[BS, BT]``: Triton before 3.7.1 miscompiles products with a
    transposed accumulator on Hopper.
    """
    K: tl.constexpr = dims.K
    V: tl.constexpr = dims.V
    BK: tl.constexpr = dims.BK
    BV: tl.constexpr = dims.BV
    GROUP: tl.constexpr = dims.GROUP
    BT: tl.constexpr = config.BT
    BS: tl.constexpr = config.BS
    RELU: tl.constexpr = lse is None
    NATURAL: tl.constexpr = RELU or q.ptr.dtype.element_ty == tl.float32
    base = 1.0 if NATURAL else LOG2_E
    i_tile, i_b, i_rank, _ = pick_tile(sizes, 1, LAST_FIRST=False)
    i_kv, left, right = find_band(i_rank, bands)
    start, keys, first = find_rows(i_tile, sizes.keys >> 1, cu_seqlens, sizes, BS)
    queries = keys
    if cu_seqlens is None and sizes.block is None:
        queries = sizes.queries >> 1

    cols = tl.arange(0, BS)
    rows = tl.arange(0, BT)
    exists = first + cols < keys
    b_k = load_rows(locate(k, i_b, i_kv, start + first), k, cols, exists, K, BK)
    b_v = load_rows(locate(v, i_b, i_kv, start + first), v, cols, exists, V, BV)

    # Query i stands at position i + shift and sees the keys that are less than left before it.
    shift = keys - queries
    last = tl.minimum(first + BS, keys) - 1
    begin, free, edge, end = visible_tiles(
        first - right - shift,
        tl.minimum(last + left - shift, queries),
        last - right - shift,
        tl.minimum(first + left - shift, queries),
        BT,
    )
    low = first + cols - right - shift  # a key is seen by the queries [low, high)
    high = first + cols + left - shift
    if keys == 1:  # all queries are alone with it, which the loop with the mask heeds
        edge = free
    if first >= keys:
        end = begin
        free = begin
        edge = begin
    heads = (sizes.kv_heads >> 1) * GROUP
    b_dk = tl.zeros([BS, BK], tl.float32)
    b_dv = tl.zeros([BS, BV], tl.float32)
    # One loop over the query heads of the group and their tiles: what a nested loop keeps between
    # its iterations would not fit into registers.
    edges = free - begin + end - edge
    for n in tl.range(0, GROUP * edges):
        i_h = i_kv * GROUP + n // edges
        i_t = masked_tile(n % edges, begin, free, edge) * BT
        live = i_t + rows < queries
        visible = (i_t + rows[None, :] >= low[:, None]) & (i_t + rows[None, :] < high[:, None])
        b_q = load_rows(locate(q, i_b, i_h, start + i_t), q, rows, live, K, BK)
        b_do = load_rows(locate(do, i_b, i_h, start + i_t), do, rows, live, V, BV)
        offset = tl.cast(i_b * heads + i_h, tl.int64) * (sizes.queries >> 1) + start + i_t
        b_s = dot(b_k, tl.trans(b_q))  # [BS, BT]
        b_lse = load_statistic(lse, offset, rows, live) * base
        b_p = probabilities(b_s, scale * base, b_lse[None, :], visible, RELU, NATURAL)
        b_dv = dot(cast(b_p, b_do.dtype), b_do, b_dv)
        b_dp = dot(b_v, tl.trans(b_do))  # [BS, BT]
        b_delta = load_statistic(delta, offset, rows, live)
        if not RELU:
            position = i_t + shift + rows
            count = tl.minimum(position + right + 1, keys) - tl.maximum(position - left + 1, 0)
            b_dp = tl.where((count == 1)[None, :], 0.0, b_dp)
        b_ds = logit_gradients(b_p, b_dp, b_delta[None, :], visible, RELU)
        b_dk = dot(cast(b_ds, b_q.dtype), b_q, b_dk)
    inner = edge - free
    for n in tl.range(0, GROUP * inner):
        i_h = i_kv * GROUP + n // inner
        i_t = (free + n % inner) * BT
        b_q = load_rows(locate(q, i_b, i_h, start + i_t), q, rows, None, K, BK)
        b_do = load_rows(locate(do, i_b, i_h, start + i_t), do, rows, None, V, BV)
        offset = tl.cast(i_b * heads + i_h, tl.int64) * (sizes.queries >> 1) + start + i_t
        b_s = dot(b_k, tl.trans(b_q))  # [BS, BT]
        b_lse = load_statistic(lse, offset, rows, None) * base
        b_p = probabilities(b_s, scale * base, b_lse[None, :], None, RELU, NATURAL)
        b_dv = dot(cast(b_p, b_do.dtype), b_do, b_dv)
        b_dp = dot(b_v, tl.trans(b_do))  # [BS, BT]
        b_delta = load_statistic(delta, offset, rows, None)
        b_ds = logit_gradients(b_p, b_dp, b_delta[None, :], None, RELU)
        b_dk = dot(cast(b_ds, b_q.dtype), b_q, b_dk)
    b_dk = b_dk * scale
    store_rows(locate(dk, i_b, i_kv, start + first), dk, cols, exists, b_dk, K, BK)
    store_rows(locate(dv, i_b, i_kv, start + first), dv, cols, exists, b_dv, V, BV)


@triton.jit
def load_statistic(x, offset, rows, live):
    """One number per row; zeros where there are none. ``live`` as in ``load_rows``."""
    if x is None:
        b_x = tl.zeros_like(rows).to(tl.float32)
    elif live is None:
        b_x = tl.load(x + offset + rows)
    else:
        b_x = tl.load(x + offset + rows, mask=live, other=0.0)
    return b_x


@triton.jit
def probabilities(b_s, factor, b_lse, visible, RELU: tl.constexpr, NATURAL: tl.constexpr):
    """The probabilities of a tile from its products; ``visible`` is a mask or ``None`` for all."""
    if RELU:
        b_s = b_s * factor
        b_p = tl.where(b_s < 0, 0.0, b_s)  # a maximum would drop NaN
    else:
        b_p = power(b_s * factor - b_lse, NATURAL)
    if visible is not None:
        b_p = tl.where(visible, b_p, 0.0)
    return b_p


@triton.jit
def logit_gradients(b_p, b_dp, b_delta, visible, RELU: tl.constexpr):
    """dS from dP, without the scale.

    Callers set dP to 0 where a query sees one key, as D is there: nothing moves a probability from
    1, and rounded numbers would not cancel. Such queries are in tiles with a mask only.
    """
    if RELU:
        b_ds = tl.where(b_p > 0, b_dp, 0.0)
    else:
        b_ds = b_p * (b_dp - b_delta)
    if visible is not None:  # a row that sees nothing may have an infinite gradient of lse
        b_ds = tl.where(visible, b_ds, 0.0)
    return b_ds
