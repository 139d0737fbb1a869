"""Softmax attention over whole sequences in CUDA C++, its threads run as fibers on the CPU.

These are the sources, the binding and the Python side that serve ``impl="cuda"``; only the
compiler, the instructions of the tensor cores, the device and the dispatch key are others.
"""

from __future__ import annotations

import ctypes
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from oracle import assert_matches_definition
from softmax_checks import ACTIVATIONS, Inputs, bounds, cast, draw
from torch import Tensor

import attnvariants
from attnvariants import diag_attention, gated_sdpa
from attnvariants._verify import within
from attnvariants.ops.diag_attention import diag_attention_with_stats
from attnvariants.reference.gated_sdpa import gated_sdpa as definition

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (BF16, F16, F32)


pytestmark = pytest.mark.usefixtures("controls")


def check(
    tensors: Inputs, dtype: torch.dtype = F32, function: str = "gated_sdpa", **options: Any
) -> None:
    """Output and statistics against float64, within the budget of the data."""
    if function != "diag_attention":
        options = {"return_stats": True} | options
    assert_matches_definition(function, tensors, options, impl="cuda", dtype=dtype, gradients=False)


def run(tensors: Inputs, function: str = "gated_sdpa", **options: Any) -> list[Tensor]:
    """Output and, of a softmax, the largest logits and the log-sum-exp."""
    if function == "diag_attention":
        return [diag_attention(**tensors, impl="cuda", **options)]
    call = getattr(attnvariants, function)
    out, stats = call(**tensors, return_stats=True, impl="cuda", **options)
    return [out, stats.max_logit, stats.lse]


def assert_identical(actual: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# Lengths and masks.


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_around_tiles(dtype: torch.dtype, length: int) -> None:
    tensors = draw(batch=1, length=length, heads=3, kv_heads=1, key_dim=24, value_dim=40)
    check(tensors, dtype)


@pytest.mark.parametrize("window", [1, 2, 50, 64, 65, 128, 300])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_windows(dtype: torch.dtype, window: int) -> None:
    """To the key: one more or less would be far off the budget."""
    check(draw(batch=1, length=200, heads=1, key_dim=16), dtype, window=window)


def test_a_window_of_one_gives_the_values() -> None:
    tensors = cast(draw(length=70), BF16)
    assert torch.equal(run(tensors, window=1)[0], tensors["v"])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("length", "keys"), [(1, 130), (20, 200), (130, 131), (128, 64), (200, 20), (70, 1)]
)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_as_many_queries_as_keys_or_not(
    dtype: torch.dtype, length: int, keys: int, causal: bool
) -> None:
    """With fewer keys than queries the first queries see nothing: 0, and a log-sum-exp of -inf."""
    tensors = draw(batch=1, length=length, keys=keys, heads=2, kv_heads=1)
    check(tensors, dtype, causal=causal)
    check(tensors, dtype, causal=causal, window=33)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_per_head(dtype: torch.dtype, causal: bool) -> None:
    """Heads with a window are causal in either case."""
    tensors = draw(length=150, heads=12, kv_heads=6)
    window = (3, None, 70, 70, None, 200)
    check(tensors, dtype, "ls_attention", window=window, causal=causal)


@pytest.mark.parametrize("group", [1, 2, 5, 7])
def test_groups_of_heads(group: int) -> None:
    tensors = draw(length=40, heads=3 * group, kv_heads=3)
    check(tensors, BF16, window=(None, 9, 20))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 20, (None, 5)])
def test_packed_sequences(window: Any, dtype: torch.dtype) -> None:
    lengths = (70, 0, 1, 128, 0, 3, 64, 0)
    tensors = draw(batch=1, length=sum(lengths), heads=4, kv_heads=2, gate="headwise")
    tensors["cu_seqlens"] = bounds(*lengths)
    check(tensors, dtype, window=window)
    check(tensors, dtype, window=window, causal=False)


def test_sequences_do_not_see_each_other() -> None:
    tensors = cast(draw(batch=1, length=200, heads=2), BF16)
    clean = run(tensors | {"cu_seqlens": bounds(70, 60, 70)})[0]
    for x in tensors.values():
        x[:, 70:130] = torch.nan
    found = run(tensors | {"cu_seqlens": bounds(70, 60, 70)})[0]
    assert torch.equal(found[:, :70], clean[:, :70])
    assert torch.equal(found[:, 130:], clean[:, 130:])
    assert found[:, 70:130].isnan().all()


def test_bounds_that_are_none_touch_nothing() -> None:
    """They cannot be checked while ``torch.compile`` records; memory must be safe all the same."""
    tensors = cast(draw(batch=1, length=80, heads=1), BF16)
    q, k, v = tensors.values()
    for broken in ([0, 200], [-5, 80], [50, 10, 80], [0, 2**30, 80]):
        cu_seqlens = torch.tensor(broken, dtype=torch.int32)
        options = ([-1], True, 1.0, None, False, "cuda")
        torch.ops.attnvariants.softmax_forward(q, k, v, None, cu_seqlens, *options)


