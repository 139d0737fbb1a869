"""Decoding with a cache gives what softmax attention gives for the whole sequence."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from decode_checks import F32, assert_decodes, cut, decode, draw, make_cache, whole
from hypothesis import given, settings

from attnvariants import KVCache, attention_decode, ls_attention
from attnvariants._verify import within
from attnvariants.reference.gated_sdpa import gated_sdpa

PLAIN = ("eager", "reference")  # kernels take smaller grids, in test_softmax_decode_kernels.py
IMPLEMENTATIONS = (*PLAIN, "triton")


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("prompt", [0, 1, 4, 5, 6, 7, 31])
@pytest.mark.parametrize("window", [None, 1, 6, (None, 6), (2, 6)])
def test_single_tokens_around_the_window(window: Any, prompt: int, impl: str) -> None:
    assert_decodes(draw(2, prompt + 9, 4, 2), window, prompt, [1] * 9, impl=impl)


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("steps", [[8, 8, 8], [2, 3, 4, 5, 6, 7], [1, 8, 1, 8, 1]])
@pytest.mark.parametrize("window", [None, 1, 3, 5, 8, (3, None), (7, 2)])
def test_steps_of_several_tokens(window: Any, steps: list[int], impl: str) -> None:
    """Among them steps longer than the window, into empty, filling and full rings."""
    for prompt in (0, 4, 20):
        assert_decodes(draw(2, prompt + sum(steps), 4, 2), window, prompt, steps, impl=impl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32, torch.float64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (8, 1)])
def test_head_groups_and_precisions(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    tensors = draw(2, 80, heads, kv_heads, key_dim=24, value_dim=40)
    tensors["gate"] = torch.randn_like(tensors["q"][..., 0])
    window = (16, None, 5)[:kv_heads]
    for impl in PLAIN if dtype == torch.float64 else IMPLEMENTATIONS:
        assert_decodes(tensors, window, 66, [1, 2, 8, 3], dtype, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", ["sigmoid", "ns_sigmoid", "softplus"])
@pytest.mark.parametrize("elementwise", [True, False])
def test_gates(elementwise: bool, activation: str, impl: str) -> None:
    tensors = draw(2, 20, 4, 2)
    gate = 4 * torch.randn(2, 20, 4, 7, dtype=torch.float64)
    tensors["gate"] = gate if elementwise else gate[..., 0]
    options = {"gate_activation": activation, "softmax_scale": 0.7, "impl": impl}
    assert_decodes(tensors, (4, None), 9, [1, 5, 2], **options)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_large_logits(impl: str) -> None:
    tensors = draw(2, 20, 4, 2)
    tensors["q"] *= 1e4
    assert_decodes(tensors, (4, None), 9, [1, 5, 2], impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_scales_that_are_not_positive(scale: float, impl: str) -> None:
    assert_decodes(draw(2, 20, 4, 2), (4, None), 9, [1, 5, 2], softmax_scale=scale, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_closed_gate_gives_zero(impl: str) -> None:
    tensors = {name: x.float() for name, x in cut(draw(1, 3, 2, 2), 0, 1).items()}
    gate = torch.full((1, 1, 2), -torch.inf)
    cache = make_cache(tensors, None)
    assert not attention_decode(**tensors, cache=cache, gate=gate, impl=impl).any()


def test_gate_in_float32_beside_half_precision() -> None:
    tensors = {name: x.bfloat16() for name, x in cut(draw(1, 3, 2, 2), 0, 3).items()}
    gate = torch.randn(1, 3, 2)
    for impl in IMPLEMENTATIONS:
        out = attention_decode(**tensors, cache=make_cache(tensors, None), gate=gate, impl=impl)
        truth = gated_sdpa(*(x.double() for x in tensors.values()), gate.double())
        row = within("out", out, truth, 0.0, torch.bfloat16)  # one rounding
        assert row.ok, row


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("steps", [[1] * 9, [3, 4, 2], [8, 1]])
def test_rows_of_different_length(steps: list[int], impl: str) -> None:
    window, prompts = (4, None, 4), (0, 3, 17)
    drawn = [draw(1, prompt + sum(steps), 6, 3) for prompt in prompts]
    whole_rows = [{name: x.float() for name, x in tensors.items()} for tensors in drawn]
    packed = [torch.cat([x[n][:, :p] for x, p in zip(whole_rows, prompts, strict=True)], 1)
              for n in "kv"]  # fmt: skip
    tails = {
        name: torch.cat([x[name][:, p:] for x, p in zip(whole_rows, prompts, strict=True)])
        for name in "qkv"
    }
    cache = make_cache(tails, window, max_length=40)
    cache.append(*packed, torch.tensor([0, *itertools.accumulate(prompts)], dtype=torch.int32))
    ends = itertools.pairwise(itertools.accumulate(steps, initial=0))
    out = torch.cat([attention_decode(**cut(tails, *e), cache=cache, impl=impl) for e in ends], 1)
    for row, (tensors, prompt) in enumerate(zip(whole_rows, prompts, strict=True)):
        exact = {name: x.double() for name, x in tensors.items()}
        truth = whole(exact, window, prompt, steps)["out"]
        plain = float((whole(tensors, window, prompt, steps)["out"] - truth).abs().max())
        comparison = within("out", out[row : row + 1], truth, plain, F32)
        assert comparison.ok, comparison


@settings(max_examples=40)
@given(
    window=st.lists(st.none() | st.integers(1, 12), min_size=3, max_size=3),
    prompt=st.integers(0, 20),
    steps=st.lists(st.integers(1, 8), min_size=1, max_size=5),
)
def test_any_windows_and_steps(window: list[int | None], prompt: int, steps: list[int]) -> None:
    torch.manual_seed(0)
    assert_decodes(draw(2, prompt + sum(steps), 6, 3), window, prompt, steps)


def test_matches_the_public_function() -> None:
    tensors = {name: x.float() for name, x in draw(2, 40, 4, 2).items()}
    full = ls_attention(**tensors, window=(6, None), impl="reference")
    out = decode(tensors, (6, None), 20, [1, 4, 8, 7], impl="auto")["out"]
    exact = whole({n: x.double() for n, x in tensors.items()}, (6, None), 20, [1, 4, 8, 7])["out"]
    plain = float((full[:, 20:] - exact).abs().max())
    row = within("out", out, exact, plain, F32)
    assert row.ok, row


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_window_of_one_returns_the_value(impl: str) -> None:
    tensors = {name: x.float() for name, x in draw(2, 8, 4, 2).items()}
    out = decode(tensors, 1, 3, [1, 4], impl=impl)["out"]
    assert torch.equal(out, tensors["v"][:, 3:8].repeat_interleave(2, dim=2))


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_strided_inputs(impl: str) -> None:
    tensors = {name: x.float() for name, x in draw(2, 8, 4, 2).items()}
    tensors["gate"] = torch.randn(2, 8, 4, 1).expand(2, 8, 4, 7)
    strided = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in tensors.items()}
    strided["q"] = torch.stack([tensors["q"], tensors["q"]], dim=-1)[..., 0]
    strided["gate"] = tensors["gate"]
    plain = decode(tensors, (3, None), 2, [1, 5], impl=impl)
    other = decode(strided, (3, None), 2, [1, 5], impl=impl)
    assert all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_what_an_earlier_sequence_left_does_not_leak(impl: str) -> None:
    tensors = {name: x.float() for name, x in draw(2, 8, 4, 2).items()}
    cache = make_cache(tensors, (3, None))
    cache.append(*(torch.full_like(tensors[name], 1e30) for name in "kv"))
    cache.reset()
    out = attention_decode(**cut(tensors, 0, 3), cache=cache, impl=impl)
    assert torch.equal(out, decode(tensors, (3, None), 0, [3], impl=impl)["out"])


def test_output_has_no_history() -> None:
    tensors = {name: x.float().requires_grad_() for name, x in draw(1, 2, 2, 2).items()}
    for impl in IMPLEMENTATIONS:
        cache = make_cache(tensors, None)
        out, stats = attention_decode(**tensors, cache=cache, return_stats=True, impl=impl)
        assert not out.requires_grad
        assert not stats.lse.requires_grad
        assert not cache.k.requires_grad


def test_autocast() -> None:
    tensors = {name: x.float() for name, x in draw(1, 2, 2, 2).items()}
    low = {name: x.bfloat16() for name, x in tensors.items()}
    cache = make_cache(low, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention_decode(**tensors, cache=cache)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attention_decode(**low, cache=make_cache(low, None)))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a wider cache is not narrowed
        out = attention_decode(**tensors, cache=make_cache(tensors, None))
    assert torch.equal(out, attention_decode(**tensors, cache=make_cache(tensors, None)))


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("gate", [None, (2, 3, 4), (2, 3, 4, 7)])
def test_opcheck(gate: tuple[int, ...] | None, impl: str) -> None:
    tensors = {name: x.float() for name, x in draw(2, 12, 4, 2).items()}
    cache = make_cache(tensors, (3, None))
    cache.append(tensors["k"][:, :5], tensors["v"][:, :5])
    new = cut(tensors, 5, 8)
    args = (new["q"], new["k"], new["v"], None if gate is None else torch.randn(gate))
    args += (cache.k, cache.v, cache.lengths, cache.capacities, 5, 0.5)
    args += (None if gate is None else "sigmoid", impl)
    torch.library.opcheck(torch.ops.attnvariants.attention_decode.default, args)


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("steps", [1, 3])
def test_compiles_without_recompiling(steps: int, impl: str) -> None:
    tensors = {name: x.float() for name, x in draw(2, 40, 4, 2).items()}
    plain, compiled = (make_cache(tensors, (6, None)) for _ in range(2))
    for cache in (plain, compiled):
        cache.append(tensors["k"][:, :5], tensors["v"][:, :5])
    torch._dynamo.reset()
    step = torch.compile(attention_decode, fullgraph=True, backend="aot_eager")
    for start in range(5, 20, steps):
        new = {name: x.contiguous() for name, x in cut(tensors, start, start + steps).items()}
        with torch._dynamo.config.patch(error_on_recompile=True):
            actual, stats = step(**new, cache=compiled, return_stats=True, impl=impl)
        out, expected = attention_decode(**new, cache=plain, return_stats=True, impl="reference")
        exact, _ = gated_sdpa(
            new["q"].double(),
            *(tensors[name][:, : start + steps].double() for name in "kv"),
            window=(6, None),
            return_stats=True,
        )
        row = within("out", actual, exact, float((out - exact).abs().max()), F32)
        assert row.ok, row
        assert stats.lse.shape == expected.lse.shape
        assert torch.equal(compiled.k, plain.k)
        assert torch.equal(compiled.lengths, plain.lengths)
    # The host takes over: it knows no tighter bound than max_length, and asks before refusing.
    assert compiled.max_filled == compiled.max_length
    rest = cut(tensors, 20, 24)
    assert attention_decode(**rest, cache=compiled, impl=impl).isfinite().all()
    assert compiled.lengths.tolist() == [24, 24]


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_repeated_runs_are_bit_equal(impl: str) -> None:
    tensors = {name: x.float() for name, x in draw(2, 30, 4, 2).items()}
    first, second = (decode(tensors, (6, None), 9, [1, 8, 4], impl=impl) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_full_cache_is_left_as_it_is() -> None:
    tensors = {name: x.float() for name, x in draw(2, 8, 4, 2).items()}
    cache = make_cache(tensors, (3, None))
    cache.append(tensors["k"][:, :6], tensors["v"][:, :6])
    before = cache.k.clone(), cache.v.clone()
    for impl in IMPLEMENTATIONS:
        with pytest.raises(ValueError, match="attention_decode: 3 more tokens make 9"):
            attention_decode(**cut(tensors, 0, 3), cache=cache, impl=impl)
    assert torch.equal(cache.k, before[0])
    assert torch.equal(cache.v, before[1])
    assert cache.lengths.tolist() == [6, 6]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cache": torch.ones(3)}, TypeError, "cache must be a KVCache, got Tensor"),
        ({"q": torch.ones(2, 9, 4, 5)}, ValueError, "k has shape .* expected .*Q=9"),
        ({"q": torch.ones(3, 2, 4, 5)}, ValueError, r"q has shape \(3, 2, 4, 5\), expected \[B=2"),
        ({"q": torch.ones(2, 2, 3, 5)}, ValueError, "the 3 heads of q must be a multiple of the 2"),
        ({"q": torch.ones(2, 2, 0, 5)}, ValueError, "dimension H must be at least 1"),
        ({"q": torch.ones(2, 4, 5)}, ValueError, "q has shape"),
        ({"q": torch.ones(2, 2, 4, 5).half()}, ValueError, "q float16, k float32, v float32, cach"),
        ({"q": torch.ones(2, 2, 4, 5).int()}, TypeError, "q has dtype int32"),
        ({"k": torch.ones(2, 2, 4, 5)}, ValueError, "k has shape .* expected .*Hkv=2"),
        ({"v": torch.ones(2, 2, 2, 5)}, ValueError, "v has shape .* expected .*V=7"),
        ({"v": torch.ones(2, 2, 2, 7, device="meta")}, ValueError, "one device.* v on meta"),
        ({"gate": torch.ones(2, 2, 4, 5)}, ValueError, "gate has shape .* or .*H=4"),
        ({"gate": torch.ones(2, 2, 4).double()}, ValueError, "gate has dtype float64, expected"),
        ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a number or None"),
        ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite"),
        ({"gate_activation": "tanh"}, ValueError, "gate_activation must be one of 'sigmoid'"),
        ({"return_stats": 1}, TypeError, "return_stats must be True or False"),
        ({"impl": "fast"}, ValueError, "impl must be one of 'auto'"),
        ({"impl": "cuda"}, NotImplementedError, "impl='cuda' cannot serve .* 'eager'"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    tensors = {name: x.float() for name, x in cut(draw(2, 9, 4, 2), 0, 2).items()}
    cache = make_cache(tensors, None)
    with pytest.raises(error, match=message):
        attention_decode(**{**tensors, "cache": cache, **change})
    assert cache.lengths.tolist() == [0, 0]
    assert not cache.k.any()


@pytest.mark.parametrize("steps", [0, 9])
def test_number_of_tokens(steps: int) -> None:
    tensors = {name: x.float() for name, x in cut(draw(2, 20, 4, 2), 0, steps).items()}
    with pytest.raises(ValueError, match=f"a step takes 1 to 8 tokens, got {steps}"):
        attention_decode(**tensors, cache=KVCache(2, 20, 2, 5, 7))
