"""What the engine of softmax attention promises: statistics, and PyTorch around it."""

from __future__ import annotations

import math

import pytest
import torch
from linear_checks import check_checkpoint, check_subsets
from softmax_checks import (
    F64,
    GATES,
    Inputs,
    assert_identical,
    assert_same,
    bounds,
    check_autocast,
    check_compile,
    check_operators,
    check_strides,
    draw,
    results,
)
from torch import Tensor

from attnvariants import gated_sdpa
from attnvariants.eager import _tiles

F32, BF16 = torch.float32, torch.bfloat16


# Statistics.


def explicit_logits(tensors: Inputs, window: int | None, causal: bool) -> Tensor:
    """Visible logits ``[B, H, T, S]``, ``-inf`` elsewhere."""
    keys = tensors["k"].repeat_interleave(tensors["q"].shape[2] // tensors["k"].shape[2], dim=2)
    logits = torch.einsum("bthk,bshk->bhts", tensors["q"], keys) * tensors["q"].shape[-1] ** -0.5
    i = torch.arange(logits.shape[2])[:, None] + logits.shape[3] - logits.shape[2]
    distance = i - torch.arange(logits.shape[3])
    banded = causal or window is not None
    visible = (distance >= 0) & (distance < (window or 10**6)) if banded else distance == distance
    return logits.masked_fill(~visible, -math.inf)


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 5), (False, None), (False, 5)])
def test_statistics(causal: bool, window: int | None, impl: str) -> None:
    tensors = draw(length=140, keys=150, heads=6, kv_heads=2, gate="headwise")
    stats = gated_sdpa(**tensors, causal=causal, window=window, return_stats=True, impl=impl)[1]
    logits = explicit_logits(tensors, window, causal)
    torch.testing.assert_close(stats.max_logit, logits.amax(dim=(0, 2, 3)), rtol=1e-13, atol=1e-13)
    lse = logits.logsumexp(dim=-1).transpose(1, 2)
    torch.testing.assert_close(stats.lse, lse, rtol=1e-13, atol=1e-13)
    row_max = logits.amax(dim=-1).transpose(1, 2)
    count = (logits > -math.inf).sum(dim=-1).transpose(1, 2)
    assert (stats.lse >= row_max - 1e-12).all()
    assert (stats.lse <= row_max + count.log() + 1e-12).all()
    assert stats.max_logit.shape == (6,)
    assert stats.lse.shape == (2, 140, 6)


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_statistics_have_their_dtype_and_are_detached(dtype: torch.dtype, impl: str) -> None:
    tensors = {name: x.to(dtype).requires_grad_() for name, x in draw().items()}
    _, stats = gated_sdpa(**tensors, return_stats=True, impl=impl)
    wide = F64 if dtype == F64 else F32
    assert (stats.max_logit.dtype, stats.lse.dtype) == (wide, wide)
    assert not stats.max_logit.requires_grad
    assert stats.lse.requires_grad


@pytest.mark.parametrize("window", [None, 9])
def test_statistics_change_no_bit(window: int | None) -> None:
    tensors = {name: x.float() for name, x in draw(length=200, gate="elementwise").items()}
    without = results("gated_sdpa", tensors, window=window, impl="eager")
    assert_identical(
        results("gated_sdpa", tensors, window=window, return_stats=True, impl="eager"), without
    )


def test_the_largest_logit_of_a_batch_is_the_largest_of_its_parts() -> None:
    tensors = draw(batch=3, length=70)

    def largest(entry: slice) -> Tensor:
        parts = {name: x[entry] for name, x in tensors.items()}
        return gated_sdpa(**parts, return_stats=True, impl="eager")[1].max_logit

    parts = torch.stack([largest(slice(i, i + 1)) for i in range(3)])
    torch.testing.assert_close(largest(slice(None)), parts.amax(dim=0), rtol=1e-14, atol=0)


def test_negative_logits_give_a_negative_maximum() -> None:
    ones = torch.ones(1, 5, 2, 4)
    stats = gated_sdpa(ones, -ones, ones, return_stats=True, impl="eager")[1]
    torch.testing.assert_close(stats.max_logit, torch.full((2,), -2.0))


