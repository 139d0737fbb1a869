"""The last row of a batch with more elements than 32-bit offsets reach, against that row alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import attnvariants
from bench.cases import DECODE, Case
from bench.contenders import AGREEMENT
from bench.replay_cases import Outputs, make_call, room

ELEMENTS = 2**31  # of the largest tensors


def difference_of_last_row(
    case: Case,
    impl: str,
    dtype: torch.dtype,
    device: torch.device,
    elements: int,
    *,
    training: bool,
) -> str:
    """What is wrong with the last row of a batch of ``elements`` elements; empty where nothing is.

    ``training``: its gradients as well. All other rows are zeros, which cost no time to make.
    """
    case = replace(case, batch=1)
    if case.function in DECODE:
        found, expected = _step(case, impl, dtype, device, elements)
    else:
        found, expected = _whole(case, impl, dtype, device, elements, training)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        apart = (one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30)
        if not float(apart) <= AGREEMENT[dtype]:
            return f"output {number} differs from that of the row alone by {float(apart):.1e}"
    return ""


def _enlarge(x: Tensor, rows: int) -> Tensor:
    large = x.new_zeros(rows, *x.shape[1:])
    large[-1:] = x
    return large


def _whole(
    case: Case,
    impl: str,
    dtype: torch.dtype,
    device: torch.device,
    elements: int,
    training: bool,
) -> tuple[Outputs, Outputs]:
    """Outputs and gradients."""
    tensors = case.tensors(dtype, device)
    widest = max(x[0].numel() for x in tensors.values() if x.dim() == 4)
    rows = elements // widest + 1
    function = getattr(attnvariants, case.function)

    def run(inputs: dict[str, Tensor]) -> Outputs:
        leaves = {name: x for name, x in inputs.items() if x.dim() == 4}
        for x in leaves.values():
            x.requires_grad_(training)
        out = function(**inputs, **_plain(case), impl=impl)
        if not training:
            return [out[-1:].detach()]
        gradients = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
        return [x[-1:].detach() for x in (out, *gradients)]

    large = {name: _enlarge(x, rows) if x.dim() > 2 else x for name, x in tensors.items()}
    return run(large), run({name: x.detach() for name, x in tensors.items()})


def _plain(case: Case) -> dict[str, object]:
    """The options without those that add results."""
    return {k: v for k, v in case.options.items() if k not in ("return_stats", "return_state")}


def _step(
    case: Case, impl: str, dtype: torch.dtype, device: torch.device, elements: int
) -> tuple[Outputs, Outputs]:
    """A decode step over a large cache or state."""
    call = make_call(case, impl, dtype, device, training=False, seed=0)
    rows = elements // call.state[0][0].numel() + 1  # of the keys in the cache, or of the state
    inputs = {name: _enlarge(x, rows) if x.dim() > 2 else x for name, x in call.inputs.items()}
    sizes = (case.key_heads, case.key_dim, case.values)
    options = dict(case.options)
    cache: attnvariants.KVCache | attnvariants.RecurrentState
    if case.function == "attention_decode":
        cached = case.keys - case.length
        window = options.pop("window", None)
        cache = attnvariants.KVCache(
            rows, room(case), *sizes, window=window, dtype=dtype, device=device
        )
        cache.lengths.fill_(cached)
        cache.max_filled = cached
        buffers = [cache.k, cache.v]
    else:
        cache = attnvariants.RecurrentState(rows, *sizes, device=device)
        buffers = [cache.state]
    for buffer, small in zip(buffers, call.state, strict=False):
        buffer[-1:] = small
    name = "cache" if case.function == "attention_decode" else "state"
    function = getattr(attnvariants, case.function)
    decay = {} if case.function == "attention_decode" or "g" in inputs else {"g": None}
    out = function(**inputs, **decay, **{name: cache}, impl=impl, **options)
    expected = [*call.run(), *call.state[: len(buffers)]]
    return [x[-1:] for x in (out, *buffers)], expected
