"""What the references of the linear attentions share: precision and packed sequences."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attnvariants import _checks


def upcast_half(enabled: bool, *tensors: Tensor | None) -> list[Any]:
    """bf16 and fp16 tensors in float32 if ``enabled``; all others as they are."""
    half = (torch.bfloat16, torch.float16)
    return [
        tensor.float() if enabled and tensor is not None and tensor.dtype in half else tensor
        for tensor in tensors
    ]


def initial_states(
    initial_state: Tensor | None, sequences: int, k: Tensor, v: Tensor, dtype: torch.dtype
) -> Tensor:
    """``initial_state`` or zeros, ``[N, H, K, V]``."""
    if initial_state is not None:
        return initial_state
    shape = (sequences, k.shape[2], k.shape[3], v.shape[3])
    return torch.zeros(shape, dtype=dtype, device=v.device)


def sequences(
    function: str, cu_seqlens: Tensor | None, batch: int, length: int
) -> Iterator[tuple[slice, slice]]:
    """Per group of equally long sequences: its slice of the states and of the tokens."""
    if cu_seqlens is None:
        yield slice(0, batch), slice(0, length)
        return
    bounds = _checks.sequence_bounds(function, cu_seqlens, length)
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        yield slice(index, index + 1), slice(start, end)
