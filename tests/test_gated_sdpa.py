"""Gated SDPA against its definition."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from softmax_checks import (
    ACTIVATIONS,
    F64,
    GATES,
    Inputs,
    assert_same,
    bounds,
    check_definition,
    check_documents,
    draw,
    results,
)

from attnvariants import gated_sdpa, ls_attention
from attnvariants.eager import _tiles

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def matches(tensors: Inputs, dtype: torch.dtype, **options: Any) -> None:
    check_definition("gated_sdpa", tensors, dtype, return_stats=True, **options)


# The definition itself, against PyTorch's attention.


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_definition_is_pytorch_attention_times_the_gate(
    causal: bool, window: int | None, gate: str | None
) -> None:
    tensors = draw(heads=6, kv_heads=2, value_dim=5, length=9, keys=12, gate=gate)
    shown = [
        [0 <= i + 3 - j < window if window else i + 3 >= j or not causal for j in range(12)]
        for i in range(9)
    ]
    q, k, v = (tensors[name].transpose(1, 2) for name in "qkv")
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.tensor(shown), scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    if gate is not None:
        logits = tensors["gate"]
        out = out * torch.sigmoid(logits if gate == "elementwise" else logits[..., None])
    options = {"causal": causal, "window": window, "softmax_scale": 0.3}
    found = gated_sdpa(**tensors, **options, impl="reference")
    torch.testing.assert_close(found, out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("activation", "value"),
    [
        ("sigmoid", lambda x: 1 / (1 + math.exp(-x))),
        ("ns_sigmoid", lambda x: 0.5 + 0.5 / (1 + math.exp(-x))),
        ("softplus", lambda x: math.log1p(math.exp(-abs(x))) + max(x, 0.0)),
    ],
)
@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_gate_activations(activation: str, value: Any, impl: str) -> None:
    logits = [-40.0, -3.0, 0.0, 0.7, 8.0, 25.0, 40.0]
    ones = torch.ones(1, 1, len(logits), 1, dtype=F64)
    gate = torch.tensor(logits, dtype=F64).view(1, 1, -1)
    out = gated_sdpa(ones, ones, ones, gate, gate_activation=activation, impl=impl)
    wanted = torch.tensor([value(x) for x in logits], dtype=F64)
    torch.testing.assert_close(out.flatten(), wanted, rtol=1e-15, atol=0)


# Outputs and gradients against float64, under the budget of the data.


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 127, 129, 200])
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_lengths(length: int, dtype: torch.dtype) -> None:
    tensors = draw(length=length, heads=2, key_dim=16, gate=GATES[length % 3])
    matches(tensors, dtype)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_long_sequence(dtype: torch.dtype) -> None:
    matches(draw(batch=1, length=1000, heads=2, key_dim=32, gate="elementwise"), dtype)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("dtype", [BF16, F64])
def test_groups_of_query_heads(group: int, dtype: torch.dtype) -> None:
    tensors = draw(length=150, heads=2 * group, kv_heads=2, value_dim=5, gate="headwise")
    matches(tensors, dtype)


@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(1, 1), (1, 7), (24, 40), (80, 33), (192, 128), (256, 256)]
)
@pytest.mark.parametrize("dtype", [BF16, F64])
def test_head_dims(key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    tensors = draw(length=33, key_dim=key_dim, value_dim=value_dim, gate="elementwise")
    matches(tensors, dtype)


@pytest.mark.parametrize(("length", "keys"), [(1, 50), (17, 200), (130, 131), (20, 9), (150, 1)])
@pytest.mark.parametrize(
    ("causal", "window"), [(True, None), (True, 6), (False, None), (False, (6, None))]
)
def test_more_and_fewer_keys_than_queries(
    length: int, keys: int, causal: bool, window: Any
) -> None:
    tensors = draw(length=length, keys=keys, heads=4, kv_heads=2, gate="elementwise")
    matches(tensors, F64, causal=causal, window=window)
    matches(tensors, BF16, causal=causal, window=window)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
def test_gates(activation: str, gate: str, dtype: torch.dtype) -> None:
    tensors = draw(length=40, kv_heads=2, value_dim=12, gate=gate)
    tensors["gate"] *= 3
    matches(tensors, dtype, gate_activation=activation)


@pytest.mark.parametrize("softmax_scale", [0.0, 1.0, -2.0, 30.0])
def test_softmax_scale(softmax_scale: float) -> None:
    matches(draw(length=70), F64, softmax_scale=softmax_scale)


def test_large_logits_do_not_overflow() -> None:
    tensors = {name: tensor * 100 for name, tensor in draw(length=70).items()}
    matches(tensors, F32)
    assert results("gated_sdpa", tensors, impl="eager")["dk"].isfinite().all()


def test_a_float32_gate_with_half_precision_inputs() -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in draw(gate="elementwise").items()}
    tensors["gate"] = tensors["gate"].float() + 1e-3
    for impl in ("eager", "reference"):
        found = results("gated_sdpa", tensors, impl=impl)
        assert (found["out"].dtype, found["dgate"].dtype) == (BF16, F32)
        rounded = {**tensors, "gate": tensors["gate"].bfloat16()}
        assert not torch.equal(found["out"], results("gated_sdpa", rounded, impl=impl)["out"])


@given(
    length=st.integers(1, 40),
    extra=st.integers(-20, 40),
    group=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    window=st.one_of(st.none(), st.integers(1, 50)),
    gate=st.sampled_from(GATES),
    activation=st.sampled_from(ACTIVATIONS),
    block=st.integers(1, 50),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60)
def test_any_shape(
    length: int,
    extra: int,
    group: int,
    dims: tuple[int, int],
    window: int | None,
    gate: str | None,
    activation: str,
    block: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    keys = max(1, length + extra)
    shape = {"heads": 2 * group, "kv_heads": 2, "key_dim": dims[0], "value_dim": dims[1]}
    tensors = draw(batch=1, length=length, keys=keys, gate=gate, **shape)
    options = {"window": window, "gate_activation": activation}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tiles, "_BLOCK", block)
        patch.setattr(_tiles, "_LOCAL_BLOCK", block)
        found = results("gated_sdpa", tensors, impl="eager", **options)
    assert_same(found, results("gated_sdpa", tensors, impl="reference", **options))


# Rows that see nothing.


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("window", [None, 2])
def test_queries_before_the_first_key(window: int | None, gate: str | None, impl: str) -> None:
    tensors = draw(length=150, keys=9, gate=gate)
    found = results("gated_sdpa", tensors, window=window, impl=impl)
    for name in ("out", "dq", "dgate"):
        if name in found:
            assert not found[name][:, :141].any()
            assert found[name].isfinite().all()
    stats = gated_sdpa(**tensors, window=window, return_stats=True, impl=impl)[1]
    assert (stats.lse[:, :141] == -math.inf).all()
    assert stats.lse[:, 141:].isfinite().all()
    assert stats.max_logit.isfinite().all()
    square = {**tensors, "q": tensors["q"][:, 141:]}
    square |= {"gate": tensors["gate"][:, 141:]} if gate else {}
    out = gated_sdpa(**square, window=window, impl=impl)
    torch.testing.assert_close(found["out"][:, 141:], out, rtol=1e-13, atol=1e-13)


# Packed sequences.

PACKINGS = {
    "one": [70],
    "equal": [16, 16, 16, 16],
    "ragged": [5, 64, 1, 5, 20],
    "empty ones": [0, 7, 0, 0, 30, 7, 0],
    "single tokens": [1] * 9,
}


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    ("causal", "window"), [(True, None), (True, (3, None)), (False, None), (False, (3, None))]
)
def test_packed_sequences_are_independent(
    causal: bool, window: Any, packing: str, impl: str
) -> None:
    lengths = PACKINGS[packing]
    tensors = draw(batch=1, length=sum(lengths), heads=4, kv_heads=2, gate="elementwise")
    check_documents("gated_sdpa", tensors, lengths, impl, causal=causal, window=window)


def test_packed_statistics() -> None:
    tensors = draw(batch=1, length=60, heads=4, kv_heads=2)
    cu_seqlens = bounds(9, 0, 9, 42)
    found = [
        gated_sdpa(**tensors, cu_seqlens=cu_seqlens, return_stats=True, impl=impl)[1]
        for impl in ("eager", "reference")
    ]
    torch.testing.assert_close(found[0].lse, found[1].lse, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found[0].max_logit, found[1].max_logit, rtol=1e-13, atol=1e-13)


def test_nothing_leaks_over_the_edge_of_a_document() -> None:
    tensors = draw(batch=1, length=50, gate="headwise")
    cu_seqlens = bounds(20, 30)
    before = gated_sdpa(**tensors, cu_seqlens=cu_seqlens, impl="eager")
    for name in "kv":
        tensors[name][:, :20] = 1e30
    after = gated_sdpa(**tensors, cu_seqlens=cu_seqlens, impl="eager")
    assert torch.equal(before[:, 20:], after[:, 20:])
    assert not torch.equal(before[:, :20], after[:, :20])


# Errors.

ONES = {"q": (2, 6, 4, 8), "k": (2, 6, 2, 8), "v": (2, 6, 2, 8)}


def call(shapes: dict[str, tuple[int, ...]] | None = None, **options: Any) -> Any:
    tensors = {name: torch.ones(shape) for name, shape in {**ONES, **(shapes or {})}.items()}
    return gated_sdpa(**{**tensors, **options})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q": (2, 6, 8)}, r"q has shape \(2, 6, 8\), expected \[B, T, H, K\]"),
        ({"k": (3, 6, 2, 8)}, r"k has shape \(3, 6, 2, 8\), expected \[B=2, S, Hkv, K=8\]"),
        ({"k": (2, 6, 2, 9)}, r"k has shape .* expected \[B=2, S, Hkv, K=8\]"),
        ({"v": (2, 5, 2, 8)}, r"v has shape .* expected \[B=2, S=6, Hkv=2, V\]"),
        ({"v": (2, 6, 1, 8)}, r"v has shape .* expected \[B=2, S=6, Hkv=2, V\]"),
        ({"gate": (2, 6, 4, 9)}, r"gate has shape .* expected .* or \[B=2, T=6, H=4\]"),
        ({"gate": (2, 6, 2)}, r"gate has shape .* expected"),
        ({"gate": (6, 4)}, r"gate has shape .* expected"),
        ({"k": (2, 6, 3, 8), "v": (2, 6, 3, 8)}, "4 heads of q must be a multiple of the 3"),
        ({"q": (2, 0, 4, 8)}, "dimension T must be at least 1"),
        ({"k": (2, 0, 2, 8), "v": (2, 0, 2, 8)}, "dimension S must be at least 1"),
        ({"q": (2, 6, 4, 257), "k": (2, 6, 2, 257)}, "head dim of q and k must be between 1 and"),
        ({"v": (2, 6, 2, 300)}, "head dim of v must be between 1 and 256, got 300"),
    ],
)
def test_wrong_shapes(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=f"gated_sdpa: .*{message}"):
        call(shapes)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"q": 3}, TypeError, "q must be a tensor"),
        ({"gate": [1.0]}, TypeError, "gate must be a tensor"),
        ({"q": torch.ones(2, 6, 4, 8).int()}, TypeError, "q has dtype int32, expected float16"),
        ({"k": torch.ones(2, 6, 2, 8).half()}, ValueError, "one dtype, got q float32, k float16"),
        ({"gate": torch.ones(2, 6, 4).bfloat16()}, ValueError, "gate has dtype bfloat16, expected"),
        ({"gate": torch.ones(2, 6, 4).double()}, ValueError, "gate has dtype float64, expected"),
        ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
        ({"return_stats": None}, TypeError, "return_stats must be True or False"),
        ({"gate_activation": "tanh"}, ValueError, "gate_activation must be one of 'sigmoid', "),
        ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a number or None"),
        ({"softmax_scale": math.inf}, ValueError, "softmax_scale must be finite"),
        ({"window": 0}, ValueError, "window counts the visible keys .* at least 1, got 0"),
        ({"window": (1, 2, 3)}, ValueError, "window has 3 entries, expected one per KV head"),
        ({"window": 2.5}, TypeError, "window must be None, an int"),
        ({"window": (1, 2.5)}, TypeError, "window takes ints and None, got 2.5"),
        ({"impl": "fast"}, ValueError, "impl must be one of 'auto', "),
        ({"impl": "cuda"}, NotImplementedError, "impl='cuda' cannot serve this call"),
        ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens must be an int32 tensor"),
        ({"cu_seqlens": torch.tensor([0, 6])}, TypeError, "cu_seqlens has dtype int64"),
        ({"cu_seqlens": bounds(6)}, ValueError, "take a batch of 1, got 2"),
        ({"k": torch.ones(2, 6, 2, 8, device="meta")}, ValueError, "on one device, got q on cpu"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**options)


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([1, 6], "must start at 0 and end at the packed length 6, got 1 and 6"),
        ([0, 5], "must start at 0 and end at the packed length 6, got 0 and 5"),
        ([0, 4, 2, 6], "must not decrease"),
    ],
)
def test_wrong_bounds_of_packed_sequences(cu_seqlens: list[int], message: str, impl: str) -> None:
    one = {name: (1, *shape[1:]) for name, shape in ONES.items()}
    with pytest.raises(ValueError, match=message):
        call(one, cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32), impl=impl)


def test_packed_sequences_take_as_many_keys_as_queries() -> None:
    shapes = {"q": (1, 5, 4, 8), "k": (1, 6, 2, 8), "v": (1, 6, 2, 8)}
    with pytest.raises(ValueError, match="as many keys as queries, got S=6 and T=5"):
        call(shapes, cu_seqlens=bounds(5))


def test_all_options_but_the_tensors_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional"):
        gated_sdpa(*(torch.ones(ONES[name]) for name in "qkv"), None, True)  # type: ignore[misc]


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_packed_calls_compile_and_name_the_function_in_errors(impl: str) -> None:
    q = torch.randn(1, 6, 2, 4)
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)

    def call(q: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        out = ls_attention(q, q, q, window=2, cu_seqlens=bounds, impl=impl)
        assert isinstance(out, torch.Tensor)
        return out

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, bounds), call(q, bounds))
    with pytest.raises(ValueError, match="ls_attention: cu_seqlens must start at 0 and end at"):
        call(q, bounds + 1)
