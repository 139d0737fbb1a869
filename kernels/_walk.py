"""Which part of which sequence and head a program of the linear kernels walks over.

A sequence is cut into segments of ``span`` tokens, each walked by programs of its own; a span that
holds the longest sequence makes one segment of each. Packed sequences need no look at their lengths
on the host: sequence n owns the slots from ``start // span + n`` on, which is always enough.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from attnvariants.kernels._decay import NOTHING, chunk_decay, decay, fresh_rows
from attnvariants.kernels._feature_map import apply_map
from attnvariants.kernels._tiles import load_slice, locate, odd
from torch import Tensor


class Walk(NamedTuple):
    """Sequences cut into segments, on their way into a kernel; sizes as from :func:`odd`."""

    cu_seqlens: Any  # [N + 1]; None
    owner: Any  # [slots], the sequence of every segment; None where there is one segment each
    length: int  # T
    heads: int
    span: int  # tokens of a segment
    slots: int  # segments, per batch entry without cu_seqlens

    @staticmethod
    def of(q: Tensor, cu_seqlens: Tensor | None, span: int, find_owners: bool = True) -> Walk:
        """Segments of ``span`` tokens of ``q [B, T, H, K]``; owners for programs by segment."""
        length, heads = q.shape[1:3]
        owner, slots = None, triton.cdiv(length, span)
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.contiguous()
            count = cu_seqlens.numel() - 1
            slots = length // span + count
            if span <= length and find_owners:
                numbers = torch.arange(slots, dtype=torch.int32, device=q.device)
                first = cu_seqlens[:-1] // span + numbers[:count]
                owner = torch.searchsorted(first, numbers, right=True, out_int32=True) - 1
        return Walk(cu_seqlens, owner, odd(length), odd(heads), odd(span), odd(slots))

    def segments(self, batch: int) -> int:
        """Segments of all sequences, some of them unused if packed."""
        return (self.slots >> 1) * (batch if self.cu_seqlens is None else 1)

    @property
    def whole(self) -> bool:
        """Whether every sequence is one segment, so that segments are sequences."""
        if self.cu_seqlens is None:
            return self.slots >> 1 == 1
        return self.span > self.length


class Dims(NamedTuple):
    """Head dims and the tile sides of a kernel, chunks of ``BT`` tokens; compile-time."""

    K: int
    V: int
    BT: int
    BK: int
    BV: int
    BC: int  # channels of the keys that are taken at a time for the scores


@triton.jit
def find_sequence(walk, i_n):
    """First and last token (excluded) of packed sequence ``i_n``.

    On a device nobody looks at ``cu_seqlens`` before: what are no bounds must touch nothing else.
    """
    length = walk.length >> 1
    first = tl.minimum(tl.maximum(tl.load(walk.cu_seqlens + i_n), 0), length)
    last = tl.minimum(tl.maximum(tl.load(walk.cu_seqlens + i_n + 1), first), length)
    return first, last


@triton.jit
def find_segment(walk, i_s):
    """Of segment ``i_s``: sequence, batch entry, place among the sequence's segments,

    first and last token of the sequence, and of the segment (the last ones excluded).
    """
    span = walk.span >> 1
    if walk.cu_seqlens is None:
        slots = walk.slots >> 1
        i_n = i_s // slots
        i_b = i_n
        place = i_s - i_n * slots
        first = 0
        last = walk.length >> 1
    else:
        i_n = i_s
        if walk.owner is not None:
            i_n = tl.maximum(tl.load(walk.owner + i_s), 0)
        i_b = 0
        first, last = find_sequence(walk, i_n)
        place = i_s - (first // span + i_n)
    begin = first + place * span
    end = tl.minimum(begin + span, last)
    if walk.cu_seqlens is not None:
        end = tl.where(place < 0, begin, end)  # of no sequence
    return i_n, i_b, place, first, last, begin, end


@triton.jit
def first_slot(walk, i_n, first):
    """The first segment of sequence ``i_n``, whose first token is ``first``."""
    if walk.cu_seqlens is None:
        slot = i_n * (walk.slots >> 1)
    else:
        slot = first // (walk.span >> 1) + i_n
    return slot


@triton.jit
def locate_state(states, walk, i_s, i_h, step, dims: tl.constexpr, i_k, i_v, T: tl.constexpr):
    """Addresses and mask of the tile ``[BK, BV]`` (its transpose if ``T``) of a state.

    ``states [segments, H, K, V]``; the tile begins at channel ``i_k`` of the keys and ``i_v`` of
    the values.
    """
    heads = walk.heads >> 1
    base = (tl.cast(i_s, tl.int64) * heads + i_h) * (dims.K * dims.V)
    keys = i_k + fresh_rows(step, walk, dims.BK)
    values = i_v + fresh_rows(step, walk, dims.BV)
    if T:
        p_state = states + base + keys[None, :] * dims.V + values[:, None]
        mask = (keys[None, :] < dims.K) & (values[:, None] < dims.V)
    else:
        p_state = states + base + keys[:, None] * dims.V + values[None, :]
        mask = (keys[:, None] < dims.K) & (values[None, :] < dims.V)
    return p_state, mask


@triton.jit
def load_state(states, walk, i_s, i_h, step, dims: tl.constexpr, i_k, i_v, T: tl.constexpr):
    """A tile of a state, or zeros where ``states`` is ``None``."""
    BK: tl.constexpr = dims.BK
    BV: tl.constexpr = dims.BV
    if states is None:
        b_s = tl.zeros([BV, BK] if T else [BK, BV], tl.float32)
    else:
        p_s, mask = locate_state(states, walk, i_s, i_h, step, dims, i_k, i_v, T)
        if dims.K % BK == 0 and dims.V % BV == 0:
            b_s = tl.load(p_s)
        else:
            b_s = tl.load(p_s, mask=mask, other=0.0)
    return b_s


@triton.jit
def store_state(states, b_s, walk, i_s, i_h, step, dims: tl.constexpr, i_k, i_v, T: tl.constexpr):
    """Stores a tile of a state, ``[BK, BV]`` or its transpose."""
    p_s, mask = locate_state(states, walk, i_s, i_h, step, dims, i_k, i_v, T)
    if dims.K % dims.BK == 0 and dims.V % dims.BV == 0:
        tl.store(p_s, b_s)
    else:
        tl.store(p_s, b_s, mask=mask)


@triton.jit
def load_log_decay(
    g, i_b, i_h, t, rows, live, i_k, K: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr
):
    """The log-decays of a chunk in float32: ``[BT, BK]``; 16 equal columns per "token".

    A compiler would load a vector again for every layout in which it is used, with an address for
    each row. A tile is loaded once, and is what a product takes.
    """
    p_g = locate(g, i_b, i_h, t)
    if KIND == "channel":
        b_g = load_slice(p_g, g, rows, live, i_k, K, BK)
    else:
        p_tile = p_g + rows[:, None] * g.time + tl.zeros([1, 16], tl.int32)
        b_g = tl.load(p_tile, mask=live[:, None], other=0.0)
    b_g = b_g.to(tl.float32)
    return tl.where(b_g < NOTHING, NOTHING, b_g)  # a maximum would drop NaN


@triton.jit
def running_decay(
    b_g,
    g,
    i_b,
    i_h,
    t,
    rows,
    end,
    i_k,
    like,
    K: tl.constexpr,
    BK: tl.constexpr,
    PART: tl.constexpr,
    KIND: tl.constexpr,
):
    """As :func:`chunk_decay`, for tiles that hold many channels, by a scan over their rows.

    On Ampere every warp would hold all of a tile that a product takes on its right.
    """
    BT: tl.constexpr = rows.shape[0]
    if KIND == "token":
        b_e = chunk_decay(b_g, rows, like, PART, KIND)
    else:
        if PART == "behind":  # the rows that follow, from each on
            follows = (rows < BT - 1) & (t + 1 + rows < end)
            b_g = load_log_decay(g, i_b, i_h, t + 1, rows, follows, i_k, K, BK, KIND)
        b_e = decay(tl.cumsum(b_g, 0, reverse=PART != "up to"), like.ptr.dtype.element_ty)
    return b_e


@triton.jit
def load_features(
    x, i_b, i_h, t, rows, live, i_k, K: tl.constexpr, BK: tl.constexpr, MAP: tl.constexpr
):
    """``phi(x)`` of a chunk in float32, ``[BT, BK]``; zero where there is nothing."""
    b_x = load_slice(locate(x, i_b, i_h, t), x, rows, live, i_k, K, BK).to(tl.float32)
    b_x = apply_map(b_x, MAP)
    if MAP == "elu+1":  # phi(0) is 1
        cols = i_k + tl.arange(0, BK)
        b_x = tl.where(live[:, None] & (cols[None, :] < K), b_x, 0.0)
    return b_x


@triton.jit
def load_row_scale(rstd, scale, i_b, i_h, t, rows, live, NORMED: tl.constexpr):
    """What multiplies the queries ``[BT, 1]``: ``scale * r``, or ``scale`` without a norm."""
    BT: tl.constexpr = live.shape[0]
    if not NORMED:
        b_r = tl.full([BT, 1], 1.0, tl.float32) * scale
    else:
        p_r = locate(rstd, i_b, i_h, t) + rows * rstd.time
        b_r = tl.load(p_r, mask=live, other=0.0)[:, None] * scale
    return b_r
