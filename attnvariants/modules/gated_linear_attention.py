"""GatedLinearAttention: linear attention whose state forgets by a learned gate per channel."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnvariants import _checks
from attnvariants.modules._common import (
    RecurrentLayer,
    RMSNorm,
    positive,
    repeat_heads,
    split_heads,
    widen,
)
from attnvariants.ops.gated_linear_attention import gated_linear_attention
from attnvariants.ops.linear_attention_decode import linear_attention_decode
from attnvariants.recurrent_state import RecurrentState


class GatedLinearAttention(RecurrentLayer):
    """The GLA layer: ``y = (RMSNorm(o) * silu(x W_g)) W_o`` with ``o`` of the gated recurrence.

    ``S_t = diag(alpha_t) S_{t-1} + k_t v_t^T``, ``o_t = K^-1/2 S_t^T q_t``, where
    ``alpha_t = sigmoid(x W_1 W_2 + b) ** (1 / gate_logit_normalizer)`` has one entry per key
    channel. The log-gates are float32 (float64 in a float64 layer) whatever the layer's dtype and
    autocast say. The norm is per head with one weight for all heads; norm and output gate are
    part of the attention call.

    Parameters are named and shaped as in flash-linear-attention's layer (without short
    convolution), except that the norm's weight there is ``g_norm_swish_gate.weight``.

    Args:
        embed_dim: model width ``C``.
        num_heads: heads ``H``.
        num_kv_heads: heads of k, v and the forget gate; repeated for the query heads.
        head_dim: the width that ``expand_k`` and ``expand_v`` scale; ``None`` is
            ``embed_dim / num_heads``.
        bias: of the projections (``gk_proj`` always has one, on its second layer).
        expand_k: key head dim ``K = expand_k * head_dim``.
        expand_v: value head dim ``V = expand_v * head_dim``.
        gate_low_rank_dim: rank of the forget gate's projection.
        gate_logit_normalizer: divides the log-gates; larger is slower forgetting.
        output_gate: multiply by ``silu(x W_g)`` after the norm.
        norm_eps: inside the root of the norm.

    Raises:
        TypeError, ValueError: an argument is out of range.

    Reference: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient
    Training", arXiv 2312.06635.
    """

    _shown = (*RecurrentLayer._shown, "key_dim", "value_dim", "gate_logit_normalizer")
    _shown += ("output_gate",)

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_low_rank_dim: int = 16,
        gate_logit_normalizer: float = 16.0,
        output_gate: bool = True,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim)
        name = type(self).__name__
        _checks.flag(name, "bias", bias)
        _checks.flag(name, "output_gate", output_gate)
        _checks.positive_int(name, "gate_low_rank_dim", gate_low_rank_dim)
        self.key_dim = _expanded(name, "expand_k", expand_k, self.head_dim)
        self.value_dim = _expanded(name, "expand_v", expand_v, self.head_dim)
        self.gate_logit_normalizer = positive(name, "gate_logit_normalizer", gate_logit_normalizer)
        self.norm_eps = positive(name, "norm_eps", norm_eps, or_zero=True)
        self.output_gate = output_gate

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        keys, values = self.num_kv_heads * self.key_dim, self.num_kv_heads * self.value_dim
        width = self.num_heads * self.value_dim
        self.q_proj = nn.Linear(embed_dim, self.num_heads * self.key_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(embed_dim, keys, bias=bias, **factory)
        self.v_proj = nn.Linear(embed_dim, values, bias=bias, **factory)
        if output_gate:
            self.g_proj = nn.Linear(embed_dim, width, bias=bias, **factory)
        self.gk_proj = nn.Sequential(
            nn.Linear(embed_dim, gate_low_rank_dim, bias=False, **factory),
            nn.Linear(gate_low_rank_dim, keys, bias=True, **factory),
        )
        self.g_norm = RMSNorm(self.value_dim, eps=self.norm_eps, **factory)
        self.o_proj = nn.Linear(width, embed_dim, bias=bias, **factory)

    def _attend(self, x: Tensor, cache: RecurrentState | None, cu_seqlens: Tensor | None) -> Tensor:
        groups = self.num_heads // self.num_kv_heads
        q = split_heads(self.q_proj(x), self.num_heads)  # [B, T, H, K]
        log_gates = F.logsigmoid(widen(self.gk_proj(x))) / self.gate_logit_normalizer
        k, v, g = (
            repeat_heads(split_heads(part, self.num_kv_heads), groups)
            for part in (self.k_proj(x), self.v_proj(x), log_gates)
        )  # [B, T, H, K or V]
        gate = split_heads(self.g_proj(x), self.num_heads) if self.output_gate else None
        epilogue = {"norm": "head", "norm_weight": self.g_norm.weight, "eps": self.norm_eps}
        options: dict[str, Any] = {**epilogue, "gate": gate, "gate_activation": "silu"}
        out = self._recur(
            partial(gated_linear_attention, q, k, v, g, **options),
            partial(linear_attention_decode, q, k, v, g, **options),
            x.shape[1],
            cache,
            cu_seqlens,
        )
        return self.o_proj(out.flatten(2))


def _expanded(layer: str, option: str, factor: float, head_dim: int) -> int:
    """``factor * head_dim`` where that is a head dim."""
    width = positive(layer, option, factor) * head_dim
    if width != int(width):
        raise ValueError(
            f"{layer}: {option} times head_dim={head_dim} must be a whole number, "
            f"got {option}={factor}"
        )
    _checks.head_dim(layer, f"{option} * head_dim", int(width))
    return int(width)
