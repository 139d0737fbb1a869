"""The Triton kernels of the linear attentions, in Triton's interpreter, against float64."""

from __future__ import annotations

from typing import Any

import linear_checks as checks
import pytest
import torch
import torch.nn.functional as F
from linear_checks import (
    INF,
    LOG_DECAYS,
    bounds,
    draw,
    gated,
    normed,
    qkv,
    results,
    run,
    single,
    states,
)
from oracle import assert_matches_definition, assert_within_budget

from attnvariants import linear_attention_decode, norm_linear_attention
from attnvariants.reference.norm_linear_attention import final_state

GATED, NORM = "gated_linear_attention", "norm_linear_attention"
KINDS = ("channel", "token", "constant")
NORMS = ("model", "head", None)
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
HALVES = [0, 3, 3, 67, 131, 140]  # bounds of packed sequences, one of them empty


def assert_exact(
    function: str, tensors: checks.Inputs, dtype: torch.dtype = F32, **options: Any
) -> None:
    options = {"return_state": True, **options}
    assert_matches_definition(function, tensors, options, impl="triton", dtype=dtype)


@pytest.fixture(autouse=True)
def _large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a small tile as for a large one."""
    from attnvariants.kernels._launch import tile_dim
    from attnvariants.kernels._linear_configs import Tiles

    from attnvariants.kernels import linear

    def tiles(kernel: str, dtype: torch.dtype, key_dim: int, value_dim: int) -> Tiles:
        return Tiles(64, tile_dim(key_dim), tile_dim(value_dim), 4, 1)

    monkeypatch.setattr(linear, "tiles", tiles)


@pytest.fixture
def table_tiles(_large_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of a device, several of them along K and V."""
    from attnvariants.kernels import _linear_configs, linear

    monkeypatch.setattr(linear, "tiles", _linear_configs.tiles)


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts sequences as if the device were large and every pass over them dear."""
    from attnvariants.kernels import _linear_configs, linear

    monkeypatch.setattr(_linear_configs, "PROGRAMS", 1 << 20)
    monkeypatch.setattr(_linear_configs, "SHORTEST", 128)
    monkeypatch.setattr(linear, "STRIDE", 64)


# Few numbers are often one large one, and its error a matter of luck.
SHAPES = {"channel": (1, 2, 12, 10), "token": (2, 3, 12, 10), "constant": (2, 5, 12, 10)}
DECAYS = [(dtype, strength) for dtype in (F32, BF16) for strength in LOG_DECAYS]
DECAYS += [(F16, strength) for strength in ("weak", "strong", "infinite resets")]


@pytest.mark.parametrize(("dtype", "strength"), DECAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_definition(kind: str, strength: str, dtype: torch.dtype) -> None:
    assert_exact(GATED, gated(80, kind, strength, SHAPES[kind]), dtype)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_lengths(kind: str, length: int) -> None:
    assert_exact(GATED, gated(length, kind, "plain", SHAPES[kind]))


@pytest.mark.usefixtures("table_tiles")
@pytest.mark.parametrize("length", [1, 31, 33, 100])
def test_lengths_with_small_tiles(length: int) -> None:
    assert_exact(GATED, gated(length, "channel", "plain", (1, 1, 20, 9)))


@pytest.mark.usefixtures("table_tiles")
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 2, 40, 20), (1, 1, 100, 70), (1, 1, 256, 256)])
@pytest.mark.parametrize("kind", ["channel", "token"])
def test_head_dims(kind: str, shape: tuple[int, int, int, int]) -> None:
    assert_exact(GATED, gated(10 if max(shape) > 100 else 40, kind, "weak", shape), scale=0.3)


@pytest.mark.parametrize("activation", ["silu", "sigmoid", None])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_epilogue(norm: str | None, activation: str | None, dtype: torch.dtype) -> None:
    tensors = gated(66, "token")
    tensors["norm_weight"] = draw(2, 10) if norm == "head" else draw(10)
    tensors["gate"] = draw(1, 66, 2, 10) if norm == "model" else draw(1, 66, 2)
    assert_exact(GATED, tensors, dtype, norm=norm, eps=1e-3, gate_activation=activation)


@pytest.mark.usefixtures("table_tiles")
@pytest.mark.parametrize("norm", ["model", "head"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_norm_over_several_slices_of_the_values(norm: str, dtype: torch.dtype) -> None:
    tensors = normed(40, (1, 2, 10, 150))
    tensors["gate"] = draw(1, 40, 2, 150)
    assert_exact(NORM, tensors, dtype, norm=norm)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("feature_map", ["elu+1", "elu", "relu", "silu", None])
def test_feature_maps(feature_map: str | None, causal: bool, dtype: torch.dtype) -> None:
    tensors = normed(100, (1, 2, 20, 16))
    options = {"feature_map": feature_map, "causal": causal, "eps": 1e-2}
    assert_exact(NORM, tensors, dtype, return_stats=True, **options)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
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


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("kind", KINDS)
def test_segments(kind: str) -> None:
    """A pass over segments beside each other first, then one that joins their states."""
    assert_exact(GATED, gated(300, kind, "weak", (1, 2, 7, 5)))


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("kind", ["channel", "constant"])
def test_segments_of_packed_sequences(kind: str) -> None:
    tensors = gated(390, kind, "weak", (1, 1, 7, 5))
    tensors["initial_state"] = states(tensors, 5)
    assert_exact(GATED, tensors, BF16, cu_seqlens=bounds(0, 5, 128, 257, 0))


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_segments_of_norm_attention(causal: bool, packed: bool) -> None:
    tensors = normed(300, (1, 2, 7, 5))
    options: dict[str, Any] = {"causal": causal, "norm": "head"}
    if packed:
        tensors["initial_state"] = states(tensors, 3)
        options["cu_seqlens"] = bounds(20, 280, 0)
    assert_exact(NORM, tensors, **options)


@pytest.mark.parametrize("strength", ["weak", "infinite resets"])
def test_kept_states(strength: str) -> None:
    """The backward finds states again from those that it kept, over several chunks."""
    assert_exact(GATED, gated(600, "channel", strength, (1, 1, 6, 5)))


def test_no_initial_state_and_no_gradient_of_the_state() -> None:
    tensors = single(gated(300, "token"))
    del tensors["initial_state"]
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    found, wanted = (
        torch.autograd.grad(run(GATED, leaves, impl=impl).square().sum(), list(leaves.values()))
        for impl in ("triton", "eager")
    )
    torch.testing.assert_close(found, wanted)


def test_gradient_of_the_state_alone() -> None:
    leaves = {name: x.requires_grad_() for name, x in single(gated()).items()}
    inputs = list(leaves.values())[1:]
    found, wanted = (
        torch.autograd.grad(run(GATED, leaves, impl=impl, return_state=True)[1].sin().sum(), inputs)
        for impl in ("triton", "eager")
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["channel", "token"])
def test_state_carries_on(kind: str) -> None:
    """Pieces with the state handed over equal one pass, in outputs and gradients."""
    tensors = {name: x.requires_grad_() for name, x in single(gated(150, kind)).items()}
    whole, last = run(GATED, tensors, impl="triton", return_state=True)
    state, pieces = tensors["initial_state"], []
    for start, end in ((0, 1), (1, 64), (64, 130), (130, 150)):
        piece = {name: x[:, start:end] for name, x in tensors.items()}
        out, state = run(GATED, {**piece, "initial_state": state}, impl="triton", return_state=True)
        pieces.append(out)
    torch.testing.assert_close((torch.cat(pieces, 1), state), (whole, last))
    cotangents = [torch.randn_like(whole), torch.randn_like(last)]
    leaves = list(tensors.values())
    found = torch.autograd.grad([torch.cat(pieces, 1), state], leaves, cotangents)
    wanted = torch.autograd.grad([whole, last], leaves, cotangents)
    torch.testing.assert_close(found, wanted)


def test_prefill_then_steps() -> None:
    tensors = single(gated(70))
    whole, last = run(GATED, tensors, impl="triton", return_state=True)
    prompt = {name: x[:, :67] for name, x in tensors.items()}
    prompt["initial_state"] = tensors["initial_state"]
    out, state = run(GATED, prompt, impl="triton", return_state=True)
    outputs = [out]
    for t in range(67, 70):
        step = [tensors[name][:, t : t + 1] for name in ("q", "k", "v", "g")]
        outputs.append(linear_attention_decode(*step, state, impl="eager"))
    torch.testing.assert_close((torch.cat(outputs, 1), state), (whole, last))


@pytest.mark.parametrize("kind", KINDS)
def test_infinite_decay_is_a_reset(kind: str) -> None:
    """``-inf`` and ``-1e3`` are the same function, in every result; its gradient is 0."""
    tensors = single(gated(100, kind, "infinite resets"))
    if kind == "constant":
        tensors["g"][0] = -INF
    infinite = tensors["g"] == -INF
    assert infinite.any()
    found = results(GATED, tensors, impl="triton", norm="head")
    finite = {**tensors, "g": tensors["g"].clamp(min=-1e3)}
    wanted = results(GATED, finite, impl="triton", norm="head")
    for actual, expected in zip(found, wanted, strict=True):
        assert torch.equal(actual, expected)
        assert actual.isfinite().all()
    dg = found[5]
    assert (dg[infinite] == 0).all()
    assert (dg[~infinite] != 0).any()


def test_nothing_passes_a_reset() -> None:
    """Behind a token with ``g = -inf`` nothing is left of what was before, not even of 1e30."""
    tensors = single(gated(130, "channel", "weak", (1, 1, 6, 5)))
    tensors["g"][:, 100] = -INF
    tensors["v"][:, :100] *= 1e30
    tensors["initial_state"] *= 1e30
    tail = {name: x[:, 100:] for name, x in tensors.items()}
    tail["initial_state"] = torch.zeros_like(tensors["initial_state"])
    expected, last = run(GATED, tail, impl="triton", return_state=True)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    out, state = run(GATED, leaves, impl="triton", return_state=True)
    torch.testing.assert_close((out[:, 100:], state), (expected, last))
    (out[:, 100:].sum() + state.sum()).backward()
    assert (leaves["initial_state"].grad == 0).all()
    for name in ("q", "k", "v", "g"):
        assert (leaves[name].grad[:, :100] == 0).all(), name


@pytest.mark.parametrize("causal", [True, False])
def test_half_precision_does_not_overflow(causal: bool) -> None:
    """Un-normalised outputs reach 1e5 here; float16 does not hold them."""
    tensors = {name: x.half() for name, x in qkv(1, 2048, 1, 64, 16).items()}
    tensors["v"] += 1
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    assert run(NORM, tensors, impl="triton", causal=causal, norm=None).isinf().any()
    out = run(NORM, tensors, impl="triton", causal=causal)
    assert out.isfinite().all()
    out.backward(torch.randn_like(out))
    for tensor in tensors.values():
        assert tensor.grad.isfinite().all()
        assert (tensor.grad[:, -100:] != 0).any()


def test_errors_do_not_compound_over_chunks() -> None:
    """A decay that float32 rounds badly per chunk is still right over 256 chunks."""
    decay = torch.tensor([-4.5e-10])  # exp(64 decay) lies between 1 and the number before it
    q, k, v = (torch.ones(1, 2**14, 1, 2) for _ in range(3))
    options = {"feature_map": None, "norm": None, "return_state": True, "impl": "triton"}
    _, state = norm_linear_attention(q, k, v, decay=decay, **options)
    start = torch.zeros(1, 1, 2, 2)
    plain = final_state(k, v, decay, start)
    truth = final_state(k.double(), v.double(), decay.double(), start.double())
    assert_within_budget(state, truth, plain)


def test_decays_close_to_one_leave_no_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one float32 factor leaves out of each chunk would add up to 4e-6 in a walk over all."""
    from attnvariants.kernels import _linear_configs

    monkeypatch.setattr(_linear_configs, "PROGRAMS", 0)  # one segment
    decay = torch.tensor([-4.5e-10])  # exp(64 decay) lies between 1 and the number before it
    q, k, v = (torch.rand(1, 2**14, 1, 2) for _ in range(3))
    options = {"feature_map": None, "norm": None, "return_state": True, "impl": "triton"}
    _, state = norm_linear_attention(q, k, v, decay=decay, **options)
    truth = final_state(
        k.double(), v.double(), decay.double(), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    )
    assert (state / truth - 1).mean().abs() < 5e-7


