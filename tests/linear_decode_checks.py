"""Inputs and comparisons for decode steps of linear attention from a state."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnvariants import RecurrentState, linear_attention_decode
from attnvariants._checks import state_dtype
from attnvariants._verify import (
    Comparison,
    exact_and_error,
    round_to,
    settle,
    shuffle_channels,
    within,
)
from attnvariants.reference.gated_linear_attention import gated_linear_attention
from attnvariants.reference.linear_attention_decode import linear_attention_decode as definition
from attnvariants.reference.norm_linear_attention import norm_linear_attention

F32 = torch.float32
PER_TOKEN = ("q", "k", "v", "gate")  # and g where it has a time axis


def draw(batch: int, length: int, heads: int = 3, key_dim: int = 5, value_dim: int = 7) -> dict:
    return {
        "q": torch.randn(batch, length, heads, key_dim, dtype=torch.float64),
        "k": torch.randn(batch, length, heads, key_dim, dtype=torch.float64),
        "v": torch.randn(batch, length, heads, value_dim, dtype=torch.float64),
    }


def epilogue(tensors: dict[str, Tensor], gate: str | None = "elementwise") -> dict[str, Tensor]:
    """The same with weight, initial state and gate."""
    batch, length, heads, value_dim = tensors["v"].shape
    tensors["norm_weight"] = torch.randn(heads, value_dim, dtype=torch.float64)
    tensors["initial_state"] = torch.randn(
        batch, heads, tensors["k"].shape[-1], value_dim, dtype=torch.float64
    )
    if gate is not None:
        channels = (value_dim,) if gate == "elementwise" else ()
        tensors["gate"] = torch.randn(batch, length, heads, *channels, dtype=torch.float64)
    return tensors


def log_decay(shape: tuple[int, ...]) -> Tensor:
    return -2 * torch.rand(shape, dtype=torch.float64) ** 3


def cut(tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {
        name: x[:, start:stop] if name in PER_TOKEN or (name == "g" and x.dim() > 1) else x
        for name, x in tensors.items()
    }


def decode(
    tensors: Mapping[str, Tensor],
    steps: Sequence[int],
    call: Callable[..., Tensor] = linear_attention_decode,
    **options: Any,
) -> dict[str, Tensor]:
    """Steps from ``initial_state``, or from an empty state."""
    inputs = dict(tensors)
    initial, g = inputs.pop("initial_state", None), inputs.get("g")
    batch, _, heads, key_dim = inputs["q"].shape
    dtype = state_dtype(inputs["v"].dtype)
    state = RecurrentState(batch, heads, key_dim, inputs["v"].shape[-1], dtype=dtype)
    if initial is not None:
        state.state.copy_(initial)
    address, outputs = state.state.data_ptr(), []
    for ends in itertools.pairwise(itertools.accumulate(steps, initial=0)):
        step = cut(inputs, *ends) if g is not None else {**cut(inputs, *ends), "g": None}
        outputs.append(call(**step, state=state, **options))
    assert state.state.data_ptr() == address
    assert state.lengths.tolist() == [sum(steps)] * batch
    assert state.max_filled == sum(steps)
    return {"out": torch.cat(outputs, dim=1), "state": state.state}


def check_bf16_state(impl: str, norm: str | None, value_dim: int) -> None:
    """A step from a bf16 state is the step from the same numbers in fp32, rounded at the end."""
    tensors = {
        name: x.bfloat16() for name, x in draw(2, 3, 3, key_dim=20, value_dim=value_dim).items()
    }
    tensors["g"] = log_decay((2, 3, 3, 20)).float()
    narrow = RecurrentState(2, 3, 20, value_dim, dtype=torch.bfloat16)
    narrow.update(torch.randn(2, 3, 20, value_dim), 5)
    wide = narrow.state.float()
    expected = linear_attention_decode(**tensors, state=wide, norm=norm, impl=impl)
    out = linear_attention_decode(**tensors, state=narrow, norm=norm, impl=impl)
    assert torch.equal(out, expected)
    assert torch.equal(narrow.state, wide.bfloat16())
    assert narrow.lengths.tolist() == [8, 8]


def whole(tensors: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The whole sequence in float64: with a feature map by the masked left product."""
    inputs = {name: x.double() for name, x in tensors.items()}
    g = inputs.pop("g", None)
    if "feature_map" in options:
        result = norm_linear_attention(**inputs, decay=g, return_state=True, **options)
    else:
        result = gated_linear_attention(**inputs, g=g, return_state=True, **options)
    return dict(zip(("out", "state"), result, strict=True))


def assert_decodes(
    tensors: Mapping[str, Tensor],
    steps: Sequence[int],
    dtype: torch.dtype = F32,
    *,
    impl: str = "eager",
    **options: Any,
) -> None:
    """Steps against the whole sequence, within twice the error of the plain recurrence.

    A miss is settled over several draws of the roundings, as in all other comparisons.
    """
    rounded = {name: round_to(name, tensor, dtype) for name, tensor in tensors.items()}
    steps_options = options | ({"scale": 1.0} if "feature_map" in options else {})

    def measure(attempt: int) -> list[Comparison]:
        working = shuffle_channels(rounded, attempt)
        truth = whole(working, **options)
        actual = decode(working, steps, impl=impl, **steps_options)
        _, errors = exact_and_error(
            lambda inputs, _: decode(inputs, steps, definition, upcast=False, **steps_options),
            working,
            dtype,
        )
        assert actual["out"].dtype == dtype
        assert actual["state"].dtype == state_dtype(dtype)
        return [within(name, actual[name], truth[name], errors[name], dtype) for name in truth]

    rows = settle(measure)
    assert all(row.ok for row in rows), rows
