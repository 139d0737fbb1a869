"""NormLinearAttention: the layer against the masked left product, decays, LRPE, presets."""

from __future__ import annotations

import copy
import math
from typing import Any

import layer_checks as checks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnvariants import NormLinearAttention
from attnvariants.modules.norm_linear_attention import alibi_decay, paper_decay

PHI = {
    "elu+1": lambda x: F.elu(x) + 1,
    "elu": F.elu,
    "relu": F.relu,
    "silu": F.silu,
    None: lambda x: x,
}
DECAY = [0.0, -0.1, -1.0, -30.0]

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "elu": {"feature_map": "elu", "num_kv_heads": 2},
    "relu, per head": {"feature_map": "relu", "norm": "head", "norm_eps": 1e-2},
    "no norm, no map": {"feature_map": None, "norm": None},
    "decay": {"decay": DECAY},
    "affine": {"elementwise_affine": True, "output_gate": "sigmoid", "decay": DECAY},
    "affine per head": {"norm": "head", "elementwise_affine": True, "output_gate": "silu"},
    "linear gate": {"output_gate": "linear", "head_dim": 6, "bias": True},
    "LRPE": {"lrpe": True, "num_kv_heads": 2},
    "LRPE, concat": {"lrpe": "concat", "feature_map": "silu", "decay": DECAY},
    "bidirectional": {"causal": False},
    "bidirectional LRPE": {"causal": False, "lrpe": True, "output_gate": "sigmoid"},
}


def make(dtype: torch.dtype = torch.float64, **options: Any) -> NormLinearAttention:
    layer = NormLinearAttention(32, 4, **options, dtype=dtype)
    if layer.norm_weight is not None:
        torch.nn.init.normal_(layer.norm_weight, mean=1.0)
    return layer


def scores(layer: NormLinearAttention, x: Tensor) -> Tensor:
    """``phi(q_i) . phi(k_j) * decay``, ``[B, H, i, j]``."""
    batch, length, _ = x.shape
    position = torch.arange(length)

    def featured(linear: torch.nn.Linear) -> Tensor:
        y = PHI[layer.feature_map](linear(x).view(batch, length, -1, layer.head_dim))
        return encoded(layer, y).repeat_interleave(4 // y.shape[2], 2)

    q, k = featured(layer.q_proj), featured(layer.k_proj)
    found = torch.einsum("bihk,bjhk->bhij", q, k)
    distance = position[:, None] - position
    if layer.causal:
        found = found * (distance >= 0)
    if layer.decay is not None:
        found = found * (layer.decay[:, None, None] * distance.clamp(min=0)).exp()
    return found


def encoded(layer: NormLinearAttention, y: Tensor) -> Tensor:
    """LRPE: Householder matrix and complex rotation, or cosines beside sines."""
    if layer.lrpe is None:
        return y
    angle = torch.arange(y.shape[1])[:, None, None] * layer.lrpe.theta.double()
    if layer.lrpe_form == "concat":
        return torch.cat([y * angle.cos(), y * angle.sin()], -1).to(y.dtype)
    v = layer.lrpe.reflection.to(y.dtype)
    y = y - 2 * torch.einsum("bthd,d,e->bthe", y, v, v) / v.dot(v)
    half = y.shape[-1] // 2
    turned = torch.complex(y[..., :half].double(), y[..., half:].double())
    turned = turned * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1).to(y.dtype)


