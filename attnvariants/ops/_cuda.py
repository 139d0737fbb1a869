"""What the operators of the extension ``attnvariants._C`` have in common."""

from __future__ import annotations

from torch import Tensor

# In the order of csrc/types.h.
MAPS = (None, "elu+1", "elu", "relu", "silu", "sigmoid")
NORMS = (None, "head", "model")


def contiguous_rows(x: Tensor) -> Tensor:
    """``x``, or a copy where the elements of its last axis do not lie next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def channels(x: Tensor | None) -> Tensor | None:
    """``x`` with contiguous rows where it has a channel axis, ``[B, T, H, D]``."""
    return contiguous_rows(x) if x is not None and x.dim() == 4 else x
