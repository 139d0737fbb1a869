"""Sequences cut into chunks of 64 tokens, and chunks gathered into segments of bounded size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64
TILES_PER_SEGMENT = 32  # chunks times heads: enough to batch, few enough to stay in the cache


class Chunk(NamedTuple):
    """Up to 64 tokens of one sequence; only the last chunk of a sequence may be short."""

    sequence: int
    start: int
    end: int
    opens: bool  # the first of its sequence
    closes: bool  # the last of its sequence


class Segment(NamedTuple):
    """Consecutive chunks: ``rows`` of the flattened ``[B * T]``, padded where one is short."""

    chunks: list[Chunk]
    rows: slice
    slots: Tensor | None  # where each row goes among the padded ones; None if none is padded

    def tiles(self, rows: Tensor) -> Tensor:
        """``[rows, H, D]`` as ``[n, H, C, D]``, short chunks filled up with zeros."""
        if self.slots is not None:
            padded = rows.new_zeros(len(self.chunks) * CHUNK, *rows.shape[1:])
            rows = padded.index_copy_(0, self.slots, rows)
        return rows.unflatten(0, (-1, CHUNK)).transpose(1, 2).contiguous()

    @property
    def sequences(self) -> list[int]:
        """The sequence of every chunk."""
        return [chunk.sequence for chunk in self.chunks]

    def add_to(self, totals: Tensor, terms: Tensor) -> None:
        """Adds a term per chunk ``[n, ...]`` to its sequence's total ``[N, ...]``."""
        end = 0
        for sequence, group in itertools.groupby(self.sequences):
            start, end = end, end + len(list(group))
            totals[sequence] += terms[start:end].sum(0)

    def untile(self, tiles: Tensor) -> Tensor:
        """The inverse of :meth:`tiles`."""
        rows = tiles.transpose(1, 2).flatten(0, 1)
        return rows if self.slots is None else rows.index_select(0, self.slots)


def segments(bounds: list[int], heads: int, device: torch.device) -> list[Segment]:
    """Cuts the sequences between ``bounds`` of the flattened tokens."""
    chunks = list(_chunks(bounds))
    size = max(1, TILES_PER_SEGMENT // heads)
    return [_segment(chunks[i : i + size], device) for i in range(0, len(chunks), size)]


def _chunks(bounds: list[int]) -> Iterator[Chunk]:
    for sequence, (first, last) in enumerate(itertools.pairwise(bounds)):
        for start in range(first, last, CHUNK):
            end = min(start + CHUNK, last)
            yield Chunk(sequence, start, end, start == first, end == last)


def _segment(chunks: list[Chunk], device: torch.device) -> Segment:
    rows = slice(chunks[0].start, chunks[-1].end)
    slots = None
    if rows.stop - rows.start < len(chunks) * CHUNK:
        lengths = torch.tensor([chunk.end - chunk.start for chunk in chunks])
        filled = torch.arange(CHUNK) < lengths.unsqueeze(1)  # [n, C]
        slots = filled.flatten().nonzero().squeeze(1).to(device)
    return Segment(chunks, rows, slots)
