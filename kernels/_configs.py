"""Tile sizes per kernel, architecture, dtype and head dim: picked by hand, pruned ahead of time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from attnvariants.kernels._launch import Config, architecture

_overrides: dict[str, Config] = {}


def configure(kernel: str, itemsize: int, head_dim: int) -> Config:
    """The configuration of ``kernel`` on the current device for inputs of ``itemsize`` bytes.

    ``head_dim`` is the larger of the two tile sides that hold K and V.
    """
    if kernel in _overrides:
        return _overrides[kernel]
    table = _TABLES[kernel]
    kind = "float32" if itemsize == 4 else _kind(architecture())
    widest = min(dim for dim in table[kind] if dim >= head_dim)
    return table[kind][widest]


def overridden(kernel: str) -> Config | None:
    """What :func:`override` says about a kernel whose configuration is not in the table."""
    return _overrides.get(kernel)


@contextlib.contextmanager
def override(kernel: str, config: Config) -> Iterator[None]:
    """Launches ``kernel`` with ``config`` inside the block, whatever the table says."""
    _overrides[kernel] = config
    try:
        yield
    finally:
        del _overrides[kernel]


def _kind(arch: int) -> str:
    """The row of the tables: by tensor cores, registers and shared memory."""
    kinds = {80: "ampere", 90: "hopper", 100: "blackwell", 103: "blackwell"}
    return kinds.get(arch, "consumer")  # 100 KiB of shared memory


_TABLES: dict[str, dict[str, dict[int, Config]]] = {
    "softmax_forward": {
        "blackwell": {
            64: Config(128, 64, 8, 3),
            128: Config(128, 64, 8, 3),
            256: Config(64, 32, 8, 3),
        },
        "hopper": {
            64: Config(128, 64, 8, 3),
            128: Config(128, 64, 8, 3),
            256: Config(64, 32, 8, 3),
        },
        "ampere": {
            64: Config(128, 64, 8, 3),
            128: Config(128, 32, 8, 3),
            256: Config(64, 32, 8, 2),
        },
        "consumer": {
            64: Config(128, 64, 8, 2),
            128: Config(128, 32, 8, 2),
            256: Config(64, 32, 8, 2),
        },
        "float32": {
            64: Config(32, 32, 4, 2),
            128: Config(32, 16, 8, 1),
            256: Config(16, 32, 8, 2),
        },
    },
    "softmax_backward_rows": {
        kind: {64: Config(64, 0, 4, 1), 128: Config(32, 0, 4, 1), 256: Config(16, 0, 4, 1)}
        for kind in ("blackwell", "hopper", "ampere", "consumer", "float32")
    },
    "softmax_backward_dq": {
        "blackwell": {
            64: Config(128, 64, 8, 2),
            128: Config(128, 64, 8, 2),
            256: Config(64, 32, 8, 2),
        },
        "hopper": {
            64: Config(128, 64, 8, 2),
            128: Config(128, 32, 8, 2),
            256: Config(64, 32, 8, 2),
        },
        "ampere": {
            64: Config(64, 64, 8, 2),
            128: Config(64, 32, 4, 2),
            256: Config(64, 32, 8, 1),
        },
        "consumer": {
            64: Config(64, 64, 8, 2),
            128: Config(64, 32, 4, 2),
            256: Config(32, 32, 8, 1),
        },
        "float32": {
            64: Config(32, 16, 8, 1),
            128: Config(16, 16, 8, 1),
            256: Config(16, 32, 8, 2),
        },
    },
    "softmax_backward_dkdv": {
        "blackwell": {
            64: Config(32, 128, 8, 2),
            128: Config(64, 128, 8, 2),
            256: Config(32, 32, 8, 2),
        },
        "hopper": {
            64: Config(64, 128, 8, 2),
            128: Config(32, 128, 8, 2),
            256: Config(32, 32, 8, 2),
        },
        "ampere": {
            64: Config(32, 128, 8, 2),
            128: Config(32, 64, 8, 2),
            256: Config(32, 32, 8, 2),
        },
        "consumer": {
            64: Config(32, 128, 8, 2),
            128: Config(32, 64, 8, 2),
            256: Config(32, 32, 8, 1),
        },
        "float32": {
            64: Config(32, 16, 8, 1),
            128: Config(16, 32, 8, 1),
            256: Config(16, 16, 8, 1),
        },
    },
}