@pytest.mark.parametrize("zero", ["q", "k", "v"])
def test_zero_rows(zero: str) -> None:
    """The norm of a zero output is zero, with finite gradients."""
    tensors = single(gated(70, "token"))
    tensors[zero].zero_()
    del tensors["initial_state"]
    for norm in ("head", "model"):
        found = results(GATED, tensors, impl="triton", norm=norm, gate=torch.randn(1, 70, 2))
        assert (found[0] == 0).all()
        assert all(x.isfinite().all() for x in found)


def test_dtypes_of_results() -> None:
    tensors = {name: x.to(BF16) for name, x in gated(20).items()}
    tensors["initial_state"] = tensors["initial_state"].float()
    for g in (tensors["g"], tensors["g"].float(), tensors["g"][..., 0], tensors["g"][0, 0, :, 0]):
        found = results(GATED, {**tensors, "g": g}, impl="triton")
        assert [x.dtype for x in found] == [BF16, F32, BF16, BF16, BF16, g.dtype, F32]


def full(length: int = 70, kind: str = "channel") -> checks.Inputs:
    tensors = single(gated(length, kind, "plain", (1, 2, 6, 5)))
    tensors["gate"] = draw(1, length, 2, 5).float()
    tensors["norm_weight"] = draw(2, 5).float()
    return tensors