# PyTorch around it.


def interleaved(length: int) -> Inputs:
    """q and gate as two halves of one projection, per head: strided views."""
    tensors = draw(length=length)
    q, gate = torch.randn(2, length, 4, 16, dtype=F64).split(8, dim=-1)
    return {**tensors, "q": q, "gate": gate}


def test_views_of_a_fused_projection() -> None:
    tensors = interleaved(70)
    assert not tensors["gate"].is_contiguous()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert_same(
        results("gated_sdpa", tensors, impl="eager"),
        results("gated_sdpa", contiguous, impl="eager"),
    )


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
def test_strides(gate: str) -> None:
    check_strides("gated_sdpa", draw(length=70, heads=4, kv_heads=2, gate=gate))


def test_an_expanded_gate_collects_its_gradient() -> None:
    tensors = draw(length=70)
    theta = torch.randn(4, 8, dtype=F64, requires_grad=True)
    found = []
    for impl in ("eager", "reference"):
        gate = theta.expand(2, 70, 4, 8)
        assert gate.stride()[:2] == (0, 0)
        out = gated_sdpa(**tensors, gate=gate, impl=impl)
        found.append(torch.autograd.grad(out.square().sum(), theta))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_compile() -> None:
    check_compile(
        "gated_sdpa",
        lambda length: draw(length=length, heads=4, kv_heads=2, gate="elementwise"),
        return_stats=True,
    )


def test_compile_packed() -> None:
    def make(length: int) -> Inputs:
        return {**draw(batch=1, length=length), "cu_seqlens": bounds(10, 10, length - 20)}

    check_compile("gated_sdpa", make, window=4)


@pytest.mark.parametrize("gate", GATES)
def test_operators(gate: str | None) -> None:
    tensors = draw(batch=1, heads=4, kv_heads=2, value_dim=5, gate=gate)
    names = {"softmax_forward", "softmax_backward"}
    check_operators("gated_sdpa", tensors, names, window=(3, None), return_stats=gate is None)
    check_operators("gated_sdpa", {**tensors, "cu_seqlens": bounds(12, 8)}, names)


def test_operators_in_half_precision() -> None:
    tensors = {name: x.bfloat16() for name, x in draw(gate="elementwise").items()}
    tensors["gate"] = tensors["gate"].float()
    check_operators("gated_sdpa", tensors, {"softmax_forward", "softmax_backward"})


def test_autocast() -> None:
    check_autocast("gated_sdpa", draw(length=70, gate="elementwise"))


def test_checkpoint() -> None:
    check_checkpoint("gated_sdpa", draw(gate="elementwise"))


def test_gradients_of_some_inputs() -> None:
    check_subsets("gated_sdpa", draw(gate="headwise"))


def test_without_gradients() -> None:
    tensors = draw(gate="headwise")
    with torch.inference_mode():
        out = gated_sdpa(**tensors, impl="eager")
    assert torch.equal(out, gated_sdpa(**tensors, impl="eager"))


def test_two_runs_are_equal_bit_for_bit() -> None:
    tensors = {name: x.float() for name, x in draw(length=300, gate="elementwise").items()}
    first = results("gated_sdpa", tensors, impl="eager")
    assert_identical(results("gated_sdpa", tensors, impl="eager"), first)


def test_inputs_are_left_alone() -> None:
    tensors = draw(length=40, gate="elementwise")
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    results("gated_sdpa", tensors, impl="eager")
    assert_identical(tensors, copies)


def test_auto_is_an_implementation_that_can_serve() -> None:
    tensors = draw(gate="headwise")
    assert_same(results("gated_sdpa", tensors), results("gated_sdpa", tensors, impl="eager"))


def test_the_size_of_tiles_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = draw(length=300, heads=4, kv_heads=2, gate="elementwise")
    whole = results("gated_sdpa", tensors, impl="eager")
    monkeypatch.setattr(_tiles, "_MAX_SCORES", 1)
    visited = list(_tiles.Tiles(tensors["q"], tensors["k"], 1.0, True, -1))
    assert len(visited) == math.ceil(300 / _tiles._MIN_BLOCK)
    assert_same(results("gated_sdpa", tensors, impl="eager"), whole)
