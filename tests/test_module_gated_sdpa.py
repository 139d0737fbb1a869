"""GatedAttention: every gate of the paper against a plain formula, positions, caches, layouts."""

from __future__ import annotations

from typing import Any

import layer_checks as checks
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_within_budget
from torch import Tensor

from attnvariants import GatedAttention, KVCache, RecurrentState
from attnvariants.modules import convert
from attnvariants.modules._positions import angles_of, rope_frequencies, rotate, token_positions

ACTIVATION = {
    "sigmoid": torch.sigmoid,
    "ns_sigmoid": lambda x: (1 + torch.sigmoid(x)) / 2,
    "softplus": F.softplus,
    "silu": lambda x: x * torch.sigmoid(x),
    "identity": lambda x: x,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"gate": None},
    "G1": {},
    "G1 headwise": {"gate": "headwise"},
    "G1 head-shared": {"head_shared": True},
    "G1 input-independent": {"input_dependent": False},
    "G1 input-independent headwise": {"input_dependent": False, "gate": "headwise"},
    "G1 NS-sigmoid": {"gate_activation": "ns_sigmoid"},
    "G1 softplus": {"gate_activation": "softplus"},
    "G1 SiLU": {"gate_activation": "silu"},
    "G1 additive SiLU": {"gate_activation": "silu", "gate_mode": "add"},
    "G1 additive identity": {"gate_activation": "identity", "gate_mode": "add"},
    "G2": {"gate_position": "value"},
    "G2 headwise": {"gate_position": "value", "gate": "headwise"},
    "G2 head-shared": {"gate_position": "value", "head_shared": True},
    "G3": {"gate_position": "key"},
    "G4 headwise": {"gate_position": "query", "gate": "headwise"},
    "G4": {"gate_position": "query"},
    "G5": {"gate_position": "output"},
    "G5 input-independent": {"gate_position": "output", "input_dependent": False},
    "bias": {"bias": True},
    "wide heads": {"head_dim": 20, "num_kv_heads": 1},
    "no positions": {"rope_base": None, "head_dim": 7},
    "QK-norm": {"qk_norm": True},
    "QK-norm, G3": {"qk_norm": True, "gate_position": "key", "rope_base": 500.0},
}


def make(dtype: torch.dtype = torch.float64, **options: Any) -> GatedAttention:
    layer = GatedAttention(32, 4, **{"num_kv_heads": 2, **options}, dtype=dtype)
    for name, parameter in layer.named_parameters():
        if name in ("gate_logits", "q_norm.weight", "k_norm.weight"):
            torch.nn.init.normal_(parameter, mean=0.5)
    return layer