@pytest.mark.parametrize("norm", ["model", "head"])
def test_strides(norm: str) -> None:
    checks.check_strides(GATED, full(), impl="triton", norm=norm)


def test_deterministic() -> None:
    tensors = full(200, "constant")
    first, second = (results(GATED, tensors, impl="triton", norm="model") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_are_not_modified() -> None:
    tensors = full()
    copies = {name: x.clone() for name, x in tensors.items()}
    results(GATED, tensors, impl="triton", norm="model")
    assert all(torch.equal(tensors[name], copies[name]) for name in tensors)


def test_operators() -> None:
    checks.check_operators(GATED, full(20), impl="triton", norm="head")
    packed = single(qkv(1, 20, 2, 6, 5))
    options = {"causal": False, "cu_seqlens": bounds(3, 17)}
    checks.check_operators(NORM, packed, impl="triton", norm=None, **options)


def test_compile() -> None:
    checks.check_compile(GATED, full, impl="triton", lengths=(20, 12), norm="head")


def test_autocast() -> None:
    checks.check_autocast(GATED, full(20), impls=("triton",), norm="head")


def test_checkpoint() -> None:
    checks.check_checkpoint(GATED, full(20), impl="triton", norm="model")


def test_float64_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="float64"):
        run(GATED, gated(5), impl="triton")


