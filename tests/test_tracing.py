"""All layers where only shapes are known: on the meta device, and as exported graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from attnvariants import (
    DiagAttention,
    GatedAttention,
    GatedLinearAttention,
    LSAttention,
    NormLinearAttention,
)

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "gated": lambda **options: GatedAttention(32, 4, **options),
    "ls": lambda **options: LSAttention(32, 4, num_local_heads=2, local_window=5, **options),
    "gla": lambda **options: GatedLinearAttention(32, 4, **options),
    "norm": lambda **options: NormLinearAttention(32, 4, **options),
    "diag": lambda **options: DiagAttention(32, 4, block_size=8, **options),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@each_layer
def test_meta_device(make: Callable[..., Any]) -> None:
    layer = make(device="meta")
    x = torch.empty(2, 7, 32, device="meta", requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in layer.parameters())


@each_layer
def test_exported_layers_run_at_any_length(make: Callable[..., Any]) -> None:
    """Also with parameters that require gradients, outside of ``no_grad``."""
    layer = make()
    lengths = {"x": {1: torch.export.Dim("T", min=2, max=512)}}
    exported = torch.export.export(
        layer, (torch.randn(2, 16, 32),), dynamic_shapes=lengths, strict=False
    ).module()
    for length in (5, 70):
        x = torch.randn(2, length, 32)
        torch.testing.assert_close(exported(x), layer(x))
