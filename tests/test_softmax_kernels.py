"""The Triton softmax engine, run by Triton's interpreter: the same kernels that run on a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attnvariants.kernels._tiles import strided
from softmax_checks import (
    ACTIVATIONS,
    GATES,
    Inputs,
    bounds,
    check_definition,
    cotangent,
    draw,
    results,
)

from attnvariants import diag_attention, gated_sdpa, ls_attention
from attnvariants.kernels import _configs, softmax

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def matches(
    tensors: Inputs, dtype: torch.dtype, function: str = "gated_sdpa", **options: Any
) -> None:
    """Outputs, statistics and all gradients against float64, within the budget of the data."""
    if function != "diag_attention":
        options["return_stats"] = True
    check_definition(function, tensors, dtype, impl="triton", **options)


def single(**shape: Any) -> Inputs:
    """Random inputs in float32."""
    return {name: x.float() for name, x in draw(**shape).items()}


# Against float64.


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_lengths(length: int, dtype: torch.dtype) -> None:
    matches(draw(length=length, heads=2, key_dim=16, gate=GATES[length % 3]), dtype)


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
def test_a_long_sequence_of_local_and_global_heads(gate: str, dtype: torch.dtype) -> None:
    tensors = draw(batch=1, length=1000, heads=2, key_dim=16, gate=gate)
    matches(tensors, dtype, "ls_attention", window=(100, None))


@pytest.mark.parametrize(
    "window", [1, 2, 15, 16, 17, 50, 64, 128, 129, 150, 200, (1, 40), (None, 70), (150, 149)]
)
def test_windows(window: Any) -> None:
    matches(draw(batch=1, length=150, heads=2, key_dim=16), F32, window=window)


@pytest.mark.parametrize("group", [1, 3, 5, 8])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_groups_of_query_heads(group: int, dtype: torch.dtype) -> None:
    tensors = draw(batch=1, length=70, heads=2 * group, kv_heads=2, value_dim=5, gate="headwise")
    matches(tensors, dtype, window=(20, None))


@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(1, 1), (1, 7), (24, 40), (80, 33), (192, 128), (256, 256)]
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_head_dims(key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    tensors = draw(length=33, heads=2, key_dim=key_dim, value_dim=value_dim, gate="elementwise")
    matches(tensors, dtype)


@pytest.mark.parametrize(("length", "keys"), [(1, 50), (17, 200), (130, 131), (20, 9), (150, 1)])
@pytest.mark.parametrize(
    ("causal", "window"), [(True, None), (True, 6), (False, None), (False, (6, None))]
)
def test_more_and_fewer_keys_than_queries(
    length: int, keys: int, causal: bool, window: Any
) -> None:
    tensors = draw(batch=1, length=length, keys=keys, heads=4, kv_heads=2, gate="elementwise")
    matches(tensors, F16, causal=causal, window=window)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
@pytest.mark.parametrize(("mean", "spread"), [(0, 1), (0, 0), (6, 1), (-12, 3)])
def test_gates(mean: float, spread: float, gate: str, activation: str) -> None:
    tensors = draw(length=40, heads=2, gate=gate)
    tensors["gate"] = mean + spread * tensors["gate"]
    matches(tensors, F32, gate_activation=activation)
    matches(tensors, BF16, gate_activation=activation)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_gate_logits_in_float32(dtype: torch.dtype) -> None:
    tensors = {name: x.to(dtype) for name, x in draw(length=40, gate="elementwise").items()}
    tensors["gate"] = tensors["gate"].float()
    found = results("gated_sdpa", tensors, impl="triton")
    wanted = results("gated_sdpa", tensors, impl="eager")
    assert found["dgate"].dtype == F32
    torch.testing.assert_close(found, wanted, rtol=4 * torch.finfo(dtype).eps, atol=1e-2)


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
@pytest.mark.parametrize("window", [None, 9])
def test_scales(scale: float, window: int | None) -> None:
    tensors = draw(length=40, heads=4, kv_heads=2, gate="headwise")
    matches(tensors, F32, softmax_scale=scale, window=window)


def test_large_logits() -> None:
    tensors = draw(length=70, heads=2, key_dim=32)
    tensors["q"] = 30 * tensors["q"]
    matches(tensors, F32)
    matches(tensors, BF16)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("strength", [0, 8, 12, 16, 24])
def test_attention_to_one_key_behind_a_gate(strength: float, dtype: torch.dtype) -> None:
    """dS is next to nothing there, and D from the rounded output would not cancel."""
    tensors = draw(batch=1, length=96, heads=2, key_dim=64, gate="elementwise")
    direction = torch.nn.functional.normalize(torch.randn(64, dtype=torch.float64), dim=0)
    tensors["q"] += 8 * direction
    tensors["k"][:, 0] = strength * direction
    matches(tensors, dtype)


@pytest.mark.parametrize("window", [1, 9, None])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_small_gradients_of_lse(dtype: torch.dtype, gate: str | None, window: int | None) -> None:
    """Next to the output's, also where a query sees one key and nothing else moves dq."""
    working = {n: x.to(dtype) for n, x in draw(length=40, heads=2, gate=gate).items()}

    def gradients(impl: str, inputs: Inputs) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        named = dict(zip(inputs, leaves, strict=True))
        out, stats = gated_sdpa(**named, window=window, return_stats=True, impl=impl)
        loss = (out * cotangent(out)).sum() + 1e-3 * stats.lse.square().sum()
        return [x.double() for x in torch.autograd.grad(loss, leaves)]

    truth = gradients("reference", {name: x.double() for name, x in working.items()})
    found, eager = gradients("triton", working), gradients("eager", working)
    for name, ours, theirs, exact in zip(working, found, eager, truth, strict=True):
        allowed = 2 * (theirs - exact).norm() + torch.finfo(dtype).eps * exact.norm()
        assert (ours - exact).norm() <= allowed, name


