"""DiagAttention: blocks against a dense mask, one-block caches, LRPE."""

from __future__ import annotations

from typing import Any

import layer_checks as checks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnvariants import DiagAttention, GatedAttention, RecurrentState

VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "relu": {"activation": "relu"},
    "grouped": {"num_kv_heads": 2, "bias": True},
    "LRPE": {"lrpe": True, "activation": "relu", "num_kv_heads": 2},
    "wide heads": {"head_dim": 11, "block_size": 7},
    "bidirectional": {"causal": False},
    "bidirectional relu": {"causal": False, "activation": "relu", "lrpe": True},
}


def make(dtype: torch.dtype = torch.float64, **options: Any) -> DiagAttention:
    return DiagAttention(32, 4, **{"block_size": 6, **options}, dtype=dtype)


def definition(layer: DiagAttention, x: Tensor) -> Tensor:
    """Block by block, each as if it were alone; positions count within the block."""
    size = layer.block_size
    out = torch.cat([_block(layer, block) for block in x.split(size, dim=1)], dim=1)
    if layer.activation == "relu":
        out = out * (out.square().mean(-1, keepdim=True) + layer.norm_eps).rsqrt()
    return layer.o_proj(out)


def _block(layer: DiagAttention, x: Tensor) -> Tensor:
    batch, length, _ = x.shape
    q, k, v = (
        linear(x).view(batch, length, -1, layer.head_dim)
        for linear in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    if layer.lrpe is not None:
        q, k = (lrpe(layer.lrpe, y) for y in (q, k))
    k, v = (y.repeat_interleave(layer.num_heads // layer.num_kv_heads, 2) for y in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / layer.head_dim**0.5
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1) & layer.causal
    if layer.activation == "softmax":
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    else:
        weights = F.relu(scores).masked_fill(hidden, 0)
    return torch.einsum("bhts,bshd->bthd", weights, v).flatten(2)


def lrpe(encoding: torch.nn.Module, y: Tensor, shift: int = 0) -> Tensor:
    """Householder matrix, then complex rotation by the learned angles."""
    v = encoding.reflection.to(y.dtype)
    reflection = torch.eye(len(v), dtype=y.dtype) - 2 * torch.outer(v, v) / v.dot(v)
    y = y @ reflection
    half = y.shape[-1] // 2
    steps = torch.arange(shift, shift + y.shape[1])[:, None, None]
    angle = steps * encoding.theta.double()
    turned = torch.complex(y[..., :half].double(), y[..., half:].double())
    turned = turned * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1).to(y.dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_equals_its_formula(variant: str) -> None:
    layer, x = make(**VARIANTS[variant]), checks.tokens(2, 20, 32)
    if variant == "grouped":  # the bias of k shifts every score of a row alike: no gradient
        torch.testing.assert_close(layer(x), definition(layer, x))
    else:
        checks.matches_definition(layer, x, definition)


def test_relu_form_is_normed_over_all_heads() -> None:
    layer = make(activation="relu")
    seen = []
    layer.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer(10 * checks.tokens(1, 12, 32))
    mean_square = seen[0].square().mean(-1)
    torch.testing.assert_close(mean_square, torch.ones_like(mean_square), rtol=1e-3, atol=1e-3)


def test_no_token_sees_another_block() -> None:
    layer, x = make(), checks.tokens(1, 18, 32)
    changed = x.clone()
    changed[:, 6:12] += 1
    same = (layer(x) - layer(changed)).abs().amax(-1)[0] == 0
    assert same.tolist() == [True] * 6 + [False] * 6 + [True] * 6


@pytest.mark.parametrize("name", ["softmax", "relu", "grouped", "LRPE", "wide heads"])
def test_prefill_and_steps_beyond_the_wrap_around(name: str) -> None:
    layer = make(**VARIANTS[name])
    for prompt in (1, 4, 6, 13):  # inside the first block, at its end, in the third
        checks.steps_equal_full(layer, checks.tokens(2, 32, 32), prompt, sizes=[1, 3, 8])
    checks.steps_equal_full(layer, checks.tokens(2, 4, 32), prompt=2)  # shorter than a block


@pytest.mark.parametrize("name", ["softmax", "LRPE"])
def test_ragged_prompts(name: str) -> None:
    x = checks.tokens(5, 24, 32)
    checks.ragged_steps_equal_full(make(**VARIANTS[name]), x, prompts=[9, 1, 6, 5, 12], steps=9)


@pytest.mark.parametrize("name", ["softmax", "LRPE", "bidirectional relu"])
def test_packed_sequences(name: str) -> None:
    checks.packed_equals_separate(make(**VARIANTS[name]), [8, 1, 0, 13])


@pytest.mark.parametrize("name", ["relu", "bidirectional"])
def test_padding(name: str) -> None:
    checks.padding_changes_nothing(make(**VARIANTS[name]), checks.tokens(3, 14, 32))


def test_state_dict_and_copies() -> None:
    """The random reflection is saved; drawing it again changes the layer."""
    checks.copies_are_equal(lambda: make(**VARIANTS["LRPE"]), checks.tokens(2, 6, 32))
    assert "lrpe.reflection" in make(lrpe=True).state_dict()


@pytest.mark.parametrize("name", ["softmax", "LRPE"])
def test_half_precision(name: str) -> None:
    layer = make(torch.float32, **VARIANTS[name])
    x = checks.tokens(2, 21, 32, dtype=torch.float32)
    checks.half_precision_within_budget(layer, x, definition)
    checks.autocast_backward_reaches_everything(layer, x)


@pytest.mark.parametrize("name", ["softmax", "LRPE"])
def test_compiles(name: str) -> None:
    layer = make(torch.float32, **VARIANTS[name])
    checks.compiles(layer, checks.tokens(2, 16, 32, dtype=torch.float32))


def test_steps_compile() -> None:
    checks.steps_compile(make(**VARIANTS["LRPE"]), checks.tokens(2, 9, 32))


def test_lrpe_depends_on_the_distance_only() -> None:
    encoding = make(lrpe=True).lrpe
    q, k = checks.tokens(1, 6, 2, 8), checks.tokens(1, 6, 2, 8)
    position = torch.arange(6)

    def scores(shift: int) -> Tensor:
        turned = (encoding(y, position + shift) for y in (q, k))
        return torch.einsum("bthd,bshd->bhts", *turned)

    torch.testing.assert_close(scores(0), scores(23))
    torch.testing.assert_close(encoding(q, position + 3), lrpe(encoding, q, shift=3))
    first, plain = scores(0).diagonal(dim1=2, dim2=3), (q * k).sum(-1).transpose(1, 2)
    torch.testing.assert_close(first, plain)  # a reflection and a turn keep inner products


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"activation": "gelu"}, "activation must be one of 'softmax', 'relu', got 'gelu'"),
        ({"lrpe": True, "head_dim": 7}, "even head_dim, got 7"),
        ({"norm_eps": -1e-6}, "norm_eps must be at least 0"),
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
    ],
)
def test_refused_constructions(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_refused_calls() -> None:
    x = checks.tokens(2, 5, 32)
    with pytest.raises(TypeError, match="causal must be True or False"):
        make(causal=None)
    bidirectional = make(causal=False)
    with pytest.raises(ValueError, match="causal=False takes no cache"):
        bidirectional.init_cache(2, 8)
    with pytest.raises(ValueError, match="causal=False takes no cache"):
        bidirectional(x, cache=make().init_cache(2, 8))
    with pytest.raises(TypeError, match="cache must be a KVCache"):
        make()(x, cache=RecurrentState(2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"cache has windows \[-1, -1, -1, -1\]"):
        make()(x, cache=GatedAttention(32, 4, dtype=torch.float64).init_cache(2, 8))
    layer = make()
    cache = layer.init_cache(2, 8)
    layer(x, cache=cache)
    with pytest.raises(ValueError, match="max_length=8"):
        layer(x, cache=cache)
    assert cache.lengths.tolist() == [5, 5]
