"""The calls that ``python -m bench replay`` records, and that a sanitizer watches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import attnvariants
from bench.cases import DECODE, Case

ROOM = 16  # steps behind the cached tokens

CASES = (
    Case(
        "gated_sdpa",
        "grouped, window, gate",
        batch=2,
        length=130,
        heads=4,
        kv_heads=2,
        key_dim=64,
        gate="elementwise",
        options={"window": 50, "return_stats": True},
    ),
    Case("gated_sdpa", "K != V", length=65, key_dim=128, value_dim=64, gate="headwise"),
    Case(
        "ls_attention", "local and global", length=200, key_dim=64, options={"window": (64, None)}
    ),
    Case("diag_attention", "softmax", length=130, key_dim=64),
    Case("diag_attention", "relu", length=130, key_dim=64, options={"activation": "relu"}),
    Case(
        "gated_linear_attention",
        "per channel, state, norm, gate",
        length=200,
        key_dim=64,
        value_dim=32,
        g="channel",
        gate="elementwise",
        norm_weight="shared",
        initial_state=True,
        options={"norm": "head", "return_state": True},
    ),
    Case("gated_linear_attention", "per token", length=1100, key_dim=64, g="token"),
    Case("norm_linear_attention", "decay", length=200, key_dim=64, g="head"),
    Case("norm_linear_attention", "not causal", length=130, options={"causal": False}),
    Case(
        "attention_decode",
        "one token, rings",
        batch=2,
        length=1,
        key_length=34,
        heads=4,
        key_dim=64,
        gate="elementwise",
        options={"window": (20, 20, 20, None)},
    ),
    Case("attention_decode", "three tokens", length=3, key_length=70, heads=4, kv_heads=2),
    Case("linear_attention_decode", "per channel", batch=2, length=1, key_dim=64, g="channel"),
    Case(
        "linear_attention_decode",
        "norm",
        length=1,
        key_dim=64,
        options={"feature_map": "elu+1", "norm": "model", "scale": 1.0},
    ),
)

Outputs = list[Tensor]


def room(case: Case) -> int:
    """Tokens that the cache of a decode step takes."""
    return case.keys - case.length + ROOM * case.length


def small(case: Case) -> Case:
    """The case at a size that Triton's interpreter is done with in seconds."""
    length = case.length if case.function in DECODE else 20
    options = {"block_size": 16} if case.function == "diag_attention" else {}
    options = {**case.options, **options}
    return replace(case, length=length, key_dim=16, value_dim=16, options=options)


@dataclass(frozen=True)
class Call:
    """One call on tensors that stay where they are.

    ``run`` reads ``inputs`` and advances ``state``, that of a cache; ``reset`` puts it back.
    """

    run: Callable[[], Outputs]
    reset: Callable[[], None]
    inputs: dict[str, Tensor]
    state: Outputs


def make_call(
    case: Case, impl: str, dtype: torch.dtype, device: torch.device, *, training: bool, seed: int
) -> Call:
    """The call of ``case`` on random inputs; ``training`` returns its gradients as well."""
    tensors = case.tensors(dtype, device, seed)
    if case.function == "attention_decode":
        return _decode(case, tensors, impl)
    if case.function in DECODE:
        return _linear_decode(case, tensors, impl)
    function = getattr(attnvariants, case.function)
    leaves = [x.requires_grad_() for x in tensors.values() if x.is_floating_point()]

    def run() -> Outputs:
        if not training:
            with torch.no_grad():
                return _flat(function(**tensors, **case.options, impl=impl))
        outputs = _flat(function(**tensors, **case.options, impl=impl))
        differentiable = [x for x in outputs if x.requires_grad]
        cotangents = [torch.ones_like(x) for x in differentiable]
        gradients = torch.autograd.grad(differentiable, leaves, cotangents)
        return [x.detach() for x in outputs] + list(gradients)

    return Call(run, lambda: None, tensors, [])


def _decode(case: Case, tensors: Mapping[str, Tensor], impl: str) -> Call:
    options = dict(case.options)
    cached = case.keys - case.length
    old = {name: tensors[name][:, :cached] for name in "kv"}
    inputs = {name: x.clone() for name, x in tensors.items() if name in ("q", "gate")}
    inputs |= {name: tensors[name][:, cached:].clone() for name in "kv"}
    cache = attnvariants.KVCache(
        case.batch,
        room(case),
        *(case.key_heads, case.key_dim, case.values),
        window=options.pop("window", None),
        dtype=tensors["k"].dtype,
        device=tensors["k"].device,
    )

    def reset() -> None:
        cache.reset()
        cache.append(old["k"], old["v"])

    def run() -> Outputs:
        return [attnvariants.attention_decode(**inputs, cache=cache, impl=impl, **options)]  # type: ignore[arg-type,list-item]

    reset()
    return Call(run, reset, inputs, [cache.k, cache.v, cache.lengths])


def _linear_decode(case: Case, tensors: Mapping[str, Tensor], impl: str) -> Call:
    q = tensors["q"]
    state = attnvariants.RecurrentState(
        *(case.batch, case.heads, case.key_dim, case.values), device=q.device
    )
    inputs = dict(tensors)
    start = torch.randn(state.state.shape, device=q.device)

    def reset() -> None:
        state.reset()
        state.state.copy_(start)

    def run() -> Outputs:
        arguments: dict[str, Any] = {"g": None, **inputs, **case.options}
        return [attnvariants.linear_attention_decode(state=state, impl=impl, **arguments)]

    reset()
    return Call(run, reset, inputs, [state.state, state.lengths])


def _flat(result: Any) -> Outputs:
    if isinstance(result, Tensor):
        return [result]
    parts = result if isinstance(result, tuple) else ()
    return [tensor for part in parts for tensor in _flat(part)]
