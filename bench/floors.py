"""The least work a call can do, and so the least time: bytes and FLOPs from the shapes alone.

The floor is ``max(bytes / copy rate, FLOPs / matmul rate)`` at the rates measured in the same
run. It belongs to no implementation: each input is read once, each output written once, and the
matrix products of the textbook algorithm are done once, on visible pairs only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.cases import DECODE, SOFTMAX, TRAINING, Case

CHUNK = 64  # tokens per chunk of the linear variants

CONVENTIONS = (
    "Softmax FLOPs: 2 (K + V) per visible pair of query and key forward (4 T^2 D B H, half of it "
    "when causal, 4 T w D B H for a window), 6 K + 4 V backward (2.5x for K = V).",
    f"Linear FLOPs: chunks of C = {CHUNK} tokens with causal skipping inside, so (C + 1) (K + V) "
    "+ 4 K V per token and head forward, (C + 1) (3 K + 2 V) + 10 K V backward.",
    "Bytes: every input read once and every output written once; backward also reads the "
    "cotangent and what any fused kernel keeps (out and 4 bytes of row statistics where it needs "
    "them) and writes all gradients. Gates, log-decays and states count in their own dtype.",
    "Decode bytes: the visible part of the cache read and the new tokens written, or the state "
    "read and written, once per call.",
    "Floor = max(bytes / copy rate, FLOPs / matmul rate), both rates measured in the same run. "
    "Data that fits the cache can beat it.",
)


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one call."""

    flops: float
    bytes: float

    def seconds(self, bytes_per_s: float, flops_per_s: float) -> float:
        """The floor at the given rates."""
        return max(self.bytes / bytes_per_s, self.flops / flops_per_s)


def work(case: Case, mode: str, dtype: torch.dtype) -> Work:
    """The least work of ``case``, forward, forward and backward, or one decode step."""
    if case.function in DECODE:
        return _decode(case, dtype)
    if case.function in SOFTMAX:
        return _softmax(case, mode == TRAINING, dtype)
    return _linear(case, mode == TRAINING, dtype)


def visible_pairs(queries: int, keys: int, window: int | None, *, causal: bool = True) -> int:
    """Visible pairs of one head; the last query is aligned with the last key."""
    if not causal and window is None:
        return queries * keys

    def below(n: int) -> int:  # pairs of the first n positions
        w = n if window is None else min(window, n)
        return w * (w + 1) // 2 + (n - w) * w

    return below(keys) - below(max(0, keys - queries))


def _case_pairs(case: Case) -> int:
    """Visible pairs of all query heads and rows."""
    group = case.heads // case.key_heads
    if case.function == "diag_attention":
        size = int(case.options.get("block_size", 64))
        full, rest = divmod(case.length, size)
        per_head = full * visible_pairs(size, size, None, causal=case.causal)
        per_head += visible_pairs(rest, rest, None, causal=case.causal)
        return case.batch * case.heads * per_head
    return case.batch * sum(
        group * visible_pairs(case.length, case.keys, window, causal=case.causal)
        for window in case.windows
    )


def _softmax(case: Case, training: bool, dtype: torch.dtype) -> Work:
    pairs, size = _case_pairs(case), dtype.itemsize
    rows = case.batch * case.length * case.heads
    keys = case.batch * case.keys * case.key_heads
    gate = rows * _gate_channels(case)
    flops = pairs * 2 * (case.key_dim + case.values)
    moved = rows * (case.key_dim + case.values) + keys * (case.key_dim + case.values) + gate
    if not training:
        return Work(flops, moved * size)
    flops += pairs * (6 * case.key_dim + 4 * case.values)
    backward = rows * (2 * case.key_dim + 2 * case.values)  # q, out, dout; dq
    backward += 2 * keys * (case.key_dim + case.values) + 2 * gate
    return Work(flops, (moved + backward) * size + 2 * 4 * rows)  # lse written, then read


def _linear(case: Case, training: bool, dtype: torch.dtype) -> Work:
    rows, size = case.batch * case.length * case.heads, dtype.itemsize
    k, v = case.key_dim, case.values
    wide = max(4, size)
    gate = rows * _gate_channels(case) * size
    decay = {"channel": rows * k, "token": rows}.get(case.g or "", 0) * wide
    norm = _norm_rows(case)
    inside = (CHUNK + 1) if case.causal else 0
    flops = rows * (inside * (k + v) + 4 * k * v)
    moved = rows * (2 * k + 2 * v) * size + decay + gate
    if not training:
        return Work(flops, moved)
    flops += rows * (inside * (3 * k + 2 * v) + 10 * k * v)
    backward = rows * (4 * k + 3 * v) * size + 2 * decay + 2 * gate
    if norm or gate:
        backward += rows * v * size  # out
    return Work(flops, moved + backward + 2 * wide * norm)


def _norm_rows(case: Case) -> int:
    """Numbers of ``1 / rms`` that the backward of the epilogue needs."""
    default = "model" if case.function == "norm_linear_attention" else None
    rows = {"model": case.batch * case.length, "head": case.batch * case.length * case.heads}
    return rows.get(case.options.get("norm", default), 0)


def _decode(case: Case, dtype: torch.dtype) -> Work:
    k, v, size = case.key_dim, case.values, dtype.itemsize
    rows = case.batch * case.length * case.heads
    gate = rows * _gate_channels(case)
    if case.function == "linear_attention_decode":
        wide = max(4, size)
        state = case.batch * case.heads * k * v
        decay = {"channel": rows * k, "token": rows}.get(case.g or "", 0) * wide
        vectors = (rows * (2 * k + 2 * v) + gate) * size + decay
        return Work(rows * 4 * k * v, 2 * state * wide + vectors)
    cached = case.batch * sum(min(window or case.keys, case.keys) for window in case.windows)
    new = case.batch * case.length * case.key_heads  # written to the cache
    moved = (cached + new + rows) * (k + v) + gate
    return Work(_case_pairs(case) * 2 * (k + v), moved * size)


def _gate_channels(case: Case) -> int:
    return {"elementwise": case.values, "headwise": 1}.get(case.gate or "", 0)