def definition(layer: GatedAttention, x: Tensor) -> Tensor:
    """The layer op by op in the precision of its parameters."""
    heads, group = layer.num_heads, layer.num_heads // layer.num_kv_heads
    batch, length, _ = x.shape

    def project(linear: torch.nn.Linear) -> Tensor:
        return linear(x).view(batch, length, -1, layer.head_dim)

    def gated(position: str, y: Tensor) -> Tensor:
        if layer.gate is None or position != layer.gate_position:
            return y
        logits = layer.gate_proj(x) if layer.input_dependent else layer.gate_logits.flatten()
        score = ACTIVATION[layer.gate_activation](logits)
        if position != "output":
            score = score.view(*score.shape[:-1], y.shape[2], -1)  # headwise: a last axis of 1
        if layer.head_shared:
            score = score.mean(-2, keepdim=True)
        return y * score if layer.gate_mode == "multiply" else y + score

    def normed(y: Tensor, norm: str) -> Tensor:
        if not layer.qk_norm:
            return y
        weight = layer.get_parameter(f"{norm}.weight")
        return y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    def turned(y: Tensor) -> Tensor:
        if layer.rope_base is None:
            return y
        half = layer.head_dim // 2
        frequency = layer.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(length)[:, None, None] * frequency
        real, imaginary = y[..., :half].double(), y[..., half:].double()
        turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], -1).to(y.dtype)

    q = turned(gated("query", normed(project(layer.q_proj), "q_norm")))
    k = turned(gated("key", normed(project(layer.k_proj), "k_norm")))
    v = gated("value", project(layer.v_proj))
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / layer.head_dim**0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    out = gated("sdpa", torch.einsum("bhts,bshd->bthd", weights, v))
    assert out.shape[2] == heads
    return gated("output", layer.o_proj(out.flatten(2)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_equals_its_formula(variant: str) -> None:
    checks.matches_definition(make(**VARIANTS[variant]), checks.tokens(2, 17, 32), definition)


def test_default_is_the_winner_and_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elementwise sigmoid on the heads' outputs, handed to the attention function as logits."""
    from attnvariants.modules import gated_sdpa as home

    gates = []
    function = home.gated_sdpa

    def spy(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, **options: Any) -> Any:
        gates.append((None if gate is None else gate.shape, options["gate_activation"]))
        return function(q, k, v, gate, **options)

    monkeypatch.setattr(home, "gated_sdpa", spy)
    x = checks.tokens(2, 5, 32)
    for name in ("G1", "G1 headwise", "G1 softplus", "G1 input-independent", "G1 SiLU", "G2"):
        make(**VARIANTS[name])(x)
    full, headwise = torch.Size([2, 5, 4, 8]), torch.Size([2, 5, 4])
    assert gates == [
        (full, "sigmoid"),
        (headwise, "sigmoid"),
        (full, "softplus"),
        (full, "sigmoid"),
        (None, "sigmoid"),
        (None, "sigmoid"),
    ]


def test_input_independent_gate_starts_at_zero_logits() -> None:
    layer = GatedAttention(32, 4, input_dependent=False)
    assert torch.equal(layer.gate_logits, torch.zeros(4, 8))
    headwise = GatedAttention(32, 4, input_dependent=False, gate="headwise")
    assert torch.equal(headwise.gate_logits, torch.zeros(4))
    torch.nn.init.ones_(layer.gate_logits)
    layer.reset_parameters()
    assert torch.equal(layer.gate_logits, torch.zeros(4, 8))


@pytest.mark.parametrize("name", ["G1", "G1 head-shared", "G2", "G4", "G5"])
def test_open_gate_keeps_its_gradient_in_bf16(name: str) -> None:
    """sigmoid(8) rounds to 1 in bf16, where a product of rounded factors has no gradient left."""
    layer = make(torch.bfloat16, **{**VARIANTS[name], "input_dependent": False})
    torch.nn.init.constant_(layer.gate_logits, 8.0)
    layer(checks.tokens(2, 5, 32, dtype=torch.bfloat16)).sum().backward()
    assert (layer.gate_logits.grad != 0).float().mean() > 0.9


@pytest.mark.parametrize(
    ("options", "millions"),
    [
        ({}, 201.3),
        ({"head_shared": True}, 201.3),
        ({"gate_mode": "add", "gate_activation": "silu"}, 201.3),
        ({"gate_position": "query"}, 201.3),
        ({"gate_position": "value"}, 25.2),
        ({"gate_position": "key"}, 25.2),
        ({"gate_position": "output"}, 100.7),
        ({"gate": "headwise"}, 1.57),
        ({"gate": "headwise", "gate_position": "value"}, 0.197),
        ({"input_dependent": False}, 0.098),
        ({"gate": None, "num_kv_heads": 8}, 50.3),
        ({"gate": None, "num_heads": 48}, 201.3),
    ],
)
def test_parameter_counts_of_the_paper(options: dict[str, Any], millions: float) -> None:
    """24 layers of the 15A2B model: parameters beyond the baseline's."""
    sizes = {"num_heads": 32, "num_kv_heads": 4, "head_dim": 128}

    def count(**options: Any) -> int:
        layer = GatedAttention(2048, **{**sizes, **options}, device="meta")
        return 24 * sum(parameter.numel() for parameter in layer.parameters())

    extra = (count(**options) - count(gate=None)) / 1e6
    assert extra == pytest.approx(millions, rel=5e-3)


@pytest.mark.parametrize("name", ["plain", "G1", "G1 head-shared", "G2", "G5", "QK-norm, G3"])
def test_prefill_and_steps_equal_the_whole_sequence(name: str) -> None:
    layer = make(**VARIANTS[name])
    checks.steps_equal_full(layer, checks.tokens(2, 24, 32), prompt=5, sizes=[1, 3, 11])
    checks.steps_equal_full(layer, checks.tokens(1, 3, 32), prompt=1)


@pytest.mark.parametrize("name", ["G1", "G1 headwise", "G2 headwise", "G5"])
def test_ragged_prompts(name: str) -> None:
    x = checks.tokens(4, 12, 32)
    checks.ragged_steps_equal_full(make(**VARIANTS[name]), x, prompts=[7, 1, 4, 3], steps=5)


@pytest.mark.parametrize("name", ["G1", "G1 input-independent", "G3", "no positions"])
def test_packed_sequences(name: str) -> None:
    checks.packed_equals_separate(make(**VARIANTS[name]), [5, 1, 0, 9])


@pytest.mark.parametrize("name", ["G1", "G5", "bias"])
def test_padding(name: str) -> None:
    checks.padding_changes_nothing(make(**VARIANTS[name]), checks.tokens(3, 9, 32))


@pytest.mark.parametrize("name", ["G1", "QK-norm", "G1 input-independent"])
def test_state_dict_and_copies(name: str) -> None:
    checks.copies_are_equal(lambda: make(**VARIANTS[name]), checks.tokens(2, 6, 32))


@pytest.mark.parametrize("name", ["G1", "G1 additive SiLU", "G2", "QK-norm"])
def test_half_precision(name: str) -> None:
    layer = make(torch.float32, **VARIANTS[name])
    x = checks.tokens(2, 21, 32, dtype=torch.float32)
    checks.half_precision_within_budget(layer, x, definition)
    checks.autocast_backward_reaches_everything(layer, x)


@pytest.mark.parametrize("name", ["G1", "QK-norm, G3"])
def test_compiles(name: str) -> None:
    layer = make(torch.float32, **VARIANTS[name])
    checks.compiles(layer, checks.tokens(2, 16, 32, dtype=torch.float32))


def test_steps_compile() -> None:
    checks.steps_compile(make(**VARIANTS["G1"]), checks.tokens(2, 9, 32))


def test_compiles_packed() -> None:
    x, bounds = checks.tokens(1, 16, 32), torch.tensor([0, 7, 16]).int()
    checks.compiles(make(), x, cu_seqlens=bounds)


def test_cache_in_another_dtype() -> None:
    """Keys and values are stored as the cache says; outputs stay in the layer's dtype."""
    layer, x = make(torch.float32), checks.tokens(2, 9, 32, dtype=torch.float32)
    cache = layer.init_cache(2, 9, dtype=torch.bfloat16)
    assert layer.init_cache(2, 9).dtype == torch.float32
    with torch.no_grad():
        y = torch.cat([layer(piece, cache=cache) for piece in x.tensor_split([5, 6], 1)], 1)
        assert y.dtype == torch.float32
        full, half = layer(x), definition(make_half(layer), x.bfloat16())
    truth = definition(layer.double(), x.double())
    assert_within_budget(y, truth, half)
    torch.testing.assert_close(y[:, :5], full[:, :5])


def make_half(layer: GatedAttention) -> GatedAttention:
    half = make(torch.bfloat16)
    half.load_state_dict(layer.state_dict())
    return half


def test_steps_never_wait_for_the_device() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoTransfer(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    layer, x = make(), checks.tokens(2, 6, 32)
    cache = layer.init_cache(2, 6)
    with torch.no_grad(), NoTransfer():
        for piece in x.split([3, 1, 2], dim=1):
            layer(piece, cache=cache)


def test_rotation_depends_on_the_distance_only() -> None:
    q, k = checks.tokens(1, 6, 1, 8), checks.tokens(1, 6, 1, 8)
    frequencies = rope_frequencies(10000.0, 8, q)
    position = torch.arange(6)

    def scores(shift: int) -> Tensor:
        angles = angles_of(position + shift, frequencies)
        return torch.einsum("bthd,bshd->bts", rotate(q, angles), rotate(k, angles))

    torch.testing.assert_close(scores(0), scores(91))
    assert not torch.allclose(scores(0), torch.einsum("bthd,bshd->bts", q, k))
    turned = rotate(q, angles_of(position, frequencies))
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))
    assert torch.equal(turned[:, 0], q[:, 0])


def test_positions() -> None:
    x = torch.empty(1, 6, 8)
    assert token_positions(x, None, None).tolist() == [0, 1, 2, 3, 4, 5]
    packed = token_positions(x, None, torch.tensor([0, 2, 2, 6]).int())
    assert packed.tolist() == [0, 1, 0, 1, 2, 3]
    cache = KVCache(2, 8, 1, 8, 8)
    cache.lengths.copy_(torch.tensor([3, 5]))
    assert token_positions(x[:, :2], cache, None).tolist() == [[3, 4], [5, 6]]


def test_angles_are_float32_in_a_half_precision_layer() -> None:
    """Position 5000 times a frequency has no bf16 digits left; the layer must not lose it."""
    q = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16)
    assert rope_frequencies(10000.0, 8, q).dtype == torch.float32
    q[..., 0] = 1
    angles = angles_of(torch.tensor([5000]), rope_frequencies(10000.0, 8, q))
    turned = rotate(q, angles)
    exact = torch.tensor([5000.0]).cos()
    torch.testing.assert_close(turned[0, 0, 0, :1].float(), exact, rtol=0, atol=2**-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 0}, "embed_dim must be at least 1"),
        ({"embed_dim": 30}, "embed_dim=30 must be a multiple of num_heads=4"),
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"head_dim": 257}, "head_dim must be at most 256"),
        ({"head_dim": 7}, "even head_dim, got 7"),
        ({"rope_base": -1.0}, "rope_base must be positive"),
        ({"gate": "both"}, "gate must be one of 'elementwise', 'headwise', None, got 'both'"),
        ({"gate_position": "G1"}, "gate_position must be one of"),
        ({"gate_activation": "tanh"}, "gate_activation must be one of"),
        ({"gate_mode": "subtract"}, "gate_mode must be one of"),
        ({"gate": None, "head_shared": True}, "gate=None has no gate"),
        ({"gate": None, "gate_position": "value"}, "gate=None has no gate"),
        ({"gate": "headwise", "head_shared": True}, "takes gate='elementwise'"),
        ({"gate": "headwise", "gate_position": "output"}, "there are no heads"),
        ({"head_shared": True, "gate_position": "output"}, "there are no heads"),
        ({"gate_activation": "identity"}, "takes gate_mode='add'"),
    ],
)
def test_refused_constructions(options: dict[str, Any], message: str) -> None:
    sizes = {"embed_dim": 32, "num_heads": 4}
    with pytest.raises(ValueError, match=message):
        GatedAttention(**{**sizes, **options})


