"""Output gates of softmax attention and their logarithmic derivatives, in float32.

Everything is written with ``e = exp(-|x|)``, which cannot overflow and keeps its accuracy where a
gate is almost closed: ``sigmoid(x)`` is then ``e / (1 + e)`` and softplus is ``log1p(e)``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """``act(x)`` of float32 logits: ``"sigmoid"``, ``"ns_sigmoid"`` or ``"softplus"``."""
    e = tl.exp(-tl.abs(x))
    if ACTIVATION == "sigmoid":
        y = tl.where(x < 0, e, 1.0) / (1.0 + e)
    elif ACTIVATION == "ns_sigmoid":
        y = 0.5 + 0.5 * (tl.where(x < 0, e, 1.0) / (1.0 + e))
    else:
        tl.static_assert(ACTIVATION == "softplus")
        y = tl.where(x < 0, 0.0, x) + e * _log1p_ratio(e)
    return y


@triton.jit
def log_derivative(x, ACTIVATION: tl.constexpr):
    """``(log act)'(x)`` of float32 logits; 0 where softplus is 0.

    ``1 - sigmoid(x)`` would be 0 for an open gate, so it is ``sigmoid(-x)``. Softplus and its
    derivative share the factor e where x < 0; divided out, their ratio holds down to e = 0.
    """
    e = tl.exp(-tl.abs(x))
    if ACTIVATION == "sigmoid":
        y = tl.where(x < 0, 1.0, e) / (1.0 + e)
    elif ACTIVATION == "ns_sigmoid":
        # s(x) s(-x) / (1 + s(x)), multiplied by (1 + e)^2
        y = e / ((1.0 + e) * (1.0 + e + tl.where(x < 0, e, 1.0)))
    else:
        tl.static_assert(ACTIVATION == "softplus")
        ratio = _log1p_ratio(e)
        y = 1.0 / ((1.0 + e) * tl.where(x < 0, ratio, x + e * ratio))
        y = tl.where((x < 0) & (e == 0), 0.0, y)
    return y


@triton.jit
def _log1p_ratio(e):
    """``log(1 + e) / e`` for 0 <= e <= 1, as ``2 atanh(s) / e`` with ``s = e / (2 + e)``.

    ``log(1 + e)`` itself rounds ``1 + e`` and loses a small e. s is at most 1/3, so that the
    series of atanh ends after eight terms with a relative error of 2e-9.
    """
    s2 = e / (2.0 + e)
    s2 = s2 * s2
    series = 1.0 / 13 + s2 * (1.0 / 15)
    series = 1.0 / 11 + s2 * series
    series = 1.0 / 9 + s2 * series
    series = 1.0 / 7 + s2 * series
    series = 1.0 / 5 + s2 * series
    series = 1.0 / 3 + s2 * series
    return (2.0 + 2.0 * s2 * series) / (2.0 + e)
