"""Linear attention backward: two walks from the end of a sequence to its start; here dq, dk, dg.

With S the state at the start of a chunk and dS the cotangent of the state at its end:

    dq_i = exp(G_i) (S do_i) + sum_{j <= i} dA_ij exp(G_i - G_j) k_j              dA_ij = do_i . v_j
    dk_j = exp(G_C - G_j) (dS v_j) + sum_{i >= j} dA_ij exp(G_i - G_j) q_i
    dv_j = dS^T (exp(G_C - G_j) k_j) + sum_{i >= j} A_ij do_i
    dS   = exp(G_C) dS + sum_i (exp(G_i) q_i) do_i^T                        (of the previous chunk)

The log-decay of a token decays every pair (j, i) with j before the token and i not: its gradient is
the sum of what these pairs, and the states, carry across it, by additions only.

This walk takes a slice of the key channels, with S and dS at hand; S comes from the last state that
was kept, over the few chunks between. The other, in ``linear_backward_v.py``, takes a slice of the
value channels, with dS alone: one walk for both would have to hold all of a state. The states of
the two are ``[V, K]`` and ``[K, V]``, so that no product needs a transposed one.

What fits the registers decides the form. A chunk is gone through in phases, dq before dk, that hold
little more than their results; the rest is loaded again, from the L1 cache, and with :func:`fresh`
also masks and addresses belong to one phase each. Of S and dS a program holds ``[BV, BK]`` at a
time: dS lies in a buffer as large as the states of all segments, meant to stay in the L2 cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from attnvariants.kernels._decay import age, chunk_decay, chunk_total, decay, fresh, fresh_chunk
from attnvariants.kernels._linear_gradient import complete_gradient, load_side
from attnvariants.kernels._tiles import load_slice, locate, product, store_slice
from attnvariants.kernels._walk import (
    find_segment,
    first_slot,
    load_features,
    load_log_decay,
    load_state,
    store_state,
)


class QueryKeyGradients(NamedTuple):
    """What the walk writes."""

    dq: Any  # Strided [B, T, H, K]
    dk: Any  # Strided [B, T, H, K]
    dg: Any  # Strided [B, T, H, K], or [slices of K * B, T, H] if per token; None


@triton.jit
def find_state(
    marks,
    k,
    v,
    g,
    walk,
    i_m,
    i_b,
    i_h,
    t,
    begin,
    i_k,
    i_v,
    dims: tl.constexpr,
    kind: tl.constexpr,
):
    """A slice ``[BV, BK]`` of the state at token ``t``, from the one that was kept at ``begin``."""
    BT: tl.constexpr = dims.BT
    DECAY: tl.constexpr = kind.DECAY
    MAP: tl.constexpr = kind.FEATURE_MAP
    b_s = load_state(marks, walk, i_m, i_h, t, dims, i_k, i_v, True)
    for i_t in tl.range(begin, t, BT):
        i_b, i_h, i_t, rows = fresh_chunk(i_t, walk, i_b, i_h, i_t, BT)
        live = rows < BT
        b_k = load_features(k, i_b, i_h, i_t, rows, live, i_k, dims.K, dims.BK, MAP)
        if DECAY is not None:
            b_g = load_log_decay(g, i_b, i_h, i_t, rows, live, i_k, dims.K, dims.BK, DECAY)
            b_k = b_k * chunk_decay(b_g, rows, k, "behind", DECAY)
            b_total = chunk_total(b_g, DECAY, True)
        b_v = load_slice(locate(v, i_b, i_h, i_t), v, rows, live, i_v, dims.V, dims.BV)
        b_new = product(tl.trans(b_v), b_k, k)
        if DECAY is not None:
            b_s = age(b_s, b_new, b_total, k.ptr.dtype.element_ty)
        else:
            b_s += b_new
    return b_s


@triton.jit
def linear_backward_qk_kernel(
    q,  # Strided [B, T, H, K]
    k,  # Strided [B, T, H, K]
    v,  # Strided [B, T, H, V]
    g,  # Strided [B, T, H, K] or [B, T, H]; None
    do,  # Strided [B, T, H, V], cotangent behind the norm
    rstd,  # Strided [B, T, H]; None
    marks,  # [slots of marked, H, K, V], states that were kept; of sequences if not causal; None
    ends,  # [segments, H, K, V], cotangents of states; of sequences if not causal; None for zeros
    running,  # [segments, H, K, V], written: running cotangents of the state; None if not causal
    grads,  # QueryKeyGradients
    walk,  # Walk
    marked,  # Walk
    scale,
    dims: tl.constexpr,  # Dims; a program takes all of V, BV at a time
    kind: tl.constexpr,  # Kind
):
    BT: tl.constexpr = dims.BT
    BK: tl.constexpr = dims.BK
    BV: tl.constexpr = dims.BV
    NK: tl.constexpr = (dims.K + BK - 1) // BK
    WITH_DG: tl.constexpr = grads.dg is not None
    dtype: tl.constexpr = q.ptr.dtype.element_ty
    DECAY: tl.constexpr = kind.DECAY
    MAP: tl.constexpr = kind.FEATURE_MAP
    dq = grads.dq
    dk = grads.dk
    dg = grads.dg
    i_program = tl.program_id(0)
    i_slice = i_program % NK
    i_k = i_slice * BK
    heads = walk.heads >> 1
    i_head = i_program // NK % heads
    i_s = i_program // NK // heads
    i_n, i_batch, _, first, _, begin, end = find_segment(walk, i_s)

    if kind.CAUSAL:
        for i_v in tl.range(0, fresh(dims.V, i_s, walk), BV):
            b_ds = load_state(ends, walk, i_s, i_head, i_v, dims, i_k, i_v, True)
            store_state(running, b_ds, walk, i_s, i_head, i_v, dims, i_k, i_v, True)
        tl.debug_barrier()
    chunks = tl.cdiv(end - begin, BT)
    for n in tl.range(0, chunks, disable_licm=True):
        i_t = begin + (chunks - 1 - n) * BT
        i_m = i_n
        begin_m = i_t
        if kind.CAUSAL:
            stride = marked.span >> 1
            place_m = (i_t - first) // stride
            i_m = first_slot(marked, i_n, first) + place_m
            begin_m = first + place_m * stride

        i_b, i_h, t, rows = fresh_chunk(16 * i_t + 5, walk, i_batch, i_head, i_t, BT)
        live = t + rows < end
        b_dq = tl.zeros([BT, BK], tl.float32)
        b_through = tl.zeros([BK], tl.float32)
        for i_v in tl.range(0, fresh(dims.V, i_s, walk), BV):
            b_s = find_state(
                marks, k, v, g, walk, i_m, i_b, i_h, i_t, begin_m, i_k, i_v, dims, kind
            )
            b_do = load_slice(locate(do, i_b, i_h, t), do, rows, live, i_v, dims.V, BV)
            b_dq += product(b_do, b_s, q)
            if WITH_DG:
                b_ds = load_state(running, walk, i_s, i_h, i_v, dims, i_k, i_v, True)
                b_through += tl.sum(b_s * b_ds, 0)
        b_dg = b_dq
        if WITH_DG:
            b_g = load_log_decay(g, i_b, i_h, t, rows, live, i_k, dims.K, BK, DECAY)
            b_through = decay(chunk_total(b_g, DECAY, True), dtype) * b_through[None, :]
            b_dg = b_through + tl.zeros([BT, BK], tl.float32)
        b_dq, b_dg = complete_gradient(
            b_dq,
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
            dims,
            kind,
            True,
            WITH_DG,
        )
        i_b, i_h, t, rows = fresh_chunk(16 * i_t + 6, walk, i_batch, i_head, i_t, BT)
        live = t + rows < end
        store_slice(locate(dq, i_b, i_h, t), dq, rows, live, b_dq, i_k, dims.K, BK)

        b_dk = tl.zeros([BT, BK], tl.float32)
        if kind.CAUSAL:
            # Late queries have decayed most; sums that begin with them round least.
            back = BT - 1 - rows
            live_back = t + back < end
            b_q = load_side(q, k, rstd, scale, i_b, i_h, t, back, live_back, i_k, dims, MAP, True)
            if DECAY is not None:
                b_g = load_log_decay(g, i_b, i_h, t, back, live_back, i_k, dims.K, BK, DECAY)
                b_q = b_q * chunk_decay(b_g, rows, q, "from", DECAY)
                b_total = chunk_total(b_g, DECAY, True)
        for i_v in tl.range(0, fresh(dims.V, i_s, walk), BV):
            b_v = load_slice(locate(v, i_b, i_h, t), v, rows, live, i_v, dims.V, BV)
            if kind.CAUSAL:
                b_ds = load_state(running, walk, i_s, i_h, i_v, dims, i_k, i_v, True)
                b_dk += product(b_v, b_ds, q)
                b_do = load_slice(locate(do, i_b, i_h, t), do, back, live_back, i_v, dims.V, BV)
                b_new = product(tl.trans(b_do), b_q, q)
                if DECAY is not None:
                    b_new = age(b_ds, b_new, b_total, dtype)
                else:
                    b_new += b_ds
                store_state(running, b_new, walk, i_s, i_h, i_v, dims, i_k, i_v, True)
            else:
                b_ds = load_state(ends, walk, i_n, i_h, i_v, dims, i_k, i_v, True)
                b_dk += product(b_v, b_ds, q)
        tl.debug_barrier()
        b_dk, b_dg = complete_gradient(
            b_dk,
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
            dims,
            kind,
            False,
            WITH_DG,
        )
        i_b, i_h, t, rows = fresh_chunk(16 * i_t + 7, walk, i_batch, i_head, i_t, BT)
        live = t + rows < end
        store_slice(locate(dk, i_b, i_h, t), dk, rows, live, b_dk, i_k, dims.K, BK)
        if WITH_DG:
            if DECAY == "channel":
                store_slice(locate(dg, i_b, i_h, t), dg, rows, live, b_dg, i_k, dims.K, BK)
            else:  # the sum over channels; a batch entry of its own for every slice
                p_dg = locate(dg, i_b * NK + i_slice, i_h, t) + rows * dg.time
                tl.store(p_dg, tl.sum(b_dg, 1), mask=live)
