"""The decode steps that ``python -m bench speed`` times, and the peers they meet.

The most telling ones come first: a run that is cut off keeps what it has measured.
"""

from __future__ import annotations

from typing import Any

from attnvariants import ls_window
from bench.cases import Case

SOFTMAX_PEERS = ("sdpa decode", "flex decode", "fa3 decode")
_RECURRENT = {
    "channel": "fla fused_recurrent_gla",
    "token": "fla fused_recurrent_simple_gla",
    None: "fla fused_recurrent_linear_attn",
}
Entry = tuple[Case, tuple[str, ...]]  # a case and its peers


def softmax_decode(
    batch: int,
    cached: int,
    heads: int,
    dim: int,
    *,
    kv_heads: int | None = None,
    gate: str | None = None,
    global_heads: int | None = None,
    window: int = 0,
) -> Entry:
    """One token behind ``cached`` ones; KV heads are local but for ``global_heads`` of them."""
    count = kv_heads or heads
    options: dict[str, Any] = {}
    kind = "gated" if gate else "full"
    if global_heads is not None:
        options["window"] = ls_window(count, count - global_heads, window)
        kind = f"ls ({global_heads} global, window {window})"
    grouped = f"/{kv_heads}" if kv_heads else ""
    case = Case(
        "attention_decode",
        f"decode {kind} B{batch} T{cached} H{heads}{grouped} D{dim}",
        batch=batch,
        length=1,
        key_length=cached + 1,
        heads=heads,
        kv_heads=kv_heads,
        key_dim=dim,
        gate=gate,
        steps=(1,),
        options=options,
    )
    return case, SOFTMAX_PEERS


def linear_decode(
    batch: int, heads: int, key_dim: int, value_dim: int, g: str | None = "channel"
) -> Entry:
    """One step of a state; without ``g`` that of transNormer: feature map, norm, no decay."""
    norm: dict[str, Any] = {"feature_map": "elu+1", "norm": "model", "scale": 1.0}
    kind = f"per {g}" if g else "norm"
    case = Case(
        "linear_attention_decode",
        f"decode {kind} B{batch} H{heads} K{key_dim} V{value_dim}",
        batch=batch,
        length=1,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        g=g,
        initial_state=True,
        steps=(1,),
        options={} if g else norm,
    )
    return case, ("plain step", _RECURRENT[g])


def decode_cases(device: str, *, quick: bool = False) -> list[Entry]:
    """The decode steps for ``device``, "cpu" or "cuda"."""
    if device == "cuda":
        return _quick_gpu_cases() if quick else _gpu_cases()
    batches = (1,) if quick else (1, 8)
    cases = [
        *[softmax_decode(b, 4096, 8, 64, gate="elementwise") for b in batches],
        softmax_decode(1, 4096, 12, 64, gate="elementwise", global_heads=1, window=100),
        *[linear_decode(b, 8, 64, 128) for b in batches],
        *[linear_decode(b, 8, 64, 128, None) for b in batches],
    ]
    return _without_compiling(cases) if quick else cases


def _without_compiling(cases: list[Entry]) -> list[Entry]:
    """Compiling a peer for a CPU takes longer than timing a small case."""
    return [(case, tuple(p for p in peers if p != "flex decode")) for case, peers in cases]


def tiny_decode_cases() -> list[Entry]:
    """Every kind of step, as small as it can be."""
    cases = [
        softmax_decode(2, 16, 4, 16, kv_heads=2, gate="elementwise"),
        softmax_decode(1, 16, 2, 16, global_heads=1, window=4),
        *[linear_decode(1, 2, 16, 16, g) for g in ("channel", "token", None)],
    ]
    return _without_compiling(cases)


def _gpu_cases() -> list[Entry]:
    """Long caches and many rows; states of four sizes for every kind of decay."""
    ls: dict[str, Any] = {"global_heads": 1, "window": 100}
    return [
        *[softmax_decode(b, 8192, 12, 64, **ls) for b in (1, 8, 64, 128)],
        *[softmax_decode(b, 4096, 16, 128) for b in (1, 8, 64, 128)],
        *[linear_decode(b, 16, 128, 128) for b in (1, 8, 64, 256)],
        *[softmax_decode(b, 8192, 32, 128, kv_heads=8) for b in (1, 8, 64, 128)],
        *[softmax_decode(b, 65536, 16, 128) for b in (1, 8)],
        *[softmax_decode(b, 4096, 16, 128, gate="elementwise") for b in (1, 8, 64)],
        *[linear_decode(b, 16, 128, 256) for b in (1, 8, 64, 256)],
        *[linear_decode(b, 16, 128, 128, None) for b in (1, 8, 64, 256)],
        *[linear_decode(b, 16, 128, 128, "token") for b in (1, 8, 64, 256)],
        *[softmax_decode(b, 65536, 32, 128, kv_heads=8) for b in (1, 16)],
        softmax_decode(1, 65536, 12, 64, **ls),
        *[softmax_decode(b, 4096, 16, 128, global_heads=8, window=512) for b in (1, 8, 64)],
        *[softmax_decode(b, 8192, 20, 64, global_heads=4, window=100) for b in (1, 8)],
        *[
            softmax_decode(b, 8192, 32, 128, kv_heads=8, global_heads=g, window=w)
            for b, g, w in ((1, 1, 128), (8, 2, 512), (64, 2, 512))
        ],
    ]


def _quick_gpu_cases() -> list[Entry]:
    return [
        softmax_decode(1, 8192, 12, 64, global_heads=1, window=100),
        softmax_decode(8, 4096, 16, 128, gate="elementwise"),
        linear_decode(8, 16, 128, 128),
        linear_decode(8, 16, 128, 128, None),
    ]
