"""How the Triton softmax engine is called: launches, memory, statistics and PyTorch around it."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from linear_checks import check_checkpoint, check_subsets
from softmax_checks import (
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

from attnvariants import diag_attention, gated_sdpa
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


def test_one_launch_forward_and_four_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    tensors = single(length=40, heads=6, kv_heads=3, gate="elementwise")
    results("ls_attention", tensors, window=(4, None, 9), return_stats=True, impl="triton")
    assert launches.kernels == [
        "softmax_forward_kernel",
        "softmax_backward_rows_kernel",
        "softmax_backward_dq_kernel",
        "softmax_backward_dq_kernel",  # returns at once where no probability is close to 1
        "softmax_backward_dkdv_kernel",
    ]


def test_only_saturated_tiles_are_walked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    tensors = {
        name: x.half() for name, x in draw(batch=1, length=300, heads=2, gate="headwise").items()
    }
    tensors["k"][:, 0, 1] = 40  # head 1 looks at its first key alone
    tensors["q"][:, :, 1] = tensors["q"][:, :, 1].abs() + 1
    results("gated_sdpa", tensors, impl="triton")
    kernel = launches.kernels.index("softmax_backward_dq_kernel")
    saturated = launches.arguments[kernel][8].view(-1, 2)  # tiles by heads
    assert saturated[:, 1].all()
    assert not saturated[:-1, 0].any()  # the last program has the first rows, which see few keys


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
