"""GatedLinearAttention: the layer against its recurrence, states, log-gates in float32."""

from __future__ import annotations

from typing import Any

import layer_checks as checks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnvariants import GatedAttention, GatedLinearAttention, RecurrentState

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no output gate": {"output_gate": False},
    "grouped": {"num_kv_heads": 2},
    "strong gates": {"gate_logit_normalizer": 0.5, "gate_low_rank_dim": 3},
    "odd sizes": {"head_dim": 6, "expand_k": 1.5, "expand_v": 0.5, "bias": True},
    "one head for all": {"num_kv_heads": 1, "expand_k": 1.0, "expand_v": 2.0, "norm_eps": 1e-3},
}


def make(dtype: torch.dtype = torch.float64, **options: Any) -> GatedLinearAttention:
    layer = GatedLinearAttention(32, 4, **options, dtype=dtype)
    torch.nn.init.normal_(layer.g_norm.weight, mean=1.0)
    return layer


def definition(layer: GatedLinearAttention, x: Tensor) -> Tensor:
    """Token by token, op by op in the precision of the parameters; log-gates at least float32."""
    batch, length, _ = x.shape
    group = layer.num_heads // layer.num_kv_heads

    def heads(y: Tensor, count: int) -> Tensor:
        y = y.view(batch, length, count, -1)
        return y.repeat_interleave(layer.num_heads // count, 2)

    q = heads(layer.q_proj(x), layer.num_heads)
    k, v = (heads(linear(x), layer.num_heads // group) for linear in (layer.k_proj, layer.v_proj))
    logits = layer.gk_proj(x)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    alpha = heads(torch.sigmoid(logits) ** (1 / layer.gate_logit_normalizer), layer.num_kv_heads)
    state = torch.zeros(batch, layer.num_heads, k.shape[-1], v.shape[-1], dtype=logits.dtype)
    outs = []
    for t in range(length):
        write = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        state = alpha[:, t, :, :, None] * state + write
        outs.append((q[:, t, :, :, None] * state).sum(-2) * k.shape[-1] ** -0.5)
    out = torch.stack(outs, 1).to(x.dtype)
    out = out * (out.square().mean(-1, keepdim=True) + layer.norm_eps).rsqrt()
    out = out * layer.g_norm.weight
    if layer.output_gate:
        out = out * F.silu(heads(layer.g_proj(x), layer.num_heads))
    return layer.o_proj(out.flatten(2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_equals_its_formula(variant: str) -> None:
    checks.matches_definition(make(**VARIANTS[variant]), checks.tokens(2, 17, 32), definition)


def test_shapes_are_those_of_the_published_layer() -> None:
    """4 heads of a width of 1024: K 128, V 256, gates through 16 channels."""
    layer = GatedLinearAttention(1024, 4, device="meta")
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {
        "q_proj.weight": (512, 1024),
        "k_proj.weight": (512, 1024),
        "v_proj.weight": (1024, 1024),
        "g_proj.weight": (1024, 1024),
        "gk_proj.0.weight": (16, 1024),
        "gk_proj.1.weight": (512, 16),
        "gk_proj.1.bias": (512,),
        "g_norm.weight": (256,),
        "o_proj.weight": (1024, 1024),
    }
    assert (layer.gate_logit_normalizer, layer.norm_eps) == (16.0, 1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_log_gates_are_float32(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a bf16 layer nor autocast rounds them; float64 keeps them in float64."""
    from attnvariants.modules import gated_linear_attention as home

    seen = []
    function = home.gated_linear_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options: Any) -> Any:
        seen.append((v.dtype, g.dtype))
        assert g.max() <= 0
        return function(q, k, v, g, **options)

    monkeypatch.setattr(home, "gated_linear_attention", spy)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        dtype = torch.float32 if autocast else torch.bfloat16
        make(dtype)(checks.tokens(1, 5, 32, dtype=dtype))
    make()(checks.tokens(1, 5, 32))
    assert seen == [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_and_steps_equal_the_whole_sequence(name: str) -> None:
    layer = make(**VARIANTS[name])
    checks.steps_equal_full(layer, checks.tokens(2, 40, 32), prompt=5, sizes=[1, 8, 9, 2])


def test_ragged_prompts() -> None:
    x = checks.tokens(4, 20, 32)
    checks.ragged_steps_equal_full(make(**VARIANTS["grouped"]), x, prompts=[9, 1, 4, 6], steps=11)


def test_packed_sequences() -> None:
    checks.packed_equals_separate(make(**VARIANTS["odd sizes"]), [5, 1, 0, 70])


def test_padding() -> None:
    checks.padding_changes_nothing(make(), checks.tokens(3, 14, 32))


def test_state_dict_and_copies() -> None:
    checks.copies_are_equal(make, checks.tokens(2, 6, 32))


@pytest.mark.parametrize("name", ["default", "grouped", "strong gates"])
def test_half_precision(name: str) -> None:
    layer = make(torch.float32, **VARIANTS[name])
    x = checks.tokens(2, 37, 32, dtype=torch.float32)
    checks.half_precision_within_budget(layer, x, definition)
    checks.autocast_backward_reaches_everything(layer, x)


def test_compiles() -> None:
    layer = make(torch.float32, num_kv_heads=2)
    checks.compiles(layer, checks.tokens(2, 16, 32, dtype=torch.float32))


def test_steps_compile() -> None:
    checks.steps_compile(make(num_kv_heads=2), checks.tokens(2, 9, 32))


def test_state_stays_float32_in_a_half_precision_layer() -> None:
    cache = make(torch.bfloat16).init_cache(2, 100)
    assert (cache.dtype, cache.state.shape) == (torch.float32, (2, 4, 4, 8))
    assert make().init_cache(1, 7).dtype == torch.float64
    assert make().init_cache(1, 7).nbytes == make().init_cache(1, 7000).nbytes


def test_a_long_continuation_is_left_alone_by_its_state() -> None:
    """The gradient of a chunk behind a cached state, although the state is overwritten."""
    layer, x = make(), checks.tokens(2, 30, 32)
    cache = layer.init_cache(2, 30)
    layer(x[:, :10], cache=cache)
    tail = x[:, 10:].clone().requires_grad_()
    layer(tail, cache=cache).square().sum().backward()
    whole = x.clone().requires_grad_()
    layer(whole)[:, 10:].square().sum().backward()
    torch.testing.assert_close(tail.grad, whole.grad[:, 10:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expand_k": 0.3}, "expand_k times head_dim=8 must be a whole number, got expand_k=0.3"),
        ({"expand_v": 0.0}, "expand_v must be positive"),
        ({"expand_v": 64}, r"expand_v \* head_dim must be at most 256, got 512"),
        ({"gate_low_rank_dim": 0}, "gate_low_rank_dim must be at least 1"),
        ({"gate_logit_normalizer": 0.0}, "gate_logit_normalizer must be positive"),
        ({"norm_eps": -1.0}, "norm_eps must be at least 0"),
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
    ],
)
def test_refused_constructions(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_refused_calls() -> None:
    layer, x = make(), checks.tokens(2, 5, 32)
    with pytest.raises(TypeError, match="output_gate must be True or False"):
        make(output_gate="silu")
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        layer.init_cache(2, 0)
    with pytest.raises(TypeError, match="cache must be a RecurrentState, got KVCache"):
        layer(x, cache=GatedAttention(32, 4).init_cache(2, 8))
    with pytest.raises(ValueError, match="cache has key_dim 8, this layer takes 4"):
        layer(x, cache=RecurrentState(2, 4, 8, 8))
    with pytest.raises(ValueError, match="cache has batch_size 3, x has 2 rows"):
        layer(x, cache=layer.init_cache(3, 8))
    cache = layer.init_cache(2, 8)
    layer(x, cache=cache)
    with pytest.raises(ValueError, match="take an empty cache"):
        layer(x, cache=cache, padding_mask=torch.ones(2, 5, dtype=torch.bool))
