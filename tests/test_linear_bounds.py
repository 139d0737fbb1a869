"""Packed sequences of the linear kernels whose bounds are none, as on a device may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_checks import gated, single

BOUNDS = [[-300, 30, 300], [0, -40, 300], [0, 700, 300], [250, 20, 300], [0, 10**9, 300]]


@pytest.mark.parametrize("short", [True, False], ids=["segments", "whole"])
@pytest.mark.parametrize("values", BOUNDS)
def test_bounds_that_are_none_touch_no_other_memory(
    values: list[int], short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnvariants.kernels import _linear_configs, linear

    if short:
        monkeypatch.setattr(_linear_configs, "PROGRAMS", 1 << 20)
        monkeypatch.setattr(_linear_configs, "SHORTEST", 128)
    buffers: list[torch.Tensor] = []

    def guarded(x: torch.Tensor, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        """Between as many numbers that nobody writes."""
        size = torch.Size(shape).numel()
        buffers.append(torch.full((3 * size,), 7.0, dtype=dtype))
        return buffers[-1][size : 2 * size].view(shape)

    plain = torch.Tensor.new_empty

    def new_empty(x: torch.Tensor, *shape: Any, **options: Any) -> torch.Tensor:
        if "device" in options:  # the interpreter's
            return plain(x, *shape, **options)
        wanted = shape[0] if isinstance(shape[0], tuple) else shape
        return guarded(x, wanted, options.get("dtype", x.dtype))

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: guarded(x, tuple(x.shape), x.dtype))
    tensors = single(gated(300, "token", "plain", (1, 1, 16, 16)))
    tensors["initial_state"] = torch.zeros(2, 1, 16, 16)
    inputs = tuple(tensors[name] for name in ("q", "k", "v", "g", "initial_state"))
    inputs += (torch.tensor(values, dtype=torch.int32), None, None)
    options = (None, True, 0.25, None, 1e-6, None)
    out, _, rstd, state = linear.forward(*inputs, *options)
    linear.backward(*inputs, None, rstd, torch.ones_like(out), state, *options, True)
    for buffer in buffers:
        size = len(buffer) // 3
        assert (buffer[:size] == 7).all()
        assert (buffer[2 * size :] == 7).all()
