"""Which work a program of the softmax kernels takes: all of it once, the longest first."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import triton
import triton.language as tl
from attnvariants.kernels._schedule import (
    Sizes,
    bands,
    find_band,
    find_rows,
    pick_tile,
    visible_tiles,
)
from hypothesis import given, settings
from torch import Tensor

from attnvariants.kernels import _schedule


@triton.jit
def picked_kernel(found, sizes, GROUP: tl.constexpr, LAST_FIRST: tl.constexpr):
    i_tile, i_b, i_rank, i_g = pick_tile(sizes, GROUP, LAST_FIRST)
    p_found = found + 4 * tl.program_id(0)
    tl.store(p_found, i_tile)
    tl.store(p_found + 1, i_b)
    tl.store(p_found + 2, i_rank)
    tl.store(p_found + 3, i_g)


@triton.jit
def rows_kernel(found, length, cu_seqlens, sizes, ROWS: tl.constexpr):
    start, count, first = find_rows(tl.program_id(0), length, cu_seqlens, sizes, ROWS)
    p_found = found + 3 * tl.program_id(0)
    tl.store(p_found, start)
    tl.store(p_found + 1, count)
    tl.store(p_found + 2, first)


@triton.jit
def tiles_kernel(found, low, high, all_low, all_high, TILE: tl.constexpr):
    begin, free, edge, end = visible_tiles(low, high, all_low, all_high, TILE)
    tl.store(found, begin)
    tl.store(found + 1, free)
    tl.store(found + 2, edge)
    tl.store(found + 3, end)


@triton.jit
def bands_kernel(found, bands):
    i_kv, left, right = find_band(tl.program_id(0), bands)
    p_found = found + 3 * tl.program_id(0)
    tl.store(p_found, i_kv)
    tl.store(p_found + 1, left)
    tl.store(p_found + 2, right)


def sizes_of(
    batch: int, kv_heads: int, length: int, lengths: list[int] | None, block: int | None
) -> tuple[Sizes, Tensor | None]:
    cu_seqlens = None
    if lengths is not None:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    x = torch.empty(batch, length, kv_heads, 1)
    return Sizes.of(x, x, cu_seqlens, block), cu_seqlens


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("l2_heads", [1, 5, 100])
def test_every_tile_of_every_head_is_picked_once_and_the_longest_first(
    l2_heads: int, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, kv_heads, group, length, rows = 2, 3, 2, 50, 16
    monkeypatch.setattr(_schedule, "_L2_BYTES", 1000 * l2_heads)
    sizes, _ = sizes_of(batch, kv_heads, length, None, None)
    heads = batch * kv_heads * group
    sizes = sizes.tiled(length, heads, 1000, mixed, rows)
    tiles = 4
    found = torch.full((tiles * heads, 4), -1, dtype=torch.int32)
    picked_kernel[(len(found),)](found, sizes, group, True)
    picks = [tuple(row) for row in found.tolist()]
    assert set(picks) == {
        (tile, b, rank, g)
        for tile in range(tiles)
        for b in range(batch)
        for rank in range(kv_heads)
        for g in range(group)
    }
    section = batch * group if mixed else min(l2_heads, heads)
    for start in range(0, len(picks), section * tiles):  # within a section from last to first
        order = [tile for tile, *_ in picks[start : start + section * tiles]]
        assert order == sorted(order, reverse=True)
    if mixed:  # the widest windows, which are the first ranks, before the others
        ranks = [rank for _, _, rank, _ in picks]
        assert ranks == sorted(ranks)


@given(
    lengths=st.one_of(st.none(), st.lists(st.integers(0, 40), min_size=1, max_size=6)),
    block=st.one_of(st.none(), st.integers(1, 40)),
    rows=st.sampled_from([16, 32]),
    length=st.integers(1, 100),
)
@settings(max_examples=60)
def test_every_row_is_in_one_tile(
    lengths: list[int] | None, block: int | None, rows: int, length: int
) -> None:
    length = length if lengths is None else max(1, sum(lengths))
    lengths = None if lengths is None or not sum(lengths) else lengths
    sizes, cu_seqlens = sizes_of(1, 1, length, lengths, block)
    sizes = sizes.tiled(length, 1, 1, False, rows)
    found = torch.full((sizes.tiles >> 1, 3), -1, dtype=torch.int32)
    rows_kernel[(len(found),)](found, length, cu_seqlens, sizes, rows)

    owners = torch.zeros(length, dtype=torch.int32)
    wanted = expected_sequences(lengths or [length], block)
    for start, count, first in found.tolist():
        if first < count:
            assert (start, count) in wanted
            assert first % rows == 0
            owners[start + first : start + min(first + rows, count)] += 1
    assert (owners == 1).all()


def expected_sequences(lengths: list[int], block: int | None) -> set[tuple[int, int]]:
    found, start = set(), 0
    for length in lengths:
        unit = block or max(length, 1)
        found |= {
            (start + first, min(unit, length - first)) for first in range(0, max(length, 1), unit)
        }
        start += length
    return found


@given(
    low=st.integers(-50, 100),
    width=st.integers(0, 100),
    all_low=st.integers(-50, 150),
    all_high=st.integers(-50, 150),
)
@settings(max_examples=100)
def test_tiles_cover_what_is_visible_and_spare_the_mask_inside_only(
    low: int, width: int, all_low: int, all_high: int
) -> None:
    found = torch.zeros(4, dtype=torch.int32)
    high = low + width
    tiles_kernel[(1,)](found, low, high, all_low, all_high, 16)
    begin, free, edge, end = found.tolist()
    assert 0 <= begin <= free <= edge <= end
    assert set(range(max(low, 0), high)) <= set(range(16 * begin, 16 * end))
    assert end == begin or (16 * begin + 16 > low and 16 * end - 16 < high)  # no idle tile
    for tile in range(free, edge):
        assert all_low <= 16 * tile
        assert 16 * tile + 16 <= all_high


@pytest.mark.parametrize("windows", [(-1,), (4, -1, 9, 9), (7, 7, 7), (3, 3, -1, 3, -1, -1)])
@pytest.mark.parametrize("causal", [True, False])
def test_bands_give_every_head_its_reach_and_the_widest_come_first(
    windows: tuple[int, ...], causal: bool
) -> None:
    far = _schedule._FAR
    found = torch.full((len(windows), 3), -1, dtype=torch.int32)
    bands_kernel[(len(windows),)](found, bands(windows, causal))
    wanted = {
        (head, far, 0 if causal else far) if window == -1 else (head, window, 0)
        for head, window in enumerate(windows)
    }
    assert {tuple(row) for row in found.tolist()} == wanted
    reach = found[:, 1].tolist()
    assert reach == sorted(reach, reverse=True)


def test_bands_are_not_specialised_but_for_zeros() -> None:
    """Windows differ between layers; Triton compiles anew for 1 and for multiples of 16."""
    for band in bands((16, 32, -1, 48), True):
        assert all(size % 2 == 1 for size in band)


def test_sizes_do_not_specialise_kernels() -> None:
    """Triton compiles anew for 1 and for multiples of 16."""
    x: Any = torch.empty(16, 1, 32, 64)
    travelling = Sizes.of(x, x, None, 48).tiled(1, 16, 10**9, False, 16)
    assert all(size % 2 == 1 for size in travelling)
    assert [size >> 1 for size in travelling][:4] == [16, 32, 1, 1]
    assert min(size for size in travelling if size >> 1) > 1
