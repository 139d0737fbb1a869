"""Inputs and comparisons for decode steps of softmax attention over a cache."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from attnvariants import KVCache, attention_decode
from attnvariants._verify import (
    Comparison,
    exact_and_error,
    round_to,
    settle,
    shuffle_channels,
    within,
)
from attnvariants.reference.gated_sdpa import gated_sdpa

F32 = torch.float32


def use_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts the cache of a head into many parts for the Triton kernels."""
    from attnvariants.kernels import softmax_decode

    config = softmax_decode.Config(BT=16, BS=16, BC=16, warps=4, stages=1)
    monkeypatch.setattr(softmax_decode, "configure", lambda *_: config)


def draw(
    batch: int, length: int, heads: int, kv_heads: int, key_dim: int = 5, value_dim: int = 7
) -> dict[str, Tensor]:
    return {
        "q": torch.randn(batch, length, heads, key_dim, dtype=torch.float64),
        "k": torch.randn(batch, length, kv_heads, key_dim, dtype=torch.float64),
        "v": torch.randn(batch, length, kv_heads, value_dim, dtype=torch.float64),
    }


def spread(x: Tensor) -> Tensor:
    """The same numbers, with the first axis innermost and NaN between them."""
    wide = x.new_full((*x.shape[1:], 2 * x.shape[0] + 1), torch.nan)
    view = wide[..., 1::2].movedim(-1, 0)
    view.copy_(x)
    return view


def cut(tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: tensor[:, start:stop] for name, tensor in tensors.items()}


def make_cache(tensors: Mapping[str, Tensor], window: Any, max_length: int = 0) -> KVCache:
    batch, length, kv_heads, key_dim = tensors["k"].shape
    return KVCache(
        *(batch, max_length or length, kv_heads, key_dim, tensors["v"].shape[-1]),
        window=window,
        dtype=tensors["k"].dtype,
    )


def decode(
    tensors: Mapping[str, Tensor], window: Any, prompt: int, steps: Sequence[int], **options: Any
) -> dict[str, Tensor]:
    """Appends a prompt of ``prompt`` tokens and decodes ``steps``."""
    cache = make_cache(tensors, window)
    cache.append(tensors["k"][:, :prompt], tensors["v"][:, :prompt])
    ends = itertools.accumulate(steps, initial=prompt)
    results = [
        attention_decode(**cut(tensors, *ends), cache=cache, return_stats=True, **options)
        for ends in itertools.pairwise(ends)
    ]
    assert cache.lengths.tolist() == [prompt + sum(steps)] * cache.batch_size
    assert cache.max_filled == prompt + sum(steps)
    return {
        "out": torch.cat([out for out, _ in results], dim=1),
        "lse": torch.cat([stats.lse for _, stats in results], dim=1),
        "max_logit": torch.stack([stats.max_logit for _, stats in results]),
    }


def whole(
    tensors: Mapping[str, Tensor], window: Any, prompt: int, steps: Sequence[int], **options: Any
) -> dict[str, Tensor]:
    """The same by the definition on the whole sequence."""
    kinds = {"window": window, "return_stats": True, "upcast": False} | options
    stop = prompt + sum(steps)
    out, stats = gated_sdpa(**cut(tensors, 0, stop), **kinds)
    largest = []
    for start, end in itertools.pairwise(itertools.accumulate(steps, initial=prompt)):
        keys = {name: tensor[:, :end] for name, tensor in tensors.items() if name in "kv"}
        largest.append(gated_sdpa(tensors["q"][:, start:end], **keys, **kinds)[1].max_logit)
    return {
        "out": out[:, prompt:],
        "lse": stats.lse[:, prompt:],
        "max_logit": torch.stack(largest),
    }


def assert_decodes(
    tensors: Mapping[str, Tensor],
    window: Any,
    prompt: int,
    steps: Sequence[int],
    dtype: torch.dtype = F32,
    *,
    impl: str = "eager",
    **options: Any,
) -> None:
    """Steps against the whole sequence, within twice the error of the plain definition.

    A miss is settled over several draws of the roundings, as in all other comparisons.
    """
    rounded = {name: round_to(name, tensor, dtype) for name, tensor in tensors.items()}

    def measure(attempt: int) -> list[Comparison]:
        working = shuffle_channels(rounded, attempt)
        actual = decode(working, window, prompt, steps, impl=impl, **options)
        truth, errors = exact_and_error(
            lambda inputs, _: whole(inputs, window, prompt, steps, **options), working, dtype
        )
        assert actual["out"].dtype == dtype
        return [within(name, actual[name], truth[name], errors[name], dtype) for name in truth]

    rows = settle(measure)
    assert all(row.ok for row in rows), rows
