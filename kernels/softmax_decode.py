"""One decode step of softmax attention over a cache, as two launches.

The first gives every program one part of the slots of one row and KV head: it reads these keys and
values once for all query rows of the group and leaves a partial softmax. The second adds up the
parts, applies the gate, and only then, when nobody reads the cache any more, writes the new keys
and values over the oldest ones of a ring and advances the lengths. Grids and buffers depend on
sizes that the host knows, so that a CUDA graph captures the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from attnvariants.kernels._cache_parts import find_head, share_out
from attnvariants.kernels._configs import overridden
from attnvariants.kernels._gate import activate
from attnvariants.kernels._launch import launch, tile_dim
from attnvariants.kernels._tiles import LOG2_E, Strided, cast, dot, load_rows, locate, odd, strided
from torch import Tensor

_NEW_KEYS = tl.constexpr(16)  # rows of the tile that holds the 1 to 8 keys of the step
_PARTS = tl.constexpr(16)  # parts of a softmax that are added up at a time
_RESIDENT = 2  # programs on an SM, as many as it takes to keep enough loads in flight


class Config(NamedTuple):
    """Query rows, slots and columns of a product, warps and stages."""

    BT: int
    BS: int
    BC: int
    warps: int
    stages: int


class Pair(NamedTuple):
    """Keys and values, each a ``Strided``."""

    k: Any
    v: Any


class Parts(NamedTuple):
    """What the first launch leaves for the second: a softmax per work item and query row.

    A part without visible keys has ``row_max`` -inf, and its ``acc`` is not written.
    """

    acc: Any  # not normalised, fp32 [items * B, G * Q, V]
    row_max: Any  # fp32 [items * B, G * Q]
    total: Any  # fp32 [items * B, G * Q]
    lengths: Any  # before the step, int32 [B]


class Results(NamedTuple):
    """Outputs of the step, contiguous."""

    out: Any  # [B, Q, H, V]
    row_max: Any  # fp32 [B, Q, H]
    lse: Any  # fp32 [B, Q, H]


def attend(
    q: Tensor,  # [B, Q, H, K]
    k: Tensor,  # [B, Q, Hkv, K]
    v: Tensor,  # [B, Q, Hkv, V]
    gate: Tensor | None,  # logits [B, Q, H, V] or [B, Q, H]
    k_cache: Tensor,  # [B, slots, K]
    v_cache: Tensor,  # [B, slots, V]
    lengths: Tensor,  # int32 [B]
    capacities: Sequence[int],
    max_filled: int,
    softmax_scale: float,
    gate_activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attends to the cache and to the new keys, then writes these to the cache.

    Returns:
        The gated output ``[B, Q, H, V]``, and per query the largest visible logit and the log of
        the denominator, fp32 ``[B, Q, H]``.
    """
    batch, steps, heads, key_dim = q.shape
    kv_heads, value_dim = v.shape[2:]
    group = heads // kv_heads
    rows = group * steps
    out = torch.empty(batch, steps, heads, value_dim, dtype=v.dtype, device=v.device)
    row_max, lse = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    if not batch:
        return out, row_max, lse
    BK, BV = tile_dim(key_dim), tile_dim(value_dim)
    config = configure(rows, BK, BV, q.dtype)
    blocks = triton.cdiv(rows, config.BT)
    runs = share_out(
        tuple(capacities), batch * blocks, config.BS, _RESIDENT * _processors(q.device)
    )
    items = sum((run.count >> 1) * (run.parts >> 1) for run in runs)
    parts = Parts(
        acc=q.new_empty(items * batch, rows, value_dim, dtype=torch.float32),
        row_max=q.new_empty(items * batch, rows, dtype=torch.float32),
        total=q.new_empty(items * batch, rows, dtype=torch.float32),
        lengths=torch.empty_like(lengths),
    )
    new = Pair(strided(k), strided(v))
    cache = Pair(_strided_cache(k_cache), _strided_cache(v_cache))
    sizes = group, steps, key_dim, value_dim
    launch(
        *(_attend_parts, items * blocks * batch, strided(q), new, cache, lengths, runs),
        *(parts, softmax_scale, odd(batch), *sizes, config.BT, BK, BV, config.BS, config.BC),
        config=config,
    )
    launch(
        *(_add_parts, batch * steps * heads, parts, Results(out, row_max, lse)),
        *(None if gate is None else _strided_gate(gate), new, cache, lengths, runs),
        *(odd(batch), *sizes, BK, BV, gate_activation),
        config=config,
    )
    return out, row_max, lse


