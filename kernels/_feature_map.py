"""Feature maps and output gates of the linear attentions with their derivatives, in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def negative_part(x):
    """``x`` where it is below 0, else 0; NaN stays, which a device's minimum with 0 would drop."""
    return tl.where(x > 0, 0.0, x)


@triton.jit
def expm1(x):
    """``exp(x) - 1`` for x <= 0: near 0 as ``2 x / (x coth(x / 2) - x)``, without a difference.

    Hardware exponentials err by two units, so that a difference is off by ten where x is -0.25.
    """
    x2 = x * x
    series = 1.0 / 15120 - x2 * (1.0 / 604800)
    series = 1.0 / 360 - x2 * series
    series = 1.0 / 6 - x2 * series
    return tl.where(x > -1, 2.0 * x / (2.0 - x + x2 * series), tl.exp(x) - 1.0)


@triton.jit
def sigmoid(x):
    """Accurate for both signs: ``exp(-|x|)`` cannot overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def apply_map(x, MAP: tl.constexpr):
    """``"elu+1"``, ``"elu"``, ``"relu"``, ``"silu"``, ``"sigmoid"`` or ``None`` for x itself."""
    if MAP == "elu+1":
        y = tl.where(x > 0, x + 1.0, tl.exp(negative_part(x)))
    elif MAP == "elu":
        y = tl.where(x > 0, x, expm1(negative_part(x)))
    elif MAP == "relu":
        y = tl.where(x < 0, 0.0, x)  # a maximum would drop NaN
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
        y = tl.exp(negative_part(x))
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