@pytest.mark.parametrize(
    "options",
    [{"num_heads": 2.0}, {"bias": 1}, {"qk_norm": None}, {"head_shared": "no"}, {"rope_base": "1"}],
)
def test_refused_types(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        GatedAttention(**{"embed_dim": 32, "num_heads": 4, **options})


def test_refused_calls() -> None:
    layer, x = make(), checks.tokens(2, 5, 32)
    cache, mask = layer.init_cache(2, 8), torch.ones(2, 5, dtype=torch.bool)
    bounds = torch.tensor([0, 2, 5]).int()
    with pytest.raises(ValueError, match=r"x has shape \(5, 32\), expected \[B, T, C=32\]"):
        layer(x[0])
    with pytest.raises(ValueError, match=r"x has shape \(2, 5, 31\)"):
        layer(x[..., 1:])
    with pytest.raises(ValueError, match="dimension T must be at least 1"):
        layer(x[:, :0])
    with pytest.raises(TypeError, match="x must be a tensor"):
        layer([1.0])
    with pytest.raises(ValueError, match="x has dtype float32, expected float64"):
        layer(x.float())
    with pytest.raises(ValueError, match=r"padding_mask has shape \(2, 4\)"):
        layer(x, padding_mask=mask[:, 1:])
    with pytest.raises(ValueError, match="padding_mask has dtype int64, expected bool"):
        layer(x, padding_mask=mask.long())
    with pytest.raises(ValueError, match="padding_mask and cu_seqlens exclude each other"):
        layer(x[:1], padding_mask=mask[:1], cu_seqlens=bounds)
    with pytest.raises(TypeError, match="cu_seqlens has dtype int64"):
        layer(x[:1], cu_seqlens=bounds.long())
    with pytest.raises(ValueError, match="cu_seqlens must start at 0 and end at"):
        layer(x[:1], cu_seqlens=bounds - 1)
    with pytest.raises(ValueError, match="cu_seqlens must start at 0 and end at"):
        layer(x[:1], cu_seqlens=torch.tensor([0, 3, 4]).int())
    with pytest.raises(ValueError, match="x on cpu, cu_seqlens on meta"):
        layer(x[:1], cu_seqlens=bounds.to("meta"))
    with pytest.raises(ValueError, match="x on cpu, cache on meta"):
        layer(x, cache=KVCache(2, 8, 2, 8, 8, device="meta"))
    with pytest.raises(TypeError, match="cache must be a KVCache, got RecurrentState"):
        layer(x, cache=RecurrentState(2, 4, 8, 8))
    with pytest.raises(
        ValueError, match=r"cache has windows \[3, 3\], this layer takes \[-1, -1\]"
    ):
        layer(x, cache=KVCache(2, 8, 2, 8, 8, window=3))
    with pytest.raises(ValueError, match="cache has num_kv_heads 4, this layer takes 2"):
        layer(x, cache=KVCache(2, 8, 4, 8, 8))
    with pytest.raises(ValueError, match="cache has batch_size 2, x has 1 rows"):
        layer(x[:1], cache=cache)
    layer(x, cache=cache)
    with pytest.raises(ValueError, match="take an empty cache"):
        layer(x, cache=cache, padding_mask=mask)
    with pytest.raises(ValueError, match="take an empty cache"):
        layer(x[:1], cache=cache, cu_seqlens=bounds)


def test_full_cache_is_refused_whole() -> None:
    """Neither a prompt nor a long step that does not fit leaves a trace."""
    layer, x = make(), checks.tokens(2, 24, 32)
    cache = layer.init_cache(2, 20)
    with pytest.raises(ValueError, match="max_length=20"):
        layer(x, cache=cache)
    assert cache.max_filled == 0
    layer(x[:, :4], cache=cache)
    before = cache.k.clone()
    with pytest.raises(ValueError, match="max_length=20"):
        layer(x[:, 4:], cache=cache)
    assert cache.lengths.tolist() == [4, 4]
    assert torch.equal(cache.k, before)


def test_repr_names_what_matters() -> None:
    text = repr(make(gate="headwise"))
    assert "embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, gate='headwise'" in text


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1), (6, 2)])
def test_weight_layouts_round_trip(heads: int, kv_heads: int) -> None:
    weight = torch.randn(2 * heads * 5, 7)
    hf = convert.official_to_hf(weight, heads, kv_heads)
    assert torch.equal(convert.hf_to_official(hf, heads, kv_heads), weight)
    assert torch.equal(hf, weight) == (heads == kv_heads)
    official_parts = convert.split_official(weight, heads, kv_heads)
    for found, expected in zip(convert.split_hf(hf, heads), official_parts, strict=True):
        assert torch.equal(found, expected)
    bias = torch.randn(2 * heads * 5)
    assert torch.equal(
        convert.hf_to_official(convert.official_to_hf(bias, heads, kv_heads), heads, kv_heads), bias
    )


