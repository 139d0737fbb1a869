"""Decode steps of softmax attention, by the Triton kernels and by the CUDA C++ kernel alike."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from cuda_build import cuda_on_cpu
from decode_checks import (
    F32,
    assert_decodes,
    cut,
    decode,
    draw,
    make_cache,
    use_small_tiles,
    whole,
)
from hypothesis import given, settings

from attnvariants import attention_decode
from attnvariants._verify import within

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["triton", "cuda"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Triton's interpreter with tiny tiles, or threads that run as fibers, in a random order."""
    if request.param == "cuda":
        with cuda_on_cpu(monkeypatch):
            yield "cuda"
    else:
        use_small_tiles(monkeypatch)
        yield "triton"


@pytest.mark.parametrize("prompt", [0, 5, 6, 7, 31])
@pytest.mark.parametrize("window", [1, (None, 6)])
def test_single_tokens_around_the_window(window: Any, prompt: int, impl: str) -> None:
    assert_decodes(draw(2, prompt + 8, 4, 2), window, prompt, [1] * 8, impl=impl)


@pytest.mark.parametrize("steps", [[8, 8, 1], [2, 3, 4, 5, 6, 7]])
@pytest.mark.parametrize("prompt", [0, 4, 30])
def test_steps_of_several_tokens(prompt: int, steps: list[int], impl: str) -> None:
    """Among them steps longer than the window, into empty, filling and full rings."""
    tensors = draw(1, prompt + sum(steps), 5, 5)
    assert_decodes(tensors, (None, 20, 5, 3, 1), prompt, steps, impl=impl)


@settings(max_examples=15)
@given(
    window=st.lists(st.none() | st.integers(1, 40), min_size=2, max_size=2),
    prompt=st.integers(0, 60),
    steps=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    group=st.integers(1, 3),
)
def test_any_windows_and_steps(
    window: list[int | None], prompt: int, steps: list[int], group: int, impl: str
) -> None:
    torch.manual_seed(0)
    tensors = draw(1, prompt + sum(steps), 2 * group, 2)
    assert_decodes(tensors, window, prompt, steps, impl=impl)


def test_rows_reset_one_by_one(impl: str) -> None:
    """A row that starts anew beside others that go on, on top of what it has left."""
    tensors = {name: x.float() for name, x in draw(3, 50, 4, 2).items()}
    cache = make_cache(tensors, (18, None), max_length=60)
    cache.append(tensors["k"][:, :30], tensors["v"][:, :30])
    cache.lengths[1] = 0
    starts = torch.tensor([30, 0, 30])
    out = []
    for start in range(0, 12, 4):
        step = {name: torch.stack([x[b, starts[b] + start :][:4] for b in range(3)])
                for name, x in tensors.items()}  # fmt: skip
        out.append(attention_decode(**step, cache=cache, impl=impl))
    assert cache.lengths.tolist() == [42, 12, 42]
    for b, prompt in enumerate(starts.tolist()):
        row = {name: x[b : b + 1] for name, x in tensors.items()}
        exact = {name: x.double() for name, x in row.items()}
        truth, plain = (whole(x, (18, None), prompt, [12])["out"] for x in (exact, row))
        found = torch.cat(out, dim=1)[b : b + 1]
        comparison = within("out", found, truth, float((plain - truth).abs().max()), F32)
        assert comparison.ok, comparison


@pytest.mark.parametrize("dtype", [*HALF, F32])
def test_unused_slots_may_hold_anything(dtype: torch.dtype, impl: str) -> None:
    tensors = {name: x.to(dtype) for name, x in draw(2, 60, 4, 2).items()}
    clean = decode(tensors, (20, None), 9, [1, 4, 8], impl=impl)["out"]
    cache = make_cache(tensors, (20, None))
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    cache.append(tensors["k"][:, :9], tensors["v"][:, :9])
    ends = itertools.pairwise([9, 10, 14, 22])
    out = [attention_decode(**cut(tensors, *end), cache=cache, impl=impl) for end in ends]
    assert torch.equal(torch.cat(out, dim=1), clean)


def test_the_key_that_leaves_the_window_is_not_read(impl: str) -> None:
    tensors = {name: x.float() for name, x in draw(1, 21, 2, 1).items()}
    clean = decode(tensors, 20, 20, [1], impl=impl)["out"]
    tensors["k"][:, 0] = tensors["v"][:, 0] = torch.nan
    assert torch.equal(decode(tensors, 20, 20, [1], impl=impl)["out"], clean)


def test_cache_holds_what_append_would_have_written(impl: str) -> None:
    tensors = {name: x.float() for name, x in draw(2, 40, 6, 3).items()}
    caches = [make_cache(tensors, (5, None, 1)) for _ in range(2)]
    for start, end in itertools.pairwise([0, 8, 9, 14, 22, 40]):
        if end - start <= 8:
            attention_decode(**cut(tensors, start, end), cache=caches[0], impl=impl)
            caches[1].append(tensors["k"][:, start:end], tensors["v"][:, start:end])
            assert torch.equal(caches[0].k, caches[1].k)
            assert torch.equal(caches[0].v, caches[1].v)
            assert torch.equal(caches[0].lengths, caches[1].lengths)