def configure(rows: int, BK: int, BV: int, dtype: torch.dtype) -> Config:
    """Tiles of up to 16 KB in half precision, so that several programs with two of them fit an SM.

    More rows than a tile has are cut into blocks, which read the cache once each, at the same time
    and so mostly from L2. Tiles of 64 rows would need wgmma, with the hazards it has in Triton.
    None of these spills registers on a supported chip.
    """
    config = _choose(rows, BK, BV, dtype)
    tried = overridden("_attend_parts")
    if tried is None:
        return config
    BT, BS, warps, stages = tried
    return config._replace(BT=BT, BS=BS, warps=warps, stages=stages)


def _choose(rows: int, BK: int, BV: int, dtype: torch.dtype) -> Config:
    wide = max(BK, BV) > 128
    if dtype == torch.float32:  # without tensor cores: a thread holds its operands' columns
        return Config(BT=16, BS=16, BC=min(64 if BV > 128 else 32, BK), warps=8, stages=2)
    slots = min(64, 4096 // max(BK, BV))
    if wide:
        return Config(BT=16, BS=slots, BC=BK, warps=8, stages=3)
    return Config(BT=16 if rows <= 16 else 32, BS=slots, BC=BK, warps=4, stages=3)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _strided_cache(x: Tensor) -> Strided:
    """``[B, slots, D]``: the heads lie behind each other in the slots."""
    batch, slot, dim = x.stride()
    return Strided(x, batch, slot, 0, dim)


def _strided_gate(x: Tensor) -> Strided:
    """``[B, Q, H, V]``, or ``[B, Q, H]`` for all channels.

    The missing axis has stride 0: Triton 3.6 compiles no test of a tuple that has ``None`` in it.
    """
    return Strided(x, *x.stride(), *(0,) * (4 - x.dim()))


@triton.jit
def _attend_parts(
    q,  # [B, Q, Hkv * G, K]
    new,  # Pair of [B, Q, Hkv, K] and [B, Q, Hkv, V]
    cache,  # Pair of [B, slots, 1, K] and [B, slots, 1, V]
    lengths,  # [B]
    runs,  # of Run
    parts,  # see Parts
    scale,
    batch,
    G: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    """The softmax of one block of query rows over one part of a head's slots.

    Row m is query ``m // G`` of the step and head ``m % G`` of the group.
    """
    batch = batch >> 1
    pid = tl.program_id(0)
    i_b = pid % batch
    blocks: tl.constexpr = (G * Q + BT - 1) // BT
    i_t = (pid // batch) % blocks
    i_w = pid // batch // blocks
    head, first, num_parts, offset, capacity = find_head(i_w, runs, OF_ITEM=True)
    part = i_w - first
    length = tl.maximum(tl.load(lengths + i_b), 0)
    if (i_w == 0) & (i_t == 0):
        tl.store(parts.lengths + i_b, length)

    rows = i_t * BT + tl.arange(0, BT)
    query = rows // G
    live = rows < G * Q
    p_q = locate(q, i_b, head * G, 0) + query * q.time + (rows % G) * q.head
    b_q = _load_columns(p_q, q, live, 0, K, BC)  # [BT, BC]

    acc = tl.zeros([BT, BV], dtype=tl.float32)
    row_max = tl.full([BT], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BT], dtype=tl.float32)

    # Slot s holds the latest position that is s modulo the capacity, age positions before the
    # newest one. Queries see less than capacity positions back, which is their window.
    held = tl.minimum(length, capacity)
    newest = (length - 1) % capacity
    size = tl.cdiv(tl.cdiv(held, num_parts), BS) * BS
    last = tl.minimum((part + 1) * size, held)
    tile = tl.arange(0, BS)
    for start in range(part * size, last, BS):
        age = newest - start - tile
        age = tl.where(age < 0, age + capacity, age)
        # What no query sees is not even loaded: a weight of 0 does not stop a NaN.
        seen = (start + tile < last) & (age + 1 < capacity)
        visible = seen[None, :] & (age[None, :] + 1 + query[:, None] < capacity)
        p_k = locate(cache.k, i_b, 0, offset + start) + tile * cache.k.time
        b_s = _products(b_q, p_q, q, live, p_k, cache.k, seen, K, BK, BC)
        b_v = load_rows(locate(cache.v, i_b, 0, offset + start), cache.v, tile, seen, V, BV)
        acc, row_max, total = _add_keys(b_s, b_v, visible, scale, acc, row_max, total)
    if part == num_parts - 1:  # this one gets the fewest cached keys
        step = tl.arange(0, _NEW_KEYS)
        distance = query[:, None] - step[None, :]
        visible = (distance >= 0) & (distance < capacity) & (step < Q)[None, :]
        p_k = locate(new.k, i_b, head, 0) + step * new.k.time
        b_s = _products(b_q, p_q, q, live, p_k, new.k, step < Q, K, BK, BC)
        b_v = load_rows(locate(new.v, i_b, head, 0), new.v, step, step < Q, V, BV)
        acc, row_max, total = _add_keys(b_s, b_v, visible, scale, acc, row_max, total)

    index = (tl.cast(i_w, tl.int64) * batch + i_b) * (G * Q) + rows
    tl.store(parts.row_max + index, row_max, mask=live)
    tl.store(parts.total + index, total, mask=live)
    cols = tl.arange(0, BV)
    mask = (live & (total > 0))[:, None] & (cols < V)[None, :]
    tl.store(parts.acc + index[:, None] * V + cols[None, :], acc, mask=mask)


@triton.jit
def _products(b_q, p_q, q, live, p_k, k, seen, K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr):
    """``q k^T`` of query rows and keys at these addresses, ``[BT, BS]``.

    BC columns at a time, of which ``b_q`` holds the first.
    """
    b_s = dot(b_q, tl.trans(_load_columns(p_k, k, seen, 0, K, BC)))
    for first in tl.static_range(BC, BK, BC):
        b_k = _load_columns(p_k, k, seen, first, K, BC)
        b_s = dot(_load_columns(p_q, q, live, first, K, BC), tl.trans(b_k), b_s)
    return b_s


@triton.jit
def _load_columns(p_x, x, live, first, D: tl.constexpr, BC: tl.constexpr):
    """Columns ``first`` to ``first + BC`` of the rows at addresses ``p_x``."""
    cols = first + tl.arange(0, BC)
    mask = live[:, None] & (cols < D)[None, :]
    return tl.load(p_x[:, None] + cols[None, :] * x.dim, mask=mask, other=0.0)


@triton.jit
def _add_keys(b_s, b_v, visible, scale, acc, row_max, total):
    """One step of the online softmax: products ``[BT, BS]`` and values ``[BS, BV]``."""
    s = tl.where(visible, b_s * scale, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(s, 1))
    origin = tl.where(new_max == -float("inf"), 0.0, new_max)  # -inf - -inf is NaN
    p = tl.exp2((s - origin[:, None]) * LOG2_E)
    rescale = tl.exp2((row_max - origin) * LOG2_E)
    total = total * rescale + tl.sum(p, 1)
    acc = dot(cast(p, b_v.dtype), b_v, acc * rescale[:, None])
    return acc, new_max, total


@triton.jit
def _add_parts(
    parts,  # see Parts
    results,  # see Results
    gate,  # logits [B, Q, H, V]; None
    new,  # Pair of [B, Q, Hkv, K] and [B, Q, Hkv, V]
    cache,  # Pair of [B, slots, 1, K] and [B, slots, 1, V]
    lengths,  # [B]
    runs,  # of Run
    batch,
    G: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The output of one query and head; the first head of a group appends the key and value."""
    batch = batch >> 1
    pid = tl.program_id(0)
    i_b = pid % batch
    i_q = (pid // batch) % Q
    i_h = pid // batch // Q
    H = tl.num_programs(0) // batch // Q
    _, first, num_parts, offset, capacity = find_head(i_h // G, runs, OF_ITEM=False)
    cols = tl.arange(0, BV)

    acc = tl.zeros([BV], dtype=tl.float32)
    row_max = -float("inf")
    total = 0.0
    for start in range(0, num_parts, _PARTS):
        part = start + tl.arange(0, _PARTS)
        live = part < num_parts
        index = (tl.cast(first + part, tl.int64) * batch + i_b) * (G * Q) + i_q * G + i_h % G
        b_max = tl.load(parts.row_max + index, mask=live, other=-float("inf"))
        b_total = tl.load(parts.total + index, mask=live, other=0.0)
        mask = live[:, None] & (cols < V)[None, :]
        b_acc = tl.load(parts.acc + index[:, None] * V + cols[None, :], mask=mask, other=0.0)
        new_max = tl.maximum(row_max, tl.max(b_max, 0))
        origin = tl.where(new_max == -float("inf"), 0.0, new_max)  # -inf - -inf is NaN
        weight = tl.exp2((b_max - origin) * LOG2_E)  # [_PARTS]
        rescale = tl.exp2((row_max - origin) * LOG2_E)
        # A part that saw no keys has left its acc as it was allocated.
        b_acc = tl.where((b_max > -float("inf"))[:, None], b_acc * weight[:, None], 0.0)
        acc = acc * rescale + tl.sum(b_acc, 0)
        total = total * rescale + tl.sum(b_total * weight, 0)
        row_max = new_max
    out = acc / total  # a query sees at least its own key
    if gate is not None:
        b_gate = tl.load(locate(gate, i_b, i_h, i_q) + cols * gate.dim, mask=cols < V, other=0.0)
        out *= activate(b_gate.to(tl.float32), ACTIVATION)
    row = (tl.cast(i_b, tl.int64) * Q + i_q) * H + i_h
    b_out = cast(out, results.out.dtype.element_ty)
    tl.store(results.out + row * V + cols, b_out, mask=cols < V)
    tl.store(results.row_max + row, row_max)
    tl.store(results.lse + row, row_max + tl.log(total))

    length = tl.load(parts.lengths + i_b)  # lengths itself changes while this launch runs
    if (i_h == 0) & (i_q == 0):
        tl.store(lengths + i_b, length + Q)
    if (i_h % G == 0) & (i_q + capacity >= Q):  # a later key of the step takes the slot otherwise
        slot = offset + (length + i_q) % capacity
        _copy_row(new.k, cache.k, i_b, i_h // G, i_q, slot, K, BK)
        _copy_row(new.v, cache.v, i_b, i_h // G, i_q, slot, V, BV)


@triton.jit
def _copy_row(new, cache, i_b, head, i_q, slot, D: tl.constexpr, BD: tl.constexpr):
    cols = tl.arange(0, BD)
    b_x = tl.load(locate(new, i_b, head, i_q) + cols * new.dim, mask=cols < D)
    tl.store(locate(cache, i_b, 0, slot) + cols * cache.dim, b_x, mask=cols < D)
