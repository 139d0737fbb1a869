"""Which tile, sequence and head a program of the softmax kernels works on, and what it sees."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import triton
import triton.language as tl
from attnvariants.kernels._tiles import odd
from torch import Tensor

UNLIMITED = -1  # a window of all keys, as operators take it
_FAR = 2**29  # further than any key
_L2_BYTES = 32 * 2**20  # of keys and values that are read together


class Sizes(NamedTuple):
    """Sizes of a call, on their way into a kernel; see :func:`odd`."""

    batch: int
    kv_heads: int
    queries: int
    keys: int
    sequences: int  # packed along T; 0 without cu_seqlens
    block: int | None  # tokens per block of block-diagonal attention
    tiles: int  # per head
    section: int  # heads whose tiles are worked on together

    @staticmethod
    def of(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, block: int | None) -> Sizes:
        """The sizes that do not depend on the tiles."""
        sequences = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
        sizes = (q.shape[0], k.shape[2], q.shape[1], k.shape[1], sequences)
        return Sizes(*map(odd, sizes), None if block is None else odd(block), 0, 0)

    def tiled(self, length: int, heads: int, kv_bytes: int, mixed: bool, rows: int) -> Sizes:
        """With tiles of ``rows`` rows along an axis of ``length``, for ``heads`` heads in all.

        Heads of one section go through their tiles together, so the keys and values of a section,
        ``kv_bytes`` per head, should fit into the L2 cache. With ``mixed`` windows a section is one
        KV head: the heads that see most come first, and those that see little fill the gaps that
        they leave on the device.
        """
        sequences, block = self.sequences >> 1, (self.block or 0) >> 1
        unit = block or rows
        tiles = (triton.cdiv(length, unit) + sequences) * triton.cdiv(unit, rows)
        section = max(1, min(heads, _L2_BYTES // kv_bytes))
        if mixed:
            section = heads // (self.kv_heads >> 1)
        return self._replace(tiles=odd(tiles), section=odd(section))


class Band(NamedTuple):
    """Neighbouring KV heads with one mask, on their way into a kernel; see :func:`odd`.

    Key j is visible to query i where ``-right <= i - j < left``.
    """

    head: int  # the first
    count: int
    left: int
    right: int


@functools.lru_cache(maxsize=256)
def bands(windows: tuple[int, ...], causal: bool) -> tuple[Band, ...]:
    """The bands of all KV heads, in order of their reach, the widest first.

    They go into a kernel as numbers: a table on the device would have to outlive CUDA graphs.
    """
    found: list[Band] = []
    head = 0
    for window, group in itertools.groupby(windows):
        count = len(list(group))
        left = _FAR if window == UNLIMITED else min(window, _FAR)
        # A head with a window is causal, whatever ``causal`` says.
        right = 0 if causal or window != UNLIMITED else _FAR
        found.append(Band(*map(odd, (head, count, left, right))))
        head += count
    return tuple(sorted(found, key=lambda band: -band.left))


@triton.jit
def find_band(i_rank, bands):
    """The KV head of this rank among the ``bands``, and its reach to the left and to the right."""
    i_kv = 0
    left = 0
    right = 0
    first = 0
    for n in tl.static_range(len(bands)):
        band = bands[n]
        count = band.count >> 1
        inside = (i_rank >= first) & (i_rank < first + count)
        i_kv = tl.where(inside, (band.head >> 1) + i_rank - first, i_kv)
        left = tl.where(inside, band.left >> 1, left)
        right = tl.where(inside, band.right >> 1, right)
        first += count
    return i_kv, left, right


@triton.jit
def pick_tile(sizes, GROUP: tl.constexpr, LAST_FIRST: tl.constexpr):
    """The tile, batch entry, rank of the KV head in ``bands`` and head in its group of a program.

    Programs start in the order of their number: section by section, in each the tiles with the
    most work first, which are the last ones where queries see the keys before them.
    """
    i_program = tl.program_id(0)
    batch = sizes.batch >> 1
    tiles = sizes.tiles >> 1
    section = sizes.section >> 1
    heads = batch * (sizes.kv_heads >> 1) * GROUP
    first = i_program // (section * tiles) * section
    width = tl.minimum(section, heads - first)
    rest = i_program % (section * tiles)
    i_tile = rest // width
    i_head = first + rest % width
    if LAST_FIRST:
        i_tile = tiles - 1 - i_tile
    return i_tile, i_head // GROUP % batch, i_head // (batch * GROUP), i_head % GROUP


@triton.jit
def find_rows(i_tile, length, cu_seqlens, sizes, ROWS: tl.constexpr):
    """The first token of a tile's sequence, the length of that, and the tile's first row in it.

    Sequence n has room for its units (tiles, or blocks of block-diagonal attention) from unit
    ``cu_seqlens[n] // unit + n`` on: it never takes more, and so a unit's sequence is found without
    counting the units of those before it. Units that no sequence takes start beyond its end.
    """
    unit = ROWS
    within = 0
    if sizes.block is not None:
        unit = sizes.block >> 1
        tiles_per_block = tl.cdiv(unit, ROWS)
        within = i_tile % tiles_per_block * ROWS
        i_tile = i_tile // tiles_per_block
    start = 0
    end = length
    if cu_seqlens is not None:
        n = 0
        after = sizes.sequences >> 1
        while after - n > 1:
            middle = (n + after) // 2
            if tl.load(cu_seqlens + middle) // unit + middle <= i_tile:
                n = middle
            else:
                after = middle
        start = tl.load(cu_seqlens + n)
        i_tile -= start // unit + n
        end = tl.minimum(tl.load(cu_seqlens + n + 1), length)
        if (start < 0) | (i_tile < 0):  # no bounds of sequences: touch nothing
            end = start
            i_tile = 0
    first = i_tile * unit
    if sizes.block is not None:
        start += first
        end = tl.minimum(end, start + unit)
        first = within
    return start, end - start, first


@triton.jit
def visible_tiles(low, high, all_low, all_high, TILE: tl.constexpr):
    """Tiles that cover ``[low, high)``, and those inside ``[all_low, all_high)``.

    Returns ``(begin, free, edge, end)``: tiles ``[begin, free)`` and ``[edge, end)`` need the mask,
    those of ``[free, edge)`` do not.
    """
    begin = tl.maximum(low, 0) // TILE
    end = tl.maximum(tl.cdiv(tl.maximum(high, 0), TILE), begin)
    free = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(all_low, 0), TILE), begin), end)
    edge = tl.minimum(tl.maximum(tl.maximum(all_high, 0) // TILE, free), end)
    return begin, free, edge, end


@triton.jit
def visible_keys(first, queries, keys, left, right, ROWS: tl.constexpr, TILE: tl.constexpr):
    """What the rows of a tile of queries see: tiles of keys, and for each row ``[low, high)``.

    ``first`` is the tile's first query; the last query is aligned with the last key. Returns
    ``(begin, free, edge, end, low, high)``, the first four as :func:`visible_tiles` does.
    """
    position = first + keys - queries
    last = tl.minimum(first + ROWS, queries) - 1 + keys - queries
    begin, free, edge, end = visible_tiles(
        position - left + 1,
        tl.minimum(last + right + 1, keys),
        last - left + 1,
        tl.minimum(position + right + 1, keys),
        TILE,
    )
    rows = tl.arange(0, ROWS)
    low = position + rows - left + 1
    high = tl.minimum(position + rows + right + 1, keys)
    if first >= queries:
        end = begin
        free = begin
        edge = begin
    return begin, free, edge, end, low, high


@triton.jit
def masked_tile(n, begin, free, edge):
    """The n-th of the tiles that need the mask."""
    return tl.where(n < free - begin, begin + n, edge + n - (free - begin))
