"""The backward of gated SDPA from its gated output: exactness, memory, precision of the gate."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from softmax_checks import (
    ACTIVATIONS,
    F64,
    GATES,
    Inputs,
    cotangent,
    draw,
    results,
)
from torch import Tensor

from attnvariants import gated_sdpa

F32, BF16 = torch.float32, torch.bfloat16


# The backward starts from the gated output.


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
def test_gradients_from_the_gated_output_are_exact(activation: str, gate: str) -> None:
    tensors = draw(length=37, heads=6, kv_heads=2, key_dim=16, gate=gate)
    found = results("gated_sdpa", tensors, impl="eager", gate_activation=activation)
    wanted = results("gated_sdpa", tensors, impl="reference", gate_activation=activation)
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= 1e-12 * value.abs().max(), name


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(gate: str | None, impl: str) -> None:
    tensors = draw(batch=1, length=5, keys=7, heads=4, kv_heads=2, key_dim=3, gate=gate)

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(tensors, values, strict=True))
        out, stats = gated_sdpa(**named, window=(4, None), return_stats=True, impl=impl)
        return out, stats.lse

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in tensors.values()])


@pytest.mark.parametrize("gate", [None, "elementwise"])
@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_a_sink_is_a_gate_on_the_log_sum_exp(gate: str | None, impl: str) -> None:
    """``softmax with a sink s = sigmoid(lse - s) * softmax``, gradients through lse included."""
    tensors = draw(length=70, heads=4, kv_heads=2)
    elementwise = torch.randn(2, 70, 4, 8, dtype=F64) if gate else None
    sink = torch.randn(4, dtype=F64)
    leaves = [x.requires_grad_() for x in (*tensors.values(), sink)]
    q, k, v = (tensors[name] for name in "qkv")

    _, stats = gated_sdpa(q, k, v, return_stats=True, impl=impl)
    found = gated_sdpa(q, k, v, stats.lse - sink, impl=impl)
    keys, values = (x.repeat_interleave(2, dim=2) for x in (k, v))
    logits = torch.einsum("bthk,bshk->bhts", q, keys) * 8**-0.5
    hidden = torch.ones(70, 70, dtype=torch.bool).triu(1)
    logits = torch.cat(
        [logits.masked_fill(hidden, -math.inf), sink.view(1, 4, 1, 1).expand(2, 4, 70, 1)], dim=-1
    )
    wanted = torch.einsum("bhts,bshv->bthv", logits.softmax(-1)[..., :-1], values)
    if elementwise is not None:
        found, wanted = found * elementwise, wanted * elementwise
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    gradients = [torch.autograd.grad(out, leaves, cotangent(out)) for out in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_gradients_of_lse_alone() -> None:
    tensors = draw(length=140, heads=4, kv_heads=2, gate="headwise")
    found = []
    for impl in ("eager", "reference"):
        leaves = [x.detach().requires_grad_() for x in tensors.values()]
        named = dict(zip(tensors, leaves, strict=True))
        _, stats = gated_sdpa(**named, return_stats=True, impl=impl)
        found.append(torch.autograd.grad(stats.lse.square().sum(), leaves, materialize_grads=True))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_gradients_of_gradients_are_refused() -> None:
    tensors = {name: x.requires_grad_() for name, x in draw(gate="headwise").items()}
    out = gated_sdpa(**tensors, impl="eager")
    with pytest.raises(NotImplementedError, match="impl='reference'"):
        torch.autograd.grad(out.sum(), tensors["q"], create_graph=True)
    out = gated_sdpa(**tensors, impl="reference")
    (gradient,) = torch.autograd.grad(out.sum(), tensors["q"], create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), tensors["k"])[0].isfinite().all()


# Saved tensors.


def saved_bytes(impl: str, dtype: torch.dtype, **shape: Any) -> tuple[int, int]:
    """Bytes kept for the backward beyond the inputs other than the gate, and those of ``out``."""
    tensors = {name: x.to(dtype).requires_grad_() for name, x in draw(**shape).items()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = gated_sdpa(**tensors, impl=impl)
    for name in "qkv":
        storages.pop(tensors[name].untyped_storage().data_ptr())
    assert out.requires_grad
    return sum(storages.values()), out.untyped_storage().nbytes()


@pytest.mark.parametrize(("gate", "units"), [(None, 1.0), ("headwise", 1.0), ("elementwise", 2.0)])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_what_the_backward_keeps(
    gate: str | None, units: float, dtype: torch.dtype, impl: str
) -> None:
    """The gated output, the gate's logits and one fp32 log-sum-exp per row; nothing else."""
    kept, unit = saved_bytes(impl, dtype, length=256, heads=8, kv_heads=2, key_dim=64, gate=gate)
    rows = 2 * 256 * 8
    logits = rows * dtype.itemsize if gate == "headwise" else 0
    assert kept == units * unit + 4 * rows + logits
    assert kept <= (units + 0.1) * unit


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_changing_the_output_in_place_makes_the_backward_raise(gate: str | None, impl: str) -> None:
    tensors = {name: x.float().requires_grad_() for name, x in draw(gate=gate).items()}
    out = gated_sdpa(**tensors, impl=impl)
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# Precision of the gate.

