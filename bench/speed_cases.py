"""The cases that ``python -m bench speed`` times, by device, and the peers they meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnvariants import ls_window
from bench.cases import DECODING, FORWARD, TRAINING, Case
from bench.decode_cases import decode_cases, tiny_decode_cases


@dataclass(frozen=True)
class SpeedCase:
    """A call to time, in which modes, beside which peers (names in ``bench.peers``)."""

    case: Case
    modes: tuple[str, ...]
    peers: tuple[str, ...]
    sweep: bool = False  # a point of the curve "speed against length"


_ATTENTION_PEERS = (
    "sdpa + gate",
    "sdpa",
    "sdpa + gate, compiled",
    "sdpa flash, compiled",
    "sdpa cudnn, compiled",
    "sdpa math",
    "sdpa flash",
    "sdpa efficient",
    "sdpa cudnn",
    "flex",
    "fa3",
    "fa4",
)
_LOCAL_PEERS = (
    "sdpa",
    "mhsa flash",
    "mhsa cudnn",
    "two calls",
    "two calls of ours",
    "flex",
    "fa3 two calls",
    "fa4 two calls",
)
_LOOPS = ("token loop", "token loop, unbind")
_GLA_PEERS = ("sdpa", "fla chunk_gla")
_SIMPLE_GLA_PEERS = ("sdpa", "fla chunk_simple_gla")
_NORM_PEERS = ("sdpa", "fla chunk_linear_attn")
_DIAG_PEERS = ("sdpa", "sdpa in blocks")


def speed_cases(
    device: str, *, quick: bool = False, lengths: Sequence[int] | None = None, tiny: bool = False
) -> list[SpeedCase]:
    """The cases to time on ``device`` ("cpu" or "cuda"), the sweep over ``lengths`` last."""
    if tiny:
        return _tiny_cases()
    if device == "cuda":
        cases = _quick_gpu_cases() if quick else _gpu_cases()
        heads, dim, shortest, longest = 16, 128, 1024, 16384 if quick else 65536
    else:
        cases = _quick_cpu_cases() if quick else _cpu_cases()
        heads, dim, shortest, longest = 4, 64, *((1024, 4096) if quick else (2048, 32768))
    if lengths is None:
        lengths = [shortest << n for n in range((longest // shortest).bit_length())]
    cases += _steps(decode_cases(device, quick=quick))
    return cases + _sweep(lengths, heads, dim, (FORWARD,) if quick else _BOTH)


def _steps(entries: Sequence[tuple[Case, tuple[str, ...]]]) -> list[SpeedCase]:
    return [SpeedCase(case, (DECODING,), peers) for case, peers in entries]


def _tiny_cases() -> list[SpeedCase]:
    """One of everything, so small that even Triton's interpreter is done in seconds."""
    return [
        SpeedCase(_gated(1, 32, 2, 16), _BOTH, ("sdpa", "sdpa + gate")),
        SpeedCase(_local(32, 2, 1, 8, 16), _BOTH, ("sdpa", "two calls")),
        SpeedCase(_gla(1, 32, 2, 16, 16), _BOTH, ("token loop, unbind", *_GLA_PEERS)),
        SpeedCase(_gla(1, 32, 2, 16, 16, "token"), _BOTH, _SIMPLE_GLA_PEERS),
        SpeedCase(_norm(1, 32, 2, 16), _BOTH, _NORM_PEERS),
        SpeedCase(_diag(64, 2, 16), _BOTH, _DIAG_PEERS),
        *_steps(tiny_decode_cases()),
        *_sweep((32, 64), 2, 16, (FORWARD,)),
    ]


def _gated(batch: int, length: int, heads: int, dim: int) -> Case:
    return Case(
        "gated_sdpa",
        f"gated B{batch} T{length} H{heads} D{dim}",
        batch=batch,
        length=length,
        heads=heads,
        key_dim=dim,
        gate="elementwise",
    )


def _local(
    length: int, heads: int, global_heads: int, window: int, dim: int, kv_heads: int | None = None
) -> Case:
    count = kv_heads or heads
    return Case(
        "ls_attention",
        f"ls B1 T{length} H{heads}"
        + (f"/{kv_heads}" if kv_heads else "")
        + f" ({global_heads} global, window {window}) D{dim}",
        length=length,
        heads=heads,
        kv_heads=kv_heads,
        key_dim=dim,
        options={"window": ls_window(count, count - global_heads, window)},
    )


def _gla(
    batch: int, length: int, heads: int, key_dim: int, value_dim: int, g: str = "channel"
) -> Case:
    return Case(
        "gated_linear_attention",
        f"gla per {g} B{batch} T{length} H{heads} K{key_dim} V{value_dim}",
        batch=batch,
        length=length,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        g=g,
    )


def _norm(batch: int, length: int, heads: int, key_dim: int, value_dim: int | None = None) -> Case:
    values = value_dim or key_dim
    return Case(
        "norm_linear_attention",
        f"norm B{batch} T{length} H{heads} K{key_dim} V{values}",
        batch=batch,
        length=length,
        heads=heads,
        key_dim=key_dim,
        value_dim=values,
    )


def _diag(length: int, heads: int, dim: int) -> Case:
    return Case(
        "diag_attention",
        f"diag B1 T{length} H{heads} D{dim} blocks of 64",
        length=length,
        heads=heads,
        key_dim=dim,
        options={"block_size": 64},
    )


