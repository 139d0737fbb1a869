"""Decode steps of linear attention: one pass over the state, which is updated in place.

A program holds some columns of one head's state in registers, takes all tokens of the step one
after the other, and writes them back. RMSNorm per head, weight and gate follow at once where a
program holds the whole head. A norm over the model dim needs the sums of squares of all heads,
and programs that each took all heads of a row would leave most of a GPU idle at small batches: so
every program leaves its sums, and a second, small launch finishes the outputs. Heads that do not
fit a program's registers (K V > 16384) are normalised the same way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from attnvariants.kernels._feature_map import apply_map
from attnvariants.kernels._launch import launch, tile_dim
from attnvariants.kernels._tiles import LOG2_E, Strided, cast, locate, odd, strided
from torch import Tensor

_ENTRIES = 4096  # of the state in a program: 32 registers a thread, several programs on an SM
_HEAD_ENTRIES = 16384  # the same where that holds a whole head to be normalised
_MIN_COLUMNS = 32  # 128 bytes of a row of the state


class Config(NamedTuple):
    """Columns of the state in a program, warps and stages."""

    BV: int
    warps: int
    stages: int = 1


class Inputs(NamedTuple):
    """Of the recurrence, but the decay."""

    q: Strided  # [B, Q, H, K]
    k: Strided  # [B, Q, H, K]
    v: Strided  # [B, Q, H, V]


class Unfinished(NamedTuple):
    """What a norm over several programs needs from each of them."""

    o: Any  # fp32 [B, Q, H, V]
    squares: Any  # sums of the squares of a program's columns, fp32 [B, Q, H, NV]


def attend(
    q: Tensor,  # [B, Q, H, K]
    k: Tensor,  # [B, Q, H, K]
    v: Tensor,  # [B, Q, H, V]
    g: Tensor | None,  # [B, Q, H, K], [B, Q, H] or [H]
    state: Tensor,  # fp32 or bf16 [B, H, K, V]
    lengths: Tensor | None,  # int32 [B]
    norm_weight: Tensor | None,  # [H, V] or [V]
    gate: Tensor | None,  # [B, Q, H, V] or [B, Q, H]
    feature_map: str | None,
    scale: float,
    norm: str | None,
    eps: float,
    gate_activation: str | None,
) -> Tensor:
    """Carries on from ``state``, in place, and advances ``lengths``."""
    batch, steps, heads, key_dim = q.shape
    value_dim = v.shape[3]
    BK = tile_dim(key_dim)
    config = configure(batch * heads, BK, tile_dim(value_dim), norm, _processors(q.device))
    columns = triton.cdiv(value_dim, config.BV)  # programs of a head
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    unfinished = None
    if norm == "model" or (norm == "head" and columns > 1):
        unfinished = Unfinished(
            o=torch.empty(v.shape, dtype=torch.float32, device=v.device),
            squares=q.new_empty(batch, steps, heads, columns, dtype=torch.float32),
        )
    inputs = Inputs(strided(q), strided(k), strided(v))
    decay = None if g is None else _broadcast(g)
    factors = (
        None if norm_weight is None else _strided_weight(norm_weight),
        None if gate is None else _broadcast(gate),
    )
    launch(
        *(_advance_state, batch * heads * columns, inputs, decay),
        *(strided(state.transpose(1, 2)), lengths, *factors, unfinished, out, scale, eps),
        *(odd(steps), odd(heads), key_dim, value_dim, BK, config.BV),
        *(feature_map, norm, gate_activation),
        config=config,
    )
    if unfinished is not None:
        launch(
            *(_finish, batch * steps * heads, *factors, unfinished, out, eps, odd(steps)),
            *(odd(heads), value_dim, tile_dim(value_dim), columns),
            *(triton.next_power_of_2(heads * columns), norm, gate_activation),
            config=Config(0, warps=4),
        )
    return out


def configure(parallel: int, BK: int, BV: int, norm: str | None, processors: int) -> Config:
    """As many columns as fit, fewer where the heads alone leave processors idle."""
    if norm == "head" and BK * BV <= _HEAD_ENTRIES:
        columns = BV
    else:
        columns = min(BV, max(_MIN_COLUMNS, _ENTRIES // BK))
        while columns > _MIN_COLUMNS and parallel * (BV // columns) < processors:
            columns //= 2
    return Config(BV=columns, warps=max(1, BK * columns // 1024))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _strided_weight(weight: Tensor) -> Strided:
    """``[H, V]``, or ``[V]`` for all heads."""
    return Strided(weight, 0, 0, weight.stride(0) if weight.dim() == 2 else 0, weight.stride(-1))


def _broadcast(x: Tensor) -> Strided:
    """``[B, Q, H, D]``, ``[B, Q, H]`` for all channels, or ``[H]`` for all tokens and channels.

    What is missing has stride 0: Triton 3.6 compiles no test and no call with a tuple that has
    ``None`` in it.
    """
    if x.dim() == 1:
        return Strided(x, 0, 0, x.stride(0), 0)
    return Strided(x, *x.stride(), *(0,) * (4 - x.dim()))


@triton.jit
def _advance_state(
    inputs,  # see Inputs
    g,  # log-decay [B, Q, H, K]; None
    state,  # [B, K, H, V]
    lengths,  # [B]; None
    weight,  # [1, 1, H, V]; None
    gate,  # logits [B, Q, H, V]; None
    unfinished,  # see Unfinished; None where this launch finishes the output
    out,  # contiguous [B, Q, H, V]
    scale,
    eps,
    steps,
    heads,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    MAP: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """``S = exp(g) S + phi(k) v^T`` and ``o = scale S^T phi(q)``, token by token."""
    steps = steps >> 1
    heads = heads >> 1
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v = pid % NV
    i_h = pid // NV % heads
    i_b = pid // NV // heads
    if lengths is not None and (i_v == 0) & (i_h == 0):
        tl.store(lengths + i_b, tl.load(lengths + i_b) + steps)

    rows = tl.arange(0, BK)
    cols = i_v * BV + tl.arange(0, BV)
    live = cols < V
    mask = (rows < K)[:, None] & live[None, :]
    offsets = rows[:, None] * state.time + cols[None, :] * state.dim
    p_state = locate(state, i_b, i_h, 0) + offsets
    b_state = tl.load(p_state, mask=mask, other=0.0).to(tl.float32)  # [BK, BV]
    for t in range(steps):
        b_q = _load_features(inputs.q, i_b, i_h, t, rows, K, MAP) * scale
        b_k = _load_features(inputs.k, i_b, i_h, t, rows, K, MAP)
        p_v = locate(inputs.v, i_b, i_h, t) + cols * inputs.v.dim
        b_v = tl.load(p_v, mask=live, other=0.0).to(tl.float32)
        if g is not None:
            b_g = tl.load(locate(g, i_b, i_h, t) + rows * g.dim, mask=rows < K, other=0.0)
            b_state *= _decay(b_g.to(tl.float32))[:, None]
        b_state += b_k[:, None] * b_v[None, :]
        b_o = tl.sum(b_q[:, None] * b_state, 0)  # [BV]
        row = (tl.cast(i_b, tl.int64) * steps + t) * heads + i_h
        if unfinished is None:
            if NORM == "head":
                b_o *= tl.rsqrt(tl.sum(b_o * b_o, 0) / V + eps)
            b_o = _apply(b_o, weight, gate, i_b, i_h, t, cols, live, ACTIVATION)
            tl.store(out + row * V + cols, cast(b_o, out.dtype.element_ty), mask=live)
        else:
            tl.store(unfinished.o + row * V + cols, b_o, mask=live)
            tl.store(unfinished.squares + row * NV + i_v, tl.sum(b_o * b_o, 0))
    tl.store(p_state, cast(b_state, state.ptr.dtype.element_ty), mask=mask)


@triton.jit
def _finish(
    weight,  # [1, 1, H, V]; None
    gate,  # logits [B, Q, H, V]; None
    unfinished,  # see Unfinished
    out,  # contiguous [B, Q, H, V]
    eps,
    steps,
    heads,
    V: tl.constexpr,
    BV: tl.constexpr,
    NV: tl.constexpr,
    BN: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Normalises one head of one token, over the head or over all heads of the token."""
    steps = steps >> 1
    heads = heads >> 1
    row = tl.program_id(0)
    i_h = row % heads
    i_t = row // heads % steps
    i_b = row // heads // steps
    if NORM == "model":
        first, count = row - i_h, heads
    else:
        first, count = row, 1
    sums = tl.arange(0, BN)
    p_squares = unfinished.squares + tl.cast(first, tl.int64) * NV + sums
    b_squares = tl.load(p_squares, mask=sums < count * NV, other=0.0)
    rstd = tl.rsqrt(tl.sum(b_squares, 0) / (count * V) + eps)
    cols = tl.arange(0, BV)
    live = cols < V
    offsets = tl.cast(row, tl.int64) * V + cols
    b_o = tl.load(unfinished.o + offsets, mask=live, other=0.0) * rstd
    b_o = _apply(b_o, weight, gate, i_b, i_h, i_t, cols, live, ACTIVATION)
    tl.store(out + offsets, cast(b_o, out.dtype.element_ty), mask=live)


