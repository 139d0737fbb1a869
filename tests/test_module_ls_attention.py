"""LSAttention: local and global heads against a dense mask, rings beyond their wrap-around."""

from __future__ import annotations

from typing import Any

import layer_checks as checks
import pytest
import torch
from torch import Tensor

from attnvariants import GatedAttention, LSAttention
from attnvariants.modules import convert

VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head": {"num_local_heads": 3, "local_window": 5},
    "grouped": {"num_kv_heads": 2, "num_local_heads": 1, "local_window": 4},
    "all local": {"num_local_heads": 4, "local_window": 3},
    "all global": {"num_local_heads": 0, "local_window": 1},
    "window of one": {"num_local_heads": 2, "local_window": 1},
    "wider than the text": {"num_local_heads": 2, "local_window": 99},
    "gated": {"num_local_heads": 2, "local_window": 4, "gate": "elementwise", "num_kv_heads": 2},
    "gated headwise": {"num_local_heads": 1, "local_window": 6, "gate": "headwise"},
    "QK-norm": {"num_local_heads": 3, "local_window": 5, "qk_norm": True, "head_dim": 12},
}


def make(dtype: torch.dtype = torch.float64, **options: Any) -> LSAttention:
    return LSAttention(32, 4, **options, dtype=dtype)


