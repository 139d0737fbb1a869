"""Norm linear attention: causal and bidirectional, every feature map, norm and gate."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import linear_checks as checks
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from linear_checks import INF, assert_same, draw, qkv, results, run, states
from oracle import assert_matches_definition, assert_within_budget

from attnvariants import gated_linear_attention, norm_linear_attention
from attnvariants.reference.norm_linear_attention import final_state

NAME = "norm_linear_attention"
MAPS = ("elu+1", "elu", "relu", "silu", None)
NORMS = ("model", "head", None)
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def case(
    length: int = 70, shape: tuple[int, int, int, int] = (2, 2, 6, 5), decay: bool = False
) -> checks.Inputs:
    batch, heads, key_dim, value_dim = shape
    tensors = qkv(batch, length, heads, key_dim, value_dim)
    tensors["initial_state"] = states(tensors, batch)
    if decay:
        tensors["decay"] = -(torch.rand(heads, dtype=F64) ** 3)
    return tensors


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("feature_map", MAPS)
def test_matches_definition(
    feature_map: str | None, norm: str | None, causal: bool, dtype: torch.dtype
) -> None:
    options = {"feature_map": feature_map, "norm": norm, "causal": causal, "eps": 1e-2}
    options |= {"return_state": True, "return_stats": True}
    assert_matches_definition(NAME, case(100, (2, 3, 20, 16)), options, impl="eager", dtype=dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("decay", ["slopes", "ones", "last layer", "infinite", "zero"])
def test_decay(decay: str, dtype: torch.dtype) -> None:
    tensors = case(200, (1, 3, 6, 5))
    slopes = -torch.exp2(-8 * torch.arange(1, 4, dtype=F64) / 3)
    tensors["decay"] = {
        "slopes": slopes,
        "ones": torch.tensor([-1.0, -8.0, -90.0], dtype=F64),
        "last layer": 1e-5 * slopes,
        "infinite": torch.tensor([-INF, 0.0, -1e4], dtype=F64),
        "zero": torch.zeros(3, dtype=F64),
    }[decay]
    options = {"return_state": True, "return_stats": True}
    assert_matches_definition(NAME, tensors, options, impl="eager", dtype=dtype)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 1000])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(causal: bool, length: int) -> None:
    tensors = case(length, (2, 2, 12, 9))
    options = {"causal": causal, "return_state": True}
    assert_matches_definition(NAME, tensors, options, impl="eager", dtype=F32)


@pytest.mark.parametrize("causal", [True, False])
def test_many_segments(causal: bool) -> None:
    """With this many heads every chunk is a segment of its own."""
    tensors = case(280, (1, 40, 3, 2), decay=causal)
    tensors["initial_state"] = states(tensors, 3)
    cu_seqlens = torch.tensor([0, 30, 270, 280], dtype=torch.int32)
    options = {"return_state": True, "cu_seqlens": cu_seqlens, "causal": causal}
    assert_matches_definition(NAME, tensors, options, impl="eager", dtype=F32)


def test_errors_do_not_compound_over_chunks() -> None:
    """A decay that float32 rounds badly per chunk is still right over 1024 chunks."""
    decay = torch.tensor([-4.5e-10])  # exp(64 decay) lies between 1 and the number before it
    q, k, v = (torch.rand(1, 2**16, 1, 2) for _ in range(3))
    options = {"feature_map": None, "norm": None, "return_state": True, "impl": "eager"}
    _, state = norm_linear_attention(q, k, v, decay=decay, **options)
    start = torch.zeros(1, 1, 2, 2)
    plain = final_state(k, v, decay, start)
    truth = final_state(k.double(), v.double(), decay.double(), start.double())
    assert_within_budget(state, truth, plain)


@pytest.mark.parametrize(
    "shape", [(1, 24, 1, 1), (1, 8, 1, 30), (1, 1, 100, 60), (1, 1, 256, 256), (3, 40, 3, 2)]
)
def test_head_dims(shape: tuple[int, int, int, int]) -> None:
    assert_matches_definition(NAME, case(70, shape), {}, impl="eager", dtype=F32)


@pytest.mark.parametrize("activation", ["sigmoid", "silu", None])
@pytest.mark.parametrize("gate", ["elementwise", "headwise", None])
@pytest.mark.parametrize("weight", [(3, 16), (16,), None])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_epilogue(
    norm: str | None,
    weight: tuple[int, ...] | None,
    gate: str | None,
    activation: str | None,
    dtype: torch.dtype,
) -> None:
    tensors = case(66, (2, 3, 20, 16))
    if weight is not None:
        tensors["norm_weight"] = draw(*weight)
    if gate is not None:
        tensors["gate"] = draw(2, 66, 3, 16) if gate == "elementwise" else draw(2, 66, 3)
    options = {"norm": norm, "gate_activation": activation, "causal": weight != (16,)}
    assert_matches_definition(NAME, tensors, options, impl="eager", dtype=dtype)


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences(causal: bool, impl: str) -> None:
    """Every sequence as if it were alone; an empty one hands its state on."""
    bounds = [0, 0, 5, 69, 69, 200, 264, 270, 270]
    tensors = case(bounds[-1], (1, 2, 6, 5), decay=causal)
    tensors["initial_state"] = states(tensors, len(bounds) - 1)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    options = {"impl": impl, "causal": causal, "return_state": True}
    out, state = run(NAME, tensors, cu_seqlens=cu_seqlens, **options)
    alone = []
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        piece = {name: x if x.dim() == 1 else x[:, start:end] for name, x in tensors.items()}
        piece["initial_state"] = last = tensors["initial_state"][index : index + 1]
        if end > start:
            one, last = run(NAME, piece, **options)
            alone.append(one)
        torch.testing.assert_close(state[index : index + 1], last)
    torch.testing.assert_close(out, torch.cat(alone, 1))


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_gradients(causal: bool, dtype: torch.dtype) -> None:
    bounds = [0, 3, 3, 67, 131, 140]
    tensors = case(140, (1, 2, 6, 5))
    tensors["initial_state"] = states(tensors, 5)
    options = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "causal": causal}
    options |= {"return_state": True, "return_stats": True}
    assert_matches_definition(NAME, tensors, options, impl="eager", dtype=dtype)


@pytest.mark.parametrize("causal", [True, False])
def test_state_carries_on(causal: bool) -> None:
    """Causal pieces with the state handed over equal one pass; so does the state if not causal."""
    tensors = {name: x.requires_grad_() for name, x in case(150, decay=causal).items()}
    whole, last = run(NAME, tensors, impl="eager", return_state=True, causal=causal)
    state, pieces = tensors["initial_state"], []
    for start, end in ((0, 1), (1, 64), (64, 130), (130, 150)):
        piece = {name: x if name == "decay" else x[:, start:end] for name, x in tensors.items()}
        piece["initial_state"] = state
        out, state = run(NAME, piece, impl="eager", return_state=True, causal=causal)
        pieces.append(out)
    found, wanted = [state], [last]
    if causal:
        found, wanted = [*pieces, state], [*whole.split([1, 63, 66, 20], 1), last]
    assert_same(found, wanted)
    leaves = [tensor for name, tensor in tensors.items() if causal or name != "q"]
    cotangents = [torch.randn_like(x) for x in wanted]
    gradients = [torch.autograd.grad(x, leaves, cotangents) for x in (found, wanted)]
    assert_same(list(gradients[0]), list(gradients[1]))


def test_is_gated_linear_attention_with_a_constant_decay() -> None:
    tensors = case(130, decay=True)
    mapped = {name: x for name, x in tensors.items() if name != "decay"}
    mapped["q"], mapped["k"] = (F.elu(tensors[name]) + 1 for name in ("q", "k"))
    found = norm_linear_attention(**tensors, norm="head", return_state=True, impl="eager")
    wanted = gated_linear_attention(
        **mapped, g=tensors["decay"], scale=1.0, norm="head", return_state=True, impl="eager"
    )
    assert_same(list(found), list(wanted))


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_gradcheck(causal: bool, feature_map: str | None, impl: str) -> None:
    tensors = case(68, (1, 2, 3, 2), decay=causal)
    tensors["gate"] = draw(1, 68, 2)
    tensors["norm_weight"] = draw(2)
    checks.check_gradients(NAME, tensors, impl, causal=causal, feature_map=feature_map, eps=0.1)


@pytest.mark.parametrize("causal", [True, False])
def test_half_precision_does_not_overflow(causal: bool) -> None:
    """Un-normalised outputs reach 1e5 here and their cotangents 1e-8; float16 holds neither."""
    tensors = {name: x.half().requires_grad_() for name, x in qkv(1, 8192, 1, 64, 64).items()}
    tensors["v"] = (tensors["v"] + 0.1).detach().requires_grad_()
    bare = run(NAME, tensors, impl="eager", causal=causal, norm=None)
    assert bare.isinf().any()
    out = run(NAME, tensors, impl="eager", causal=causal)
    assert out.isfinite().all()
    out.backward(torch.randn_like(out))
    for tensor in tensors.values():
        assert tensor.grad.isfinite().all()
        assert (tensor.grad[:, -100:] != 0).any()


def test_largest_score() -> None:
    tensors = case(150, decay=True)
    q, k = F.silu(tensors["q"]), F.silu(tensors["k"])
    distance = torch.arange(150).unsqueeze(1) - torch.arange(150)
    decay = (tensors["decay"].view(2, 1, 1) * distance).exp()
    scores = torch.einsum("bihk,bjhk->bhij", q, k).abs()
    for causal in (True, False):
        given = tensors if causal else {n: x for n, x in tensors.items() if n != "decay"}
        options = {"impl": "eager", "causal": causal, "feature_map": "silu"}
        _, stats = run(NAME, given, return_stats=True, **options)
        visible = (scores * decay).tril() if causal else scores
        torch.testing.assert_close(stats.max_logit, visible.amax((0, 2, 3)))


@pytest.mark.parametrize("feature_map", ["relu", "silu", None])
def test_zero_keys(feature_map: str | None) -> None:
    """A row without any score is 0 behind the norm, with finite gradients."""
    tensors = case()
    tensors["k"].zero_()
    del tensors["initial_state"]
    found = results(NAME, tensors, impl="eager", feature_map=feature_map, norm="head")
    assert (found[0] == 0).all()
    assert all(x.isfinite().all() for x in found)


def test_feature_map_far_from_zero() -> None:
    """``elu+1`` keeps its relative accuracy where it is small."""
    x = torch.tensor([-80.0, -30.0, -1e-3, 0.0, 1e-3, 50.0]).view(1, 6, 1, 1)
    ones = torch.ones_like(x)
    out = norm_linear_attention(x, ones, ones, impl="eager", norm=None, causal=False)
    exact = torch.where(x > 0, x.double() + 1, x.double().exp()) * 6 * 2
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=0)


def full_case(length: int = 70) -> checks.Inputs:
    tensors = case(length)
    tensors["gate"] = draw(2, length, 2, 5)
    tensors["norm_weight"] = draw(2, 5)
    return tensors


def test_operators() -> None:
    checks.check_operators(NAME, full_case())
    cu_seqlens = torch.tensor([0, 3, 70], dtype=torch.int32)
    packed = qkv(1, 70, 2, 6, 5)
    checks.check_operators(NAME, packed, norm=None, causal=False, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("causal", [True, False])
def test_compile(causal: bool) -> None:
    checks.check_compile(NAME, full_case, causal=causal)


def test_reference_compiles() -> None:
    checks.check_compile(NAME, full_case, impl="reference", lengths=(3,))


def test_gradients_of_gradients_are_refused() -> None:
    checks.check_second_gradients(NAME, full_case(5))


def test_autocast() -> None:
    checks.check_autocast(NAME, full_case())


def test_checkpoint() -> None:
    checks.check_checkpoint(NAME, full_case())


@pytest.mark.parametrize("causal", [True, False])
def test_strides(causal: bool) -> None:
    checks.check_strides(NAME, full_case(), causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_subsets(causal: bool) -> None:
    checks.check_subsets(NAME, full_case(), causal=causal)


def test_deterministic() -> None:
    tensors = {name: x.float() for name, x in full_case(200).items()}
    first, second = (results(NAME, tensors, impl="eager") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=4).filter(any),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    feature_map=st.sampled_from(MAPS),
    norm=st.sampled_from(NORMS),
    mask=st.sampled_from(["causal", "decay", "bidirectional"]),
    seed=st.integers(0, 99),
)
def test_any_packing(
    lengths: list[int],
    sizes: tuple[int, int, int],
    feature_map: str | None,
    norm: str | None,
    mask: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    tensors = case(sum(lengths), (1, *sizes), decay=mask == "decay")
    tensors["initial_state"] = states(tensors, len(lengths))
    options: dict[str, Any] = {"feature_map": feature_map, "norm": norm, "eps": 0.01}
    options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).int()
    options["causal"] = mask != "bidirectional"
    found, wanted = (
        results(NAME, tensors, impl=impl, **options) for impl in ("eager", "reference")
    )
    assert_same(found, wanted)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"feature_map": "exp"}, ValueError, "feature_map must be one of 'elu.1', 'elu'"),
        ({"decay": torch.zeros(3)}, ValueError, r"decay has shape \(3,\), expected \[H=2\]"),
        ({"decay": torch.zeros(2, 70, 2)}, ValueError, r"decay has shape .*expected \[H=2\]"),
        ({"decay": torch.zeros(2).double()}, ValueError, "decay has dtype float64, expected"),
        ({"decay": torch.zeros(2), "causal": False}, ValueError, "decay .*takes causal=True"),
        ({"decay": 0.5}, TypeError, r"decay must be a tensor \[H=2\], got float"),
        ({"causal": "yes"}, TypeError, "causal must be True or False, got 'yes'"),
        ({"k": torch.zeros(2, 71, 2, 6)}, ValueError, "k has shape .*expected .*T=70"),
        ({"norm": "batch"}, ValueError, "norm must be one of 'model', 'head', None"),
        ({"gate_activation": "softplus"}, ValueError, "gate_activation must be one of 'sigmoid'"),
        ({"q": torch.zeros(2, 70, 2, 6).int()}, TypeError, "q has dtype int32, expected float16"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    tensors = {name: x.float() for name, x in case().items()}
    with pytest.raises(error, match=f"norm_linear_attention: .*{message}"):
        norm_linear_attention(**{**tensors, **changes})