@triton.jit
def _apply(b_o, weight, gate, i_b, i_h, t, cols, live, ACTIVATION: tl.constexpr):
    """``act(gate) * weight * o`` in float32, for some columns of one head."""
    if weight is not None:
        p_weight = locate(weight, 0, i_h, 0) + cols * weight.dim
        b_o *= tl.load(p_weight, mask=live, other=0.0).to(tl.float32)
    if gate is not None:
        b_gate = tl.load(locate(gate, i_b, i_h, t) + cols * gate.dim, mask=live, other=0.0)
        b_o *= apply_map(b_gate.to(tl.float32), ACTIVATION)
    return b_o


@triton.jit
def _load_features(x, i_b, i_h, t, rows, K: tl.constexpr, MAP: tl.constexpr):
    """``phi(x)`` of one token and head in float32, 0 beyond K whatever phi(0) is."""
    b_x = tl.load(locate(x, i_b, i_h, t) + rows * x.dim, mask=rows < K, other=0.0)
    return tl.where(rows < K, apply_map(b_x.to(tl.float32), MAP), 0.0)


@triton.jit
def _decay(g):
    """``exp(g)`` for g <= 0, to about half a unit in the last place; 0 below the normal numbers.

    Hardware exponentials err by two units or more. Under a constant decay that is a wrong decay,
    whose error grows with every token that the state remembers.
    """
    x = tl.where(g < -87.0, -87.0, g)  # a maximum would lose NaN
    n = tl.floor(x * LOG2_E + 0.5)
    r = x - n * 0.693359375  # exact: log(2) to 9 bits; the rest of it follows
    r = r + n * 2.12194440e-4
    series = 1.0 / 720 + r * (1.0 / 5040)
    series = 1.0 / 120 + r * series
    series = 1.0 / 24 + r * series
    series = 1.0 / 6 + r * series
    series = 0.5 + r * series
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(g < -87.0, 0.0, (1.0 + (r + r * r * series)) * power)
