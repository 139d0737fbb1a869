"""Small value types of the public interface, and helpers that build windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

Window: TypeAlias = "int | Sequence[int | None] | None"


class AttentionStats(NamedTuple):
    """Statistics of one attention call.

    Attributes:
        max_logit: fp32 ``[H]`` (float64 for float64 inputs), detached. Softmax variants: the
            largest visible ``softmax_scale * q.k`` over the batch. Linear variants: the largest
            visible ``|score|`` before normalisation. ``-inf`` where nothing was visible.
        lse: fp32 ``[B, T, H]`` (float64 for float64 inputs), natural logarithm of the softmax
            denominator, or ``None`` for linear variants.
    """

    max_logit: Tensor
    lse: Tensor | None


def window_from_flash(left: int) -> int | None:
    """Converts FlashAttention's inclusive ``window_size=(left, 0)`` to our window.

    Ours counts the visible keys *including the query's own*, so the result is ``left + 1``;
    FlashAttention's ``-1`` (no limit) becomes ``None``.

    Raises:
        TypeError: ``left`` is not an int.
        ValueError: ``left`` is below -1.
    """
    if isinstance(left, bool) or not isinstance(left, int):
        raise TypeError(f"left must be an int, got {left!r} of type {type(left).__name__}")
    if left < -1:
        raise ValueError(f"left must be -1 (no limit) or at least 0, got {left}")
    return None if left == -1 else left + 1


def ls_window(num_kv_heads: int, num_local_heads: int, local_window: int) -> tuple[int | None, ...]:
    """Windows of an LS-attention layer: ``num_local_heads`` local KV heads first, then global ones.

    Args:
        num_kv_heads: all key/value heads of the layer.
        num_local_heads: how many of them see only ``local_window`` keys, from 0 to all.
        local_window: visible keys of a local head, the query's own included, at least 1.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is out of range.
    """
    arguments = {
        "num_kv_heads": num_kv_heads,
        "num_local_heads": num_local_heads,
        "local_window": local_window,
    }
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if num_kv_heads < 1:
        raise ValueError(f"num_kv_heads must be at least 1, got {num_kv_heads}")
    if not 0 <= num_local_heads <= num_kv_heads:
        raise ValueError(
            f"num_local_heads must be between 0 and num_kv_heads={num_kv_heads}, "
            f"got {num_local_heads}"
        )
    if local_window < 1:
        raise ValueError(f"local_window must be at least 1, got {local_window}")
    return (local_window,) * num_local_heads + (None,) * (num_kv_heads - num_local_heads)
