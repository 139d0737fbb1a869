"""LS-attention: local and global heads in one call."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
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
    cotangent,
    draw,
    results,
)
from torch import Tensor

from attnvariants import gated_sdpa, ls_attention, ls_window, window_from_flash
from attnvariants.eager import _tiles
from attnvariants.reference.gated_sdpa import visible_keys

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
IMPLEMENTATIONS = ("reference", "eager")


def matches(tensors: Inputs, dtype: torch.dtype, **options: Any) -> None:
    check_definition("ls_attention", tensors, dtype, return_stats=True, **options)


def run(tensors: Inputs, **options: Any) -> Inputs:
    return results("ls_attention", tensors, **options)


# Against PyTorch and the definition.


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_every_head_sees_its_own_window(impl: str) -> None:
    tensors = draw(length=9, heads=4)
    windows = (3, 1, None, 20)
    found = ls_attention(**tensors, window=windows, impl=impl)
    for head, window in enumerate(windows):
        shown = [[0 <= i - j < (window or 9) for j in range(9)] for i in range(9)]
        q, k, v = (tensors[name][:, :, head] for name in "qkv")
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.tensor(shown))
        torch.testing.assert_close(found[:, :, head], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 16, 17, 63, 64, 65, 130, 200])
@pytest.mark.parametrize("window", [2, 64, (5, None), (100, 17)])
@pytest.mark.parametrize("dtype", [BF16, F64])
def test_lengths_and_windows(length: int, window: Any, dtype: torch.dtype) -> None:
    matches(draw(length=length, heads=4, kv_heads=2, value_dim=5), dtype, window=window)


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_a_long_sequence(dtype: torch.dtype) -> None:
    """The published layout: one global head beside local ones that see 100 keys."""
    tensors = draw(batch=1, length=1000, heads=3, key_dim=32)
    matches(tensors, dtype, window=ls_window(3, 2, 100))


@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 7, 8])
def test_a_window_belongs_to_a_group_of_query_heads(group: int) -> None:
    tensors = draw(length=100, heads=3 * group, kv_heads=3, gate="headwise")
    window = (7, None, 30)
    matches(tensors, F64, window=window)
    matches(tensors, BF16, window=window)
    expanded = {**tensors}
    for name in "kv":
        expanded[name] = tensors[name].repeat_interleave(group, dim=2)
    each = [entry for entry in window for _ in range(group)]
    assert_same(
        {"out": ls_attention(**tensors, window=window, impl="eager")},
        {"out": ls_attention(**expanded, window=each, impl="eager")},
    )


@pytest.mark.parametrize("dim", [5, 32, 96, 128])
def test_head_dims(dim: int) -> None:
    matches(draw(length=90, heads=2, key_dim=dim, value_dim=dim + 3), BF16, window=(20, None))


@pytest.mark.parametrize(("length", "keys"), [(1, 40), (17, 100), (100, 130), (70, 30)])
def test_more_and_fewer_keys_than_queries(length: int, keys: int) -> None:
    tensors = draw(length=length, keys=keys, heads=4, kv_heads=2)
    for window in (9, (64, None), (1, 90)):
        matches(tensors, F64, window=window)


@given(
    length=st.integers(1, 60),
    extra=st.integers(-10, 30),
    windows=st.lists(st.one_of(st.none(), st.integers(1, 80)), min_size=3, max_size=3),
    group=st.integers(1, 2),
    block=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60)
def test_any_windows(
    length: int, extra: int, windows: list[int | None], group: int, block: int, seed: int
) -> None:
    torch.manual_seed(seed)
    keys = max(1, length + extra)
    tensors = draw(batch=1, length=length, keys=keys, heads=3 * group, kv_heads=3, key_dim=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tiles, "_BLOCK", block)
        patch.setattr(_tiles, "_LOCAL_BLOCK", block)
        found = run(tensors, window=windows, impl="eager")
    assert_same(found, run(tensors, window=windows, impl="reference"))


# Properties of windows.


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [130, 131, 10**9])
def test_a_window_of_the_whole_sequence_is_causal_attention(window: int, impl: str) -> None:
    tensors = draw(length=130)
    causal = results("gated_sdpa", tensors, impl=impl)
    assert_identical(run(tensors, window=window, impl=impl), causal)
    assert_identical(run(tensors, window=(None,) * 4, impl=impl), causal)
    assert_identical(run(tensors, window=None, impl=impl), causal)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
def test_a_window_of_one_returns_v(dtype: torch.dtype, impl: str) -> None:
    tensors = {name: x.to(dtype) for name, x in draw(length=90).items()}
    found = run(tensors, window=1, impl=impl)
    assert torch.equal(found["out"], tensors["v"])
    assert not found["dq"].any()
    assert not found["dk"].any()


def test_a_window_of_one_with_a_gate_returns_the_gated_v() -> None:
    tensors = draw(length=90, gate="elementwise")
    found = ls_attention(**tensors, window=1, impl="eager")
    wanted = tensors["v"] * tensors["gate"].sigmoid()
    torch.testing.assert_close(found, wanted, rtol=1e-15, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_permuted_heads_give_permuted_outputs(impl: str) -> None:
    """Among them heads of one window that are not neighbours."""
    tensors = {n: x.requires_grad_() for n, x in draw(length=80, heads=5).items()}
    windows = (8, 8, None, 30, None)
    order = [2, 0, 3, 4, 1]
    moved = {name: tensor[:, :, order] for name, tensor in tensors.items()}
    found = ls_attention(**moved, window=[windows[head] for head in order], impl=impl)
    wanted = ls_attention(**tensors, window=windows, impl=impl)[:, :, order]
    gradients = [torch.autograd.grad(x, tensors.values(), cotangent(x)) for x in (found, wanted)]
    torch.testing.assert_close((found, *gradients[0]), (wanted, *gradients[1]))


def test_both_published_conventions_differ_by_one_key() -> None:
    """Span 50 counts the query's own key in the code of 2025, and not in that of 2026."""
    q = torch.empty(1)
    both = [visible_keys(90, 90, True, [w], None, q)[0].sum(1) for w in (50, window_from_flash(50))]
    assert both[0][60:].unique().tolist() == [50]
    assert both[1][60:].unique().tolist() == [51]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_lies_outside_the_window_changes_nothing(impl: str) -> None:
    tensors = draw(length=100, heads=2)
    before = ls_attention(**tensors, window=(10, None), impl=impl)
    for name in "kv":
        tensors[name][:, :40] = 1e30
    after = ls_attention(**tensors, window=(10, None), impl=impl)
    assert torch.equal(before[:, 49:, 0], after[:, 49:, 0])
    assert not torch.equal(before[:, 49:, 1], after[:, 49:, 1])


