"""The cases that ``python -m bench verify`` compares with float64: mostly edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.cases import Case
from bench.verify_wide import wide_cases


def _softmax_cases() -> list[Case]:
    def gated(name: str, **arguments: Any) -> Case:
        return Case("gated_sdpa", name, **arguments)

    def local(name: str, window: Any, **arguments: Any) -> Case:
        options = {"window": window, **arguments.pop("options", {})}
        return Case("ls_attention", name, options=options, **arguments)

    def diagonal(name: str, **arguments: Any) -> Case:
        return Case("diag_attention", name, **arguments)

    stats = {"return_stats": True}
    return [
        gated("T=1", batch=2, length=1, gate="elementwise"),
        gated(
            "T=17 K!=V headwise softplus",
            batch=2,
            length=17,
            key_dim=16,
            value_dim=24,
            gate="headwise",
            options={"gate_activation": "softplus", **stats},
        ),
        gated(
            "T=64 GQA ns_sigmoid",
            length=64,
            heads=6,
            kv_heads=2,
            gate="elementwise",
            options={"gate_activation": "ns_sigmoid"},
        ),
        gated("T=65 window", length=65, gate="elementwise", options={"window": 16, **stats}),
        gated("S>T windows per head", length=17, key_length=65, options={"window": (7, None)}),
        gated("packed", length=87, sequences=(17, 0, 64, 5, 1), gate="elementwise", options=stats),
        gated("T=200 large logits", length=200, gate="elementwise", spread=8, options=stats),
        gated("not causal", length=65, key_length=40, options={"causal": False}),
        gated("odd dims", length=64, key_dim=33, value_dim=20, options={"softmax_scale": 0.3}),
        gated("T=1000 GQA", length=1000, heads=4, kv_heads=1, gate="headwise"),
        local("T=1", (4, None), length=1),
        local("T=1000", (100, 100, None), length=1000, heads=3),
        local("T=65 one global", (16, 16, None), batch=2, length=65, heads=3, options=stats),
        local("T=200 GQA", (64, 1, None), length=200, heads=6, kv_heads=3, gate="headwise"),
        local("window > T", (100, None), length=17, gate="elementwise"),
        local("S>T all local", 20, length=64, key_length=200, value_dim=24),
        local("packed", (16, None), length=87, sequences=(64, 0, 17, 6), options=stats),
        diagonal("T=1", length=1),
        diagonal("T=65", length=65),
        diagonal("T=200 relu", length=200, options={"activation": "relu", "block_size": 32}),
        diagonal("not causal GQA", length=64, heads=4, kv_heads=2, options={"causal": False}),
        diagonal(
            "packed K!=V",
            length=87,
            value_dim=24,
            sequences=(17, 0, 64, 6),
            options={"block_size": 16},
        ),
    ]


def _linear_cases() -> list[Case]:
    def gla(name: str, g: str, **arguments: Any) -> Case:
        return Case("gated_linear_attention", name, g=g, **arguments)

    def norm(name: str, **arguments: Any) -> Case:
        return Case("norm_linear_attention", name, **arguments)

    state = {"return_state": True}
    stats = {"return_stats": True}
    return [
        gla("T=1", "channel", batch=2, length=1, initial_state=True, options=state),
        gla("T=17 K!=V strong", "channel", length=17, value_dim=24, decays="strong"),
        gla("T=64 resets", "channel", length=64, decays="reset", options=state),
        gla("T=65 per token", "token", batch=2, length=65, options=stats),
        gla("T=65 per token resets", "token", length=65, decays="reset", initial_state=True),
        gla("T=200 per head", "head", length=200, options={"scale": 1.0}),
        gla(
            "T=200 norm and gate",
            "channel",
            length=200,
            gate="elementwise",
            norm_weight="shared",
            initial_state=True,  # or 1 / rms of the first rows amplifies every rounding
            options={"norm": "head", **state},
        ),
        gla(
            "T=64 no decay, model norm",
            "channel",
            length=64,
            decays="zero",
            initial_state=True,
            gate="headwise",
            norm_weight="head",
            options={"norm": "model", "gate_activation": "sigmoid"},
        ),
        gla(
            "packed with states",
            "channel",
            length=87,
            sequences=(17, 0, 64, 6),
            initial_state=True,
            options=state,
        ),
        gla("T=520 state", "channel", length=520, initial_state=True, options=state),
        norm("T=1", batch=2, length=1),
        norm("T=1000 K!=V", length=1000, value_dim=24),
        norm(
            "T=17 K!=V elu",
            length=17,
            value_dim=24,
            initial_state=True,
            options={"feature_map": "elu", **stats},
        ),
        norm("T=64 not causal", length=64, options={"causal": False}),
        norm(
            "T=65 decay, gate",
            g="head",
            length=65,
            gate="elementwise",
            norm_weight="head",
            initial_state=True,
            options={"feature_map": "silu"},
        ),
        norm(
            "T=200 states, head norm",
            g="head",
            length=200,
            initial_state=True,
            norm_weight="shared",
            options={"norm": "head", "feature_map": None, **state},
        ),
        norm(
            "T=64 no norm",
            length=64,
            gate="headwise",
            options={"norm": None, "feature_map": "relu"},
        ),
        norm(
            "packed with states",
            length=87,
            sequences=(17, 0, 64, 6),
            initial_state=True,
            options=state,
        ),
    ]


def _decode_cases() -> list[Case]:
    def softmax(name: str, steps: tuple[int, ...], cached: int, **arguments: Any) -> Case:
        length = sum(steps)
        return Case(
            "attention_decode",
            name,
            steps=steps,
            length=length,
            key_length=cached + length,
            **arguments,
        )

    def linear(name: str, steps: tuple[int, ...], **arguments: Any) -> Case:
        return Case("linear_attention_decode", name, steps=steps, length=sum(steps), **arguments)

    return [
        softmax("empty cache", (1, 1, 1), 0, batch=2, gate="elementwise"),
        softmax("GQA, 65 cached", (1, 1), 65, batch=2, heads=6, kv_heads=2, gate="headwise"),
        softmax("ring wrap-around", (1,) * 9, 4, options={"window": (5, None)}),
        softmax(
            "steps of up to 8 through a ring",
            (8, 3, 8, 1),
            17,
            value_dim=24,
            gate="elementwise",
            options={"window": (6, 20), "gate_activation": "ns_sigmoid"},
        ),
        linear("per channel", (1, 1, 1), batch=2, g="channel", initial_state=True),
        linear(
            "per token, head norm and gate",
            (1, 5),
            g="token",
            initial_state=True,
            value_dim=24,
            gate="elementwise",
            norm_weight="shared",
            options={"norm": "head"},
        ),
        linear(
            "resets",
            (3, 1),
            g="channel",
            decays="reset",
            initial_state=True,
        ),
        linear(
            "norm linear attention",
            (1, 1, 4),
            g="head",
            norm_weight="head",
            gate="headwise",
            options={
                "norm": "model",
                "feature_map": "elu+1",
                "scale": 1.0,
                "gate_activation": "sigmoid",
            },
        ),
    ]


_QUICK = frozenset(
    {
        ("gated_sdpa", "T=17 K!=V headwise softplus"),
        ("gated_sdpa", "T=65 window"),
        ("gated_sdpa", "packed"),
        ("ls_attention", "T=65 one global"),
        ("ls_attention", "T=200 GQA"),
        ("diag_attention", "T=65"),
        ("diag_attention", "packed K!=V"),
        ("gated_linear_attention", "T=17 K!=V strong"),
        ("gated_linear_attention", "T=65 per token resets"),
        ("gated_linear_attention", "packed with states"),
        ("norm_linear_attention", "T=17 K!=V elu"),
        ("norm_linear_attention", "T=65 decay, gate"),
        ("norm_linear_attention", "packed with states"),
        ("attention_decode", "ring wrap-around"),
        ("attention_decode", "steps of up to 8 through a ring"),
        ("linear_attention_decode", "per token, head norm and gate"),
        ("linear_attention_decode", "norm linear attention"),
    }
)


def verify_cases(
    functions: Sequence[str] | None = None, *, quick: bool = False, wide: bool = False
) -> list[Case]:
    """The cases to verify, of all functions or of those named; ``wide``: larger head dims too."""
    cases = _softmax_cases() + _linear_cases() + _decode_cases()
    cases += wide_cases() if wide else []
    return [
        case
        for case in cases
        if (functions is None or case.function in functions)
        and (not quick or (case.function, case.name) in _QUICK)
    ]
