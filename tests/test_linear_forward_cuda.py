"""Linear attention over whole sequences in CUDA C++, its threads run as fibers on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any

import linear_checks as checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_checks import (
    INF,
    LOG_DECAYS,
    SHAPE,
    bounds,
    draw,
    gated,
    normed,
    qkv,
    run,
    single,
    states,
)
from oracle import assert_matches_definition, assert_within_budget
from torch import Tensor

from attnvariants import linear_attention_decode, norm_linear_attention
from attnvariants.reference.norm_linear_attention import final_state

GATED, NORM = "gated_linear_attention", "norm_linear_attention"
KINDS = ("channel", "token", "constant")
NORMS = ("model", "head", None)
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = (BF16, F16, F32)
HALVES = [0, 3, 3, 67, 131, 140]  # bounds of packed sequences, one of them empty


pytestmark = pytest.mark.usefixtures("controls")


@pytest.fixture
def many_processors(controls: ctypes.CDLL) -> None:
    """Cuts every sequence of 512 tokens or more into segments."""
    controls.cuda_on_cpu_processors(1000)


def assert_exact(
    function: str, tensors: checks.Inputs, dtype: torch.dtype = F32, **options: Any
) -> None:
    options = {"return_state": True, **options}
    assert_matches_definition(function, tensors, options, impl="cuda", dtype=dtype, gradients=False)


def call(function: str, tensors: checks.Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    out, state = run(function, tensors, impl="cuda", return_state=True, **options)
    return out, state


# --- the recurrence

# Few numbers are often one large one, and its error a matter of luck.
SHAPES = {"channel": SHAPE, "token": (2, 3, 12, 10), "constant": (2, 5, 12, 10)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", LOG_DECAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_decay(kind: str, strength: str, dtype: torch.dtype) -> None:
    assert_exact(GATED, gated(80, kind, strength, SHAPES[kind]), dtype)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize("kind", [*KINDS, "none"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_lengths(kind: str, length: int, dtype: torch.dtype) -> None:
    tensors = gated(length, "constant" if kind == "none" else kind, "plain", (1, 3, 20, 20))
    if kind == "none":
        del tensors["g"]
        assert_exact(NORM, tensors, dtype, norm=None, feature_map=None)
    else:
        assert_exact(GATED, tensors, dtype)


DIMS = [
    *((1, 1, BF16), (1, 1, F32), (40, 100, BF16), (100, 40, F32), (72, 136, F16)),
    *((256, 256, BF16), (130, 65, F32), (128, 128, BF16), (200, 24, F16)),
]


@pytest.mark.parametrize("kind", ["channel", "token"])
@pytest.mark.parametrize(("key_dim", "value_dim", "dtype"), DIMS)
def test_head_dims(key_dim: int, value_dim: int, dtype: torch.dtype, kind: str) -> None:
    length = 70 if key_dim * value_dim < 20000 else 35
    heads = 4 if key_dim == 1 else 1
    tensors = gated(length, kind, "weak", (1, heads, key_dim, value_dim))
    tensors["gate"] = draw(1, length, heads, value_dim)
    assert_exact(GATED, tensors, dtype, scale=0.3, norm="head", eps=1e-2)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind: str, dtype: torch.dtype) -> None:
    tensors = gated(140, kind)
    tensors["initial_state"] = states(tensors, 5)
    assert_exact(GATED, tensors, dtype, cu_seqlens=torch.tensor(HALVES).int(), norm="head")


@pytest.mark.parametrize("causal", [True, False])
def test_packed_norm_attention(causal: bool) -> None:
    tensors = normed(140)
    tensors["initial_state"] = states(tensors, 5)
    assert_exact(NORM, tensors, cu_seqlens=torch.tensor(HALVES).int(), causal=causal)


def test_neighbouring_sequences_do_not_mix() -> None:
    """Not even numbers of 1e30, and NaN of the sequence beside it."""
    tensors = single(gated(140))
    tensors["initial_state"] = states(tensors, 5).float()
    tensors["initial_state"][0] = torch.nan
    for name in ("q", "k", "v", "g"):
        tensors[name][:, :67] = torch.nan
    out, state = call(GATED, tensors, cu_seqlens=torch.tensor(HALVES).int())
    alone = {name: x[:, 67:131] for name, x in tensors.items()}
    alone["initial_state"] = tensors["initial_state"][3:4]
    expected, last = call(GATED, alone)
    assert torch.equal(out[:, 67:131], expected)
    assert torch.equal(state[3:4], last)
    assert state[4].isfinite().all()


# --- segments


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_segments(kind: str, dtype: torch.dtype) -> None:
    """A pass over segments beside each other first, then one that joins their states."""
    assert_exact(GATED, gated(600, kind, "weak", (1, 2, 12, 10)), dtype)


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize("kind", ["channel", "constant"])
def test_segments_of_packed_sequences(kind: str) -> None:
    tensors = gated(800, kind, "weak", (1, 1, 7, 5))
    tensors["initial_state"] = states(tensors, 5)
    assert_exact(GATED, tensors, cu_seqlens=bounds(5, 256, 0, 539, 0))


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_segments_of_norm_attention(causal: bool, packed: bool) -> None:
    tensors = normed(600, (1, 2, 7, 5))
    options: dict[str, Any] = {"causal": causal, "norm": "head"}
    if packed:
        tensors["initial_state"] = states(tensors, 3)
        options["cu_seqlens"] = bounds(20, 580, 0)
    assert_exact(NORM, tensors, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_segments_equal_one_walk(kind: str, controls: ctypes.CDLL) -> None:
    tensors = single(gated(600, kind, "weak"))
    found = []
    for processors in (1, 1000):
        controls.cuda_on_cpu_processors(processors)
        found.append(call(GATED, tensors))
    assert not torch.equal(found[0][0], found[1][0])  # both ways have been taken
    torch.testing.assert_close(*found)


# --- the epilogue


@pytest.mark.parametrize("activation", ["silu", "sigmoid", None])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_epilogue(norm: str | None, activation: str | None, dtype: torch.dtype) -> None:
    tensors = gated(66, "token")
    tensors["norm_weight"] = draw(2, 10) if norm == "head" else draw(10)
    tensors["gate"] = draw(1, 66, 2, 10) if norm == "model" else draw(1, 66, 2)
    assert_exact(GATED, tensors, dtype, norm=norm, eps=1e-3, gate_activation=activation)


@pytest.mark.parametrize("norm", ["model", "head"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_over_several_tiles_of_the_values(norm: str, dtype: torch.dtype) -> None:
    tensors = normed(40, (1, 2, 10, 150))
    tensors["gate"] = draw(1, 40, 2, 150)
    tensors["norm_weight"] = draw(2, 150)
    assert_exact(NORM, tensors, dtype, norm=norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("feature_map", ["elu+1", "elu", "relu", "silu", None])
def test_feature_maps(feature_map: str | None, causal: bool, dtype: torch.dtype) -> None:
    tensors = normed(100, (1, 2, 20, 16))
    options = {"feature_map": feature_map, "causal": causal, "eps": 1e-2}
    assert_exact(NORM, tensors, dtype, return_stats=True, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature_map", ["elu+1", "silu"])
def test_feature_maps_with_decay(feature_map: str, dtype: torch.dtype) -> None:
    tensors = normed(100, (2, 4, 20, 16))
    tensors["decay"] = -torch.logspace(-3, 0, 4, dtype=torch.float64)
    tensors["gate"] = draw(2, 100, 4, 16)
    assert_exact(NORM, tensors, dtype, feature_map=feature_map, gate_activation=None)


@pytest.mark.parametrize("zero", ["q", "k", "v"])
def test_zero_rows(zero: str) -> None:
    """The norm of a zero output is zero."""
    tensors = single(gated(70, "token"))
    tensors[zero].zero_()
    del tensors["initial_state"]
    for norm in ("head", "model"):
        out, state = call(GATED, tensors, norm=norm, gate=torch.randn(1, 70, 2))
        assert (out == 0).all()
        assert state.isfinite().all()


@pytest.mark.parametrize("causal", [True, False])
def test_half_precision_does_not_overflow(causal: bool) -> None:
    """Un-normalised outputs reach 1e5 here; float16 does not hold them."""
    tensors = {name: x.half() for name, x in qkv(1, 2048, 1, 64, 16).items()}
    tensors["v"] += 1
    assert call(NORM, tensors, causal=causal, norm=None)[0].isinf().any()
    for norm in ("head", "model"):
        assert call(NORM, tensors, causal=causal, norm=norm)[0].isfinite().all()


# --- states and resets


@pytest.mark.parametrize("kind", KINDS)
def test_state_carries_on(kind: str) -> None:
    """Pieces with the state handed over equal one pass."""
    tensors = single(gated(150, kind))
    whole, last = call(GATED, tensors)
    state, pieces = tensors["initial_state"], []
    for start, end in ((0, 1), (1, 64), (64, 130), (130, 150)):
        piece = {name: x[:, start:end] for name, x in tensors.items() if x.dim() > 1}
        piece["g"] = tensors["g"] if kind == "constant" else piece["g"]
        out, state = call(GATED, {**piece, "initial_state": state})
        pieces.append(out)
    torch.testing.assert_close((torch.cat(pieces, 1), state), (whole, last))


@pytest.mark.parametrize("norm", NORMS)
def test_prefill_then_steps(norm: str | None) -> None:
    """From compiled code alone."""
    tensors = single(gated(70)) | {"gate": torch.randn(1, 70, 2, 10)}
    whole, last = call(GATED, tensors, norm=norm, eps=1e-2)
    prompt = {name: x[:, :67] for name, x in tensors.items()}
    prompt["initial_state"] = tensors["initial_state"]
    out, state = call(GATED, prompt, norm=norm, eps=1e-2)
    outputs = [out]
    for t in range(67, 70):
        step = {name: tensors[name][:, t : t + 1] for name in ("q", "k", "v", "g", "gate")}
        outputs.append(
            linear_attention_decode(**step, state=state, impl="cuda", norm=norm, eps=1e-2)
        )
    torch.testing.assert_close((torch.cat(outputs, 1), state), (whole, last))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_infinite_decay_is_a_reset(kind: str, dtype: torch.dtype) -> None:
    """``-inf`` and ``-1e3`` are the same function, to the last bit."""
    tensors = single(gated(100, kind, "infinite resets"))
    tensors = {name: x.to(dtype) if name in "qkv" else x for name, x in tensors.items()}
    if kind == "constant":
        tensors["g"][0] = -INF
    assert (tensors["g"] == -INF).any()
    found = call(GATED, tensors, norm="head")
    wanted = call(GATED, {**tensors, "g": tensors["g"].clamp(min=-1e3)}, norm="head")
    for actual, expected in zip(found, wanted, strict=True):
        assert torch.equal(actual, expected)
        assert actual.isfinite().all()


@pytest.mark.parametrize("reset", [64, 96, 100])
@pytest.mark.parametrize("kind", ["channel", "token"])
def test_nothing_passes_a_reset(kind: str, reset: int) -> None:
    """Behind a token with ``g = -inf`` nothing is left of what was before, not even of 1e30."""
    tensors = single(gated(130, kind, "weak", (1, 1, 6, 5)))
    tensors["g"][:, reset] = -INF
    tensors["v"][:, :reset] *= 1e30
    tensors["initial_state"] *= 1e30
    tail = {name: x[:, reset:] for name, x in tensors.items()}
    tail["initial_state"] = torch.zeros_like(tensors["initial_state"])
    expected, last = call(GATED, tail)
    out, state = call(GATED, tensors)
    torch.testing.assert_close((out[:, reset:], state), (expected, last))


@pytest.mark.parametrize("processors", [1, 1000])
def test_errors_do_not_compound_over_chunks(processors: int, controls: ctypes.CDLL) -> None:
    """A decay that float32 rounds badly per chunk is still right over 512 chunks."""
    controls.cuda_on_cpu_processors(processors)
    decay = torch.tensor([-9e-10])  # exp(32 decay) lies between 1 and the number before it
    q, k, v = (torch.rand(1, 2**14, 1, 2) for _ in range(3))
    options = {"feature_map": None, "norm": None, "return_state": True, "impl": "cuda"}
    _, state = norm_linear_attention(q, k, v, decay=decay, **options)
    start = torch.zeros(1, 1, 2, 2)
    plain = final_state(k, v, decay, start)
    truth = final_state(k.double(), v.double(), decay.double(), start.double())
    assert_within_budget(state, truth, plain)


# --- layouts and threads


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    # A norm over few numbers is one of a few errors, and its own a matter of luck.
    dims=st.tuples(st.integers(2, 4), st.integers(4, 70), st.integers(9, 70)),
    kind=st.sampled_from(["channel", "token", "constant", "none"]),
    norm=st.sampled_from(NORMS),
    dtype=st.sampled_from(DTYPES),
    order=st.integers(0, 100),
)
def test_any_shapes(
    lengths: list[int],
    dims: tuple[int, int, int],
    kind: str,
    norm: str | None,
    dtype: torch.dtype,
    order: int,
    controls: ctypes.CDLL,
) -> None:
    torch.manual_seed(0)
    controls.cuda_on_cpu_order(order)
    lengths = [*lengths, 1]
    tensors = gated(sum(lengths), "constant" if kind == "none" else kind, "plain", (1, *dims))
    if kind == "none":
        tensors["g"] = torch.zeros_like(tensors["g"])
    tensors["initial_state"] = states(tensors, len(lengths))
    assert_exact(GATED, tensors, dtype, cu_seqlens=bounds(*lengths), norm=norm, eps=0.1)


@pytest.mark.parametrize(
    ("kind", "causal"), [("channel", True), ("token", True), ("none", True), ("none", False)]
)
def test_order_of_threads_and_blocks_does_not_matter(
    kind: str, causal: bool, controls: ctypes.CDLL
) -> None:
    controls.cuda_on_cpu_processors(1000)  # with segments
    tensors = single(gated(520, "token" if kind == "none" else kind, "plain", (1, 1, 70, 72)))
    function, options = GATED, {}
    if kind == "none":
        del tensors["g"]
        function, options = NORM, {"causal": causal}
    tensors["gate"] = torch.randn(1, 520, 1)
    for dtype in (BF16, F32):
        inputs = {name: x.to(dtype) if name in "qkv" else x for name, x in tensors.items()}
        expected = None
        for order in range(4):
            controls.cuda_on_cpu_order(order)
            found = call(function, inputs, norm="model", **options)
            expected = expected or found
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("norm", ["model", "head"])
def test_any_strides(norm: str, dtype: torch.dtype) -> None:
    """With NaN between the elements."""
    tensors = single(gated(70, "channel", "plain", (2, 2, 16, 24)))
    tensors["gate"], tensors["norm_weight"] = torch.randn(2, 70, 2, 24), torch.randn(2, 24)
    tensors = {name: x.to(dtype) if name in "qkv" else x for name, x in tensors.items()}
    expected = call(GATED, tensors, norm=norm)
    found = call(GATED, {name: _spread(x) for name, x in tensors.items()}, norm=norm)
    shifted = call(GATED, {name: _shift(x) for name, x in tensors.items()}, norm=norm)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(shifted, expected, strict=True))


def _spread(x: Tensor) -> Tensor:
    """The same numbers, with the first axis innermost."""
    wide = x.new_full((*x.shape[1:], 2 * x.shape[0] + 1), torch.nan)
    view = wide[..., 1::2].movedim(-1, 0)
    view.copy_(x)
    return view


def _shift(x: Tensor) -> Tensor:
    """The same numbers in rows that do not start at multiples of 16 bytes."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
    return wide[..., 1:-2].copy_(x)


@pytest.mark.parametrize("wide", ["norm_weight", "gate", "g"])
def test_float32_beside_bfloat16(wide: str) -> None:
    """The same numbers in either dtype give the same result."""
    tensors = {name: x.bfloat16() for name, x in gated(40).items()}
    tensors["gate"] = torch.randn(1, 40, 2, 10).bfloat16()
    tensors["norm_weight"] = torch.randn(10).bfloat16()
    tensors["initial_state"] = tensors["initial_state"].float()
    found = [call(GATED, x) for x in (tensors, tensors | {wide: tensors[wide].float()})]
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