@pytest.mark.parametrize("window", [1, 10, 100, 1000])
def test_a_local_head_costs_its_window(window: int) -> None:
    """Every visible score lies in a tile, and few others do."""
    length = 20_000
    q = torch.empty(1, length, 1, 1)
    tiles = _tiles.Tiles(q, q, 1.0, True, window)
    seen = 0
    for rows, columns in tiles:
        assert columns.stop == rows.stop
        assert columns.start == max(0, rows.start - window + 1)
        seen += (rows.stop - rows.start) * (columns.stop - columns.start)
    assert seen <= length * (window + _tiles._LOCAL_BLOCK)
    assert tiles.buffer().numel() <= _tiles._LOCAL_BLOCK * (window + _tiles._LOCAL_BLOCK)


def test_statistics_by_kind_of_head() -> None:
    tensors = draw(length=150, heads=3)
    window = (1, 20, None)
    found, wanted = (
        ls_attention(**tensors, window=window, return_stats=True, impl=impl)[1]
        for impl in ("eager", "reference")
    )
    torch.testing.assert_close(found.max_logit, wanted.max_logit, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.lse, wanted.lse, rtol=1e-13, atol=1e-13)
    diagonal = (tensors["q"] * tensors["k"]).sum(-1)[:, :, 0] * 8**-0.5
    torch.testing.assert_close(found.max_logit[0], diagonal.max(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_without_a_window_it_need_not_be_causal(impl: str) -> None:
    tensors = draw(length=40)
    found = run(tensors, window=(None,) * 4, causal=False, impl=impl)
    assert_identical(found, results("gated_sdpa", tensors, causal=False, impl=impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (40, 40), (30, 90), (90, 30), (70, 135)])
def test_a_local_head_is_causal_in_any_case(length: int, keys: int, impl: str) -> None:
    """``causal=False`` frees the heads without a window; a band ends at the query's own key."""
    tensors = draw(length=length, keys=keys, heads=6, kv_heads=3, gate="headwise")
    window = (7, None, 10**6)
    found = run(tensors, window=window, causal=False, impl=impl)
    wanted = run(tensors, window=window, causal=True, impl=impl)
    free = run(tensors, window=None, causal=False, impl=impl)
    for name, heads in {"out": 2, "dq": 2, "dk": 1, "dv": 1, "dgate": 2}.items():
        all_keys = slice(heads, 2 * heads)
        wanted[name][:, :, all_keys] = free[name][:, :, all_keys]
    assert_same(found, wanted)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_free_head_beside_local_ones_in_packed_sequences(impl: str) -> None:
    tensors = draw(batch=1, length=150, heads=4, kv_heads=2)
    options = {"window": (7, None), "causal": False}
    check_documents("ls_attention", tensors, [64, 0, 1, 85], impl, **options)


# Packed sequences.


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("lengths", [[70], [30, 30, 30], [64, 0, 1, 65, 7], [0, 3, 0]])
def test_the_window_holds_within_a_document(lengths: list[int], impl: str) -> None:
    tensors = draw(batch=1, length=sum(lengths), heads=4, kv_heads=2, value_dim=3)
    for window in (5, (16, None), (40, 2)):
        check_documents("ls_attention", tensors, lengths, impl, window=window)


def test_nothing_leaks_over_the_edge_of_a_document() -> None:
    tensors = draw(batch=1, length=50, heads=2)
    options = {"window": (25, None), "cu_seqlens": bounds(20, 30), "impl": "eager"}
    before = ls_attention(**tensors, **options)
    for name in "kv":
        tensors[name][:, :20] = 1e30
    assert torch.equal(before[:, 20:], ls_attention(**tensors, **options)[:, 20:])


# PyTorch around it.


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradcheck(impl: str) -> None:
    tensors = draw(batch=1, length=7, heads=4, kv_heads=2, key_dim=3, gate="headwise")

    def call(*values: Tensor) -> Tensor:
        return ls_attention(**dict(zip(tensors, values, strict=True)), window=(3, None), impl=impl)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in tensors.values()])