GATE_LOGITS = {"N(0,1)": (0, 1), "N(-3,1.5)": (-3, 1.5), "N(3,1)": (3, 1), "N(6,1)": (6, 1)}


def relative_rms(tensors: Inputs, impl: str, **options: Any) -> dict[str, float]:
    """Relative root mean square error of bf16 results against float64 on the same inputs."""
    working = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    exact = {name: tensor.double() for name, tensor in working.items()}
    found = results("gated_sdpa", working, impl=impl, **options)
    truth = results("gated_sdpa", exact, impl="reference", **options)
    return {
        name: float((found[name].double() - value).norm() / value.norm())
        for name, value in truth.items()
    }


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
@pytest.mark.parametrize("distribution", GATE_LOGITS)
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_bf16_error_for_every_kind_of_gate(distribution: str, gate: str, impl: str) -> None:
    mean, deviation = GATE_LOGITS[distribution]
    tensors = draw(batch=1, length=256, heads=4, kv_heads=2, key_dim=64, gate=gate)
    tensors["gate"] = tensors["gate"] * deviation + mean
    errors = relative_rms(tensors, impl)
    assert errors["out"] <= 2.2e-3
    assert errors["dgate"] <= 3e-3


@pytest.mark.parametrize("sharpness", [1, 2, 4])
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_dq_is_not_worse_than_plain_bf16(sharpness: int, impl: str) -> None:
    tensors = draw(batch=1, length=256, heads=4, key_dim=64, gate="elementwise")
    tensors["q"] *= sharpness
    tensors["gate"] = tensors["gate"] * 1.5 - 3
    working = {name: x.bfloat16().requires_grad_() for name, x in tensors.items()}
    q, k, v = (working[name].transpose(1, 2) for name in "qkv")
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    plain = plain * torch.sigmoid(working["gate"])
    (dq,) = torch.autograd.grad(plain, working["q"], cotangent(plain))
    exact = {name: tensor.detach().double() for name, tensor in working.items()}
    truth = results("gated_sdpa", exact, impl="reference")["dq"]
    assert relative_rms(tensors, impl)["dq"] <= (dq.double() - truth).norm() / truth.norm()


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
@pytest.mark.parametrize("logit", [6.5, 8.0, 20.0])
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_an_open_gate_keeps_its_gradient_in_bf16(logit: float, gate: str, impl: str) -> None:
    tensors = draw(gate=gate)
    tensors["gate"] = torch.full_like(tensors["gate"], logit)
    working = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    dgate = results("gated_sdpa", working, impl=impl)["dgate"]
    exact = {name: tensor.double() for name, tensor in working.items()}
    truth = results("gated_sdpa", exact, impl="reference")["dgate"]
    assert dgate.count_nonzero() == dgate.numel()
    assert (dgate.double() - truth).norm() <= 4e-3 * truth.norm()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("logit", [-30.0, -90.0, -1000.0, -math.inf])
@pytest.mark.parametrize(
    ("impl", "dtype"), [("eager", F64), *itertools.product(("eager", "triton"), (BF16, F32))]
)
def test_a_closed_gate_is_harmless(
    dtype: torch.dtype, logit: float, activation: str, impl: str
) -> None:
    tensors = draw(gate="elementwise")
    tensors["gate"] = torch.full_like(tensors["gate"], logit)
    working = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    found = results("gated_sdpa", working, impl=impl, gate_activation=activation)
    assert all(value.isfinite().all() for value in found.values())
    if activation != "ns_sigmoid" and logit < -800:
        assert not any(value.any() for value in found.values())
