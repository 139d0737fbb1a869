"""A one-token step of a layer is one decode operator, in the implementation that auto chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnvariants import (
    DiagAttention,
    GatedAttention,
    GatedLinearAttention,
    LSAttention,
    NormLinearAttention,
    _select,
)

SOFTMAX, LINEAR = "attention_decode", "linear_attention_decode"
LAYERS: dict[str, tuple[Callable[[], torch.nn.Module], str]] = {
    "gated": (lambda: GatedAttention(32, 2), SOFTMAX),
    "grouped": (lambda: GatedAttention(32, 4, num_kv_heads=2, gate="headwise"), SOFTMAX),
    "LS": (lambda: LSAttention(32, 4, num_local_heads=3, local_window=4), SOFTMAX),
    "diagonal": (lambda: DiagAttention(32, 2, block_size=4), SOFTMAX),
    "GLA": (lambda: GatedLinearAttention(32, 2), LINEAR),
    "transNormer T2": (lambda: NormLinearAttention.transnormer_t2(32, 2), LINEAR),
    "TransNormerLLM": (
        lambda: NormLinearAttention.transnormer_llm(32, 2, layer_index=1, num_layers=2),
        LINEAR,
    ),
}


class Operators(TorchDispatchMode):
    """Names of the package's operators that are called, with their last argument."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "attnvariants":
            self.found.append((function._schema.name.split("::")[1], args[-1]))
        return function(*args, **(kwargs or {}))


def _filled(make: Callable[[], torch.nn.Module]) -> tuple[torch.nn.Module, Any, Tensor]:
    layer = make().requires_grad_(False)
    x = torch.randn(2, 8, 32)
    cache = layer.init_cache(2, 8)
    layer(x[:, :5], cache=cache)
    return layer, cache, x[:, 5:]


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_is_one_decode_operator(name: str) -> None:
    make, operator = LAYERS[name]
    layer, cache, x = _filled(make)
    with Operators() as operators:
        for position in range(3):
            layer(x[:, position : position + 1], cache=cache)
    assert operators.found == [(operator, "eager")] * 3


@pytest.mark.parametrize(
    ("obstacle", "chosen"),
    [((), "cuda"), (("cuda",), "triton"), (("cuda", "triton"), "eager")],
)
@pytest.mark.parametrize("name", ["LS", "diagonal", "GLA", "TransNormerLLM"])
def test_auto_takes_the_fastest_that_is_there(
    name: str, obstacle: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the operator is asked for; a CPU cannot run it, so that it raises there."""
    make, operator = LAYERS[name]
    layer, cache, x = _filled(make)
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(
        _select, "_obstacle", lambda function, impl, *_: "absent" if impl in obstacle else ""
    )
    operators = Operators()
    try:
        with operators:
            layer(x[:, :1], cache=cache)
    except Exception:  # no GPU
        assert chosen != "eager"
    assert operators.found[0] == (operator, chosen)
