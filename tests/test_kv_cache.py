"""The key/value cache: which token lies in which slot, and what it refuses."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from attnvariants import KVCache
from attnvariants.kv_cache import head_runs

HEADS, K, V = 3, 4, 5


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, HEADS, K, dtype=dtype), torch.randn(*shape, HEADS, V, dtype=dtype)


def assert_holds(cache: KVCache, row: int, k: Tensor, v: Tensor) -> None:
    """Row ``row`` holds the last tokens of ``k``, ``v`` ``[length, Hkv, D]``, each in its slot."""
    length = len(k)
    assert int(cache.lengths[row]) == length <= cache.max_filled
    for head, (offset, capacity) in enumerate(zip(cache.offsets, cache.capacities, strict=True)):
        for position in range(max(0, length - capacity), length):
            slot = offset + position % capacity
            assert torch.equal(cache.k[row, slot], k[position, head]), (head, position)
            assert torch.equal(cache.v[row, slot], v[position, head]), (head, position)


def snapshot(cache: KVCache) -> list[Tensor]:
    return [cache.k.clone(), cache.v.clone(), cache.lengths.clone()]


def assert_unchanged(cache: KVCache, before: list[Tensor]) -> None:
    after = (cache.k, cache.v, cache.lengths)
    assert all(torch.equal(x, y) for x, y in zip(after, before, strict=True))


def test_layout() -> None:
    cache = KVCache(2, 20, HEADS, K, V, window=(3, None, 50), dtype=torch.bfloat16)
    assert cache.windows == [3, -1, 50]
    assert cache.capacities == [3, 20, 20]
    assert cache.offsets == [0, 3, 23]
    assert cache.k.shape == (2, 43, K)
    assert cache.v.shape == (2, 43, V)
    assert cache.k.dtype == cache.v.dtype == cache.dtype == torch.bfloat16
    assert cache.lengths.dtype == torch.int32
    assert cache.lengths.tolist() == [0, 0]
    assert cache.max_filled == 0
    assert cache.device == torch.device("cpu")
    assert (cache.batch_size, cache.max_length, cache.num_kv_heads) == (2, 20, HEADS)
    assert (cache.key_dim, cache.value_dim) == (K, V)


def test_head_runs_are_views_of_the_buffer() -> None:
    cache = KVCache(2, 20, HEADS, K, V, window=(3, 3, None))
    k, v = tokens(2, 2)
    cache.append(k, v)
    local, long = head_runs(cache.capacities)
    assert (local.heads, long.heads) == (slice(0, 2), slice(2, 3))
    assert local.view(cache.k).shape == (2, 2, 3, K)
    assert long.view(cache.k).data_ptr() == cache.k[:, 6:].data_ptr()
    assert torch.equal(local.view(cache.v)[:, :, :2], v[:, :, :2].transpose(1, 2))


@pytest.mark.parametrize("pieces", [(1,), (3,), (4,), (5,), (11,), (1, 1, 1, 1, 1), (4, 9), (40,)])
@pytest.mark.parametrize("window", [None, 1, 4, (4, 4, None), (None, 1, 7), 100])
def test_append(window: object, pieces: tuple[int, ...]) -> None:
    cache = KVCache(2, 40, HEADS, K, V, window=window)
    k, v = tokens(2, sum(pieces))
    for k_piece, v_piece in zip(k.split(pieces, dim=1), v.split(pieces, dim=1), strict=True):
        cache.append(k_piece, v_piece)
    assert cache.max_filled == sum(pieces)
    for row in range(2):
        assert_holds(cache, row, k[row], v[row])


@settings(max_examples=40)
@given(
    window=st.lists(st.none() | st.integers(1, 12), min_size=HEADS, max_size=HEADS),
    pieces=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4),
)
def test_append_packed(window: list[int | None], pieces: list[tuple[int, int]]) -> None:
    cache = KVCache(2, 40, HEADS, K, V, window=window)
    rows: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for lengths in pieces:
        k, v = tokens(1, sum(lengths))
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        cache.append(k, v, cu_seqlens)
        for row, start in enumerate((0, lengths[0])):
            cut = slice(start, start + lengths[row])
            rows[row].append((k[0, cut], v[0, cut]))
    for row, parts in enumerate(rows):
        assert_holds(cache, row, *(torch.cat(part) for part in zip(*parts, strict=True)))


def test_rows_of_different_length_grow_together() -> None:
    cache = KVCache(2, 40, HEADS, K, V, window=(4, None, 6))
    k, v = tokens(1, 8)
    cache.append(k, v, torch.tensor([0, 3, 8], dtype=torch.int32))
    more_k, more_v = tokens(2, 5)
    cache.append(more_k, more_v)
    for row, cut in enumerate((slice(0, 3), slice(3, 8))):
        grown = torch.cat([k[0, cut], more_k[row]]), torch.cat([v[0, cut], more_v[row]])
        assert_holds(cache, row, *grown)
    cache.lengths[0] = 0  # empties one row
    cache.append(more_k, more_v)
    assert_holds(cache, 0, more_k[0], more_v[0])


def test_full_cache_refuses_and_stays_as_it_is() -> None:
    cache = KVCache(2, 6, HEADS, K, V, window=(2, None, None))
    cache.append(*tokens(2, 6))
    before = snapshot(cache)
    with pytest.raises(
        ValueError, match=r"KVCache.append: 1 more tokens make 7 in a row, .*max_length=6"
    ):
        cache.append(*tokens(2, 1))
    with pytest.raises(ValueError, match="3 more tokens make 9"):
        cache.append(*tokens(1, 3), torch.tensor([0, 0, 3], dtype=torch.int32))
    assert_unchanged(cache, before)
    assert cache.max_filled == 6


def test_loose_bound_does_not_refuse_what_fits() -> None:
    cache = KVCache(2, 10, HEADS, K, V)
    cache.append(*tokens(1, 9), torch.tensor([0, 8, 9], dtype=torch.int32))
    cache.append(*tokens(1, 9), torch.tensor([0, 1, 9], dtype=torch.int32))
    assert cache.lengths.tolist() == [9, 9]
    cache.append(*tokens(2, 1))
    assert cache.lengths.tolist() == [10, 10]
    with pytest.raises(ValueError, match="max_length=10"):
        cache.append(*tokens(2, 1))


def test_reset_forgets_everything() -> None:
    cache = KVCache(2, 10, HEADS, K, V, window=4)
    cache.append(*(torch.full_like(x, torch.nan) for x in tokens(2, 7)))
    buffers = cache.k.data_ptr(), cache.v.data_ptr(), cache.lengths.data_ptr()
    cache.reset()
    assert buffers == (cache.k.data_ptr(), cache.v.data_ptr(), cache.lengths.data_ptr())
    assert not cache.k.any()
    assert not cache.v.any()
    assert cache.lengths.tolist() == [0, 0]
    assert cache.max_filled == 0


def test_nbytes() -> None:
    heads, length, local, dim, batch = 12, 8192, 100, 64, 2
    window = (local,) * (heads - 1) + (None,)
    common = {"dtype": torch.bfloat16, "device": "meta"}
    mixed = KVCache(batch, length, heads, dim, dim, window=window, **common)
    full = KVCache(batch, length, heads, dim, dim, **common)
    assert mixed.nbytes == batch * ((length + 11 * local) * 2 * dim * 2 + 4)
    assert full.nbytes == batch * (heads * length * 2 * dim * 2 + 4)
    assert full.nbytes / mixed.nbytes == pytest.approx(10.6, abs=0.05)


def test_cache_keeps_no_history() -> None:
    cache = KVCache(2, 10, HEADS, K, V)
    k, v = tokens(2, 3)
    cache.append(k.requires_grad_(), v.requires_grad_())
    assert not cache.k.requires_grad
    assert not cache.v.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_casts_what_is_appended(dtype: torch.dtype) -> None:
    cache = KVCache(2, 10, HEADS, K, V, dtype=dtype)
    k, v = tokens(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache.append(k, v.bfloat16())
    assert_holds(cache, 0, k[0].to(dtype), v[0].bfloat16().to(dtype))


def test_append_compiles() -> None:
    plain, compiled = (KVCache(2, 40, HEADS, K, V, window=(4, 4, None)) for _ in range(2))
    append = torch.compile(
        lambda cache, k, v: cache.append(k, v), fullgraph=True, backend="aot_eager"
    )
    for _ in range(4):
        k, v = tokens(2, 3)
        plain.append(k, v)
        append(compiled, k, v)
    assert_unchanged(compiled, snapshot(plain))
    assert compiled.max_filled == compiled.max_length  # a bound that holds for every repetition
    k, v = tokens(2, 28)
    compiled.append(k, v)  # fits: 12 + 28
    with pytest.raises(ValueError, match="1 more tokens make 41"):
        compiled.append(k[:, :1], v[:, :1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "KVCache: batch_size must be at least 1, got 0"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1"),
        ({"max_length": 2.0}, TypeError, "max_length must be an int, got 2.0"),
        ({"num_kv_heads": True}, TypeError, "num_kv_heads must be an int"),
        ({"key_dim": 257}, ValueError, "key_dim must be at most 256, got 257"),
        ({"value_dim": 0}, ValueError, "value_dim must be at least 1"),
        ({"window": (3, 3)}, ValueError, "window has 2 entries, expected one per KV head"),
        ({"window": 0}, ValueError, "window .* must be at least 1, got 0"),
        ({"window": "all"}, TypeError, "window must be None, an int"),
        ({"dtype": torch.int8}, ValueError, "dtype must be one of float16, .*got int8"),
        ({"dtype": "bfloat16"}, TypeError, "dtype must be a torch.dtype"),
    ],
)
def test_constructor_errors(change: dict, error: type[Exception], message: str) -> None:
    sizes = {"batch_size": 2, "max_length": 9, "num_kv_heads": HEADS, "key_dim": K, "value_dim": V}
    with pytest.raises(error, match=message):
        KVCache(**sizes | change)


def cu(*bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


@pytest.mark.parametrize(
    ("k", "v", "cu_seqlens", "error", "message"),
    [
        (torch.ones(3, 1, HEADS, K), None, None, ValueError, r"k has shape \(3, 1, 3, 4\)"),
        (
            torch.ones(2, 1, HEADS, K + 1),
            None,
            None,
            ValueError,
            r"expected \[B=2, T, Hkv=3, K=4\]",
        ),
        (torch.ones(2, HEADS, K), None, None, ValueError, "k has shape"),
        (torch.ones(2, 1, 1, K), None, None, ValueError, "k has shape"),
        (None, torch.ones(2, 2, HEADS, V), None, ValueError, "v has shape"),
        (None, torch.ones(2, 1, HEADS, K), None, ValueError, "v has shape"),
        (torch.ones(2, 1, HEADS, K).double(), None, None, ValueError, "k float64, v float32, cach"),
        (torch.ones(2, 1, HEADS, K, dtype=torch.int64), None, None, TypeError, "k has dtype int64"),
        (
            torch.ones(2, 1, HEADS, K, device="meta"),
            None,
            None,
            ValueError,
            "one device.*k on meta",
        ),
        ([[1.0]], None, None, TypeError, "k must be a tensor"),
        (None, None, cu(0, 1), ValueError, r"k has shape \(2, 1, 3, 4\), expected \[B=1"),
        (torch.ones(1, 1, HEADS, K), torch.ones(1, 1, HEADS, V), cu(0, 1), ValueError, "2 entries"),
        (
            torch.ones(1, 1, HEADS, K),
            torch.ones(1, 1, HEADS, V),
            cu(0, 2, 1),
            ValueError,
            "decreas",
        ),
        (torch.ones(1, 1, HEADS, K), torch.ones(1, 1, HEADS, V), cu(0, 1, 2), ValueError, "end at"),
        (torch.ones(1, 1, HEADS, K), torch.ones(1, 1, HEADS, V), [0, 1], TypeError, "int32 tensor"),
        (
            *(torch.ones(1, 1, HEADS, K), torch.ones(1, 1, HEADS, V), cu(0, 0, 1).long()),
            *(TypeError, "cu_seqlens has dtype int64, expected int32"),
        ),
    ],
)
def test_append_errors(
    k: object, v: object, cu_seqlens: object, error: type[Exception], message: str
) -> None:
    cache = KVCache(2, 9, HEADS, K, V)
    cache.append(*tokens(2, 2))
    before = snapshot(cache)
    with pytest.raises(error, match=message):
        cache.append(
            torch.ones(2, 1, HEADS, K) if k is None else k,
            torch.ones(2, 1, HEADS, V) if v is None else v,
            cu_seqlens,
        )
    assert_unchanged(cache, before)
