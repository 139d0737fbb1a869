"""Attention variants for PyTorch: gated, local/global, gated-linear and normalised-linear."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AttentionStats": "_types",
    "ls_window": "_types",
    "window_from_flash": "_types",
    "implementations": "_select",
    "gated_sdpa": "ops.gated_sdpa",
    "ls_attention": "ops.ls_attention",
    "diag_attention": "ops.diag_attention",
    "gated_linear_attention": "ops.gated_linear_attention",
    "norm_linear_attention": "ops.norm_linear_attention",
    "attention_decode": "ops.attention_decode",
    "linear_attention_decode": "ops.linear_attention_decode",
    "KVCache": "kv_cache",
    "RecurrentState": "recurrent_state",
    "GatedAttention": "modules.gated_sdpa",
    "LSAttention": "modules.ls_attention",
    "DiagAttention": "modules.diag_attention",
    "GatedLinearAttention": "modules.gated_linear_attention",
    "NormLinearAttention": "modules.norm_linear_attention",
    "LogitMonitor": "monitor",
}


__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
