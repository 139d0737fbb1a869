"""The decode kernels for softmax attention, with tiles so small that a head has many parts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from decode_checks import (
    F32,
    assert_decodes,
    cut,
    decode,
    draw,
    make_cache,
    spread,
    use_small_tiles,
    whole,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from attnvariants import KVCache, attention_decode
from attnvariants._verify import within
from attnvariants.kernels import _cache_parts, softmax_decode

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tiles(monkeypatch)


@pytest.mark.parametrize(
    ("prompt", "dtype"), [(15, F32), (33, F32), (70, F32), (150, F32), *((150, x) for x in HALF)]
)
def test_rings_and_whole_caches_of_several_parts(prompt: int, dtype: torch.dtype) -> None:
    """The ring of 70 slots, 5 parts, is filling, just full, or has been around twice."""
    tensors = draw(2, 170, 6, 3, key_dim=24, value_dim=40)
    assert_decodes(tensors, (70, None, 33), prompt, [1, 8, 1, 3], dtype, impl="triton")


@pytest.mark.parametrize("prompt", [0, 3, 310])
def test_more_parts_than_are_added_at_a_time(prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """21 parts; of an empty cache only the last one, which has the new keys, is not empty."""
    monkeypatch.setattr(softmax_decode, "_processors", lambda _: 64)
    tensors = draw(1, 330, 1, 1)
    working = {name: x.float() for name, x in tensors.items()}
    cache = make_cache(working, None)
    (run,) = _cache_parts.share_out((330,), 1, 16, 128)
    assert run.parts >> 1 == 21
    cache.append(working["k"][:, :prompt], working["v"][:, :prompt])
    out = attention_decode(**cut(working, prompt, prompt + 2), cache=cache, impl="triton")
    exact = {name: x.double() for name, x in working.items()}
    truth, plain = (whole(x, None, prompt, [2])["out"] for x in (exact, working))
    row = within("out", out, truth, float((plain - truth).abs().max()), F32)
    assert row.ok, row


@pytest.mark.parametrize("dtype", [torch.bfloat16, F32])
@pytest.mark.parametrize(("heads", "kv_heads", "steps"), [(8, 1, [3, 8]), (3, 1, [1, 7])])
def test_more_rows_than_a_tile(
    heads: int, kv_heads: int, steps: list[int], dtype: torch.dtype
) -> None:
    tensors = draw(2, 80, heads, kv_heads)
    tensors["gate"] = torch.randn(2, 80, heads, 7, dtype=torch.float64)
    assert_decodes(tensors, 40, 55, steps, dtype, impl="triton")


def test_short_contents_spread_over_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """33 tokens are three tiles, although a part of the whole cache would hold all of them."""
    launch, seen = softmax_decode.launch, []

    def spy(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        launch(kernel, programs, *arguments, **options)
        seen.extend(x.total for x in arguments if isinstance(x, softmax_decode.Parts))

    monkeypatch.setattr(softmax_decode, "launch", spy)
    tensors = {name: x.float() for name, x in draw(1, 34, 1, 1).items()}
    cache = make_cache(tensors, None, max_length=16 * 40)
    cache.append(tensors["k"][:, :33], tensors["v"][:, :33])
    attention_decode(**cut(tensors, 33, 34), cache=cache, impl="triton")
    assert seen[0].shape == (8, 1)  # 5 tiles each
    assert (seen[0][:, 0] > 0).tolist() == [True] * 3 + [False] * 4 + [True]


@pytest.mark.parametrize(("key_dim", "value_dim"), [(1, 1), (17, 256), (256, 16), (96, 80)])
@pytest.mark.parametrize("dtype", [torch.float16, F32])
def test_head_dims(key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    tensors = draw(1, 40, 2, 1, key_dim, value_dim)
    assert_decodes(tensors, 20, 30, [1, 2], dtype, impl="triton")


@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (200, 200)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32])
def test_with_the_tiles_of_a_device(
    key_dim: int, value_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    tensors = draw(1, 200, 2, 1, key_dim, value_dim)
    assert_decodes(tensors, None, 180, [1, 8, 1], dtype, impl="triton")


def test_caches_and_inputs_with_any_strides() -> None:
    tensors = {name: x.float() for name, x in draw(2, 40, 4, 2).items()}
    tensors["gate"] = torch.randn(2, 40, 4)
    plain = decode(tensors, (20, None), 30, [1, 8], impl="triton")["out"]
    cache = make_cache(tensors, (20, None))
    cache.append(tensors["k"][:, :30], tensors["v"][:, :30])
    cache.k, cache.v = (spread(x) for x in (cache.k, cache.v))
    ends, out = itertools.pairwise([30, 31, 39]), []
    for end in ends:
        step = {name: spread(x) for name, x in cut(tensors, *end).items()}
        out.append(attention_decode(**step, cache=cache, impl="triton"))
    assert torch.equal(torch.cat(out, dim=1), plain)


def test_nothing_is_read_by_the_host() -> None:
    """Neither through an operator, nor could it: the launches are the same without any values."""
    tensors = {name: x.float() for name, x in draw(2, 40, 4, 2).items()}
    cache = make_cache(tensors, (20, None))
    cache.append(tensors["k"][:, :9], tensors["v"][:, :9])
    called = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Spy():
        attention_decode(**cut(tensors, 9, 12), cache=cache, impl="triton")
    assert "attnvariants::attention_decode" in called
    reads = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"}
    assert not reads & set(called)


def test_launches_depend_on_sizes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def record(kernel: Any, programs: int, *arguments: Any, **_: Any) -> None:
        launched.append((kernel.__name__, programs, [type(x).__name__ for x in arguments]))

    def step(lengths: Tensor, max_filled: int) -> None:
        q, k, k_cache = (torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 2, 5), torch.zeros(2, 60, 5))
        softmax_decode.attend(
            *(q, k, k, None, k_cache, k_cache, lengths, [20, 40], max_filled, 1.0, None)
        )

    monkeypatch.setattr(softmax_decode, "launch", record)
    step(torch.tensor([0, 39], dtype=torch.int32), 39)
    step(torch.tensor([3, 5], dtype=torch.int32), 5)
    with FakeTensorMode():
        step(torch.zeros(2, dtype=torch.int32), 40)
    assert len(launched) == 6
    assert launched[:2] == launched[2:4]
    assert [entry[:2] for entry in launched[:2]] == [entry[:2] for entry in launched[4:]]


@pytest.mark.parametrize(
    ("capacities", "parallel", "counts"),
    [
        ((4096,) * 16, 1, None),
        ((512, 512, 4096, 100), 2, None),
        ((65536,), 1, None),
        ((8192,) * 8, 64, [1] * 8),  # rows and heads keep the device busy
        ((3, 16, 17), 1, [1, 1, 2]),
    ],
)
def test_parts_follow_the_capacity(
    capacities: tuple[int, ...], parallel: int, counts: list[int] | None
) -> None:
    runs = [
        [size >> 1 for size in run] for run in _cache_parts.share_out(capacities, parallel, 16, 264)
    ]
    heads = {}
    for head, count, parts, slot, capacity in runs:
        for n in range(count):
            heads[head + n] = (parts, slot + n * capacity, capacity)
    slots = [0, *itertools.accumulate(capacities)]
    assert [heads[h][1] for h in range(len(capacities))] == slots[:-1]
    assert [heads[h][2] for h in range(len(capacities))] == list(capacities)
    found = [heads[h][0] for h in range(len(capacities))]
    if counts is not None:
        assert found == counts
    else:
        assert 132 <= sum(found) * parallel <= 264
        size = max(-(-c // 16) / n for c, n in zip(capacities, found, strict=True))
        for capacity, parts in zip(capacities, found, strict=True):
            assert parts <= -(-capacity // 16) / size + 1
    lengths = [capacity / parts for _, _, parts, _, capacity in runs]
    assert all(longer >= shorter - 16 for longer, shorter in itertools.pairwise(lengths))


@pytest.mark.parametrize("dtype", [torch.bfloat16, F32])
def test_tiles_have_sides_that_compile(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes any size; the compiler takes powers of two, and 16 for products."""
    monkeypatch.undo()
    sizes = (16, 32, 64, 128, 256)
    for rows, BK, BV in itertools.product((1, 16, 17, 200), sizes, sizes):
        config = softmax_decode.configure(rows, BK, BV, dtype)
        for side in (config.BT, config.BS, config.BC):
            assert side >= 16
            assert side & (side - 1) == 0
        assert BK % config.BC == 0
        assert config.BS * (BK + BV) <= 8192


