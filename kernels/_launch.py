"""Launches kernels: on the device of their tensors, with a configuration chosen ahead of time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from attnvariants.kernels._tiles import INTERPRETED
from torch import Tensor


class Config(NamedTuple):
    """Tile sizes along queries and keys (rows and columns of the scores), warps and stages."""

    BT: int
    BS: int
    warps: int
    stages: int


def launch(kernel: Any, programs: int, *arguments: Any, like: Tensor, config: Any) -> None:
    """Runs ``programs`` programs of ``kernel`` on the device and the current stream of ``like``.

    The grid has one axis: the others are limited to 65,535 programs.
    """
    options = {"num_warps": config.warps, "num_stages": config.stages}
    if like.device.type != "cuda":
        kernel[(programs,)](*arguments, **options)
        return
    with torch.cuda.device(like.device):
        kernel[(programs,)](*arguments, **options)


def architecture() -> int:
    """Compute capability of the current device as one number, 90 for 9.0."""
    if INTERPRETED:
        return 80
    return int(triton.runtime.driver.active.get_current_target().arch)


def tile_dim(size: int) -> int:
    """The smallest tile side that holds ``size``: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(size))
