"""Attention inside blocks: against its definition, against attention on the blocks, and alone."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from linear_checks import check_checkpoint, check_subsets
from softmax_checks import (
    F64,
    Inputs,
    assert_identical,
    assert_same,
    bounds,
    check_autocast,
    check_compile,
    check_definition,
    check_documents,
    check_operators,
    check_strides,
    draw,
    results,
)
from torch import Tensor

from attnvariants import diag_attention, gated_sdpa
from attnvariants.eager import diag
from attnvariants.ops.diag_attention import diag_attention_with_stats

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
IMPLEMENTATIONS = ("reference", "eager")
ACTIVATIONS = ("softmax", "relu")
KINDS = [(activation, causal) for activation in ACTIVATIONS for causal in (True, False)]


def run(tensors: Inputs, **options: Any) -> Inputs:
    return results("diag_attention", tensors, **options)


def matches(tensors: Inputs, dtype: torch.dtype, **options: Any) -> None:
    check_definition("diag_attention", tensors, dtype, **options)


# Against other definitions of the same.


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_attention_on_every_block(causal: bool, impl: str) -> None:
    tensors = draw(length=20, heads=4, kv_heads=2, value_dim=5)
    found = diag_attention(**tensors, block_size=6, causal=causal, impl=impl)
    for start in range(0, 20, 6):
        block = {name: tensor[:, start : start + 6] for name, tensor in tensors.items()}
        wanted = gated_sdpa(**block, causal=causal, impl="reference")
        torch.testing.assert_close(found[:, start : start + 6], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False])
def test_relu_has_no_row_sum(causal: bool, impl: str) -> None:
    tensors = draw(batch=1, length=5, heads=1)
    q, k, v = (tensors[name][0, :, 0] for name in "qkv")
    scores = (0.7 * q @ k.T).clamp(min=0)
    wanted = (scores.tril() if causal else scores) @ v
    options = {"activation": "relu", "softmax_scale": 0.7, "causal": causal, "block_size": 5}
    found = diag_attention(**tensors, **options, impl=impl)[0, :, 0]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


# Against the definition.


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize(("activation", "causal"), KINDS)
def test_lengths(length: int, activation: str, causal: bool) -> None:
    tensors = draw(length=length, heads=4, kv_heads=2, value_dim=5)
    options = {"activation": activation, "causal": causal}
    for dtype, block_size in ((F64, 16), (BF16, 64), (F32, 16)):
        matches(tensors, dtype, block_size=block_size, **options)


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_long_sequence(activation: str, dtype: torch.dtype) -> None:
    matches(draw(batch=1, length=1000, heads=2, key_dim=32), dtype, activation=activation)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8])
def test_groups_of_query_heads(group: int) -> None:
    tensors = draw(length=45, heads=2 * group, kv_heads=2, value_dim=7)
    for activation, causal in KINDS:
        matches(tensors, F64, block_size=16, activation=activation, causal=causal)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(1, 1), (24, 40), (192, 33), (256, 256)])
def test_head_dims(key_dim: int, value_dim: int) -> None:
    tensors = draw(length=40, heads=2, key_dim=key_dim, value_dim=value_dim)
    matches(tensors, BF16)
    matches(tensors, F64, block_size=9)


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    block_size=st.integers(1, 40),
    kind=st.sampled_from(KINDS),
    packed=st.booleans(),
    scores=st.integers(1, 5000),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=80)
def test_any_shape(
    lengths: list[int],
    block_size: int,
    kind: tuple[str, bool],
    packed: bool,
    scores: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    lengths = [*lengths, 1]
    tensors = draw(
        batch=1 if packed else 2, length=sum(lengths), heads=4, kv_heads=2, key_dim=3, value_dim=5
    )
    if packed:
        tensors["cu_seqlens"] = bounds(*lengths)
    options = {"block_size": block_size, "activation": kind[0], "causal": kind[1]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diag, "_SCORES", scores)
        found = run(tensors, impl="eager", **options)
    assert_same(found, run(tensors, impl="reference", **options))


# Properties.


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False])
def test_no_token_sees_another_block(causal: bool, impl: str) -> None:
    tensors = draw(length=50)
    options = {"block_size": 16, "causal": causal, "impl": impl}
    before = diag_attention(**tensors, **options)
    for name in "kv":
        tensors[name][:, :16] = 1e30
        tensors[name][:, 48:] = 1e30
    after = diag_attention(**tensors, **options)
    assert torch.equal(before[:, 16:48], after[:, 16:48])
    assert not torch.equal(before[:, 48:], after[:, 48:])


def test_the_gradients_of_a_block_stay_in_it() -> None:
    tensors = {name: x.requires_grad_() for name, x in draw(length=50).items()}
    out = diag_attention(**tensors, block_size=16, impl="eager")
    for gradient in torch.autograd.grad(out[:, 48:].sum(), tensors.values()):
        assert not gradient[:, :48].any()
        assert gradient[:, 48:].isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_causal_blocks_begin_with_their_own_value(impl: str) -> None:
    tensors = draw(length=50)
    out = diag_attention(**tensors, block_size=16, impl=impl)
    assert torch.equal(out[:, ::16], tensors["v"][:, ::16])
    assert_identical(
        {"out": diag_attention(**tensors, block_size=1, impl=impl)}, {"out": tensors["v"]}
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_block_of_the_whole_sequence_is_attention(impl: str) -> None:
    tensors = draw(length=50)
    for block_size in (50, 51, 10**6):
        found = run(tensors, block_size=block_size, impl=impl)
        assert_same(found, results("gated_sdpa", tensors, impl="reference"))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_rows_of_relu_that_see_no_positive_score_are_zero(dtype: torch.dtype) -> None:
    ones = torch.ones(1, 70, 2, 4, dtype=dtype)
    tensors = {"q": ones, "k": -ones, "v": ones}
    found = run(tensors, activation="relu", impl="eager")
    assert not any(value.any() for value in found.values())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("activation", "causal"), KINDS)
def test_the_largest_logit(activation: str, causal: bool, packed: bool, impl: str) -> None:
    tensors = draw(batch=1, length=45, heads=4, kv_heads=2)
    lengths = [20, 0, 7, 18] if packed else [45]
    options: dict[str, Any] = {"activation": activation, "causal": causal, "block_size": 8}
    if packed:
        options["cu_seqlens"] = bounds(*lengths)
    out, found = diag_attention_with_stats(**tensors, **options, impl=impl)
    assert torch.equal(out, diag_attention(**tensors, **options, impl=impl))
    keys = tensors["k"].repeat_interleave(2, dim=2)
    largest = torch.full((4,), -torch.inf, dtype=F64)
    stop = 0
    for length in lengths:
        start, stop = stop, stop + length
        for first in range(start, stop, 8):
            block = slice(first, min(first + 8, stop))
            logits = torch.einsum("thk,shk->hts", tensors["q"][0, block], keys[0, block])
            i, j = torch.meshgrid(*[torch.arange(logits.shape[-1])] * 2, indexing="ij")
            logits = logits.masked_fill((i < j) & causal, -torch.inf)
            largest = torch.maximum(largest, logits.amax(dim=(1, 2)) * 8**-0.5)
    torch.testing.assert_close(found, largest, rtol=1e-13, atol=0)


def test_the_largest_logit_is_optional_and_detached() -> None:
    tensors = {name: x.bfloat16().requires_grad_() for name, x in draw().items()}
    out, largest = diag_attention_with_stats(**tensors, impl="eager")
    assert out.requires_grad
    assert largest is not None
    assert not largest.requires_grad
    assert largest.dtype == F32
    for impl in IMPLEMENTATIONS:
        assert diag_attention_with_stats(**tensors, stats=False, impl=impl)[1] is None


# Packed sequences.


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "lengths", [[40], [16, 16, 16], [5, 64, 1, 5, 20], [0, 7, 0, 0, 30, 7, 0], [1] * 5]
)
@pytest.mark.parametrize(("activation", "causal"), KINDS)
def test_blocks_restart_with_every_document(
    activation: str, causal: bool, lengths: list[int], impl: str
) -> None:
    tensors = draw(batch=1, length=sum(lengths), heads=4, kv_heads=2, value_dim=5)
    options = {"block_size": 16, "activation": activation, "causal": causal}
    check_documents("diag_attention", tensors, lengths, impl, **options)


# PyTorch around it.


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("activation", "causal"), KINDS)
def test_gradcheck(activation: str, causal: bool, impl: str) -> None:
    tensors = draw(batch=1, length=7, heads=2, kv_heads=1, key_dim=3, value_dim=2)

    def call(*values: Tensor) -> Tensor:
        options = {"block_size": 3, "activation": activation, "causal": causal}
        return diag_attention(**dict(zip(tensors, values, strict=True)), **options, impl=impl)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in tensors.values()])


def test_only_the_inputs_are_kept() -> None:
    tensors = {name: x.requires_grad_() for name, x in draw(length=100).items()}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        diag_attention(**tensors, impl="eager")
    assert set(kept) == {x.untyped_storage().data_ptr() for x in tensors.values()}


def test_gradients_of_gradients_are_refused() -> None:
    tensors = {name: x.requires_grad_() for name, x in draw().items()}
    out = diag_attention(**tensors, impl="eager")
    with pytest.raises(NotImplementedError, match="impl='reference'"):
        torch.autograd.grad(out.sum(), tensors["q"], create_graph=True)


def test_compile() -> None:
    check_compile("diag_attention", lambda length: draw(length=length), block_size=16)


def test_compile_packed() -> None:
    def make(length: int) -> Inputs:
        return {**draw(batch=1, length=length), "cu_seqlens": bounds(9, length - 9)}

    check_compile("diag_attention", make, activation="relu", causal=False)


@pytest.mark.parametrize(("activation", "causal"), KINDS)
def test_operators(activation: str, causal: bool) -> None:
    tensors = draw(batch=1, heads=4, kv_heads=2, value_dim=5)
    names = {"diag_forward", "diag_backward"}
    options = {"activation": activation, "causal": causal, "block_size": 8}
    check_operators("diag_attention", tensors, names, **options)
    check_operators("diag_attention", {**tensors, "cu_seqlens": bounds(12, 8)}, names, **options)


def test_autocast() -> None:
    check_autocast("diag_attention", draw(length=70), activation="relu")


def test_checkpoint() -> None:
    check_checkpoint("diag_attention", draw(), block_size=8)


def test_gradients_of_some_inputs() -> None:
    check_subsets("diag_attention", draw(), block_size=8)


@pytest.mark.parametrize("length", [64, 70])
def test_strides(length: int) -> None:
    check_strides("diag_attention", draw(length=length, heads=4, kv_heads=2), block_size=16)


def test_two_runs_are_equal_bit_for_bit() -> None:
    tensors = {name: x.float() for name, x in draw(length=300).items()}
    assert_identical(run(tensors, impl="eager"), run(tensors, impl="eager"))


# Errors.


def call(**options: Any) -> Any:
    tensors = {name: x.float() for name, x in draw(heads=4, kv_heads=2).items()}
    return diag_attention(**{**tensors, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"q": torch.ones(2, 20, 8)}, ValueError, r"q has shape \(2, 20, 8\), expected"),
        ({"q": torch.ones(2, 19, 4, 8)}, ValueError, r"k has shape .* \[B=2, T=19, Hkv, K=8\]"),
        ({"v": torch.ones(2, 20, 4, 8)}, ValueError, "v has shape .* Hkv=2, V"),
        ({"q": torch.ones(2, 20, 3, 8)}, ValueError, "3 heads of q must be a multiple of the 2"),
        ({"v": torch.ones(2, 20, 2, 257)}, ValueError, "head dim of v must be between 1 and 256"),
        ({"v": torch.ones(2, 20, 2, 8).half()}, ValueError, "must share one dtype, got q float32"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"block_size": 2.0}, TypeError, "block_size must be an int, got 2.0"),
        ({"activation": "gelu"}, ValueError, "activation must be one of 'softmax', 'relu'"),
        ({"causal": None}, TypeError, "causal must be True or False"),
        ({"softmax_scale": "a"}, TypeError, "softmax_scale must be a number"),
        ({"cu_seqlens": bounds(20)}, ValueError, "take a batch of 1, got 2"),
        ({"cu_seqlens": torch.tensor([0, 20])}, TypeError, "cu_seqlens has dtype int64"),
        ({"impl": "numpy"}, ValueError, "impl must be one of"),
        ({"impl": "cuda"}, NotImplementedError, "impl='cuda' cannot serve this call"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"diag_attention: .*{message}"):
        call(**options)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("stop", [[19], [21], [15, 10, 20]])
def test_wrong_bounds_of_packed_sequences(stop: list[int], impl: str) -> None:
    one = {name: x[:1] for name, x in draw().items()}
    cu_seqlens = torch.tensor([0, *stop], dtype=torch.int32)
    with pytest.raises(ValueError, match="diag_attention: cu_seqlens must"):
        diag_attention(**one, cu_seqlens=cu_seqlens, impl=impl)
