"""Addresses of tiles in tensors with more elements, or longer strides, than 32 bits count.

Such tensors take no memory here: only the pages that are touched exist.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from attnvariants.kernels._tiles import odd
from attnvariants.kernels._walk import Dims, Walk, locate_state

from attnvariants import gated_linear_attention, gated_sdpa, norm_linear_attention

FAR = 2**31 + 2**20  # elements


@pytest.fixture(autouse=True)
def _unwritten_memory() -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False


def far_apart(x: torch.Tensor, axis: int, step: int) -> torch.Tensor:
    """A copy of ``x`` whose neighbours along ``axis`` lie ``step`` elements apart."""
    steps = list(x.contiguous().stride())
    steps[axis] = step
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, steps, strict=True))
    far = torch.empty(size, dtype=x.dtype).as_strided(x.shape, steps)
    return far.copy_(x)


def attend(name: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients of q, k, v and, for GLA, of the log-decay."""
    q, k, v, g = (x.detach().requires_grad_() for x in tensors)
    if name == "gated_sdpa":
        out, inputs = gated_sdpa(q, k, v, impl="triton"), [q, k, v]
    elif name == "norm_linear_attention":
        out, inputs = norm_linear_attention(q, k, v, impl="triton"), [q, k, v]
    else:
        out, inputs = gated_linear_attention(q, k, v, g, impl="triton"), [q, k, v, g]
    return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]


@pytest.mark.parametrize("name", ["gated_linear_attention", "gated_sdpa", "norm_linear_attention"])
@pytest.mark.parametrize(
    ("axis", "step"), [(0, FAR), (2, FAR), (1, 2**28)], ids=["batch", "head", "time"]
)
def test_tensors_beyond_32_bits(name: str, axis: int, step: int) -> None:
    """As with the same numbers close together; 11 steps of 2^28, in one tile, are over 2^31."""
    shape = (2, 12, 1, 16) if axis == 0 else (1, 12, 2, 16)
    near = [torch.randn(shape, dtype=torch.bfloat16) for _ in range(4)]
    near[3] = -near[3].abs()
    far = [far_apart(x, axis, step) for x in near]
    for found, expected in zip(attend(name, far), attend(name, near), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@triton.jit
def _place_of_state(states, out, walk, i_s, dims: tl.constexpr):
    p_s, _ = locate_state(states, walk, i_s, 1, 0, dims, 0, 0, False)
    p_first, _ = locate_state(states, walk, 0, 0, 0, dims, 0, 0, False)
    tl.store(out, tl.max(p_s.to(tl.int64, bitcast=True) - p_first.to(tl.int64, bitcast=True)))


def test_states_beyond_32_bits() -> None:
    """The address of the last state of 2^18 segments and 2 heads, 256 KB each."""
    dims = Dims(256, 256, 16, 16, 16, 16)
    walk = Walk(None, None, odd(1), odd(2), odd(1), odd(1))
    out = torch.zeros(1, dtype=torch.int64)
    _place_of_state[(1,)](torch.zeros(4), out, walk, 2**18 - 1, dims)
    assert out.item() == 4 * (2**19 - 1) * 256 * 256