def test_keys_that_nobody_sees_are_not_read() -> None:
    """A weight of 0 does not stop a NaN."""
    tensors = cast(draw(batch=1, length=30, keys=200, heads=2), BF16)
    clean = run(tensors, window=20)[0]
    tensors["k"][:, : 200 - 49] = tensors["v"][:, : 200 - 49] = torch.nan
    assert torch.equal(run(tensors, window=20)[0], clean)


# Head dims, gates and numbers.


@pytest.mark.parametrize(
    ("key_dim", "value_dim"),
    [(1, 1), (32, 32), (40, 100), (100, 40), (64, 64), (65, 33), (96, 80), (128, 128), (127, 3)]
    + [(192, 128), (17, 256), (256, 200)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims(dtype: torch.dtype, key_dim: int, value_dim: int) -> None:
    tensors = draw(batch=1, length=140, heads=1, key_dim=key_dim, value_dim=value_dim)
    check(tensors, dtype, window=100)


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates(dtype: torch.dtype, activation: str, gate: str) -> None:
    tensors = draw(length=20, heads=4, kv_heads=2, value_dim=24, gate=gate)
    tensors["gate"] *= 5
    check(tensors, dtype, gate_activation=activation)


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
def test_gate_in_float32_beside_bfloat16(gate: str) -> None:
    tensors = draw(length=20, gate=gate)
    wide = cast(tensors, BF16) | {"gate": tensors["gate"].float()}
    out = run(wide)[0]
    exact, narrow = cast(wide, torch.float64), cast(wide, BF16)
    truth, plain = (definition(**x, upcast=False) for x in (exact, narrow))
    row = within("out", out, truth, float((plain - truth).abs().max()), BF16)
    assert row.ok, row


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-0.7, 0.0, 8.0])
def test_scales(scale: float, dtype: torch.dtype) -> None:
    """Among them logits so strong that a row has one key, and turned round."""
    check(draw(length=100, heads=2, key_dim=64), dtype, softmax_scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_logit_may_come_late(dtype: torch.dtype) -> None:
    """Sums of earlier keys are rescaled, tile by tile."""
    tensors = draw(batch=1, length=260, heads=1, key_dim=32)
    tensors["q"][...] = tensors["q"].abs()
    tensors["k"] *= torch.linspace(0.0, 3.0, 260)[:, None, None] / 3
    tensors["k"][...] = tensors["k"].abs()
    check(tensors, dtype, softmax_scale=0.4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_negative_logits(dtype: torch.dtype) -> None:
    ones = torch.ones(1, 70, 2, 4, dtype=dtype)
    _, max_logit, lse = run({"q": ones, "k": -ones, "v": ones})
    torch.testing.assert_close(max_logit, torch.full((2,), -2.0))
    torch.testing.assert_close(lse[0, :, 0], torch.arange(1, 71).float().log() - 2)
    _, max_logit, _ = run({"q": ones, "k": torch.zeros_like(ones), "v": -ones})
    assert torch.equal(max_logit, torch.zeros(2))


def test_the_largest_logit_may_be_minus_zero() -> None:
    """Its bits come before those of -inf in the order of integers."""
    tiny = torch.full((1, 70, 2, 64), 1e-24, dtype=BF16)
    _, max_logit, _ = run({"q": tiny, "k": -tiny, "v": tiny})
    assert torch.equal(max_logit, torch.zeros(2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_spreads(dtype: torch.dtype) -> None:
    tensors = cast(draw(batch=1, length=70, heads=2), dtype)
    tensors["k"][:, 66, 0] = torch.nan
    out, max_logit, lse = run(tensors)
    assert max_logit.isnan().tolist() == [True, False]
    assert lse[..., 0].isnan()[0].tolist() == [False] * 66 + [True] * 4
    assert out[..., 0, :].isnan().all(-1)[0].tolist() == [False] * 66 + [True] * 4
    assert not out[..., 1, :].isnan().any()


def test_statistics_change_no_bit() -> None:
    tensors = cast(draw(length=90, gate="headwise"), BF16)
    assert torch.equal(run(tensors)[0], gated_sdpa(**tensors, impl="cuda"))


# Blocks.


@pytest.mark.parametrize("block_size", [1, 7, 16, 64, 100, 500])
@pytest.mark.parametrize("activation", ["softmax", "relu"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_blocks(dtype: torch.dtype, causal: bool, activation: str, block_size: int) -> None:
    tensors = draw(batch=1, length=210, heads=2, kv_heads=1, value_dim=24)
    options = {"block_size": block_size, "activation": activation, "causal": causal}
    check(tensors, dtype, "diag_attention", **options)


@pytest.mark.parametrize("activation", ["softmax", "relu"])
def test_blocks_of_packed_sequences(activation: str) -> None:
    tensors = draw(batch=1, length=173, heads=2, kv_heads=1)
    tensors["cu_seqlens"] = bounds(70, 0, 3, 100)
    check(tensors, F16, "diag_attention", block_size=30, activation=activation)


@pytest.mark.parametrize("activation", ["softmax", "relu"])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_statistics_of_blocks(dtype: torch.dtype, activation: str) -> None:
    tensors = cast(draw(length=100), dtype)
    options: dict[str, Any] = {"block_size": 30, "activation": activation, "softmax_scale": -0.3}
    out, largest = diag_attention_with_stats(**tensors, **options, impl="cuda")
    _, expected = diag_attention_with_stats(**tensors, **options, impl="reference")
    assert torch.equal(out, diag_attention(**tensors, **options, impl="cuda"))
    torch.testing.assert_close(largest, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ["softmax", "relu"])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_nan_in_the_statistics_of_blocks(dtype: torch.dtype, activation: str) -> None:
    tensors = cast(draw(batch=1, length=70, heads=2), dtype)
    tensors["k"][:, 40, 0] = torch.nan
    _, largest = diag_attention_with_stats(**tensors, activation=activation, impl="cuda")
    assert largest is not None
    assert largest.isnan().tolist() == [True, False]


# Layouts, and the order in which threads run.


def spread(x: Tensor) -> Tensor:
    """The same numbers, with the first axis innermost and NaN between them."""
    wide = x.new_full((*x.shape[1:], 2 * x.shape[0] + 1), torch.nan)
    view = wide[..., 1::2].movedim(-1, 0)
    view.copy_(x)
    return view


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_any_strides(dtype: torch.dtype, gate: str) -> None:
    tensors = cast(draw(length=70, kv_heads=2, value_dim=16, gate=gate), dtype)
    plain = run(tensors)
    assert_identical(run({name: spread(x) for name, x in tensors.items()}), plain)
    by_head = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in tensors.items()}
    assert_identical(run(by_head), plain)


@pytest.mark.parametrize("name", ["q", "k", "v", "gate"])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_rows_off_a_multiple_of_16_bytes(dtype: torch.dtype, name: str) -> None:
    """They are read an element at a time, and nothing in front of them or behind."""
    tensors = cast(draw(length=70, value_dim=24, gate="elementwise"), dtype)
    plain = run(tensors)
    tensors[name] = torch.nn.functional.pad(tensors[name], (1, 2), value=torch.nan)[..., 1:-2]
    assert_identical(run(tensors), plain)


def test_expanded_tensors() -> None:
    tensors = cast(draw(length=70), BF16)
    tensors["k"] = tensors["k"][:, :1].expand(-1, 70, -1, -1)
    tensors["gate"] = torch.randn(4, 8).bfloat16().expand(2, 70, -1, -1)
    assert_identical(run(tensors), run({name: x.contiguous() for name, x in tensors.items()}))


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_order_of_threads_and_blocks_does_not_matter(
    dtype: torch.dtype, dim: int, controls: ctypes.CDLL
) -> None:
    """To the last bit: a race would show. Nor does the number of copies under way."""
    tensors = draw(batch=1, length=200, heads=2, key_dim=dim, gate="elementwise")
    tensors = cast(tensors, dtype)
    expected = None
    for order, shared in ((0, 227), (1, 227), (2, 227), (3, 100), (4, 100)):
        controls.cuda_on_cpu_order(order)
        controls.cuda_on_cpu_shared_memory(shared * 1024)
        found = run(tensors, window=(None, 70))
        expected = expected or found
        assert_identical(found, expected)


@pytest.mark.parametrize("activation", ["softmax", "relu"])
def test_order_of_threads_does_not_matter_to_blocks(activation: str, controls: ctypes.CDLL) -> None:
    tensors = cast(draw(batch=1, length=150, heads=2), BF16)
    found = []
    for order in range(3):
        controls.cuda_on_cpu_order(order)
        found.append(diag_attention(**tensors, activation=activation, impl="cuda"))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@settings(max_examples=25)
@given(
    length=st.integers(1, 150),
    more_keys=st.integers(-40, 80),
    window=st.lists(st.none() | st.integers(1, 150), min_size=2, max_size=2),
    group=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 130), st.integers(1, 130)),
    causal=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    gate=st.sampled_from([None, "elementwise", "headwise"]),
    order=st.integers(0, 100),
)
def test_any_call(
    length: int,
    more_keys: int,
    window: list[int | None],
    group: int,
    dims: tuple[int, int],
    causal: bool,
    dtype: torch.dtype,
    gate: str | None,
    order: int,
    controls: ctypes.CDLL,
) -> None:
    torch.manual_seed(0)
    controls.cuda_on_cpu_order(order)
    tensors = draw(
        batch=1,
        length=length,
        keys=max(1, length + more_keys),
        heads=2 * group,
        kv_heads=2,
        key_dim=dims[0],
        value_dim=dims[1],
        gate=gate,
    )
    check(tensors, dtype, window=tuple(window), causal=causal)
