"""Counters of arrived blocks for decode kernels, which find and leave them at zero."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from attnvariants import _checks

# They belong to a cache, by way of its lengths: two steps of one cache never overlap, while other
# steps on other streams may.
_arrivals: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def reserve(owner: Tensor, count: int) -> None:
    """Makes ``count`` counters for ``owner``.

    A cache does so before its first step: what a step allocates may lie in the memory of a CUDA
    graph, as it does when ``torch.compile(mode="reduce-overhead")`` warms up, and cannot be kept.
    """
    if not _checks.recording():
        _arrivals[owner] = torch.zeros(count, dtype=torch.int32, device=owner.device)


def counters(owner: Tensor | None, count: int, like: Tensor) -> Tensor:
    """The counters of ``owner``; new ones where it has none, as a copy of a cache."""
    found = None if owner is None else _arrivals.get(owner)
    if found is not None and found.numel() == count:
        return found
    return like.new_zeros(count, dtype=torch.int32)
