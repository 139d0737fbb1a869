"""GatedAttention: softmax attention with a learned gate, in every variant of the paper."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnvariants import _checks
from attnvariants.kv_cache import KVCache
from attnvariants.modules._common import (
    KeyValueLayer,
    RMSNorm,
    filled,
    positive,
    split_heads,
    widen,
)
from attnvariants.modules._positions import angles_of, rope_frequencies, rotate, token_positions
from attnvariants.ops.attention_decode import MAX_STEPS, attention_decode
from attnvariants.ops.gated_sdpa import gated_sdpa
from attnvariants.ops.softmax import GATE_ACTIVATIONS as FUSED_ACTIVATIONS

ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "ns_sigmoid": lambda logits: 0.5 + 0.5 * torch.sigmoid(logits),
    "softplus": lambda logits: -F.logsigmoid(-logits),
    "silu": F.silu,
    "identity": lambda logits: logits,
}
POSITIONS = ("sdpa", "value", "key", "query", "output")  # G1 to G5


class GatedAttention(KeyValueLayer):
    """Causal multi-head attention with a gate on one of its five intermediate results.

    The default multiplies the output of every head, before the output projection, by
    ``sigmoid(x W)``: the variant that wins in the paper, computed inside the attention function.

    ==================  ====================================  =====================================
    ``gate_position``   what is gated                         gate logits per token
    ==================  ====================================  =====================================
    ``"sdpa"``    (G1)  output of each head                   ``H x D``; headwise ``H``
    ``"value"``   (G2)  v, by its own token                   ``Hkv x D``; headwise ``Hkv``
    ``"key"``     (G3)  k, after QK-norm and before RoPE      ``Hkv x D``; headwise ``Hkv``
    ``"query"``   (G4)  q, after QK-norm and before RoPE      ``H x D``; headwise ``H``
    ``"output"``  (G5)  result of the output projection       ``C``
    ==================  ====================================  =====================================

    The gate itself has neither norm nor RoPE. What the attention function cannot fuse (other
    positions, addition, SiLU, shared heads) is plain PyTorch around the same attention, in
    float32 with one rounding.

    Args:
        embed_dim: model width ``C``.
        num_heads: query heads ``H``.
        num_kv_heads: key/value heads ``Hkv``; ``None`` is ``H``.
        head_dim: ``D``; ``None`` is ``embed_dim / num_heads``.
        bias: of all projections.
        gate: ``"elementwise"``, ``"headwise"`` (one scalar per head) or ``None``: ordinary
            multi-head attention.
        gate_position: see above.
        gate_activation: ``"sigmoid"``, ``"ns_sigmoid"`` (1/2 + sigmoid/2), ``"softplus"``,
            ``"silu"`` or ``"identity"`` (with ``gate_mode="add"`` only).
        gate_mode: ``"multiply"``: ``Y * act(L)``; ``"add"``: ``Y + act(L)``.
        head_shared: all heads take the mean over heads of the activated elementwise gate.
        input_dependent: otherwise the logits are a parameter ``gate_logits``, zero at first.
        qk_norm: RMSNorm of every head of q and k, before RoPE.
        rope_base: base of the rotary angles, ``None`` for no positions. Channel ``i`` turns with
            channel ``i + D / 2``; positions restart in every packed sequence.

    Raises:
        TypeError, ValueError: an argument is out of range, or a combination has no meaning.

    Reference: Qiu et al., "Gated Attention for Large Language Models", arXiv 2505.06708.
    """

    _shown = (*KeyValueLayer._shown, "gate", "gate_position", "gate_activation", "gate_mode")
    _shown += ("head_shared", "input_dependent", "qk_norm", "rope_base")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        gate: str | None = "elementwise",
        gate_position: str = "sdpa",
        gate_activation: str = "sigmoid",
        gate_mode: str = "multiply",
        head_shared: bool = False,
        input_dependent: bool = True,
        qk_norm: bool = False,
        rope_base: float | None = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim)
        name = type(self).__name__
        flags = {"bias": bias, "head_shared": head_shared, "input_dependent": input_dependent}
        for option, value in {**flags, "qk_norm": qk_norm}.items():
            _checks.flag(name, option, value)
        _checks.choice(name, "gate", gate, ("elementwise", "headwise", None))
        _checks.choice(name, "gate_position", gate_position, POSITIONS)
        _checks.choice(name, "gate_activation", gate_activation, tuple(ACTIVATIONS))
        _checks.choice(name, "gate_mode", gate_mode, ("multiply", "add"))
        self.gate = gate
        self.gate_position = gate_position
        self.gate_activation = gate_activation
        self.gate_mode = gate_mode
        self.head_shared = head_shared
        self.input_dependent = input_dependent
        self.qk_norm = qk_norm
        self.rope_base = _rope_base(name, rope_base, self.head_dim)
        self._refuse_meaningless()

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, width, bias=bias, **factory)
        self.k_proj = nn.Linear(embed_dim, kv_width, bias=bias, **factory)
        self.v_proj = nn.Linear(embed_dim, kv_width, bias=bias, **factory)
        self.o_proj = nn.Linear(width, embed_dim, bias=bias, **factory)
        if gate is not None and input_dependent:
            self.gate_proj = nn.Linear(embed_dim, self._gate_shape().numel(), bias=bias, **factory)
        elif gate is not None:
            self.gate_logits = nn.Parameter(torch.zeros(self._gate_shape(), **factory))
        if qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=1e-6, **factory)
            self.k_norm = RMSNorm(self.head_dim, eps=1e-6, **factory)

    def reset_parameters(self) -> None:
        """Draws all parameters again: ``nn.Linear``'s default, ones for norms, zero gate logits."""
        super().reset_parameters()
        if hasattr(self, "gate_logits"):
            nn.init.zeros_(self.gate_logits)

    def _refuse_meaningless(self) -> None:
        """Raises for combinations of gate options that describe nothing."""
        reason = None
        kind = (self.gate_position, self.gate_activation, self.gate_mode)
        plain = not self.head_shared and self.input_dependent
        if self.gate is None and not (plain and kind == ("sdpa", "sigmoid", "multiply")):
            reason = "gate=None has no gate, so the other gate options must keep their defaults"
        elif self.gate_position == "output" and (self.gate == "headwise" or self.head_shared):
            reason = (
                "gate_position='output' comes after the output projection, where there are no "
                "heads: it takes gate='elementwise' and head_shared=False"
            )
        elif self.head_shared and self.gate == "headwise":
            reason = "head_shared=True shares channels between heads: it takes gate='elementwise'"
        elif self.gate_mode == "multiply" and self.gate_activation == "identity":
            reason = "gate_activation='identity' takes gate_mode='add'"
        if reason:
            raise ValueError(f"{type(self).__name__}: {reason}")

    @property
    def _gate_heads(self) -> int:
        return self.num_kv_heads if self.gate_position in ("key", "value") else self.num_heads

    def _gate_shape(self) -> torch.Size:
        """Shape of the gate logits of one token."""
        if self.gate_position == "output":
            return torch.Size([self.embed_dim])
        heads = self._gate_heads
        return torch.Size([heads, self.head_dim] if self.gate == "elementwise" else [heads])

    @property
    def _fused(self) -> bool:
        return (
            self.gate is not None
            and self.gate_position == "sdpa"
            and self.gate_mode == "multiply"
            and self.gate_activation in FUSED_ACTIVATIONS
            and not self.head_shared
        )

    def _attend(self, x: Tensor, cache: KVCache | None, cu_seqlens: Tensor | None) -> Tensor:
        q = split_heads(self.q_proj(x), self.num_heads)  # [B, T, H, D]
        k = split_heads(self.k_proj(x), self.num_kv_heads)  # [B, T, Hkv, D]
        v = split_heads(self.v_proj(x), self.num_kv_heads)
        gate = self._logits(x)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self._gated("query", q, gate), self._gated("key", k, gate)
        v = self._gated("value", v, gate)
        past = filled(cache)
        if self.rope_base is not None:
            positions = token_positions(x, past, cu_seqlens)
            angles = angles_of(positions, rope_frequencies(self.rope_base, self.head_dim, q))
            q, k = rotate(q, angles), rotate(k, angles)

        fused = gate if self._fused else None
        if past is not None:
            out = self._step(q, k, v, fused, past)
        else:
            out = self._attention(q, k, v, fused, cu_seqlens)
            if cache is not None:
                self._append(cache, k, v, cu_seqlens)
        if not self._fused:
            out = self._gated("sdpa", out, gate)
        return self._gated("output", self.o_proj(out.flatten(2)), gate)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        return self._call(
            gated_sdpa, q, k, v, gate, gate_activation=self._fused_activation, cu_seqlens=cu_seqlens
        )

    @property
    def _fused_activation(self) -> str:
        return self.gate_activation if self._fused else "sigmoid"

    def _step(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, cache: KVCache) -> Tensor:
        """New tokens behind those in ``cache``, a few at a time, in the cache's dtype."""
        length, dtype = q.shape[1], v.dtype
        cache.reserve(type(self).__name__, length)  # all of them or none
        q, k, v = (tensor.to(cache.dtype) for tensor in (q, k, v))
        gate = None if gate is None else gate.to(cache.dtype)
        outs = []
        with torch.autocast(q.device.type, enabled=False):
            for start in range(0, length, MAX_STEPS):
                piece = slice(start, start + MAX_STEPS)
                outs.append(
                    self._call(
                        attention_decode,
                        *(tensor[:, piece] for tensor in (q, k, v)),
                        cache,
                        gate=None if gate is None else gate[:, piece],
                        gate_activation=self._fused_activation,
                    )
                )
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        return out.to(dtype)

    def _logits(self, x: Tensor) -> Tensor | None:
        """Gate logits ``[B, T, heads, D]``; headwise ``[B, T, heads]``; output ``[B, T, C]``."""
        if self.gate is None:
            return None
        if not self.input_dependent:
            return self.gate_logits.expand(*x.shape[:2], *self.gate_logits.shape)
        logits: Tensor = self.gate_proj(x)
        if self.gate == "headwise" or self.gate_position == "output":
            return logits
        return split_heads(logits, self._gate_heads)

    def _gated(self, position: str, tensor: Tensor, logits: Tensor | None) -> Tensor:
        """``tensor`` with the gate applied, where the gate sits at ``position``."""
        if logits is None or position != self.gate_position:
            return tensor
        score = ACTIVATIONS[self.gate_activation](widen(logits))
        if self.gate == "headwise":
            score = score[..., None]
        if self.head_shared:
            score = score.mean(dim=-2, keepdim=True)
        wide = widen(tensor)
        return (wide * score if self.gate_mode == "multiply" else wide + score).to(tensor.dtype)


def _rope_base(name: str, base: float | None, head_dim: int) -> float | None:
    """Checks ``rope_base``, and that channels can be paired."""
    if base is None:
        return None
    if head_dim % 2:
        raise ValueError(
            f"{name}: RoPE turns pairs of channels and takes an even head_dim, got {head_dim} "
            f"(or rope_base=None)"
        )
    return positive(name, "rope_base", base)