def definition(layer: LSAttention, x: Tensor) -> Tensor:
    """Every query head with its own dense mask, one at a time."""
    length = x.shape[1]
    dim, group = layer.head_dim, layer.num_heads // layer.num_kv_heads
    half = dim // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(length)[:, None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle)

    def turned(y: Tensor) -> Tensor:  # [B, T, D]
        y_complex = torch.complex(y[..., :half].double(), y[..., half:].double()) * turn
        return torch.cat([y_complex.real, y_complex.imag], -1).to(y.dtype)

    def normed(y: Tensor, norm: str) -> Tensor:
        if not layer.qk_norm:
            return y
        weight = layer.get_parameter(f"{norm}.weight")
        return weight * y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    outs = []
    for head in range(layer.num_heads):
        kv_head = head // group
        rows = slice(head * dim, (head + 1) * dim)
        kv_rows = slice(kv_head * dim, (kv_head + 1) * dim)
        q = turned(normed(x @ layer.q_proj.weight[rows].T, "q_norm"))
        k = turned(normed(x @ layer.k_proj.weight[kv_rows].T, "k_norm"))
        v = x @ layer.v_proj.weight[kv_rows].T
        distance = torch.arange(length)[:, None] - torch.arange(length)
        reach = layer.local_window if kv_head < layer.num_local_heads else length
        visible = (distance >= 0) & (distance < reach)
        scores = (q @ k.transpose(1, 2) * dim**-0.5).masked_fill(~visible, -torch.inf)
        out = scores.softmax(-1) @ v
        if layer.gate == "elementwise":
            out = out * torch.sigmoid(x @ layer.gate_proj.weight[rows].T)
        elif layer.gate == "headwise":
            out = out * torch.sigmoid(x @ layer.gate_proj.weight[head, :, None])
        outs.append(out)
    return layer.o_proj(torch.cat(outs, -1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_equals_its_formula(variant: str) -> None:
    layer = make(**VARIANTS[variant])
    if variant != "window of one":
        checks.matches_definition(layer, checks.tokens(2, 17, 32), definition)
    else:  # a head that sees itself only has no gradient in q and k
        x = checks.tokens(2, 17, 32)
        torch.testing.assert_close(layer(x), definition(layer, x))


def test_extremes_of_the_window() -> None:
    """A window as long as the text is causal attention; one of a single key copies v."""
    x = checks.tokens(2, 9, 32)
    plain = GatedAttention(32, 4, gate=None, dtype=torch.float64)
    for options in ("all global", "wider than the text"):
        layer = make(**VARIANTS[options])
        layer.load_state_dict(plain.state_dict())
        torch.testing.assert_close(layer(x), plain(x))
    layer = make(num_local_heads=4, local_window=1)
    torch.testing.assert_close(layer(x), layer.o_proj(layer.v_proj(x)))


def test_author_presets_differ_by_one_key() -> None:
    """Span 3 is window 3 in the 2025 code and window 4 in the 2026 code."""
    old, new = (make(num_local_heads=4, local_window=window) for window in (3, 4))
    new.load_state_dict(old.state_dict())
    x = checks.tokens(1, 8, 32)
    y_old, y_new = old(x), new(x)
    torch.testing.assert_close(y_old[:, :3], y_new[:, :3])
    assert ((y_old - y_new)[:, 3:].abs().amax(-1) > 1e-6).all()


def test_head_groups_are_per_query_head() -> None:
    layer = LSAttention(48, 6, num_kv_heads=3, num_local_heads=2, local_window=5)
    assert layer.head_groups == ["local"] * 4 + ["global"] * 2
    assert layer.window == (5, 5, None)
    assert GatedAttention(32, 4).head_groups == ["global"] * 4


@pytest.mark.parametrize("name", ["multi-head", "grouped", "all local", "window of one", "gated"])
def test_prefill_and_steps_beyond_the_wrap_around(name: str) -> None:
    layer = make(**VARIANTS[name])
    for prompt in (1, 3, 11):  # shorter and longer than the window
        checks.steps_equal_full(layer, checks.tokens(2, 26, 32), prompt, sizes=[1, 2, 9])


@pytest.mark.parametrize("name", ["multi-head", "grouped", "gated headwise"])
def test_ragged_prompts(name: str) -> None:
    x = checks.tokens(4, 20, 32)
    checks.ragged_steps_equal_full(make(**VARIANTS[name]), x, prompts=[9, 1, 4, 6], steps=11)


@pytest.mark.parametrize("name", ["multi-head", "gated"])
def test_packed_sequences(name: str) -> None:
    checks.packed_equals_separate(make(**VARIANTS[name]), [5, 1, 0, 12])


def test_padding() -> None:
    checks.padding_changes_nothing(make(**VARIANTS["grouped"]), checks.tokens(3, 14, 32))


def test_state_dict_and_copies() -> None:
    checks.copies_are_equal(lambda: make(**VARIANTS["gated"]), checks.tokens(2, 6, 32))


@pytest.mark.parametrize("name", ["grouped", "gated"])
def test_half_precision(name: str) -> None:
    layer = make(torch.float32, **VARIANTS[name])
    x = checks.tokens(2, 21, 32, dtype=torch.float32)
    checks.half_precision_within_budget(layer, x, definition)
    checks.autocast_backward_reaches_everything(layer, x)


def test_compiles() -> None:
    layer = make(torch.float32, **VARIANTS["gated"])
    checks.compiles(layer, checks.tokens(2, 16, 32, dtype=torch.float32))


def test_steps_compile() -> None:
    checks.steps_compile(make(**VARIANTS["gated"]), checks.tokens(2, 9, 32))


def test_cache_of_local_heads_is_small() -> None:
    """The sheet's example: 12 heads, one global, window 100, 8192 tokens: a tenth."""
    sizes = {"head_dim": 2, "num_local_heads": 11, "local_window": 100}
    cache = LSAttention(24, 12, **sizes).init_cache(1, 8192)
    full = GatedAttention(24, 12, head_dim=2).init_cache(1, 8192)
    assert cache.capacities == [100] * 11 + [8192]
    assert full.nbytes / cache.nbytes == pytest.approx(10.6, abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_local_heads": 5}, "num_local_heads must be between 0 and num_kv_heads=4, got 5"),
        ({"num_local_heads": -1}, "num_local_heads must be between 0"),
        ({"num_kv_heads": 2, "num_local_heads": 3}, "num_kv_heads=2, got 3"),
        ({"local_window": 0}, "local_window must be at least 1"),
        ({"gate": "value"}, "LSAttention: gate must be one of"),
        ({"rope_base": 0.0}, "LSAttention: rope_base must be positive"),
    ],
)
def test_refused_constructions(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{"num_local_heads": 2, "local_window": 4, **options})


def test_refused_calls() -> None:
    with pytest.raises(TypeError, match="num_local_heads"):
        LSAttention(32, 4)
    with pytest.raises(TypeError, match="local_window must be an int"):
        make(num_local_heads=2, local_window=2.5)
    layer, other = make(**VARIANTS["multi-head"]), make(**VARIANTS["grouped"])
    x = checks.tokens(1, 3, 32)
    with pytest.raises(ValueError, match="cache has num_kv_heads 2, this layer takes 4"):
        layer(x, cache=other.init_cache(1, 8))
    with pytest.raises(ValueError, match="cache has windows"):
        layer(x, cache=GatedAttention(32, 4).init_cache(1, 8))


def test_author_weights() -> None:
    """The author's 2026 projections, one per kind of head, give the layer's q, k and v."""
    local, rest = torch.randn(3 * 3 * 8, 32), torch.randn(3 * 1 * 8, 32)
    x = torch.randn(5, 32)
    by_kind = [(x @ weight.T).view(5, 3, -1, 8) for weight in (local, rest)]
    expected = torch.cat(by_kind, dim=2)  # [tokens, q k v, heads, D]
    for part, weight in enumerate(convert.split_long_short(local, rest, head_dim=8)):
        torch.testing.assert_close((x @ weight.T).view(5, 4, 8), expected[:, part])
    with pytest.raises(ValueError, match="c_global_attn has 23 rows"):
        convert.split_long_short(local, rest[1:], head_dim=8)
