"""The floor model against numbers worked out by hand (H200: 4.3 TB/s copy, 780 TFLOP/s bf16)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.cases import DECODING, FORWARD, TRAINING, Case
from bench.floors import Work, visible_pairs, work

BF16 = torch.bfloat16
COPY, MATMUL = 4.3e12, 780e12


def _norm(batch: int, length: int, heads: int, k: int, v: int) -> Case:
    return Case(
        "norm_linear_attention",
        "norm",
        batch=batch,
        length=length,
        heads=heads,
        key_dim=k,
        value_dim=v,
        options={"norm": None},
    )


def _gla(case: Case) -> Case:
    return dataclasses.replace(case, function="gated_linear_attention", g="channel")


FIRST = _norm(8, 4096, 16, 64, 128)  # 524,288 token-heads
SECOND = _norm(1, 65536, 16, 128, 128)  # 1,048,576


@pytest.mark.parametrize(
    ("case", "forward_ms", "both_ms"),
    [
        (FIRST, 0.094, 0.250),
        (SECOND, 0.250, 0.687),
        (_gla(FIRST), 0.125, 0.343),  # log-decays in float32
        (_gla(SECOND), 0.375, 1.061),
    ],
)
def test_linear_bytes(case: Case, forward_ms: float, both_ms: float) -> None:
    forward, both = work(case, FORWARD, BF16), work(case, TRAINING, BF16)
    assert 1e3 * forward.bytes / COPY == pytest.approx(forward_ms, abs=6e-4)
    assert 1e3 * both.bytes / COPY == pytest.approx(both_ms, abs=1.1e-3)


def test_linear_flops() -> None:
    rows = 524_288
    forward = rows * (65 * (64 + 128) + 4 * 64 * 128)
    backward = rows * (65 * (3 * 64 + 2 * 128) + 10 * 64 * 128)
    assert work(FIRST, FORWARD, BF16).flops == forward
    assert work(FIRST, TRAINING, BF16).flops == forward + backward
    everything = dataclasses.replace(FIRST, options={"norm": None, "causal": False})
    assert work(everything, FORWARD, BF16).flops == rows * 4 * 64 * 128


def test_norm_and_gate_cost_what_they_move() -> None:
    plain = work(FIRST, FORWARD, BF16)
    gated = dataclasses.replace(FIRST, gate="elementwise")
    assert work(gated, FORWARD, BF16).bytes - plain.bytes == 524_288 * 128 * 2
    normed = dataclasses.replace(FIRST, options={})  # RMSNorm over all heads
    extra = work(normed, TRAINING, BF16).bytes - work(FIRST, TRAINING, BF16).bytes
    assert extra == 524_288 * 128 * 2 + 2 * 4 * 8 * 4096  # out is read; 1/rms written and read


@pytest.mark.parametrize(
    ("queries", "keys", "window"), [(7, 7, None), (7, 7, 3), (3, 9, None), (3, 9, 4), (9, 4, None)]
)
def test_visible_pairs(queries: int, keys: int, window: int | None) -> None:
    counted = sum(
        0 <= (i + keys - queries) - j < (window or keys)
        for i in range(queries)
        for j in range(keys)
    )
    assert visible_pairs(queries, keys, window) == counted
    free = queries * keys if window is None else counted
    assert visible_pairs(queries, keys, window, causal=False) == free


def test_local_heads_save_what_the_paper_counts() -> None:
    options = {"window": (100,) * 11 + (None,)}
    local = Case("ls_attention", "ls", length=8192, heads=12, key_dim=64, options=options)
    full = dataclasses.replace(local, function="gated_sdpa", options={})
    ratio = work(local, FORWARD, BF16).flops / work(full, FORWARD, BF16).flops
    assert ratio == pytest.approx(0.106, abs=5e-4)


def test_softmax_flops_and_bytes() -> None:
    case = Case("gated_sdpa", "gated", batch=8, length=4096, heads=16, key_dim=128)
    forward, both = work(case, FORWARD, BF16), work(case, TRAINING, BF16)
    assert forward.flops == pytest.approx(4 * 4096**2 * 128 * 8 * 16 / 2, rel=1e-3)
    assert both.flops == pytest.approx(3.5 * forward.flops)
    tensor = 8 * 4096 * 16 * 128 * 2
    assert forward.bytes == 4 * tensor
    rows = 8 * 4096 * 16
    assert both.bytes == 4 * tensor + 8 * tensor + 2 * 4 * rows  # q k v out dout, dq dk dv; lse
    gated = dataclasses.replace(case, gate="elementwise")
    assert work(gated, TRAINING, BF16).bytes - both.bytes == 3 * tensor
    grouped = dataclasses.replace(case, kv_heads=4)
    assert work(grouped, FORWARD, BF16).flops == forward.flops
    assert work(grouped, FORWARD, BF16).bytes == 2.5 * tensor


def test_diagonal_blocks() -> None:
    options = {"block_size": 64}
    case = Case("diag_attention", "diag", length=200, heads=2, key_dim=16, options=options)
    pairs = 2 * (3 * 64 * 65 // 2 + 8 * 9 // 2)
    assert work(case, FORWARD, BF16).flops == pairs * 2 * 32


@pytest.mark.parametrize(
    ("batch", "cached", "window", "kv_heads", "microseconds"),
    [
        (1, 4096, None, 16, 7.8),
        (8, 4096, None, 16, 62),
        (8, 4096, None, 4, 15.6),
        (64, 4096, (512,) * 8 + (None,) * 8, 16, 281),
        (1, 65536, (512,) * 8 + (None,) * 8, 16, 63),
    ],
)
def test_decode_bytes(
    batch: int,
    cached: int,
    window: tuple[int | None, ...] | None,
    kv_heads: int,
    microseconds: float,
) -> None:
    case = Case(
        "attention_decode",
        "decode",
        batch=batch,
        length=1,
        key_length=cached,
        heads=16,
        kv_heads=kv_heads,
        key_dim=128,
        options={} if window is None else {"window": window},
    )
    assert 1e6 * work(case, DECODING, BF16).bytes / COPY == pytest.approx(microseconds, rel=0.02)


@pytest.mark.parametrize(("batch", "microseconds"), [(1, 0.5), (8, 3.9), (64, 31.5), (256, 126)])
def test_linear_decode_bytes(batch: int, microseconds: float) -> None:
    case = Case("linear_attention_decode", "step", batch=batch, length=1, heads=16, key_dim=128)
    assert 1e6 * work(case, DECODING, BF16).bytes / COPY == pytest.approx(microseconds, rel=0.05)


def test_the_floor_is_the_slower_of_the_two() -> None:
    assert Work(flops=10, bytes=10).seconds(bytes_per_s=5, flops_per_s=1) == 10
    assert Work(flops=10, bytes=10).seconds(bytes_per_s=1, flops_per_s=5) == 10