_BOTH = (FORWARD, TRAINING)


def _cpu_cases() -> list[SpeedCase]:
    """The shapes of the project's goals, and what a CPU user meets around them."""
    return [
        SpeedCase(_gated(2, 2048, 8, 64), _BOTH, _ATTENTION_PEERS),
        SpeedCase(_local(4096, 12, 1, 100, 64), _BOTH, _LOCAL_PEERS),
        SpeedCase(_gla(1, 2048, 4, 64, 128), _BOTH, _LOOPS + _GLA_PEERS),
        SpeedCase(_gla(1, 32768, 4, 64, 128), _BOTH, ("fla chunk_gla",)),
        SpeedCase(_gla(1, 2048, 4, 64, 128, "token"), _BOTH, _LOOPS + _SIMPLE_GLA_PEERS),
        SpeedCase(_norm(1, 2048, 8, 64), _BOTH, _NORM_PEERS),
        SpeedCase(_norm(1, 32768, 8, 64), _BOTH, ("fla chunk_linear_attn",)),
        SpeedCase(_diag(4096, 8, 64), _BOTH, _DIAG_PEERS),
    ]


def _quick_cpu_cases() -> list[SpeedCase]:
    """Smaller, so that all of them take less than a minute."""
    peers = tuple(n for n in _ATTENTION_PEERS if n != "flex" and not n.endswith("compiled"))
    local = tuple(name for name in _LOCAL_PEERS if name != "flex")
    return [
        SpeedCase(_gated(1, 1024, 8, 64), _BOTH, peers),
        SpeedCase(_local(2048, 12, 1, 100, 64), _BOTH, local),
        SpeedCase(_gla(1, 512, 4, 64, 128), _BOTH, _LOOPS + _GLA_PEERS),
        SpeedCase(_norm(1, 2048, 8, 64), _BOTH, _NORM_PEERS),
        SpeedCase(_diag(2048, 8, 64), _BOTH, _DIAG_PEERS),
    ]


def _gpu_cases() -> list[SpeedCase]:
    """Published shapes: the six of fla's benchmark registry, TFLA's, and those of the papers."""
    registry = (
        (1, 8192, 96, 128),
        (2, 16384, 16, 128),
        (4, 2048, 16, 128),
        (4, 4096, 64, 128),
        (8, 1024, 8, 64),
        (8, 2048, 32, 256),
    )
    attention = ((4, 4096, 16, 128), (4, 16384, 16, 128), (4, 4096, 16, 64), (4, 8192, 8, 256))
    gla = ((8, 4096, 16, 64, 128), (1, 65536, 16, 128, 128), (8, 4096, 4, 128, 256))
    return [
        *[SpeedCase(_gated(*shape), _BOTH, _ATTENTION_PEERS) for shape in attention],
        SpeedCase(_local(2048, 6, 1, 50, 32), _BOTH, _LOCAL_PEERS),
        *[
            SpeedCase(_local(length, 12, 1, 100, 64), _BOTH, _LOCAL_PEERS)
            for length in (512, 2048, 8192, 32768)
        ],
        *[SpeedCase(_local(8192, 20, g, 100, 64), _BOTH, _LOCAL_PEERS) for g in (1, 4)],
        SpeedCase(_local(8192, 32, 2, 512, 128, kv_heads=8), _BOTH, _LOCAL_PEERS),
        *[SpeedCase(_gla(*shape), _BOTH, _GLA_PEERS) for shape in gla],
        *[SpeedCase(_gla(b, t, h, d, d), _BOTH, _GLA_PEERS) for b, t, h, d in registry],
        *[SpeedCase(_gla(*s, "token"), _BOTH, _SIMPLE_GLA_PEERS) for s in gla],
        *[
            SpeedCase(_gla(b, t, h, d, d, "token"), _BOTH, _SIMPLE_GLA_PEERS)
            for b, t, h, d in registry
        ],
        *[SpeedCase(_norm(*shape), _BOTH, _NORM_PEERS) for shape in gla],
        *[SpeedCase(_norm(*shape), _BOTH, _NORM_PEERS) for shape in registry],
        SpeedCase(_diag(16384, 16, 128), _BOTH, _DIAG_PEERS),
    ]


def _quick_gpu_cases() -> list[SpeedCase]:
    return [
        SpeedCase(_gated(4, 4096, 16, 128), _BOTH, _ATTENTION_PEERS),
        SpeedCase(_local(8192, 12, 1, 100, 64), _BOTH, _LOCAL_PEERS),
        SpeedCase(_gla(8, 4096, 16, 64, 128), _BOTH, _GLA_PEERS),
        SpeedCase(_norm(8, 4096, 16, 64, 128), _BOTH, _NORM_PEERS),
    ]


def _sweep(lengths: Sequence[int], heads: int, dim: int, modes: tuple[str, ...]) -> list[SpeedCase]:
    """Every variant and plain attention over the length, all with the same heads."""
    return [
        SpeedCase(case, modes, peers, sweep=True)
        for length in lengths
        for case, peers in (
            (_gated(1, length, heads, dim), ("sdpa",)),
            (_local(length, heads, 1, 100, dim), ()),
            (_gla(1, length, heads, dim, dim), ()),
            (_norm(1, length, heads, dim), ()),
            (_diag(length, heads, dim), ()),
        )
    ]