def definition(layer: NormLinearAttention, x: Tensor) -> Tensor:
    batch, length, _ = x.shape
    v = layer.v_proj(x).view(batch, length, -1, layer.head_dim)
    v = v.repeat_interleave(4 // v.shape[2], 2)
    out = torch.einsum("bhij,bjhv->bihv", scores(layer, x).to(v.dtype), v)
    if layer.norm is not None:
        axes = (-2, -1) if layer.norm == "model" else (-1,)
        out = out * (out.square().mean(axes, keepdim=True) + layer.norm_eps).rsqrt()
    if layer.norm_weight is not None:
        out = out * layer.norm_weight
    if layer.output_gate is not None:
        gate = layer.gate_proj(x).view(out.shape)
        gate = {"sigmoid": torch.sigmoid, "silu": F.silu, "linear": lambda u: u}[layer.output_gate](
            gate
        )
        out = out * gate
    return layer.o_proj(out.flatten(2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_equals_its_formula(variant: str) -> None:
    checks.matches_definition(make(**VARIANTS[variant]), checks.tokens(2, 17, 32), definition)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "bidirectional" not in name])
def test_prefill_and_steps_equal_the_whole_sequence(name: str) -> None:
    layer = make(**VARIANTS[name])
    checks.steps_equal_full(layer, checks.tokens(2, 40, 32), prompt=5, sizes=[1, 8, 9, 2])


@pytest.mark.parametrize("name", ["decay", "LRPE", "LRPE, concat"])
def test_ragged_prompts(name: str) -> None:
    x = checks.tokens(4, 20, 32)
    checks.ragged_steps_equal_full(make(**VARIANTS[name]), x, prompts=[9, 1, 4, 6], steps=11)


@pytest.mark.parametrize("name", ["affine", "LRPE", "bidirectional LRPE"])
def test_packed_sequences(name: str) -> None:
    checks.packed_equals_separate(make(**VARIANTS[name]), [5, 1, 0, 70])


@pytest.mark.parametrize("name", ["linear gate", "bidirectional"])
def test_padding(name: str) -> None:
    """In the bidirectional form too, where the published code lets padding into ``K^T V``."""
    checks.padding_changes_nothing(make(**VARIANTS[name]), checks.tokens(3, 14, 32))


@pytest.mark.parametrize("name", ["affine", "LRPE"])
def test_state_dict_and_copies(name: str) -> None:
    checks.copies_are_equal(lambda: make(**VARIANTS[name]), checks.tokens(2, 6, 32))


@pytest.mark.parametrize("name", ["default", "affine", "LRPE, concat", "bidirectional"])
def test_half_precision(name: str) -> None:
    layer = make(torch.float32, **VARIANTS[name])
    x = checks.tokens(2, 37, 32, dtype=torch.float32)
    checks.half_precision_within_budget(layer, x, definition)
    checks.autocast_backward_reaches_everything(layer, x)


@pytest.mark.parametrize("name", ["affine", "LRPE"])
def test_compiles(name: str) -> None:
    layer = make(torch.float32, **VARIANTS[name])
    checks.compiles(layer, checks.tokens(2, 16, 32, dtype=torch.float32))


def test_steps_compile() -> None:
    checks.steps_compile(make(**VARIANTS["LRPE"]), checks.tokens(2, 9, 32))


def test_alibi_decay_is_the_released_one() -> None:
    slopes = [-rate / (1 + 1e-5) for rate in alibi_decay(8, 0, 24)]
    assert slopes == pytest.approx([2.0**-i for i in range(1, 9)])
    windows = [-1 / rate for rate in alibi_decay(16, 0, 24)]
    assert (windows[0], windows[-1]) == pytest.approx((2**0.5, 256), rel=1e-4)
    assert alibi_decay(16, 23, 24) == pytest.approx(
        [rate * 1e-5 for rate in alibi_decay(16, 0, 24)], rel=1e-4
    )
    middle = alibi_decay(4, 3, 9)
    assert middle == pytest.approx([-(2.0**-e) * (1 - 3 / 8 + 1e-5) for e in (2, 4, 6, 8)])
    assert alibi_decay(4, 0, 1) == pytest.approx([-(2.0**-e) * (1 + 1e-5) for e in (2, 4, 6, 8)])


def test_alibi_slopes_off_powers_of_two() -> None:
    """12 heads: the 8 slopes of 8 heads, then every second of 16."""
    slopes = [-rate / (1 + 1e-5) for rate in alibi_decay(12, 0, 2)]
    assert slopes[:8] == pytest.approx([2.0**-i for i in range(1, 9)])
    assert slopes[8:] == pytest.approx([2.0**-e for e in (0.5, 1.5, 2.5, 3.5)])


def test_paper_decay() -> None:
    """The sheet's example: 16 heads, 24 layers, layer 1."""
    kept = [math.exp(rate) for rate in paper_decay(16, 1, 24)]
    assert kept[0] == 1
    assert [kept[1], kept[2], kept[8], kept[15]] == pytest.approx(
        [0.62, 0.38, 0.02, 0.0008], abs=0.006
    )
    assert paper_decay(4, 2, 4) == [-0.0, -1.0, -2.0, -3.0]


def test_decay_by_name() -> None:
    layers = {"layer_index": 2, "num_layers": 5}
    for name, formula in (("alibi", alibi_decay), ("paper", paper_decay)):
        layer = make(decay=name, **layers)
        assert layer.decay.tolist() == formula(4, **layers)
        given = make(decay=torch.tensor(formula(4, **layers), dtype=torch.float64))
        given.load_state_dict(layer.state_dict())
        x = checks.tokens(1, 9, 32)
        assert torch.equal(layer(x), given(x))


def test_decay_is_never_rounded() -> None:
    """Casting a layer rounds its weights and leaves the log-decays alone, on any device."""
    layer = NormLinearAttention(32, 4, decay=[0.0, -0.1, -1 / 3, -torch.inf])
    exact = torch.tensor([0.0, -0.1, -1 / 3, -torch.inf])
    assert torch.equal(copy.deepcopy(layer).bfloat16().decay, exact)
    assert torch.equal(layer.half().float().decay, exact)
    assert layer.double().decay.dtype == torch.float64
    assert layer.decay[1].item() == -0.1
    assert "decay" not in layer.state_dict()
    late = NormLinearAttention(32, 4, decay=[-0.1] * 4, device="meta").to_empty(device="cpu")
    assert torch.equal(late.decay, torch.full((4,), -0.1))


def test_late_weights() -> None:
    """A layer made without storage gets its log-decays with the weights that it is given."""
    source = make(decay=DECAY)
    with torch.device("meta"):
        late = NormLinearAttention(32, 4, decay=DECAY)
        with pytest.raises(ValueError, match="decay must hold numbers, got a tensor on the meta"):
            NormLinearAttention(32, 4, decay=torch.tensor(DECAY))
    assert late.decay.is_meta
    late.load_state_dict(source.state_dict(), assign=True)
    x = checks.tokens(1, 9, 32)
    assert torch.equal(late(x), source(x))
    kept = late.decay
    late.load_state_dict(source.state_dict())
    assert late.decay is kept  # a CUDA graph may read it
    late = NormLinearAttention(32, 4, decay=DECAY)  # float32, and source is float64
    late.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(late(x), source(x))


def test_presets() -> None:
    t1 = NormLinearAttention.transnormer_t1(32, 4)
    assert (t1.feature_map, t1.norm, t1.lrpe_form, t1.output_gate) == (
        "elu",
        "model",
        "reflect",
        None,
    )
    assert t1.q_proj.bias is not None
    t2 = NormLinearAttention.transnormer_t2(32, 4, bias=False, causal=False)
    assert (t2.feature_map, t2.lrpe_form, t2.q_proj.bias) == ("elu+1", "reflect", None)
    first, second = (
        NormLinearAttention.transnormer_llm(32, 4, layer_index=layer, num_layers=3)
        for layer in range(2)
    )
    assert (first.feature_map, first.norm, first.output_gate) == ("silu", "model", "linear")
    assert (first.lrpe_form, second.lrpe_form) == ("concat", None)
    torch.testing.assert_close(second.decay, torch.tensor(alibi_decay(4, 1, 3)))
    printed = NormLinearAttention.transnormer_llm(
        32, 4, layer_index=1, num_layers=3, decay="paper", dtype=torch.float64
    )
    assert printed.decay.tolist() == paper_decay(4, 1, 3)
    for layer in (t1.double(), first.double()):
        x = checks.tokens(1, 9, 32)
        torch.testing.assert_close(layer(x), definition(layer, x))


def test_lrpe_concat_depends_on_the_distance_only() -> None:
    encoding = make(lrpe="concat").lrpe
    q, k = checks.tokens(1, 6, 2, 8), checks.tokens(1, 6, 2, 8)

    def products(shift: int) -> Tensor:
        turned = (encoding(y, torch.arange(6) + shift) for y in (q, k))
        return torch.einsum("bthd,bshd->bhts", *turned)

    torch.testing.assert_close(products(0), products(31))
    assert make(lrpe="concat").init_cache(1, 5).key_dim == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_map": "exp"}, "feature_map must be one of"),
        ({"norm": "layer"}, "norm must be one of"),
        ({"output_gate": "tanh"}, "output_gate must be one of"),
        ({"lrpe": "rotate"}, "lrpe must be one of"),
        ({"lrpe": True, "head_dim": 7}, "even head_dim, got 7"),
        ({"lrpe": "concat", "head_dim": 200}, "head_dim of q and k must be at most 256, got 400"),
        ({"norm": None, "elementwise_affine": True}, "elementwise_affine=True needs a norm"),
        ({"norm_eps": float("nan")}, "norm_eps must be finite"),
        ({"decay": "slopes"}, "decay must be one of 'alibi', 'paper', got 'slopes'"),
        ({"decay": "alibi"}, "decay='alibi' takes layer_index and num_layers"),
        ({"decay": "paper", "layer_index": 3, "num_layers": 3}, "layer_index must be from 0 to"),
        (
            {"decay": [-1.0, -2.0]},
            r"decay has shape \(2,\), expected one log-decay per head \(4,\)",
        ),
        ({"decay": [0.0, 0.1, -1.0, -2.0]}, "log-decays must be at most 0"),
        ({"decay": [0.0, float("nan"), -1.0, -2.0]}, "log-decays must be at most 0"),
        ({"decay": DECAY, "causal": False}, "decay counts back in time and takes causal=True"),
    ],
)
def test_refused_constructions(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_refused_calls() -> None:
    x = checks.tokens(1, 5, 32)
    with pytest.raises(TypeError, match="decay must be None, 'alibi', 'paper' or the log-decay"):
        make(decay=-1.0)
    with pytest.raises(TypeError, match=r"layer_index must be an int, got 1\.0"):
        alibi_decay(4, 1.0, 3)
    bidirectional = make(causal=False)
    with pytest.raises(ValueError, match="causal=False takes no cache"):
        bidirectional.init_cache(1, 8)
    with pytest.raises(ValueError, match="causal=False takes no cache"):
        bidirectional(x, cache=make().init_cache(1, 8))
    with pytest.raises(ValueError, match="cache has key_dim 8, this layer takes 16"):
        make(lrpe="concat")(x, cache=make().init_cache(1, 8))