def test_no_rows() -> None:
    empty = torch.zeros(0, 1, 2, 4)
    lengths = torch.zeros(0, dtype=torch.int32)
    out, row_max, lse = softmax_decode.attend(
        *(empty, empty, empty, None, torch.zeros(0, 6, 4), torch.zeros(0, 6, 4), lengths),
        *([3, 3], 0, 1.0, None),
    )
    assert out.shape == (0, 1, 2, 4)
    assert row_max.shape == lse.shape == (0, 1, 2)


def test_compiles_with_several_parts() -> None:
    tensors = {name: x.float() for name, x in draw(2, 60, 4, 2).items()}
    tensors["gate"] = torch.randn(2, 60, 4, 7)
    plain, compiled = (make_cache(tensors, (20, None)) for _ in range(2))
    for cache in (plain, compiled):
        cache.append(tensors["k"][:, :40], tensors["v"][:, :40])
    torch._dynamo.reset()
    step = torch.compile(attention_decode, fullgraph=True, backend="aot_eager")
    for start in (40, 42):
        new = {name: x.contiguous() for name, x in cut(tensors, start, start + 2).items()}
        out = step(**new, cache=compiled, impl="triton")
        assert torch.equal(out, attention_decode(**new, cache=plain, impl="triton"))
        assert torch.equal(compiled.k, plain.k)
        assert torch.equal(compiled.lengths, plain.lengths)


def test_refuses_float64() -> None:
    cache = KVCache(1, 4, 1, 2, 2, dtype=torch.float64)
    x = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="takes float16, bfloat16 and float32"):
        attention_decode(x, x, x, cache, impl="triton")
    assert not cache.lengths.any()
