"""NormLinearAttention: linear attention that divides by its norm, not by a denominator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnvariants import _checks
from attnvariants.modules._common import (
    RecurrentLayer,
    filled,
    positive,
    repeat_heads,
    split_heads,
    widen,
)
from attnvariants.modules._positions import LRPE, token_positions
from attnvariants.ops.linear import FEATURE_MAPS, NORMS
from attnvariants.ops.linear_attention_decode import linear_attention_decode
from attnvariants.ops.norm_linear_attention import norm_linear_attention
from attnvariants.recurrent_state import RecurrentState

_PHI = {
    "elu+1": lambda x: F.elu(x) + 1,
    "elu": F.elu,
    "relu": F.relu,
    "silu": F.silu,
    None: lambda x: x,
}
_LRPE_FORMS = {False: None, True: "reflect", "concat": "concat"}


def alibi_decay(num_heads: int, layer_index: int, num_layers: int) -> list[float]:
    """Log-decays of the released code: Lightning Attention, MiniMax-01 and vLLM.

    ``-s_h (1 - l / (L - 1) + 1e-5)`` with ALiBi's slopes ``s_h``: ``2 ** (-8 (h + 1) / H)``, and
    ALiBi's interleaving where ``H`` is no power of 2. Layers count from 0; the last one hardly
    forgets.

    Raises:
        TypeError, ValueError: an argument is not an int or out of range.
    """
    _check_layer("alibi_decay", num_heads, layer_index, num_layers)
    factor = 1 - layer_index / max(num_layers - 1, 1) + 1e-5
    return [-slope * factor for slope in _alibi_slopes(num_heads)]


def paper_decay(num_heads: int, layer_index: int, num_layers: int) -> list[float]:
    """Log-decays as the TransNormerLLM paper prints them, and as flash-linear-attention has them.

    ``-(8 h / H) (1 - l / L)``, heads and layers from 0: head 0 never forgets, most others see few
    tokens. No released model uses these.

    Raises:
        TypeError, ValueError: an argument is not an int or out of range.
    """
    _check_layer("paper_decay", num_heads, layer_index, num_layers)
    return [-(8 * h / num_heads) * (1 - layer_index / num_layers) for h in range(num_heads)]


class NormLinearAttention(RecurrentLayer):
    """Linear attention with a norm in place of the denominator: ``RMSNorm(phi(Q) phi(K)^T V) W_o``.

    transNormer's NormAttention, with the parts that its successors added: a decay per head
    (TransNormerLLM, Lightning Attention), an output gate, and a norm per head. There is no
    ``1 / sqrt(d)``.

    Args:
        embed_dim: model width ``C``.
        num_heads: heads ``H``.
        num_kv_heads: heads of k and v; repeated for the query heads.
        head_dim: ``D``; ``None`` is ``embed_dim / num_heads``.
        bias: of all projections.
        feature_map: phi of q and k: ``"elu+1"``, ``"elu"``, ``"relu"``, ``"silu"`` or ``None``.
        norm: ``"model"`` (over all heads' channels together, the paper), ``"head"`` or ``None``.
        elementwise_affine: learn a weight of the norm: ``norm_weight`` ``[H, D]``, or ``[D]`` for
            ``norm="head"``.
        decay: log-decay of each head, at most 0, as a tensor or list ``[H]``; or the name of a
            published formula, which needs ``layer_index`` and ``num_layers``: ``"alibi"``
            (:func:`alibi_decay`, released models) or ``"paper"`` (:func:`paper_decay`). The two
            differ, so neither is a default. Not learned; float32 in a half precision layer.
        lrpe: learned relative positions, applied after phi: ``True`` reflects and rotates
            (transNormer), ``"concat"`` is TransNormerLLM's form, which doubles the key head dim.
        output_gate: multiply the norm's result by ``"sigmoid"`` or ``"silu"`` of ``x W_g``, or by
            it as it is (``"linear"``).
        causal: otherwise every token sees all; there is no cache and no decay then.
        norm_eps: inside the root of the norm.
        layer_index: of this layer, from 0.
        num_layers: of the model.

    Raises:
        TypeError, ValueError: an argument is out of range, or a combination has no meaning.

    Reference: Qin et al., "The Devil in Linear Transformer", arXiv 2210.10340; TransNormerLLM:
    arXiv 2307.14995 and 2405.17381.
    """

    _shown = (*RecurrentLayer._shown, "feature_map", "norm", "lrpe_form", "output_gate", "causal")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        feature_map: str | None = "elu+1",
        norm: str | None = "model",
        elementwise_affine: bool = False,
        decay: Tensor | Sequence[float] | str | None = None,
        lrpe: bool | str = False,
        output_gate: str | None = None,
        causal: bool = True,
        norm_eps: float = 1e-6,
        layer_index: int | None = None,
        num_layers: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim)
        name = type(self).__name__
        for option, value in {"bias": bias, "causal": causal}.items():
            _checks.flag(name, option, value)
        _checks.flag(name, "elementwise_affine", elementwise_affine)
        _checks.choice(name, "feature_map", feature_map, FEATURE_MAPS)
        _checks.choice(name, "norm", norm, NORMS)
        _checks.choice(name, "lrpe", lrpe, tuple(_LRPE_FORMS))
        _checks.choice(name, "output_gate", output_gate, ("sigmoid", "silu", "linear", None))
        if elementwise_affine and norm is None:
            raise ValueError(f"{name}: elementwise_affine=True needs a norm, got norm=None")
        if decay is not None and not causal:
            raise ValueError(f"{name}: decay counts back in time and takes causal=True")
        self.feature_map = feature_map
        self.norm = norm
        self.lrpe_form = _LRPE_FORMS[lrpe]
        self.output_gate = output_gate
        self.causal = causal
        self.norm_eps = positive(name, "norm_eps", norm_eps, or_zero=True)
        self.key_dim = self.head_dim * (2 if lrpe == "concat" else 1)
        self.value_dim = self.head_dim
        _checks.head_dim(name, "head_dim of q and k", self.key_dim)
        self._log_decay = _log_decay(name, decay, num_heads, layer_index, num_layers)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, width, bias=bias, **factory)
        self.k_proj = nn.Linear(embed_dim, kv_width, bias=bias, **factory)
        self.v_proj = nn.Linear(embed_dim, kv_width, bias=bias, **factory)
        if output_gate is not None:
            self.gate_proj = nn.Linear(embed_dim, width, bias=bias, **factory)
        self.o_proj = nn.Linear(width, embed_dim, bias=bias, **factory)
        self.lrpe = LRPE(self.lrpe_form, self.head_dim, **factory) if self.lrpe_form else None
        weights = {"model": (num_heads, self.head_dim), "head": (self.head_dim,), None: ()}[norm]
        weight = nn.Parameter(torch.ones(weights, **factory)) if elementwise_affine else None
        self.register_parameter("norm_weight", weight)
        self.decay: Tensor | None
        self.register_buffer("decay", None, persistent=False)
        self._place_decay()
        self.register_load_state_dict_post_hook(_follow_weights)

    @classmethod
    def transnormer_t1(cls, embed_dim: int, num_heads: int, **options: Any) -> NormLinearAttention:
        """transNormer T1: phi = elu, norm over the model width, LRPE, biases (options override)."""
        preset = {"feature_map": "elu", "norm": "model", "lrpe": True, "bias": True}
        return cls(embed_dim, num_heads, **{**preset, **options})

    @classmethod
    def transnormer_t2(cls, embed_dim: int, num_heads: int, **options: Any) -> NormLinearAttention:
        """transNormer T2: as T1 with phi = 1 + elu (options override)."""
        return cls.transnormer_t1(embed_dim, num_heads, **{"feature_map": "elu+1", **options})

    @classmethod
    def transnormer_llm(
        cls, embed_dim: int, num_heads: int, *, layer_index: int, num_layers: int, **options: Any
    ) -> NormLinearAttention:
        """TransNormerLLM: phi = silu, norm over the model width times ``x W_u``, decay.

        The decay is ``"alibi"``, that of the released models; the paper prints ``"paper"``. LRPE
        (``"concat"``) is in layer 0 only. ``options`` override.
        """
        preset: dict[str, Any] = {"feature_map": "silu", "norm": "model", "output_gate": "linear"}
        preset |= {"decay": "alibi", "lrpe": "concat" if layer_index == 0 else False}
        preset |= {"layer_index": layer_index, "num_layers": num_layers}
        return cls(embed_dim, num_heads, **{**preset, **options})

    def reset_parameters(self) -> None:
        """Draws all parameters again: ``nn.Linear``'s default, ones for the norm."""
        super().reset_parameters()
        if isinstance(self.norm_weight, Tensor):
            nn.init.ones_(self.norm_weight)

    def init_cache(
        self, batch_size: int, max_length: int, *, dtype: torch.dtype | None = None
    ) -> RecurrentState:
        """An empty state for ``batch_size`` rows; its size does not depend on ``max_length``."""
        self._require_causal()
        return super().init_cache(batch_size, max_length, dtype=dtype)

    def _check_cache(self, cache: Any) -> dict[str, tuple[Any, Any]]:
        self._require_causal()
        return super()._check_cache(cache)

    def _require_causal(self) -> None:
        if not self.causal:
            raise ValueError("NormLinearAttention: a layer with causal=False takes no cache")

    def _apply(self, fn: Any, recurse: bool = True) -> NormLinearAttention:
        """Moves and casts the layer, except that log-decays are never rounded to half precision."""
        super()._apply(fn, recurse)
        self._place_decay()
        return self

    def _place_decay(self) -> None:
        if self._log_decay is not None:
            weight = self.q_proj.weight
            wide = _checks.state_dtype(weight.dtype)
            self.decay = torch.tensor(self._log_decay, dtype=wide, device=weight.device)

    def _attend(self, x: Tensor, cache: RecurrentState | None, cu_seqlens: Tensor | None) -> Tensor:
        q = split_heads(self.q_proj(x), self.num_heads)  # [B, T, H, D]
        k = split_heads(self.k_proj(x), self.num_kv_heads)  # [B, T, Hkv, D]
        v = split_heads(self.v_proj(x), self.num_kv_heads)
        feature_map = self.feature_map
        if self.lrpe is not None:
            positions = token_positions(x, filled(cache), cu_seqlens)
            phi = _PHI[feature_map]
            # phi comes before the positions, so the attention function must not apply it again
            q, k = (self.lrpe(phi(widen(t)), positions).to(v.dtype) for t in (q, k))
            feature_map = None
        groups = self.num_heads // self.num_kv_heads
        k, v = repeat_heads(k, groups), repeat_heads(v, groups)

        gate = None if self.output_gate is None else split_heads(self.gate_proj(x), self.num_heads)
        activation = None if self.output_gate == "linear" else self.output_gate
        options: dict[str, Any] = {"norm": self.norm, "norm_weight": self.norm_weight}
        options |= {"eps": self.norm_eps, "gate": gate, "gate_activation": activation}
        options |= {"feature_map": feature_map}
        out = self._recur(
            partial(
                norm_linear_attention, q, k, v, decay=self.decay, causal=self.causal, **options
            ),
            partial(linear_attention_decode, q, k, v, self.decay, scale=1.0, **options),
            x.shape[1],
            cache,
            cu_seqlens,
        )
        return self.o_proj(out.flatten(2))


def _follow_weights(layer: NormLinearAttention, _: Any) -> None:
    """Places the log-decays again where ``load_state_dict(assign=True)`` replaced the weights."""
    decay, weight = layer.decay, layer.q_proj.weight
    if decay is None:
        return
    if (decay.device, decay.dtype) != (weight.device, _checks.state_dtype(weight.dtype)):
        layer._place_decay()


def _alibi_slopes(num_heads: int) -> list[float]:
    """ALiBi's slopes: a geometric series, interleaved with the next one off powers of 2."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    if power < num_heads:
        slopes += _alibi_slopes(2 * power)[::2][: num_heads - power]
    return slopes


def _check_layer(name: str, num_heads: int, layer_index: int, num_layers: int) -> None:
    _checks.positive_int(name, "num_heads", num_heads)
    _checks.positive_int(name, "num_layers", num_layers)
    if isinstance(layer_index, bool) or not isinstance(layer_index, int):
        raise TypeError(
            f"{name}: layer_index must be an int, got {layer_index!r} of type "
            f"{type(layer_index).__name__}"
        )
    if not 0 <= layer_index < num_layers:
        raise ValueError(
            f"{name}: layer_index must be from 0 to num_layers - 1 = {num_layers - 1}, "
            f"got {layer_index}"
        )


def _log_decay(
    name: str,
    decay: Tensor | Sequence[float] | str | None,
    num_heads: int,
    layer_index: int | None,
    num_layers: int | None,
) -> list[float] | None:
    """The log-decay of each head as numbers, checked."""
    if decay is None:
        return None
    if isinstance(decay, str):
        _checks.choice(name, "decay", decay, ("alibi", "paper"))
        if layer_index is None or num_layers is None:
            raise ValueError(f"{name}: decay={decay!r} takes layer_index and num_layers")
        formula = {"alibi": alibi_decay, "paper": paper_decay}[decay]
        return formula(num_heads, layer_index, num_layers)
    if not isinstance(decay, (Tensor, Sequence)):
        raise TypeError(
            f"{name}: decay must be None, 'alibi', 'paper' or the log-decay of each head, "
            f"got {type(decay).__name__}"
        )
    if isinstance(decay, Tensor) and decay.is_meta:
        raise ValueError(f"{name}: decay must hold numbers, got a tensor on the meta device")
    # on the CPU, because the default device may be meta
    values = torch.as_tensor(decay, dtype=torch.float64, device="cpu")
    if values.shape != (num_heads,):
        raise ValueError(
            f"{name}: decay has shape {tuple(values.shape)}, expected one log-decay per head "
            f"({num_heads},)"
        )
    if not bool((values <= 0).all()):  # NaN too
        raise ValueError(f"{name}: log-decays must be at most 0, got {values.tolist()}")
    found: list[float] = values.tolist()
    return found
