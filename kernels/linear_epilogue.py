"""What follows linear attention, ``act(gate) * weight * RMSNorm(o)``, and its gradients.

The forward kernel does it in its tiles where they hold all that a norm runs over. Else a pass over
the output puts the norm together from sums of squares; the backward begins with a pass of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from attnvariants.kernels._feature_map import apply_map, map_gradient
from attnvariants.kernels._tiles import cast, load_slice, locate, store_slice


class Outputs(NamedTuple):
    """What the forward writes."""

    out: Any  # Strided [B, T, H, V]
    y: Any  # Strided [B, T, H, V], before weight and gate; None where it is out


class Norm(NamedTuple):
    """Of the output; compile-time."""

    KIND: str | None  # "model", "head" or None
    DEFERRED: bool  # left to the second kernel
    ACTIVATION: str | None  # of the gate
    GATE: str | None  # "elementwise", "headwise"
    WEIGHT: bool
    KEEP_Y: bool  # y is not out


@triton.jit
def weigh_and_gate(
    b_y,
    gate,
    weight,
    i_b,
    i_h,
    t,
    rows,
    live,
    i_v,
    V: tl.constexpr,
    BV: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    WEIGHT: tl.constexpr,
):
    """``act(gate) * weight * y`` for a tile ``[BT, BV]``."""
    b_y = b_y * load_weight(weight, i_h, i_v, V, BV, WEIGHT)
    if GATE is not None:
        b_y = b_y * apply_map(load_gate(gate, i_b, i_h, t, rows, live, i_v, V, BV, GATE), ACT)
    return b_y


@triton.jit
def load_gate(
    gate, i_b, i_h, t, rows, live, i_v, V: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr
):
    """Gate logits in float32, ``[BT, BV]``, or ``[BT, 1]`` where there is one per head."""
    p_gate = locate(gate, i_b, i_h, t)
    if GATE == "headwise":
        b_gate = tl.load(p_gate + rows * gate.time, mask=live, other=0.0)[:, None]
    else:
        b_gate = load_slice(p_gate, gate, rows, live, i_v, V, BV)
    return b_gate.to(tl.float32)


@triton.jit
def divisor(b_squares, BV: tl.constexpr):
    """What the rows of a slice are left divided by: their root mean square, from their squares.

    Rows of zeros stay as they are, and rows whose squares a device may take for 0.
    """
    return tl.where(b_squares < 1e-34, 1.0, tl.sqrt(b_squares / BV))


@triton.jit
def linear_norm_kernel(
    gate,  # Strided [B, T, H, V] or [B, T, H], logits; None
    weight,  # Strided [1, 1, H, V]; None
    outputs,  # Outputs
    rstd,  # Strided [B, T, H]; None without a norm
    squares,  # [B, T, H, slices of V], sums of squares of a deferred norm; None
    eps,
    length,  # odd(T)
    heads,  # odd(H)
    dims: tl.constexpr,  # Dims, BT rows and the BV of the forward
    norm: tl.constexpr,  # Norm
):
    """Puts a deferred norm together, with weight and gate, in one pass over the output."""
    BT: tl.constexpr = dims.BT
    V: tl.constexpr = dims.V
    BV: tl.constexpr = dims.BV
    ACT: tl.constexpr = norm.ACTIVATION
    GATE: tl.constexpr = norm.GATE
    WEIGHT: tl.constexpr = norm.WEIGHT
    NV: tl.constexpr = (dims.V + dims.BV - 1) // dims.BV
    i_program = tl.program_id(0)
    i_slice = i_program % NV
    i_v = i_slice * dims.BV
    count = heads >> 1
    i_h = i_program // NV % count
    tiles = tl.cdiv(length >> 1, BT)
    i_b = i_program // NV // count // tiles
    t = i_program // NV // count % tiles * BT
    rows = tl.arange(0, BT)
    live = t + rows < (length >> 1)
    row = tl.cast(i_b, tl.int64) * (length >> 1) + t + rows
    p_squares = squares + row * count * NV
    b_sum = tl.zeros([BT], tl.float32)
    if norm.KIND == "model":
        for n in tl.range(0, count * NV):
            b_sum += tl.load(p_squares + n, mask=live, other=0.0)
        width = count * V
    else:
        for n in tl.static_range(NV):
            b_sum += tl.load(p_squares + i_h * NV + n, mask=live, other=0.0)
        width = V
    b_r = 1.0 / tl.sqrt_rn(b_sum / width + eps)
    p_r = locate(rstd, i_b, i_h, t) + rows * rstd.time
    if norm.KIND == "model":
        if i_h + i_slice == 0:
            tl.store(p_r, b_r, mask=live)
    elif i_slice == 0:
        tl.store(p_r, b_r, mask=live)

    b_own = divisor(tl.load(p_squares + i_h * NV + i_slice, mask=live, other=0.0), BV)
    store = outputs.y if norm.KEEP_Y else outputs.out
    p_store = locate(store, i_b, i_h, t)
    b_y = load_slice(p_store, store, rows, live, i_v, dims.V, dims.BV).to(tl.float32)
    b_y = b_y * (b_own * b_r)[:, None]
    if norm.KEEP_Y:
        store_slice(p_store, store, rows, live, b_y, i_v, dims.V, dims.BV)
    b_y = weigh_and_gate(
        b_y,
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
    out = outputs.out
    store_slice(locate(out, i_b, i_h, t), out, rows, live, b_y, i_v, dims.V, dims.BV)


@triton.jit
def load_cotangent(
    dout,
    y,
    gate,
    i_b,
    i_h,
    t,
    rows,
    live,
    V: tl.constexpr,
    BV: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
):
    """``act(gate) * dout`` and y, both ``[BT, BV]``."""
    b_do = load_slice(locate(dout, i_b, i_h, t), dout, rows, live, 0, V, BV).to(tl.float32)
    b_y = load_slice(locate(y, i_b, i_h, t), y, rows, live, 0, V, BV).to(tl.float32)
    if GATE is not None:
        b_do *= apply_map(load_gate(gate, i_b, i_h, t, rows, live, 0, V, BV, GATE), ACT)
    return b_do, b_y


@triton.jit
def load_weight(weight, i_h, i_v, V: tl.constexpr, BV: tl.constexpr, WEIGHT: tl.constexpr):
    """One head's weight in float32, ``[1, BV]``, or 1."""
    if not WEIGHT:
        b_w = 1.0
    else:
        cols = i_v + tl.arange(0, BV)
        p_w = locate(weight, 0, i_h, 0) + cols * weight.dim
        b_w = tl.load(p_w, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    return b_w


@triton.jit
def linear_cotangent_kernel(
    dout,  # Strided [B, T, H, V]
    y,  # Strided [B, T, H, V]
    gate,  # Strided [B, T, H, V] or [B, T, H], logits; None
    weight,  # Strided [1, 1, H, V]; None
    do,  # Strided [B, T, H, V], written: dy - mean(dy y) y for dy = act(gate) weight dout
    dgate,  # Strided [B, T, H, V] or [B, T, H]; None
    dweight,  # [B, tiles, H, V], a sum per tile of rows; None
    length,  # odd(T)
    heads,  # odd(H)
    dims: tl.constexpr,  # Dims, BT rows
    norm: tl.constexpr,  # Norm
):
    """Takes the cotangent of the output through gate, weight and norm, but for the factor rstd."""
    BT: tl.constexpr = dims.BT
    V: tl.constexpr = dims.V
    BV: tl.constexpr = dims.BV
    ACT: tl.constexpr = norm.ACTIVATION
    GATE: tl.constexpr = norm.GATE
    WEIGHT: tl.constexpr = norm.WEIGHT
    i_program = tl.program_id(0)
    count = heads >> 1
    tiles = tl.cdiv(length >> 1, BT)
    first = 0
    last = count
    if norm.KIND != "model":
        first = i_program % count
        last = first + 1
        i_program = i_program // count
    i_b = i_program // tiles
    i_t = i_program % tiles
    t = i_t * BT
    rows = tl.arange(0, BT)
    live = t + rows < (length >> 1)
    b_c = tl.zeros([BT], tl.float32)
    if norm.KIND is not None:
        for i_h in tl.range(first, last):
            b_dy, b_y = load_cotangent(dout, y, gate, i_b, i_h, t, rows, live, V, BV, ACT, GATE)
            b_c += tl.sum(b_dy * load_weight(weight, i_h, 0, V, BV, WEIGHT) * b_y, 1)
        b_c = b_c / ((last - first) * V)
    for i_h in tl.range(first, last):
        b_dy, b_y = load_cotangent(dout, y, gate, i_b, i_h, t, rows, live, V, BV, ACT, GATE)
        b_w = load_weight(weight, i_h, 0, V, BV, WEIGHT)
        if dweight is not None:
            cols = tl.arange(0, BV)
            row = (tl.cast(i_b, tl.int64) * tiles + i_t) * count + i_h
            tl.store(dweight + row * V + cols, tl.sum(b_dy * b_y, 0), mask=cols < V)
        if dgate is not None:
            b_gate = load_gate(gate, i_b, i_h, t, rows, live, 0, V, BV, GATE)
            p_out = locate(dout, i_b, i_h, t)
            b_dg = load_slice(p_out, dout, rows, live, 0, V, BV).to(tl.float32) * b_y * b_w
            p_dg = locate(dgate, i_b, i_h, t)
            if GATE == "headwise":
                b_sum = tl.sum(b_dg, 1)[:, None] * map_gradient(b_gate, ACT)
                p_sum = p_dg + rows[:, None] * dgate.time
                tl.store(p_sum, cast(b_sum, dgate.ptr.dtype.element_ty), mask=live[:, None])
            else:
                b_dg = b_dg * map_gradient(b_gate, ACT)
                store_slice(p_dg, dgate, rows, live, b_dg, 0, V, BV)
        b_do = b_dy * b_w - b_c[:, None] * b_y
        store_slice(locate(do, i_b, i_h, t), do, rows, live, b_do, 0, V, BV)
