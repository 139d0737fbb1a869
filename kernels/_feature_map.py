"""Feature maps and output gates of the linear attentions with their derivatives, in float32."""

from __future__ import annotations

import triton
import triton.language as tl
from attnvariants.kernels._decay import expm1


@triton.jit
def sigmoid(x):
    """Accurate for both signs: ``exp(-|x|)`` cannot overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def apply_map(x, MAP: tl.constexpr):
    """``"elu+1"``, ``"elu"``, ``"relu"``, ``"silu"``, ``"sigmoid"`` or ``None`` for x itself."""
    if MAP == "elu+1":
        y = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif MAP == "elu":
        y = tl.where(x > 0, x, expm1(tl.minimum(x, 0.0)))
    elif MAP == "relu":
        y = tl.maximum(x, 0.0)
    elif MAP == "silu":
        y = x * sigmoid(x)
    elif MAP == "sigmoid":
        y = sigmoid(x)
    else:
        tl.static_assert(MAP is None)
        y = x
    return y


@triton.jit
def map_gradient(x, MAP: tl.constexpr):
    """The derivative of :func:`apply_map`."""
    if MAP == "elu+1" or MAP == "elu":
        y = tl.exp(tl.minimum(x, 0.0))
    elif MAP == "relu":
        y = tl.where(x > 0, 1.0, 0.0)
    elif MAP == "silu":
        y = sigmoid(x) * (1.0 + x * sigmoid(-x))
    elif MAP == "sigmoid":
        y = sigmoid(x) * sigmoid(-x)
    else:
        tl.static_assert(MAP is None)
        y = tl.full(x.shape, 1.0, tl.float32)
    return y
