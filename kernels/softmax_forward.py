"""Softmax attention with windows and an output gate, forward: one launch for all heads.

A program holds ``BT`` queries of one head and walks over the tiles of ``BS`` keys that they see:
those at the left edge of a window and at the diagonal with a mask, those between without.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from attnvariants.kernels._gate import activate
from attnvariants.kernels._schedule import (
    find_band,
    find_rows,
    masked_tile,
    pick_tile,
    visible_keys,
)
from attnvariants.kernels._tiles import (
    LN_2,
    LOG2_E,
    cast,
    dot,
    load_rows,
    locate,
    power,
    store_rows,
)


class Dims(NamedTuple):
    """Head dims, the tile sides that hold them, and query heads per KV head; compile-time."""

    K: int
    V: int
    BK: int
    BV: int
    GROUP: int


@triton.jit
def accumulate(
    b_o,
    b_m,
    b_l,
    b_s,
    b_v,
    factor,
    visible,
    RELU: tl.constexpr,
    WITH_MAX: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """Adds the values of one tile of keys; ``visible`` is a mask, or ``None`` for all of them."""
    b_new = b_m
    if visible is not None:
        b_s = tl.where(visible, b_s * factor, float("-inf"))
        factor = 1.0
    if WITH_MAX:
        b_new = tl.maximum(b_m, tl.max(b_s, 1) * factor)
    if RELU:
        b_p = b_s * factor
        b_p = tl.where(b_p < 0, 0.0, b_p)  # a maximum would drop NaN
    else:
        b_base = b_new
        if visible is not None:  # a row may see nothing here or before: -inf - -inf would be NaN
            b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = power(b_s * factor - b_base[:, None], NATURAL)
        b_rescale = power(b_m - b_base, NATURAL)
        b_l = b_l * b_rescale + tl.sum(b_p, 1)
        b_o = b_o * b_rescale[:, None]
    b_o = dot(cast(b_p, b_v.dtype), b_v, b_o)
    return b_o, b_new, b_l


@triton.jit
def softmax_forward_kernel(
    q,  # Strided [B, T, H, K]
    k,  # Strided [B, S, Hkv, K]
    v,  # Strided [B, S, Hkv, V]
    gate,  # Strided [B, T, H, V] or [B, T, H], logits; None
    out,  # Strided [B, T, H, V]
    lse,  # [B, H, T]; None for the relu of the logits in place of their softmax
    max_logit,  # [tiles, B, H]; None
    bands,  # of Band
    cu_seqlens,  # [N + 1]; None
    sizes,  # Sizes
    scale,
    dims: tl.constexpr,  # Dims
    config: tl.constexpr,  # Config
    ACTIVATION: tl.constexpr,  # of the gate; None
):
    K: tl.constexpr = dims.K
    V: tl.constexpr = dims.V
    BK: tl.constexpr = dims.BK
    BV: tl.constexpr = dims.BV
    GROUP: tl.constexpr = dims.GROUP
    BT: tl.constexpr = config.BT
    BS: tl.constexpr = config.BS
    RELU: tl.constexpr = lse is None
    i_tile, i_b, i_rank, i_g = pick_tile(sizes, GROUP, LAST_FIRST=True)
    i_kv, left, right = find_band(i_rank, bands)
    i_h = i_kv * GROUP + i_g
    start, queries, first = find_rows(i_tile, sizes.queries >> 1, cu_seqlens, sizes, BT)
    keys = queries
    if cu_seqlens is None and sizes.block is None:
        keys = sizes.keys >> 1

    rows = tl.arange(0, BT)
    live = first + rows < queries
    p_q = locate(q, i_b, i_h, start + first)
    b_q = load_rows(p_q, q, rows, live, K, BK)  # [BT, BK]
    p_k = locate(k, i_b, i_kv, start)
    p_v = locate(v, i_b, i_kv, start)

    begin, free, edge, end, low, high = visible_keys(first, queries, keys, left, right, BT, BS)
    b_o = tl.zeros([BT, BV], tl.float32)
    b_m = tl.full([BT], float("-inf"), tl.float32)  # largest logit so far
    b_l = tl.zeros([BT], tl.float32)  # sum of power(logit - b_m)
    NATURAL: tl.constexpr = RELU or q.ptr.dtype.element_ty == tl.float32
    factor = scale if NATURAL else scale * LOG2_E
    WITH_MAX: tl.constexpr = not RELU or max_logit is not None
    cols = tl.arange(0, BS)
    for n in tl.range(0, free - begin + end - edge):
        i_s = masked_tile(n, begin, free, edge) * BS
        exists = i_s + cols < keys
        visible = (i_s + cols[None, :] >= low[:, None]) & (i_s + cols[None, :] < high[:, None])
        b_k = load_rows(p_k + tl.cast(i_s, tl.int64) * k.time, k, cols, exists, K, BK)
        b_v = load_rows(p_v + tl.cast(i_s, tl.int64) * v.time, v, cols, exists, V, BV)
        b_s = dot(b_q, tl.trans(b_k))  # [BT, BS]
        b_o, b_m, b_l = accumulate(
            b_o, b_m, b_l, b_s, b_v, factor, visible, RELU, WITH_MAX, NATURAL
        )
    for i_tile_s in tl.range(free, edge):
        i_s = i_tile_s * BS
        b_k = load_rows(p_k + tl.cast(i_s, tl.int64) * k.time, k, cols, None, K, BK)
        b_v = load_rows(p_v + tl.cast(i_s, tl.int64) * v.time, v, cols, None, V, BV)
        b_s = dot(b_q, tl.trans(b_k))  # [BT, BS]
        b_o, b_m, b_l = accumulate(b_o, b_m, b_l, b_s, b_v, factor, None, RELU, WITH_MAX, NATURAL)

    batch = sizes.batch >> 1
    heads = (sizes.kv_heads >> 1) * GROUP
    if not RELU:
        blind = b_l == 0  # rows that see nothing give 0
        b_l = tl.where(blind, 1.0, b_l)
        b_o = b_o / b_l[:, None]
        length = sizes.queries >> 1
        p_lse = lse + tl.cast(i_b * heads + i_h, tl.int64) * length + start + first + rows
        b_lse = b_m + tl.log(b_l) if NATURAL else (b_m + tl.log2(b_l)) * LN_2
        b_lse = tl.where(blind, float("-inf"), b_lse)
        tl.store(p_lse, b_lse, mask=live)
    if max_logit is not None:
        largest = tl.max(tl.where(live, b_m, float("-inf")), 0)
        if not RELU:  # a maximum drops NaN, a sum does not
            broken = tl.max(tl.where(live & (b_l != b_l), 1, 0), 0)
            largest = tl.where(broken > 0, float("nan"), largest)
        if not NATURAL:
            largest = largest * LN_2
        tl.store(max_logit + (i_tile * batch + i_b) * heads + i_h, largest)
    if ACTIVATION is not None:  # Triton 3.6 fails to compare a gate that holds None with None
        p_gate = locate(gate, i_b, i_h, start + first)
        if gate.dim is None:  # one logit per head
            b_gate = tl.load(p_gate + rows * gate.time, mask=live, other=0.0)[:, None]
        else:
            b_gate = load_rows(p_gate, gate, rows, live, V, BV)
        b_o = b_o * activate(b_gate.to(tl.float32), ACTIVATION)
    store_rows(locate(out, i_b, i_h, start + first), out, rows, live, b_o, V, BV)
