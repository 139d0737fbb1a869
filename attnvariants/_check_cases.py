"""Small inputs for every public function, and the check of an implementation on them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnvariants._select import has_backward
from attnvariants._verify import (
    Comparison,
    compare,
    exact_and_error,
    round_to,
    settle,
    shuffle_channels,
    within,
)
from attnvariants.kv_cache import KVCache
from attnvariants.recurrent_state import RecurrentState

_B, _T, _H, _HKV, _K, _V = 2, 70, 4, 2, 16, 24
_PROMPT = 37  # tokens before the first decode step
_STEPS = (1, 8, 3, 1, 1)


@dataclass(frozen=True)
class Case:
    """The tensor arguments of one call by shape, and its other arguments."""

    function: str
    shapes: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """Normal draws in float64; log-decays are negative."""
        generator = torch.Generator().manual_seed(seed)
        draws = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in self.shapes.items()
        }
        for name in ("g", "decay"):
            if name in draws:
                draws[name] = -draws[name].abs() / 4
        return {name: draw.to(device) for name, draw in draws.items()}


_SOFTMAX = {"q": (_B, _T, _H, _K), "k": (_B, _T, _HKV, _K), "v": (_B, _T, _HKV, _V)}
_LINEAR = {"q": (_B, _T, _H, _K), "k": (_B, _T, _H, _K), "v": (_B, _T, _H, _V)}
_GATE = {"gate": (_B, _T, _H, _V)}
_STATE = {"initial_state": (_B, _H, _K, _V)}

CASES = (
    Case("gated_sdpa", _SOFTMAX | _GATE, {"return_stats": True}),
    Case(
        "ls_attention",
        _SOFTMAX | {"gate": (_B, _T, _H)},
        {"window": (20, None), "return_stats": True},
    ),
    Case("diag_attention", _SOFTMAX, {"block_size": 32}),
    Case(
        "gated_linear_attention",
        _LINEAR | _GATE | _STATE | {"g": (_B, _T, _H, _K), "norm_weight": (_V,)},
        {"norm": "head", "return_state": True, "return_stats": True},
    ),
    Case(
        "norm_linear_attention",
        _LINEAR | _GATE | _STATE | {"decay": (_H,), "norm_weight": (_H, _V)},
        {"norm": "model", "return_state": True, "return_stats": True},
    ),
    Case("attention_decode", _SOFTMAX | _GATE, {"window": (20, None)}),
    Case(
        "linear_attention_decode",
        _LINEAR | _GATE | _STATE | {"g": (_B, _T, _H, _K), "norm_weight": (_H, _V)},
        {"norm": "model"},
    ),
)


def check(case: Case, impl: str, dtype: torch.dtype, device: torch.device) -> list[Comparison]:
    """Compares every output of ``impl``, and every gradient that it has, with float64."""
    tensors = case.tensors(device)
    if case.function == "attention_decode":
        return _compare_decode(_decode_softmax, case, tensors, impl, dtype)
    if case.function == "linear_attention_decode":
        return _compare_decode(_decode_linear, case, tensors, impl, dtype)
    gradients = has_backward(case.function, impl)
    return compare(
        case.function, tensors, case.options, impl=impl, dtype=dtype, gradients=gradients
    )


def _compare_decode(
    decode: Callable[..., dict[str, Tensor]],
    case: Case,
    tensors: Mapping[str, Tensor],
    impl: str,
    dtype: torch.dtype,
) -> list[Comparison]:
    public = getattr(importlib.import_module("attnvariants"), case.function)
    home = importlib.import_module(f"attnvariants.reference.{case.function}")
    definition = getattr(home, case.function)
    rounded = {name: round_to(name, tensor, dtype) for name, tensor in tensors.items()}

    def measure(attempt: int) -> list[Comparison]:
        working = shuffle_channels(rounded, attempt)
        actual = decode(public, working, case.options, impl=impl)
        truth, errors = exact_and_error(
            lambda inputs, _: decode(definition, inputs, case.options, upcast=False),
            working,
            dtype,
        )
        return [within(name, actual[name], truth[name], errors[name], dtype) for name in truth]

    with torch.no_grad():
        return settle(measure)


def _decode_softmax(
    call: Callable[..., Any],
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any],
    **extra: Any,
) -> dict[str, Tensor]:
    """A prompt, then steps: the outputs, their log-sum-exps and the largest logits."""
    k, v = tensors["k"], tensors["v"]
    cache = KVCache(_B, _T, _HKV, _K, _V, **options, dtype=k.dtype, device=k.device)
    cache.append(k[:, :_PROMPT], v[:, :_PROMPT])
    results = [call(**step, cache=cache, return_stats=True, **extra) for step in _steps(tensors)]
    return {
        "out": torch.cat([out for out, _ in results], dim=1),
        "lse": torch.cat([stats.lse for _, stats in results], dim=1),
        "max_logit": torch.stack([stats.max_logit for _, stats in results]),
    }


def _decode_linear(
    call: Callable[..., Any],
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any],
    **extra: Any,
) -> dict[str, Tensor]:
    """Steps from a state: the outputs and the last state."""
    initial = tensors["initial_state"]
    state = RecurrentState(*initial.shape, dtype=initial.dtype, device=initial.device)
    state.update(initial, _PROMPT)
    outputs = [call(**step, state=state, **options, **extra) for step in _steps(tensors)]
    return {"out": torch.cat(outputs, dim=1), "state": state.state}


def _steps(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The arguments of successive steps, cut from those of a whole sequence."""
    steps, start = [], _PROMPT
    for count in _STEPS:
        cut = slice(start, start + count)
        steps.append(
            {
                name: tensor if name == "norm_weight" else tensor[:, cut]
                for name, tensor in tensors.items()
                if name != "initial_state"
            }
        )
        start += count
    return steps
