"""What kernels share with the rest of a process: errors of CUDA, and limits of a device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from attnvariants import KVCache, attention_decode, gated_linear_attention, gated_sdpa

pytestmark = pytest.mark.usefixtures("controls")


CALLS: dict[str, Callable[..., Any]] = {
    "attention_decode": lambda *x: attention_decode(*x, KVCache(1, 8, 2, 16, 16), impl="cuda"),
    "gated_sdpa": lambda *x: gated_sdpa(*x, impl="cuda"),
    "gated_linear_attention": lambda *x: gated_linear_attention(*x, -torch.ones(2), impl="cuda"),
}


@pytest.mark.parametrize("function", CALLS)
def test_a_failed_launch_leaves_no_error_behind(function: str, controls: ctypes.CDLL) -> None:
    """Torch asks for the last error behind each of its own launches."""
    inputs = [torch.randn(1, 4, 2, 16) for _ in range(3)]
    controls.cuda_on_cpu_refuse_launches(True)
    try:
        with pytest.raises(RuntimeError, match="attnvariants: invalid argument"):
            CALLS[function](*inputs)
    finally:
        controls.cuda_on_cpu_refuse_launches(False)
    assert controls.cuda_on_cpu_last_error() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_call_takes_shared_memory_from_another(
    dtype: torch.dtype, controls: ctypes.CDLL
) -> None:
    """Calls of other threads of the host may be about to launch the same kernel."""
    before = controls.cuda_on_cpu_reductions()
    for value_dim in (128, 64):
        q, k, v = (torch.randn(1, 4, 1, dim, dtype=dtype) for dim in (64, 64, value_dim))
        gated_linear_attention(q, k, v, -torch.rand(1, 4, 1), impl="cuda")
        gated_sdpa(q, k, v, impl="cuda")
    assert controls.cuda_on_cpu_reductions() == before


@pytest.mark.parametrize("kind", ["token", "channel", None])
@pytest.mark.parametrize("processors", [6, 1000])  # sequences as a whole, and in segments
@pytest.mark.parametrize("bounds", [[0, 60, 640], [-40, 60, 600], [0, 60, 2**31 - 1]])
def test_wrong_bounds_on_a_device_lead_to_no_other_memory(
    bounds: list[int], processors: int, kind: str | None, controls: ctypes.CDLL
) -> None:
    """Nobody waits for a device to check them. Around the tokens there is NaN."""
    controls.cuda_on_cpu_processors(processors)
    wide = torch.full((4, 1, 680, 1, 16), torch.nan)
    q, k, v, g = wide[:, :, 40:640].copy_(-torch.rand(4, 1, 600, 1, 16)).unbind()
    decay = {"token": g[..., 0], "channel": g, None: None}[kind]

    def attend(cu_seqlens: list[int]) -> list[torch.Tensor]:
        return torch.ops.attnvariants.linear_forward(
            *(q, k, v, decay, None, torch.tensor(cu_seqlens, dtype=torch.int32), None, None),
            *(None, True, 1.0, None, 1e-6, None, False, "cuda"),
        )

    for found, expected in zip(attend(bounds), attend([0, 60, 600]), strict=True):
        assert torch.equal(found, expected)
