"""The Triton softmax engine, run by Triton's interpreter: the same kernels that run on a GPU."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from linear_checks import check_checkpoint, check_subsets
from softmax_checks import (
    ACTIVATIONS,
    GATES,
    Inputs,
    assert_identical,
    bounds,
    check_autocast,
    check_compile,
    check_definition,
    check_operators,
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


def test_nothing_leaks_over_the_edge_of_a_document() -> None:
    tensors = single(batch=1, length=50, heads=2, gate="headwise")
    cu_seqlens = bounds(20, 30)
    before = gated_sdpa(**tensors, cu_seqlens=cu_seqlens, impl="triton")
    for name in "kv":
        tensors[name][:, :20] = 1e30
    after = gated_sdpa(**tensors, cu_seqlens=cu_seqlens, impl="triton")
    assert torch.equal(before[:, 20:], after[:, 20:])
    assert not torch.equal(before[:, :20], after[:, :20])


# Layout, launches and memory.


class Launches:
    """Records what is launched, and lets it run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernels: list[str] = []
        self.arguments: list[tuple[Any, ...]] = []
        launch = softmax.launch

        def record(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
            self.kernels.append(kernel.fn.__name__)
            self.arguments.append(arguments)
            launch(kernel, programs, *arguments, **options)

        monkeypatch.setattr(softmax, "launch", record)


def test_one_launch_forward_and_three_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    tensors = single(length=40, heads=6, kv_heads=3, gate="elementwise")
    results("ls_attention", tensors, window=(4, None, 9), return_stats=True, impl="triton")
    assert launches.kernels == [
        "softmax_forward_kernel",
        "softmax_backward_rows_kernel",
        "softmax_backward_dkdv_kernel",
        "softmax_backward_dq_kernel",
    ]


def test_views_of_a_fused_projection_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """q and gate as two halves of one projection, per head, as a doubled ``q_proj`` gives them."""
    projected = torch.randn(2, 70, 4, 32)
    q, gate = projected.split(16, dim=-1)
    tensors = {**single(length=70, key_dim=16), "q": q, "gate": gate}
    launches = Launches(monkeypatch)
    found = results("gated_sdpa", tensors, impl="triton")
    strided = {x.ptr.data_ptr(): x for x in launches.arguments[0] if hasattr(x, "ptr")}
    for name in ("q", "gate"):
        assert strided[tensors[name].data_ptr()][1:] == tensors[name].stride()
    contiguous = {name: x.contiguous() for name, x in tensors.items()}
    assert_identical(found, results("gated_sdpa", contiguous, impl="triton"))


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
def test_any_strides(gate: str) -> None:
    tensors = single(length=40, heads=4, kv_heads=2, gate=gate)
    moved = {}
    for name, tensor in tensors.items():
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), math.nan)
        layout = wide.transpose(1, 2).contiguous().transpose(1, 2)  # [B, H, T, D] in memory
        moved[name] = layout[..., 1::2].copy_(tensor)
        assert not moved[name].is_contiguous()
    found = results("gated_sdpa", moved, impl="triton")
    assert_identical(found, results("gated_sdpa", tensors, impl="triton"))


def test_expanded_inputs() -> None:
    tensors = single(batch=1, length=40, heads=4, kv_heads=2)
    gate = torch.randn(4, 8)
    expanded = {name: x.expand(3, -1, -1, -1) for name, x in tensors.items()}
    expanded["gate"] = gate.expand(3, 40, 4, 8)
    contiguous = {name: x.contiguous() for name, x in expanded.items()}
    found = results("gated_sdpa", expanded, impl="triton")
    assert_identical(found, results("gated_sdpa", contiguous, impl="triton"))


def test_inputs_are_left_alone() -> None:
    tensors = single(length=40, gate="elementwise")
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    results("gated_sdpa", tensors, softmax_scale=-1.0, impl="triton")
    assert_identical(tensors, copies)


@pytest.mark.parametrize("activation", ["softmax", "relu"])
def test_what_the_backward_of_blocks_keeps(activation: str) -> None:
    """The output and a log-sum-exp; with relu nothing but the inputs."""
    tensors = {name: x.requires_grad_() for name, x in single(length=64, heads=2).items()}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        diag_attention(**tensors, activation=activation, impl="triton")
    inputs = {x.data_ptr() for x in tensors.values()}
    assert len([x for x in kept if x.data_ptr() not in inputs]) == 2 * (activation == "softmax")


def test_two_runs_are_equal_bit_for_bit() -> None:
    tensors = single(length=150, heads=4, kv_heads=2, gate="elementwise")
    first = results("ls_attention", tensors, window=(7, None), impl="triton")
    assert_identical(results("ls_attention", tensors, window=(7, None), impl="triton"), first)


def test_a_window_of_all_keys_is_no_window() -> None:
    tensors = {name: x.half() for name, x in draw(length=150, heads=2).items()}
    found = results("ls_attention", tensors, window=(150, 999), impl="triton")
    assert_identical(found, results("gated_sdpa", tensors, impl="triton"))


