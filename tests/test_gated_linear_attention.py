"""Gated linear attention: exact for every decay, forward and backward."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import linear_checks as checks
import pytest
import torch
from hypothesis import given, settings
from linear_checks import INF, LOG_DECAYS, assert_same, draw, log_decay, qkv, results, run, states
from oracle import assert_matches_definition
from torch import Tensor

from attnvariants import gated_linear_attention

NAME = "gated_linear_attention"
KINDS = ("channel", "token", "constant")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def case(
    length: int = 70,
    kind: str = "channel",
    strength: str = "weak",
    shape: tuple[int, int, int, int] = (2, 2, 6, 5),  # B, H, K, V
) -> checks.Inputs:
    batch, heads, key_dim, value_dim = shape
    tensors = qkv(batch, length, heads, key_dim, value_dim)
    tensors["g"] = log_decay(tensors, kind, strength)
    tensors["initial_state"] = states(tensors, batch)
    return tensors


DTYPES = [(kind, dtype) for kind in KINDS for dtype in (F32, BF16, F16)]
DTYPES += [("channel", F64)]  # the others in float64: test_any_packing


@pytest.mark.parametrize(("kind", "dtype"), DTYPES)
@pytest.mark.parametrize("strength", LOG_DECAYS)
def test_matches_definition(kind: str, strength: str, dtype: torch.dtype) -> None:
    options = {"return_state": True, "return_stats": True}
    assert_matches_definition(
        NAME, case(80, kind, strength, (4, 6, 12, 10)), options, impl="eager", dtype=dtype
    )


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_lengths(kind: str, length: int) -> None:
    tensors = case(length, kind, "plain", (2, 3, 12, 9))
    assert_matches_definition(NAME, tensors, {"return_state": True}, impl="eager", dtype=F32)


@pytest.mark.parametrize("strength", ["weak", "infinite resets"])
def test_many_chunks(strength: str) -> None:
    tensors = case(1000, "channel", strength, (1, 1, 8, 4))
    assert_matches_definition(NAME, tensors, {"return_state": True}, impl="eager", dtype=F32)


@pytest.mark.parametrize("kind", KINDS)
def test_many_segments(kind: str) -> None:
    """With this many heads every chunk is a segment of its own."""
    tensors = case(280, kind, "weak", (1, 40, 3, 2))
    tensors["initial_state"] = states(tensors, 3)
    cu_seqlens = torch.tensor([0, 30, 270, 280], dtype=torch.int32)
    options = {"return_state": True, "cu_seqlens": cu_seqlens}
    assert_matches_definition(NAME, tensors, options, impl="eager", dtype=F32)


@pytest.mark.parametrize(
    "shape", [(1, 24, 1, 1), (1, 8, 1, 30), (1, 1, 100, 60), (1, 1, 256, 256), (3, 40, 3, 2)]
)
@pytest.mark.parametrize("kind", ["channel", "token"])
def test_head_dims(shape: tuple[int, int, int, int], kind: str) -> None:
    options = {"return_state": True, "scale": 0.3}
    assert_matches_definition(NAME, case(40, kind, "weak", shape), options, impl="eager", dtype=F32)


@pytest.mark.parametrize("activation", ["silu", "sigmoid", None])
@pytest.mark.parametrize("norm", ["model", "head", None])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_epilogue(norm: str | None, activation: str | None, dtype: torch.dtype) -> None:
    tensors = case(66, shape=(2, 2, 12, 10))
    tensors["norm_weight"] = draw(2, 10) if norm == "head" else draw(10)
    tensors["gate"] = draw(2, 66, 2, 10) if norm == "model" else draw(2, 66, 2)
    options = {"norm": norm, "eps": 1e-3, "gate_activation": activation, "return_state": True}
    assert_matches_definition(NAME, tensors, options, impl="eager", dtype=dtype)


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind: str, impl: str) -> None:
    """Every sequence as if it were alone; an empty one hands its state on."""
    bounds = [0, 0, 5, 69, 69, 200, 264, 270, 270]
    tensors = case(bounds[-1], kind, "plain", (1, 2, 6, 5))
    tensors["initial_state"] = states(tensors, len(bounds) - 1)
    tensors["gate"] = draw(1, bounds[-1], 2, 5)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    found = results(NAME, tensors, impl=impl, cu_seqlens=cu_seqlens, norm="model")
    alone = []
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        piece = {name: x if x.dim() == 1 else x[:, start:end] for name, x in tensors.items()}
        piece["initial_state"] = tensors["initial_state"][index : index + 1]
        if end > start:
            out, state = run(NAME, piece, impl=impl, return_state=True, norm="model")
            alone.append(out)
        else:
            state = piece["initial_state"]
        torch.testing.assert_close(found[1][index : index + 1], state)
    torch.testing.assert_close(found[0], torch.cat(alone, 1))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_gradients(kind: str, dtype: torch.dtype) -> None:
    bounds = [0, 3, 3, 67, 131, 140]
    tensors = case(140, kind, "plain", (1, 2, 12, 10))
    tensors["initial_state"] = states(tensors, 5)
    options = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "return_state": True}
    options["return_stats"] = True
    assert_matches_definition(NAME, tensors, options, impl="eager", dtype=dtype)


def test_all_sequences_empty_but_one() -> None:
    tensors = case(1, "token", "weak", (1, 2, 3, 4))
    tensors["initial_state"] = states(tensors, 3)
    cu_seqlens = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    out, state = run(NAME, tensors, impl="eager", cu_seqlens=cu_seqlens, return_state=True)
    assert out.shape == (1, 1, 2, 4)
    assert torch.equal(state[0], tensors["initial_state"][0])
    assert torch.equal(state[2], tensors["initial_state"][2])


@pytest.mark.parametrize("kind", KINDS)
def test_state_carries_on(kind: str) -> None:
    """Pieces with the state handed over equal one pass, in outputs and gradients."""
    tensors = {name: x.requires_grad_() for name, x in case(150, kind, "plain").items()}
    whole, last = run(NAME, tensors, impl="eager", return_state=True)
    state, pieces = tensors["initial_state"], []
    for start, end in ((0, 1), (1, 64), (64, 130), (130, 150)):
        piece = {
            name: x if name == "g" and kind == "constant" else x[:, start:end]
            for name, x in tensors.items()
        }
        piece["initial_state"] = state
        out, state = run(NAME, piece, impl="eager", return_state=True)
        pieces.append(out)
    assert_same([torch.cat(pieces, 1), state], [whole, last])
    cotangents = [torch.randn_like(whole), torch.randn_like(last)]
    leaves = list(tensors.values())
    found = torch.autograd.grad([torch.cat(pieces, 1), state], leaves, cotangents)
    assert_same(list(found), list(torch.autograd.grad([whole, last], leaves, cotangents)))


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_decay_shapes_agree(impl: str) -> None:
    """Constant = the same for every token = the same for every channel; zeros = none."""
    tensors = case(70)
    head = log_decay(tensors, "constant", "plain")
    token = log_decay(tensors, "token", "plain")
    for narrow, wide in (
        (head, head.expand(2, 70, 2)),
        (token, token.unsqueeze(-1).expand(2, 70, 2, 6)),
    ):
        expected = results(NAME, {**tensors, "g": wide.contiguous()}, impl=impl)
        found = results(NAME, {**tensors, "g": narrow}, impl=impl)
        over = (0, 1) if narrow.dim() == 1 else -1
        expected[5] = expected[5].sum(over)  # dg
        assert_same(found, expected)
    del tensors["g"]
    expected = results(NAME, tensors, g=None, impl=impl)
    for kind in KINDS:
        g = log_decay(tensors, kind, "zero")
        found = results(NAME, {**tensors, "g": g}, impl=impl)
        del found[6]  # dg, which comes last
        assert_same(found, expected)


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_infinite_decay_is_a_reset(kind: str, impl: str) -> None:
    """``-inf`` and ``-1e3`` are the same function, in every result; its gradient is 0."""
    tensors = case(100, kind, "infinite resets")
    if kind == "constant":
        tensors["g"][0] = -INF
    infinite = tensors["g"] == -INF
    assert infinite.any()
    found = results(NAME, tensors, impl=impl, norm="head")
    finite = {**tensors, "g": tensors["g"].clamp(min=-1e3)}
    for actual, expected in zip(found, results(NAME, finite, impl=impl, norm="head"), strict=True):
        assert torch.equal(actual, expected)
        assert actual.isfinite().all()
    dg = found[5]
    assert (dg[infinite] == 0).all()
    assert (dg[~infinite] != 0).any()


def test_nothing_passes_a_reset() -> None:
    """Behind a token with ``g = -inf`` nothing is left of what was before, not even of 1e30."""
    tensors = case(130, "channel", "weak", (1, 2, 6, 5))
    tensors["g"][:, 100] = -INF
    tensors["v"][:, :100] *= 1e30
    tensors["initial_state"] *= 1e30
    tail = {name: x[:, 100:] for name, x in tensors.items()}
    tail["initial_state"] = torch.zeros_like(tensors["initial_state"])
    expected, last = run(NAME, tail, impl="eager", return_state=True)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    out, state = run(NAME, leaves, impl="eager", return_state=True)
    torch.testing.assert_close((out[:, 100:], state), (expected, last))
    (out[:, 100:].sum() + state.sum()).backward()
    assert (leaves["initial_state"].grad == 0).all()
    for name in ("q", "k", "v", "g"):
        assert (leaves[name].grad[:, :100] == 0).all(), name


@pytest.mark.parametrize("far_apart", [False, True])
def test_largest_score(far_apart: bool) -> None:
    tensors = case(150, "channel", "weak" if far_apart else "plain")
    if far_apart:  # one query and one key only, three chunks from each other
        for name, position in (("q", 140), ("k", 3)):
            only = torch.zeros_like(tensors[name])
            only[:, position] = tensors[name][:, position]
            tensors[name] = only
    _, stats = run(NAME, tensors, impl="eager", return_stats=True, scale=-0.5)
    total = tensors["g"].cumsum(1)
    scores = torch.zeros(2, 150, 150, 2, dtype=F64)
    for i in range(150):
        decay = (total[:, i : i + 1] - total[:, : i + 1]).exp()
        keys = decay * tensors["k"][:, : i + 1]
        scores[:, i, : i + 1] = (tensors["q"][:, i : i + 1] * keys).sum(-1)
    torch.testing.assert_close(stats.max_logit, 0.5 * scores.abs().amax((0, 1, 2)))
    assert stats.max_logit.all()
    assert stats.lse is None
    assert not stats.max_logit.requires_grad


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, impl: str) -> None:
    tensors = case(7 if impl == "reference" else 68, kind, "plain", (1, 2, 3, 2))
    tensors["gate"] = draw(*tensors["v"].shape)
    tensors["norm_weight"] = draw(2, 2)
    checks.check_gradients(NAME, tensors, impl, norm="model", eps=0.1)


def test_gradient_of_the_state_alone() -> None:
    tensors = {name: x.requires_grad_() for name, x in case().items()}
    grads = []
    for impl in ("eager", "reference"):
        _, state = run(NAME, tensors, impl=impl, return_state=True)
        grads.append(torch.autograd.grad(state.sin().sum(), list(tensors.values())[1:]))
    assert_same(list(grads[0]), list(grads[1]))


@pytest.mark.parametrize("zero", ["q", "k", "v"])
def test_zero_rows(zero: str) -> None:
    """The norm of a zero output is zero, with finite gradients."""
    tensors = case()
    tensors[zero].zero_()
    del tensors["initial_state"]
    found = results(NAME, tensors, impl="eager", norm="head", gate=draw(2, 70, 2))
    assert (found[0] == 0).all()
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_dtypes_of_results(impl: str) -> None:
    tensors = {name: x.to(BF16) for name, x in case().items()}
    tensors["initial_state"] = tensors["initial_state"].float()
    for g in (tensors["g"], tensors["g"].float()):
        found = results(NAME, {**tensors, "g": g}, impl=impl)
        wanted = [BF16, F32, BF16, BF16, BF16, g.dtype, F32]
        assert [x.dtype for x in found] == wanted
    double = results(NAME, case(), impl=impl)
    assert {x.dtype for x in double} == {F64}


def full_case(length: int = 70) -> checks.Inputs:
    tensors = case(length)
    tensors["gate"] = draw(2, length, 2, 5)
    tensors["norm_weight"] = draw(2, 5)
    return tensors


def test_operators() -> None:
    checks.check_operators(NAME, full_case(), norm="head")
    checks.check_operators(NAME, case(kind="token"))
    packed = case(70, "constant", "plain", (1, 2, 6, 5))
    del packed["initial_state"]
    cu_seqlens = torch.tensor([0, 3, 70], dtype=torch.int32)
    checks.check_operators(NAME, packed, cu_seqlens=cu_seqlens, norm="model")


def test_compile() -> None:
    checks.check_compile(NAME, full_case, norm="head")


def test_reference_compiles() -> None:
    checks.check_compile(NAME, full_case, impl="reference", lengths=(3,), norm="head")


def test_gradients_of_gradients_are_refused() -> None:
    checks.check_second_gradients(NAME, full_case(5), norm="head")


def test_autocast() -> None:
    checks.check_autocast(NAME, full_case(), norm="head")


def test_checkpoint() -> None:
    checks.check_checkpoint(NAME, full_case(), norm="head")


def test_strides() -> None:
    checks.check_strides(NAME, full_case(), norm="head")
    tensors = full_case()
    tensors["g"] = tensors["g"][:, :1, :, :1].expand(2, 70, 2, 6)  # stride 0
    tensors["gate"] = tensors["gate"][:1, :1].expand(2, 70, 2, 5)
    copied = {name: x.contiguous() for name, x in tensors.items()}
    assert_same(results(NAME, tensors, impl="eager"), results(NAME, copied, impl="eager"))


def test_subsets() -> None:
    checks.check_subsets(NAME, full_case(), norm="model")
    checks.check_subsets(NAME, case(kind="constant"))


def test_deterministic() -> None:
    tensors = {name: x.float() for name, x in full_case(200).items()}
    first, second = (results(NAME, tensors, impl="eager", norm="model") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_are_not_modified() -> None:
    tensors = full_case()
    copies = {name: x.clone() for name, x in tensors.items()}
    results(NAME, tensors, impl="eager", norm="model")
    assert all(torch.equal(tensors[name], copies[name]) for name in tensors)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4).filter(any),
    heads=st.integers(1, 3),
    key_dim=st.integers(1, 9),
    value_dim=st.integers(1, 9),
    kind=st.sampled_from(KINDS),
    strength=st.sampled_from(sorted(LOG_DECAYS)),
    seed=st.integers(0, 99),
)
def test_any_packing(
    lengths: list[int],
    heads: int,
    key_dim: int,
    value_dim: int,
    kind: str,
    strength: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    tensors = case(sum(lengths), kind, strength, (1, heads, key_dim, value_dim))
    tensors["initial_state"] = states(tensors, len(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    found, wanted = (
        results(NAME, tensors, cu_seqlens=bounds, impl=impl) for impl in ("eager", "reference")
    )
    assert_same(found, wanted)


def _with(**changes: Any) -> dict[str, Any]:
    tensors = {name: x.float() for name, x in case().items()}
    return {**tensors, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, r"q must be a tensor \[B, T, H, K\], got list"),
        ({"q": torch.zeros(2, 70, 2)}, ValueError, r"q has shape \(2, 70, 2\), expected \[B, T"),
        (
            {"k": torch.zeros(2, 70, 1, 6)},
            ValueError,
            r"k has shape \(2, 70, 1, 6\), expected .*H=2",
        ),
        ({"v": torch.zeros(2, 69, 2, 5)}, ValueError, r"v has shape .*expected \[B=2, T=70"),
        ({"v": torch.zeros(2, 70, 2, 300)}, ValueError, r"head dim of v must be between 1 and 256"),
        ({"g": torch.zeros(2, 70, 2, 5)}, ValueError, r"g has shape .*K=6.* or .* or \[H=2\]"),
        ({"g": torch.zeros(3)}, ValueError, r"g has shape \(3,\)"),
        ({"g": torch.zeros(2, 70, 2).half()}, ValueError, "g has dtype float16, expected float32"),
        ({"q": torch.zeros(2, 70, 2, 6).half()}, ValueError, "one dtype, got q float16, k float32"),
        ({"scale": "big"}, TypeError, "scale must be a number or None"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"norm": "layer"}, ValueError, "norm must be one of 'model', 'head', None, got 'layer'"),
        ({"eps": -1.0}, ValueError, "eps must not be negative, got -1.0"),
        ({"eps": None}, TypeError, "eps must be a number, got None"),
        ({"gate_activation": "relu"}, ValueError, "gate_activation must be one of 'sigmoid'"),
        ({"norm_weight": torch.zeros(2)}, ValueError, r"norm_weight has shape \(2,\), expected"),
        ({"gate": torch.zeros(2, 70)}, ValueError, r"gate has shape \(2, 70\), expected \[B=2"),
        ({"gate": torch.zeros(2, 70, 2).double()}, ValueError, "gate has dtype float64"),
        ({"initial_state": torch.zeros(1, 2, 6, 5)}, ValueError, "initial_state has shape .*N=2"),
        ({"initial_state": torch.zeros(2, 2, 6, 5).half()}, ValueError, "dtype float16, expected"),
        ({"return_state": 1}, TypeError, "return_state must be True or False, got 1"),
        ({"return_stats": None}, TypeError, "return_stats must be True or False"),
        ({"cu_seqlens": torch.tensor([0, 70]).int()}, ValueError, "batch of 1, got 2"),
        ({"impl": "fast"}, ValueError, "impl must be one of 'auto'"),
        (
            {"g": torch.zeros(2, 70, 2, device="meta")},
            ValueError,
            "must be on one device.*g on meta",
        ),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"gated_linear_attention: .*{message}"):
        gated_linear_attention(**_with(**changes))


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([1, 70], "start at 0"),
        ([0, 60], "end at the packed length 70"),
        ([0, 9, 8, 70], "decrease"),
    ],
)
def test_bounds_errors(bounds: list[int], message: str, impl: str) -> None:
    tensors: dict[str, Tensor] = case(shape=(1, 2, 6, 5))
    del tensors["initial_state"]
    with pytest.raises(ValueError, match=message):
        run(NAME, tensors, cu_seqlens=torch.tensor(bounds).int(), impl=impl)


def test_missing_kernel_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="impl='cuda' cannot serve this call"):
        run(NAME, case(), impl="cuda")
