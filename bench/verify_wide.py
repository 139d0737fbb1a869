"""Cases with the head dims that models have: on a GPU every size has tiles of its own."""

from __future__ import annotations

from typing import Any

from bench.cases import Case

DIMS = (64, 96, 128, 256)


def wide_cases() -> list[Case]:
    """Every function at every head dim, with the features that take most registers and memory."""
    return [case for dim in DIMS for case in _of(dim)]


def _of(dim: int) -> list[Case]:
    name = f"D={dim}"
    stats = {"return_stats": True}
    half: dict[str, Any] = {"key_dim": dim, "value_dim": max(64, dim // 2)}
    steps: dict[str, Any] = {"length": 3, "steps": (1, 1, 1)}
    return [
        Case(
            "gated_sdpa",
            f"{name} GQA, window, packed",
            length=300,
            heads=4,
            kv_heads=2,
            key_dim=dim,
            gate="elementwise",
            sequences=(130, 0, 170),
            options={"window": 100, **stats},
        ),
        Case("gated_sdpa", f"{name} T=513", length=513, key_dim=dim),
        Case("gated_sdpa", f"{name} S>T, K!=V", length=65, key_length=200, gate="headwise", **half),
        Case(
            "ls_attention",
            f"{name} local and global",
            batch=2,
            length=513,
            heads=4,
            key_dim=dim,
            options={"window": (64, 64, 64, None), **stats},
        ),
        Case("diag_attention", f"{name} blocks of 64", length=200, key_dim=dim),
        Case(
            "diag_attention",
            f"{name} relu",
            length=200,
            key_dim=dim,
            options={"activation": "relu", "block_size": 128},
        ),
        Case(
            "gated_linear_attention",
            f"{name} state, norm, gate",
            length=300,
            key_dim=dim,
            g="channel",
            gate="elementwise",
            norm_weight="shared",
            initial_state=True,
            options={"norm": "head", "return_state": True},
        ),
        *(
            Case("gated_linear_attention", f"{name} segments, {g}", length=1100, g=g, **half)
            for g in ("channel", "token")  # their products take operands from other registers
        ),
        Case(
            "gated_linear_attention",
            f"{name} per token, packed",
            length=300,
            key_dim=dim,
            g="token",
            decays="reset",
            sequences=(130, 0, 170),
            initial_state=True,
            options={"return_state": True},
        ),
        Case("norm_linear_attention", f"{name} decay", length=300, g="head", key_dim=dim),
        Case(
            "norm_linear_attention",
            f"{name} not causal",
            length=130,
            key_dim=dim,
            options={"causal": False},
        ),
        Case(
            "attention_decode",
            f"{name} GQA, rings",
            batch=2,
            key_length=303,
            heads=8,
            kv_heads=4,
            key_dim=dim,
            gate="elementwise",
            options={"window": (100, 100, 100, None)},
            **steps,
        ),
        Case("attention_decode", f"{name} long cache", key_length=5003, key_dim=dim, **steps),
        Case(
            "linear_attention_decode",
            f"{name} per channel",
            batch=2,
            g="channel",
            initial_state=True,
            **half,
            **steps,
        ),
        Case(
            "linear_attention_decode",
            f"{name} model norm",
            key_dim=dim,
            g="head",
            gate="elementwise",
            options={
                "norm": "model",
                "feature_map": "elu+1",
                "scale": 1.0,
                "gate_activation": "sigmoid",
            },
            **steps,
        ),
    ]