@pytest.mark.parametrize("gate", GATES)
def test_the_size_of_tiles_matters_little(gate: str | None) -> None:
    tensors = draw(batch=1, length=100, heads=4, kv_heads=2, gate=gate)
    for rows, columns in ((16, 64), (64, 16), (128, 128)):
        with (
            _configs.override("softmax_forward", _configs.Config(rows, columns, 4, 1)),
            _configs.override("softmax_backward_dq", _configs.Config(columns, rows, 4, 1)),
            _configs.override("softmax_backward_dkdv", _configs.Config(rows, columns, 4, 1)),
        ):
            matches(tensors, F16, window=(30, None))


# Statistics.


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 5), (False, None)])
def test_statistics(causal: bool, window: int | None) -> None:
    tensors = single(length=140, keys=150, heads=6, kv_heads=2, gate="headwise")
    options = {"causal": causal, "window": window, "return_stats": True}
    stats = gated_sdpa(**tensors, **options, impl="triton")[1]
    wanted = gated_sdpa(**tensors, **options, impl="reference")[1]
    torch.testing.assert_close(stats.max_logit, wanted.max_logit)
    torch.testing.assert_close(stats.lse, wanted.lse)
    assert not stats.max_logit.requires_grad


def test_statistics_change_no_bit() -> None:
    tensors = single(length=100, gate="elementwise")
    without = results("gated_sdpa", tensors, impl="triton")
    found = results("gated_sdpa", tensors, return_stats=True, impl="triton")
    assert_identical(found, without)


def test_negative_logits_give_a_negative_maximum() -> None:
    """Rows of a tile beyond the last query do not count, nor keys beyond the last."""
    ones = torch.ones(1, 5, 2, 4)
    for causal in (True, False):
        stats = gated_sdpa(ones, -ones, ones, causal=causal, return_stats=True, impl="triton")[1]
        torch.testing.assert_close(stats.max_logit, torch.full((2,), -2.0))


@pytest.mark.parametrize("activation", ["softmax", "relu"])
def test_the_largest_logit_of_blocks(activation: str) -> None:
    engine = importlib.import_module("attnvariants.ops.diag_attention")
    tensors = single(length=70, heads=4, kv_heads=2)
    options = {"activation": activation, "block_size": 32}
    _, found = engine.diag_attention_with_stats(**tensors, **options, impl="triton")
    _, wanted = engine.diag_attention_with_stats(**tensors, **options, impl="reference")
    torch.testing.assert_close(found, wanted)


def test_gradients_of_lse() -> None:
    tensors = single(length=70, heads=4, kv_heads=2, gate="headwise")
    found = []
    for impl in ("triton", "reference"):
        leaves = [x.detach().requires_grad_() for x in tensors.values()]
        named = dict(zip(tensors, leaves, strict=True))
        out, stats = gated_sdpa(**named, return_stats=True, impl=impl)
        loss = stats.lse.square().sum() + out.square().sum()
        found.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


# PyTorch around it.


@pytest.mark.parametrize("gate", GATES)
def test_operators(gate: str | None) -> None:
    tensors = single(batch=1, heads=4, kv_heads=2, value_dim=5, gate=gate)
    names = {"softmax_forward", "softmax_backward"}
    stats = {"return_stats": gate is None}
    check_operators("gated_sdpa", tensors, names, "triton", window=(3, None), **stats)
    check_operators("gated_sdpa", {**tensors, "cu_seqlens": bounds(12, 8)}, names, "triton")


@pytest.mark.parametrize("activation", ["softmax", "relu"])
def test_operators_of_blocks(activation: str) -> None:
    tensors = single(batch=1, heads=4, kv_heads=2)
    names = {"diag_forward", "diag_backward"}
    check_operators("diag_attention", tensors, names, "triton", activation=activation)


def test_compile() -> None:
    def make(length: int) -> Inputs:
        return single(batch=1, length=length, heads=2, kv_heads=1, gate="elementwise")

    check_compile("gated_sdpa", make, "triton", return_stats=True)


def test_compile_packed() -> None:
    def make(length: int) -> Inputs:
        return {**single(batch=1, length=length), "cu_seqlens": bounds(10, 10, length - 20)}

    check_compile("gated_sdpa", make, "triton", window=4)


def test_compile_blocks() -> None:
    check_compile("diag_attention", lambda length: single(batch=1, length=length), "triton")


def test_autocast() -> None:
    check_autocast("gated_sdpa", draw(length=40, gate="elementwise"), impls=("triton",))


def test_checkpoint() -> None:
    check_checkpoint("gated_sdpa", single(gate="elementwise"), impl="triton")


def test_gradients_of_some_inputs() -> None:
    check_subsets("gated_sdpa", single(gate="headwise"), impl="triton")


def test_gradients_of_gradients_are_refused() -> None:
    tensors = {name: x.requires_grad_() for name, x in single(gate="headwise").items()}
    out = gated_sdpa(**tensors, impl="triton")
    with pytest.raises(NotImplementedError, match="impl='reference'"):
        torch.autograd.grad(out.sum(), tensors["q"], create_graph=True)


def test_float64_is_refused_and_left_to_others() -> None:
    tensors = draw(length=9)
    with pytest.raises(NotImplementedError, match=r"takes float16, .* got float64.*'eager'"):
        gated_sdpa(**tensors, impl="triton")
    assert gated_sdpa(**tensors).dtype == torch.float64
