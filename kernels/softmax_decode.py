"""One decode step of softmax attention over a cache, as two launches.

The first gives every program one part of the slots of one row and KV head: it reads these keys and
values once for all query rows of the group and leaves a partial softmax. The second adds up the
parts, applies the gate, and only then, when nobody reads the cache any more, writes the new keys
and values over the oldest ones of a ring and advances the lengths. Grids and buffers depend on
sizes that the host knows, so that a CUDA graph captures the step.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
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


class Plan(NamedTuple):
    """How the slots of the cache are shared out: a work item is one part of one KV head."""

    items: Tensor  # int32 [items, 5]: head, part, parts, first slot and capacity of the head
    heads: Tensor  # int32 [Hkv, 4]: first item, parts, first slot, capacity


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
    plan = share_out(
        tuple(capacities), batch * blocks, config.BS, _RESIDENT * _processors(q.device), q.device
    )
    items = plan.items.shape[0]
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
        *(_attend_parts, items * blocks * batch, strided(q), new, cache, lengths, plan.items),
        *(parts, softmax_scale, odd(batch), *sizes, config.BT, BK, BV, config.BS, config.BC),
        like=q,
        config=config,
    )
    launch(
        *(_add_parts, batch * steps * heads, parts, Results(out, row_max, lse)),
        *(None if gate is None else strided(gate), new, cache, lengths, plan.heads),
        *(odd(batch), *sizes, BK, BV, gate_activation),
        like=q,
        config=config,
    )
    return out, row_max, lse


def configure(rows: int, BK: int, BV: int, dtype: torch.dtype) -> Config:
    """Tiles of up to 16 KB in half precision, so that several programs with two of them fit an SM.

    More rows than a tile has are cut into blocks, which read the cache once each, at the same time
    and so mostly from L2. Tiles of 64 rows would need wgmma, with the hazards it has in Triton.
    """
    slots = min(64, 4096 // max(BK, BV))
    if dtype == torch.float32:  # without tensor cores: a thread holds its operands' columns
        return Config(BT=16, BS=slots, BC=min(64, BK), warps=8, stages=2)
    wide = rows > 16 and max(BK, BV) <= 128
    return Config(BT=32 if wide else 16, BS=slots, BC=BK, warps=4, stages=3)


@functools.lru_cache(maxsize=256)
def share_out(
    capacities: tuple[int, ...], parallel: int, tile: int, resident: int, device: torch.device
) -> Plan:
    """Cuts the slots of every head into parts of about equal size, as many as keep a GPU busy.

    A part is a share of what its head holds when the step runs, which only the device knows.

    Args:
        capacities: slots of each KV head.
        parallel: programs per work item.
        tile: slots of a tile.
        resident: programs that run at the same time.
        device: of the tables.
    """
    tiles = [triton.cdiv(capacity, tile) for capacity in capacities]
    size = _tiles_per_part(Counter(tiles), parallel, resident)
    counts = [triton.cdiv(n, size) for n in tiles]
    items: list[tuple[int, ...]] = []
    heads = [(0, 0, 0, 0)] * len(capacities)
    # Programs start in the order of the items: the longest first.
    for head in sorted(range(len(tiles)), key=lambda h: -tiles[h] / counts[h]):
        slots = sum(capacities[:head]), capacities[head]
        heads[head] = (len(items), counts[head], *slots)
        items += [(head, part, counts[head], *slots) for part in range(counts[head])]
    return Plan(*(torch.tensor(x, dtype=torch.int32, device=device) for x in (items, heads)))


def _tiles_per_part(tiles: Counter[int], parallel: int, resident: int) -> int:
    """The size with the shortest schedule, where a part costs one tile more than it has."""

    def cost(size: int) -> int:
        programs = parallel * sum(heads * triton.cdiv(n, size) for n, heads in tiles.items())
        return int(triton.cdiv(programs, resident)) * (size + 1)

    return min(range(max(tiles), 0, -1), key=cost)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _strided_cache(x: Tensor) -> Strided:
    """``[B, slots, D]``: the heads lie behind each other in the slots."""
    batch, slot, dim = x.stride()
    return Strided(x, batch, slot, 0, dim)


@triton.jit
def _attend_parts(
    q,  # [B, Q, Hkv * G, K]
    new,  # Pair of [B, Q, Hkv, K] and [B, Q, Hkv, V]
    cache,  # Pair of [B, slots, 1, K] and [B, slots, 1, V]
    lengths,  # [B]
    items,  # see Plan
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
    head = tl.load(items + 5 * i_w)
    part = tl.load(items + 5 * i_w + 1)
    num_parts = tl.load(items + 5 * i_w + 2)
    offset = tl.load(items + 5 * i_w + 3)
    capacity = tl.load(items + 5 * i_w + 4)
    length = tl.load(lengths + i_b)
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
    gate,  # logits [B, Q, H, V] or [B, Q, H]; None
    new,  # Pair of [B, Q, Hkv, K] and [B, Q, Hkv, V]
    cache,  # Pair of [B, slots, 1, K] and [B, slots, 1, V]
    lengths,  # [B]
    heads,  # see Plan
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
    first = tl.load(heads + 4 * (i_h // G))
    num_parts = tl.load(heads + 4 * (i_h // G) + 1)
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
        p_gate = locate(gate, i_b, i_h, i_q)
        if gate.dim is None:  # one logit per head
            b_gate = tl.load(p_gate)
        else:
            b_gate = tl.load(p_gate + cols * gate.dim, mask=cols < V, other=0.0)
        out *= activate(b_gate.to(tl.float32), ACTIVATION)
    row = (tl.cast(i_b, tl.int64) * Q + i_q) * H + i_h
    b_out = cast(out, results.out.dtype.element_ty)
    tl.store(results.out + row * V + cols, b_out, mask=cols < V)
    tl.store(results.row_max + row, row_max)
    tl.store(results.lse + row, row_max + tl.log(total))

    length = tl.load(parts.lengths + i_b)  # lengths itself changes while this launch runs
    if (i_h == 0) & (i_q == 0):
        tl.store(lengths + i_b, length + Q)
    offset = tl.load(heads + 4 * (i_h // G) + 2)
    capacity = tl.load(heads + 4 * (i_h // G) + 3)
    if (i_h % G == 0) & (i_q + capacity >= Q):  # a later key of the step takes the slot otherwise
        slot = offset + (length + i_q) % capacity
        _copy_row(new.k, cache.k, i_b, i_h // G, i_q, slot, K, BK)
        _copy_row(new.v, cache.v, i_b, i_h // G, i_q, slot, V, BV)


@triton.jit
def _copy_row(new, cache, i_b, head, i_q, slot, D: tl.constexpr, BD: tl.constexpr):
    cols = tl.arange(0, BD)
    b_x = tl.load(locate(new, i_b, head, i_q) + cols * new.dim, mask=cols < D)
    tl.store(locate(cache, i_b, 0, slot) + cols * cache.dim, b_x, mask=cols < D)