def test_the_choice_of_segments() -> None:
    from attnvariants.kernels._linear_configs import PROGRAMS, SHORTEST, segment_length

    def segments(sequences: int, length: int, programs: int) -> int:
        return -(-length // segment_length(sequences, sequences * length, programs, length))

    assert segments(8, 4096, 16) == 1  # they fill the device
    assert segments(1, SHORTEST, 1) == 1  # too short
    assert segments(1, 65536, 16) == PROGRAMS // 16
    assert segments(1, 1 << 20, 1) == PROGRAMS
    assert segments(2, 4096, 4) * 8 <= PROGRAMS


@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_hgrn2(impl: str) -> None:
    """HGRN2 (arXiv 2404.07904): the keys are what the forget gate leaves, ``1 - exp(g)``."""
    q, v, f = (torch.randn(1, 40, 2, 8) for _ in range(3))
    g = F.logsigmoid(f)
    out = run(GATED, {"q": q, "k": -g.expm1(), "v": v, "g": g}, scale=1.0, impl=impl)
    state, expected = torch.zeros(1, 2, 8, 8), []
    for t in range(40):
        forget = f[:, t].sigmoid().unsqueeze(-1)
        state = forget * state + (1 - forget) * v[:, t].unsqueeze(-2)
        expected.append((q[:, t].unsqueeze(-1) * state).sum(-2))
    torch.testing.assert_close(out, torch.stack(expected, 1))


@pytest.mark.parametrize("impl", ["triton", "eager"])
@pytest.mark.parametrize("preset", ["retnet", "lightning"])
def test_constant_decays(preset: str, impl: str) -> None:
    """RetNet (arXiv 2307.08621) and Lightning Attention, as their parallel form."""
    heads, layer, layers = 4, 2, 12
    head = torch.arange(heads, dtype=F32)
    if preset == "retnet":
        g = torch.log(1 - 2 ** -(5 + head))
    else:
        g = -(2 ** (-8 * (head + 1) / heads)) * (1 - layer / (layers - 1) + 1e-5)
    q, k, v = (torch.randn(1, 70, heads, 8) for _ in range(3))
    out = run(GATED, {"q": q, "k": k, "v": v, "g": g}, impl=impl)
    distance = torch.arange(70).unsqueeze(1) - torch.arange(70)
    mask = (g.view(-1, 1, 1) * distance).exp().tril()
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * mask * 8**-0.5
    torch.testing.assert_close(out, torch.einsum("bhij,bjhv->bihv", scores, v))
