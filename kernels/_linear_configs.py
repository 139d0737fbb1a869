"""Tile sizes of the linear kernels, picked by hand and pruned ahead of time; and their segments."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from attnvariants.kernels._launch import tile_dim
from attnvariants.kernels._walk import Dims

PROGRAMS = 128  # that fill a large device
SHORTEST = 512  # tokens of a segment: fewer are not worth a pass of their own
STRIDE = 256  # tokens between the states that the backward keeps


class Tiles(NamedTuple):
    """Chunk length, tiles along K and V, warps and stages."""

    BT: int
    BK: int
    BV: int
    warps: int
    stages: int

    def dims(self, dims: Dims) -> Dims:
        """Head dims with these tiles."""
        return Dims(dims.K, dims.V, self.BT, self.BK, self.BV, min(self.BK, 32))


def segment_length(sequences: int, tokens: int, programs: int, longest: int) -> int:
    """Tokens of a segment, for ``programs`` programs per segment and ``tokens`` in all.

    Sequences stay whole where they fill the device, and where two segments would be short.
    """
    whole = 1 << 29  # more than any length
    if 2 * sequences * programs > PROGRAMS or longest < 2 * SHORTEST:
        return whole
    span = max(SHORTEST, triton.next_power_of_2(triton.cdiv(tokens * programs, PROGRAMS)))
    return span if span < longest else whole


def tiles(kernel: str, dtype: torch.dtype, key_dim: int, value_dim: int) -> Tiles:
    key, value = tile_dim(key_dim), tile_dim(value_dim)
    return {
        "linear_forward": Tiles(64 if key <= 128 else 32, key, min(value, 64), 8, 1),
        "linear_states": Tiles(64, min(key, 64), min(value, 64), 4, 1),
        "linear_norm": Tiles(32, 0, 0, 4, 1),
        "linear_cotangent": Tiles(32, 0, value, 4, 1),
        "linear_backward_qk": Tiles(64, min(key, 32), value, 8, 1),
        "linear_backward_v": Tiles(64 if key <= 128 else 32, key, min(value, 64), 8, 1),
    }[kernel]