def test_compile() -> None:
    check_compile("ls_attention", lambda length: draw(length=length), window=(9, 9, None, 3))


def test_operators() -> None:
    names = {"softmax_forward", "softmax_backward"}
    check_operators("ls_attention", draw(batch=1), names, window=(9, 9, None, 3))


def test_autocast() -> None:
    check_autocast("ls_attention", draw(length=70), window=ls_window(4, 3, 10))


def test_checkpoint() -> None:
    check_checkpoint("ls_attention", draw(gate="elementwise"), window=5)


def test_gradients_of_some_inputs() -> None:
    check_subsets("ls_attention", draw(gate="elementwise"), window=(5, 5, None, None))


def test_strides() -> None:
    check_strides("ls_attention", draw(length=70, heads=4, kv_heads=2), window=(5, None))


def test_two_runs_are_equal_bit_for_bit() -> None:
    tensors = {name: x.float() for name, x in draw(length=300).items()}
    window = ls_window(4, 3, 33)
    first = run(tensors, window=window, impl="eager")
    assert_identical(run(tensors, window=window, impl="eager"), first)


# Errors.


def call(**options: Any) -> Any:
    tensors = {name: x.float() for name, x in draw(heads=4, kv_heads=2).items()}
    return ls_attention(**{**tensors, "window": 4, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0}, ValueError, "must be at least 1, got 0"),
        ({"window": (4, -1)}, ValueError, "must be at least 1, got -1"),
        ({"window": (4,)}, ValueError, "window has 1 entries, expected one per KV head .2."),
        ({"window": (4,) * 4}, ValueError, "window has 4 entries, expected one per KV head .2."),
        ({"window": "4"}, TypeError, "window must be None, an int"),
        ({"window": (True, 4)}, TypeError, "window takes ints and None, got True"),
        ({"q": torch.ones(2, 20, 3, 8)}, ValueError, "3 heads of q must be a multiple of the 2"),
        ({"softmax_scale": math.nan}, ValueError, "softmax_scale must be finite"),
        ({"gate": torch.ones(2, 20, 2)}, ValueError, "gate has shape"),
        ({"cu_seqlens": bounds(20)}, ValueError, "take a batch of 1, got 2"),
        ({"impl": "triton-"}, ValueError, "impl must be one of"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"ls_attention: .*{message}"):
        call(**options)


def test_the_window_is_required() -> None:
    with pytest.raises(TypeError, match="window"):
        ls_attention(**draw())  # type: ignore[call-arg]
    assert gated_sdpa(**draw()).shape == (2, 20, 4, 8)
