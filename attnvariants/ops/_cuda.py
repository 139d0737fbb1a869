"""What the operators of the extension ``attnvariants._C`` have in common."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# In the order of csrc/types.h.
MAPS = (None, "elu+1", "elu", "relu", "silu", "sigmoid")
NORMS = (None, "head", "model")

# Counters of arrived blocks, 0 between steps. They belong to a cache, by way of its lengths: two
# steps of one cache never overlap, while other steps on other streams may.
_arrivals: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def contiguous_rows(x: Tensor) -> Tensor:
    """``x``, or a copy where the elements of its last axis do not lie next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def channels(x: Tensor | None) -> Tensor | None:
    """``x`` with contiguous rows where it has a channel axis, ``[B, T, H, D]``."""
    return contiguous_rows(x) if x is not None and x.dim() == 4 else x


def counters(owner: Tensor | None, count: int, like: Tensor) -> Tensor:
    """``count`` zeros, int32: always the same of one owner, which leaves them at zero."""
    found = None if owner is None else _arrivals.get(owner)
    if found is not None and found.numel() == count:
        return found
    zeros = like.new_zeros(count, dtype=torch.int32)
    # What a graph captures has not run yet: later steps outside of it need zeros of their own.
    capturing = like.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if owner is not None and not capturing:
        _arrivals[owner] = zeros
    return zeros