def test_split_official_projection() -> None:
    """Row by row: query head h of group n, its gate after the queries of the whole group."""
    heads, kv_heads, dim = 6, 2, 3
    rows = [f"{kind}{3 * n + h}" for n in range(2) for kind in "qg" for h in range(3)]
    labels = torch.arange(12).repeat_interleave(dim)
    q, gate = convert.split_official(labels, heads, kv_heads)
    assert [rows[i] for i in q[::dim]] == [f"q{h}" for h in range(6)]
    assert [rows[i] for i in gate[::dim]] == [f"g{h}" for h in range(6)]
    headwise = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 10, 11, 12])  # one group: 3 heads of 3
    q, gate = convert.split_official(headwise, 3, 1, gate="headwise")
    assert (q.tolist(), gate.tolist()) == ([0, 0, 0, 1, 1, 1, 2, 2, 2], [10, 11, 12])


def test_official_weights_in_the_layer() -> None:
    """The official module's arithmetic on its own layout, against the layer with split weights."""
    layer, x = make(num_kv_heads=2, rope_base=None), checks.tokens(2, 5, 32)
    weight = torch.randn(2 * 32, 32, dtype=torch.float64)
    both = (x @ weight.T).view(2, 5, 2, -1)  # per KV group: 2 queries of 8, then 2 gates of 8
    q, gate = both.split([16, 16], dim=-1)
    layer.q_proj.weight.data, layer.gate_proj.weight.data = convert.split_official(weight, 4, 2)
    torch.testing.assert_close(layer.q_proj(x), q.flatten(2))
    torch.testing.assert_close(layer.gate_proj(x), gate.flatten(2))


def test_refused_layouts() -> None:
    with pytest.raises(ValueError, match=r"q_proj has 30 rows, expected 2 \* H \* D for 4 heads"):
        convert.split_official(torch.randn(30, 4), 4, 2)
    with pytest.raises(ValueError, match=r"q_proj has 4 rows, expected H \* D \+ H"):
        convert.split_official(torch.randn(4, 4), 4, 2, gate="headwise")
    with pytest.raises(ValueError, match="gate must be 'elementwise' or 'headwise'"):
        convert.split_official(torch.randn(64, 4), 4, 2, gate="both")
    with pytest.raises(ValueError, match="must be a multiple of num_kv_heads=3"):
        convert.hf_to_official(torch.randn(64, 4), 4, 3)