PACKINGS = {
    "one": [70],
    "equal": [16, 16, 16],
    "ragged": [5, 64, 1, 5, 20],
    "empty ones": [0, 7, 0, 0, 30, 7, 0],
    "single tokens": [1] * 5,
    "long": [129, 3, 70],
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    ("causal", "window"), [(True, None), (True, (3, None)), (False, None), (False, (3, None))]
)
def test_packed_sequences(causal: bool, window: Any, packing: str) -> None:
    lengths = PACKINGS[packing]
    tensors = draw(batch=1, length=sum(lengths), heads=4, kv_heads=2, gate="elementwise")
    tensors["cu_seqlens"] = bounds(*lengths)
    matches(tensors, F16, causal=causal, window=window)


def test_a_packed_sequence_in_float32() -> None:
    tensors = draw(batch=1, length=87, heads=4, kv_heads=2, value_dim=24, gate="elementwise")
    matches({**tensors, "cu_seqlens": bounds(17, 0, 64, 5, 1)}, F32, window=(16, None))


@pytest.mark.parametrize(("block_size", "length"), [(1, 9), (16, 40), (50, 130), (150, 130)])
@pytest.mark.parametrize("activation", ["softmax", "relu"])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks(causal: bool, activation: str, block_size: int, length: int) -> None:
    options = {"causal": causal, "activation": activation, "block_size": block_size}
    tensors = draw(batch=1, length=length, heads=4, kv_heads=2, key_dim=24, value_dim=20)
    matches(tensors, F16, "diag_attention", **options)
    packed = draw(batch=1, length=length + 57, heads=1)
    packed["cu_seqlens"] = bounds(17, 0, length, 35, 5)
    matches(packed, F16, "diag_attention", **options)


@pytest.mark.parametrize("activation", ["softmax", "relu"])
def test_blocks_in_float32(activation: str) -> None:
    options = {"activation": activation, "block_size": 32, "softmax_scale": -0.3}
    matches(draw(length=70, heads=2), F32, "diag_attention", **options)


