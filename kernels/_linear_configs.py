"""Tiles of the linear kernels, picked by hand and pruned ahead of time; and their segments."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from attnvariants.kernels._launch import architecture, tile_dim
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
    """The tiles of ``kernel`` on the current device.

    The forward and the walk for dv hold all of K, the walk for dq and dk and the pass before it
    all of V; what a table leaves at 0 is filled in here.
    """
    key, value = tile_dim(key_dim), tile_dim(value_dim)
    # float16 is multiplied as TF32, in tiles as large as those of float32.
    kind = "float32" if dtype != torch.bfloat16 else _kind(architecture())
    table = _TABLES[kernel][kind]
    size = value if kernel in ("linear_backward_qk", "linear_cotangent") else key
    found = table[min(dim for dim in table if dim >= size)]
    return found._replace(BK=min(found.BK or key, key), BV=min(found.BV or value, value))


def _kind(arch: int) -> str:
    """The part of a table: by tensor cores and registers."""
    return {90: "hopper", 100: "blackwell"}.get(arch, "ampere")


_OVER_K = {  # tiles of those that hold all of K
    "hopper": {
        64: Tiles(32, 0, 64, 4, 1),
        128: Tiles(32, 0, 64, 8, 1),
        256: Tiles(16, 0, 32, 8, 1),
    },
    # Its own matrix instruction takes tiles of 64 rows, and Triton 3.7 does not compile these
    # kernels for it; smaller ones use the older instruction.
    "blackwell": {
        64: Tiles(32, 0, 32, 4, 1),
        128: Tiles(16, 0, 32, 8, 1),
        256: Tiles(16, 0, 32, 8, 1),
    },
    "ampere": {
        64: Tiles(32, 0, 32, 4, 1),
        128: Tiles(16, 0, 32, 8, 1),
        256: Tiles(16, 0, 16, 8, 1),
    },
    "float32": {
        64: Tiles(16, 0, 32, 4, 1),
        128: Tiles(16, 0, 16, 8, 1),
        256: Tiles(16, 0, 16, 8, 1),
    },
}
_TO_KEYS = {
    "hopper": {256: Tiles(64, 32, 32, 4, 1)},
    "blackwell": {256: Tiles(64, 16, 32, 4, 1)},
    "ampere": {256: Tiles(32, 16, 32, 4, 1)},
    "float32": {256: Tiles(32, 16, 32, 8, 1)},
}
_ANY = ("hopper", "blackwell", "ampere", "float32")
_TABLES: dict[str, dict[str, dict[int, Tiles]]] = {
    "linear_forward": _OVER_K,
    "linear_backward_v": _OVER_K,
    "linear_backward_qk": _TO_KEYS,
    "linear_states": {
        kind: {256: Tiles(32, 32, 32, 4, 1) if kind == "float32" else Tiles(64, 64, 64, 4, 1)}
        for kind in _ANY
    },
    "linear_norm": {kind: {256: Tiles(32, 1, 0, 4, 1)} for kind in _ANY},
    "linear_cotangent": {
        kind: {64: Tiles(32, 1, 0, 4, 1), 256: Tiles(16, 1, 0, 8, 1)} for kind in _ANY
    },
}
