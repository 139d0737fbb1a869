"""Attention variants for PyTorch: gated, local/global, gated-linear and normalised-linear."""

from attnvariants._select import Availability, implementations
from attnvariants._types import AttentionStats, ls_window, window_from_flash
from attnvariants.kv_cache import KVCache
from attnvariants.modules.diag_attention import DiagAttention
from attnvariants.modules.gated_linear_attention import GatedLinearAttention
from attnvariants.modules.gated_sdpa import GatedAttention
from attnvariants.modules.ls_attention import LSAttention
from attnvariants.modules.norm_linear_attention import NormLinearAttention
from attnvariants.monitor import LogitMonitor
from attnvariants.ops.attention_decode import attention_decode
from attnvariants.ops.diag_attention import diag_attention
from attnvariants.ops.gated_linear_attention import gated_linear_attention
from attnvariants.ops.gated_sdpa import gated_sdpa
from attnvariants.ops.linear_attention_decode import linear_attention_decode
from attnvariants.ops.ls_attention import ls_attention
from attnvariants.ops.norm_linear_attention import norm_linear_attention
from attnvariants.recurrent_state import RecurrentState

__version__ = "0.1.0"

__all__ = [
    "AttentionStats",
    "Availability",
    "DiagAttention",
    "GatedAttention",
    "GatedLinearAttention",
    "KVCache",
    "LSAttention",
    "LogitMonitor",
    "NormLinearAttention",
    "RecurrentState",
    "__version__",
    "attention_decode",
    "diag_attention",
    "gated_linear_attention",
    "gated_sdpa",
    "implementations",
    "linear_attention_decode",
    "ls_attention",
    "ls_window",
    "norm_linear_attention",
    "window_from_flash",
]