# Rows that see nothing, and what no row sees.


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("window", [None, 2])
def test_queries_before_the_first_key(window: int | None, gate: str | None) -> None:
    tensors = single(length=150, keys=9, heads=2, gate=gate)
    found = results("gated_sdpa", tensors, window=window, impl="triton")
    for name in ("out", "dq", "dgate"):
        if name in found:
            assert not found[name][:, :141].any()
            assert found[name].isfinite().all()
    stats = gated_sdpa(**tensors, window=window, return_stats=True, impl="triton")[1]
    assert (stats.lse[:, :141] == -math.inf).all()
    assert stats.lse[:, 141:].isfinite().all()
    assert stats.max_logit.isfinite().all()


def test_a_local_head_touches_the_tiles_of_its_window_only() -> None:
    """All else is poisoned; a hidden key in a touched tile has a weight of 0, and is 0 here."""
    tensors = {name: x.half() for name, x in draw(batch=1, length=1000, heads=1).items()}
    for name in "kv":
        tensors[name][:, :700] = math.nan
    config = _configs.configure("softmax_forward", 2, 64)
    first = 700 + 20 + max(config)  # its window starts in a tile without poison
    out = ls_attention(**tensors, window=20, impl="triton")
    assert out[:, first:].isfinite().all()
    assert out[:, 700:720].isnan().any()


def test_an_infinite_gradient_of_lse_stays_with_its_query() -> None:
    """Queries before the first key have a log-sum-exp of -inf, and its square such a gradient."""
    tensors = {n: x.requires_grad_() for n, x in single(length=40, keys=9, heads=2).items()}
    out, stats = gated_sdpa(**tensors, return_stats=True, impl="triton")
    loss = out.sum() + stats.lse.square().sum()
    found = torch.autograd.grad(loss, list(tensors.values()))
    assert all(x.isfinite().all() for x in found)


def test_nan_is_not_lost() -> None:
    """No maximum hides it: on a device that would drop NaN, which the interpreter keeps."""
    tensors = single(length=40, heads=2)
    tensors["q"][0, 17, 1] = math.nan
    out, stats = gated_sdpa(**tensors, return_stats=True, impl="triton")
    assert stats.max_logit.isnan().tolist() == [False, True]
    assert out[0, 17, 1].isnan().all()
    relu = diag_attention(**tensors, activation="relu", impl="triton")
    assert relu[0, 17, 1].isnan().all()


@pytest.mark.parametrize(
    "values", [[-100, 30, 60], [0, -40, 60], [0, 70, 60], [50, 20, 60], [0, 10**9, 60]]
)
def test_bounds_that_are_none_touch_no_other_memory(values: list[int]) -> None:
    """On a device nobody reads them before the kernels do."""
    guarded = torch.full((3, 60, 2, 16), 7.0)
    q, k, v = torch.randn(3, 1, 60, 2, 16)
    cu_seqlens = torch.tensor(values, dtype=torch.int32)
    call = softmax.SoftmaxCall(q, k, v, cu_seqlens, [-1, -1], True, 0.25)
    new_empty = torch.Tensor.new_empty

    def inside(x: torch.Tensor, *shape: Any, **options: Any) -> torch.Tensor:
        return guarded[1:2] if shape == (1, 60, 2, 16) else new_empty(x, *shape, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", inside)
        call.forward(None, None, stats=False)
    assert (guarded[0] == 7).all()
    assert (guarded[2] == 7).all()


def test_strides_beyond_32_bits_are_copied() -> None:
    base = torch.empty(1, device="meta")
    far = base.as_strided((1, 40, 2, 16), (0, 2**27, 16, 1))
    assert strided(far).time == 32
    near = base.as_strided((1, 40, 2, 16), (0, 2**22, 16, 1))
    assert strided(near).ptr is near


def test_nothing_leaks_over_the_edge_of_a_document() -> None:
    tensors = single(batch=1, length=50, heads=2, gate="headwise")
    cu_seqlens = bounds(20, 30)
    before = gated_sdpa(**tensors, cu_seqlens=cu_seqlens, impl="triton")
    for name in "kv":
        tensors[name][:, :20] = 1e30
    after = gated_sdpa(**tensors, cu_seqlens=cu_seqlens, impl="triton")
    assert torch.equal(before[:, 20:], after[:, 20:])
    assert not torch.equal(before[:, :20], after[:, :20])
