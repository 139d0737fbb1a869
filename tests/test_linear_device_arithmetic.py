"""The linear kernels with a device's arithmetic, where the interpreter's is kinder.

A device's maxima and minima drop NaN, and its fast root takes numbers below the normal ones for 0.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from linear_checks import gated, normed, run, single

GATED, NORM = "gated_linear_attention", "norm_linear_attention"


@pytest.fixture(autouse=True)
def _device_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    def flushing_root(x: Any) -> Any:
        return np.sqrt(np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x))

    monkeypatch.setattr(
        InterpreterBuilder, "create_maxnumf", lambda self, *x: self.binary_op(*x, np.fmax)
    )
    monkeypatch.setattr(
        InterpreterBuilder, "create_minnumf", lambda self, *x: self.binary_op(*x, np.fmin)
    )
    monkeypatch.setattr(
        InterpreterBuilder, "create_sqrt", lambda self, x: self.unary_op(x, flushing_root)
    )


@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize("feature_map", ["elu+1", "elu", "relu", "silu", None])
def test_no_feature_map_loses_nan(feature_map: str | None, name: str) -> None:
    tensors = single(normed(40))
    tensors[name][0, 17, 1, 0] = math.nan
    out = run(NORM, tensors, feature_map=feature_map, norm=None, impl="triton")
    assert out[0, 17, 1].isnan().all()
    assert out[:, :, 0].isfinite().all()


@pytest.mark.parametrize("kind", ["channel", "token"])
def test_no_log_decay_loses_nan(kind: str) -> None:
    tensors = single(gated(40, kind))
    tensors["g"][0, 17, 1] = math.nan
    out = run(GATED, tensors, impl="triton")
    assert out[0, 17:, 1].isnan().all()
    assert out[:, :, 0].isfinite().all()


@pytest.mark.parametrize("norm", ["model", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_whose_squares_are_not_normal(norm: str, dtype: torch.dtype) -> None:
    """As behind a sequence's last value, once its state has decayed."""
    tensors = single(normed(40, (1, 2, 12, 80)))
    tensors["v"] *= torch.logspace(-18, -24, 40)[None, :, None, None]
    del tensors["initial_state"]
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    found, expected = (
        run(NORM, tensors, norm=norm, causal=True, decay=torch.full((2,), -9.0), impl=impl)
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=2.0**-6, atol=1e-30)
