"""Passes over the state alone: its value at boundaries, from keys and values or, backwards, from

queries and cotangents; and the scan that joins segments which were walked beside each other.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from attnvariants.kernels._decay import age, chunk_total, fresh_rows
from attnvariants.kernels._tiles import load_slice, locate, product
from attnvariants.kernels._walk import (
    find_segment,
    find_sequence,
    first_slot,
    load_features,
    load_log_decay,
    load_row_scale,
    load_state,
    locate_state,
    running_decay,
)


class Kind(NamedTuple):
    """The variant of linear attention; compile-time."""

    DECAY: str | None  # "channel", "token"; None for none
    FEATURE_MAP: str | None
    CAUSAL: bool


@triton.jit
def linear_states_kernel(
    k,  # Strided [B, T, H, K]; queries if BACKWARD
    v,  # Strided [B, T, H, V]; cotangents of the output if BACKWARD
    g,  # Strided [B, T, H, K] or [B, T, H]; None
    rstd,  # Strided [B, T, H], only if BACKWARD; None
    start,  # [segments, H, K, V], states to start from; None for zeros
    finish,  # [segments, H, K, V], states arrived at; None
    marks,  # [slots of marked, H, K, V], states at the start of the segments of marked; None
    total,  # [segments, H, K] or [segments, H], log-decay of a segment; None
    walk,  # Walk
    marked,  # Walk with spans that divide those of walk
    scale,
    dims: tl.constexpr,  # Dims
    kind: tl.constexpr,  # Kind
    BACKWARD: tl.constexpr,
):
    """The state of every segment, chunk by chunk; a program holds a tile of it."""
    BT: tl.constexpr = dims.BT
    dtype: tl.constexpr = k.ptr.dtype.element_ty
    DECAY: tl.constexpr = kind.DECAY
    MAP: tl.constexpr = kind.FEATURE_MAP
    NORMED: tl.constexpr = rstd is not None
    NV: tl.constexpr = (dims.V + dims.BV - 1) // dims.BV
    NK: tl.constexpr = (dims.K + dims.BK - 1) // dims.BK
    i_program = tl.program_id(0)
    i_v = i_program % NV * dims.BV
    i_k = i_program // NV % NK * dims.BK
    heads = walk.heads >> 1
    i_h = i_program // (NV * NK) % heads
    i_s = i_program // (NV * NK) // heads
    i_n, i_b, place, first, last, begin, end = find_segment(walk, i_s)

    b_s = load_state(start, walk, i_s, i_h, 0, dims, i_k, i_v, False)  # [BK, BV]
    BD: tl.constexpr = dims.BK if DECAY == "channel" else 1
    b_sum = tl.zeros([BD, 1], tl.float32)
    chunks = tl.cdiv(end - begin, BT)
    for n in tl.range(0, chunks):
        t = begin + n * BT
        if BACKWARD:
            t = begin + (chunks - 1 - n) * BT
        if marks is not None:
            stride = marked.span >> 1
            if (t - first) % stride == 0:
                i_m = first_slot(marked, i_n, first) + (t - first) // stride
                p_m, mask = locate_state(marks, walk, i_m, i_h, t, dims, i_k, i_v, False)
                tl.store(p_m, b_s, mask=mask)
        places = fresh_rows(t, walk, BT)
        rows = places
        if BACKWARD:  # late queries have decayed most; sums that begin with them round least
            rows = BT - 1 - places
        live = t + rows < end
        b_k = load_features(k, i_b, i_h, t, rows, live, i_k, dims.K, dims.BK, MAP)
        if BACKWARD:
            b_k = b_k * load_row_scale(rstd, scale, i_b, i_h, t, rows, live, NORMED)
        b_v = load_slice(locate(v, i_b, i_h, t), v, rows, live, i_v, dims.V, dims.BV)
        if DECAY is not None:
            b_g = load_log_decay(g, i_b, i_h, t, rows, live, i_k, dims.K, dims.BK, DECAY)
            if BACKWARD:
                b_k = b_k * running_decay(
                    b_g, g, i_b, i_h, t, places, end, i_k, k, dims.K, dims.BK, "from", DECAY
                )
            else:
                b_k = b_k * running_decay(
                    b_g, g, i_b, i_h, t, places, end, i_k, k, dims.K, dims.BK, "behind", DECAY
                )
            b_total = chunk_total(b_g, DECAY, False)
            b_s = age(b_s, product(tl.trans(b_k), b_v, k), b_total, dtype)
            b_sum += b_total
        else:
            b_s += product(tl.trans(b_k), b_v, k)

    # Slots behind a sequence's last segment are nobody's.
    if (place == 0) | (begin < last):
        if finish is not None:
            p_s, mask = locate_state(finish, walk, i_s, i_h, 0, dims, i_k, i_v, False)
            tl.store(p_s, b_s, mask=mask)
        if total is not None:
            row = tl.cast(i_s, tl.int64) * heads + i_h
            if DECAY == "channel":
                cols = i_k + tl.arange(0, dims.BK)
                tl.store(total + row * dims.K + cols[:, None], b_sum, mask=cols[:, None] < dims.K)
            else:
                tl.store(total + row + tl.arange(0, 1)[:, None], b_sum)


@triton.jit
def linear_scan_kernel(
    states,  # [segments, H, K, V]: of each segment alone, replaced by the one it starts from
    total,  # [segments, H, K] or [segments, H]; None
    start,  # [N, H, K, V]; None for zeros
    finish,  # [N, H, K, V], behind the last segment; None
    walk,  # Walk
    dims: tl.constexpr,  # Dims
    DECAY: tl.constexpr,
    BACKWARD: tl.constexpr,  # from the last segment to the first
):
    """Joins the segments of every sequence: ``S <- exp(total) S + states``."""
    NV: tl.constexpr = (dims.V + dims.BV - 1) // dims.BV
    NK: tl.constexpr = (dims.K + dims.BK - 1) // dims.BK
    i_program = tl.program_id(0)
    i_v = i_program % NV * dims.BV
    i_k = i_program // NV % NK * dims.BK
    heads = walk.heads >> 1
    i_h = i_program // (NV * NK) % heads
    i_n = i_program // (NV * NK) // heads
    if walk.cu_seqlens is None:
        first = 0
        last = walk.length >> 1
    else:
        first, last = find_sequence(walk, i_n)
    slot = first_slot(walk, i_n, first)
    count = tl.cdiv(last - first, walk.span >> 1)
    cols = i_k + tl.arange(0, dims.BK)
    b_s = load_state(start, walk, i_n, i_h, 0, dims, i_k, i_v, False)
    for n in tl.range(0, count):
        i_s = slot + n
        if BACKWARD:
            i_s = slot + count - 1 - n
        p_s, mask = locate_state(states, walk, i_s, i_h, 0, dims, i_k, i_v, False)
        b_own = tl.load(p_s, mask=mask, other=0.0)
        tl.store(p_s, b_s, mask=mask)
        row = tl.cast(i_s, tl.int64) * heads + i_h
        if DECAY == "channel":
            b_total = tl.load(total + row * dims.K + cols, mask=cols < dims.K, other=0.0)
            b_s = age(b_s, b_own, b_total[:, None], tl.float32)
        elif DECAY == "token":
            b_s = age(b_s, b_own, tl.load(total + row), tl.float32)
        else:
            b_s += b_own
    if finish is not None:
        p_f, mask = locate_state(finish, walk, i_n, i_h, 0, dims, i_k, i_v, False)
        tl.store(p_f, b_s, mask=mask)
