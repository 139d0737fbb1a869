"""Public function ``norm_linear_attention``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnvariants.ops.linear import attend


def norm_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str | None = "elu+1",
    decay: Tensor | None = None,
    causal: bool = True,
    norm: str | None = "model",
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    gate: Tensor | None = None,
    gate_activation: str | None = "sigmoid",
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    return_stats: bool = False,
    impl: str = "auto",
) -> Any:
    """Linear attention that a norm of the output replaces the denominator of, as one operation.

    ``o_t = sum_{s <= t} exp(decay (t - s)) (phi(q_t) . phi(k_s)) v_s`` (over all ``s`` if not
    causal), no scale, and ``out = act(gate) * norm_weight * RMSNorm(o)``, each part of the latter
    optional. Time and memory are linear in ``T``; the backward keeps the normalised output and
    one number per row. Everything between the inputs and ``out`` is float32 (float64 for float64
    inputs), so un-normalised outputs beyond float16's range do no harm.

    Relatives: TransNormerLLM is ``feature_map="silu"``, ``gate_activation=None`` and ``decay =
    -(8 h / H) (1 - l / L)`` of head h in layer l; Lightning Attention (MiniMax-01) has ALiBi
    slopes, ``decay = -2 ** (-8 (h + 1) / H) (1 - l / (L - 1) + 1e-5)``.

    Args:
        q: ``[B, T, H, K]``, float16, bfloat16, float32 or float64 (and then all
            others too); ``K`` up to 256.
        k: ``[B, T, H, K]``, dtype of ``q``.
        v: ``[B, T, H, V]``, dtype of ``q``; ``V`` up to 256, ``V != K`` allowed.
        feature_map: phi of ``q`` and ``k``: ``"elu+1"``, ``"elu"``, ``"relu"``, ``"silu"`` or
            ``None``.
        decay: log-decay ``[H]`` per token of distance, dtype of ``q`` or float32; must be <= 0,
            which is not checked. ``None`` is none.
        causal: token t sees no token after it; ``False`` takes ``decay=None``.
        norm: ``"model"`` normalises all heads' channels together (the paper), ``"head"`` each
            head's ``V`` channels, ``None`` neither.
        norm_weight: ``[H, V]`` or ``[V]``, dtype of ``q`` or float32; applies without a norm too.
        eps: inside the root of the norm, not negative.
        gate: logits, elementwise ``[B, T, H, V]`` or headwise ``[B, T, H]``, dtype of ``q`` or
            float32.
        gate_activation: ``"sigmoid"``, ``"silu"`` or ``None`` (the gate multiplies as it is).
        initial_state: ``[N, H, K, V]``, float32 (float64 for float64 inputs), added to (causal:
            decayed into) the sum of ``phi(k_s) v_s^T``; zeros if ``None``.
        return_state: also return that sum, decayed to the last token of every sequence.
        cu_seqlens: int32 ``[N + 1]``: bounds of ``N`` independent sequences packed along ``T``
            (``B == 1``); empty ones are allowed. Without it ``N`` is ``B``.
        return_stats: also return :class:`AttentionStats`, whose ``max_logit`` is the largest
            ``|phi(q_t) . phi(k_s) exp(decay (t - s))|`` over the visible pairs; this takes an
            extra pass of O(T^2), in plain PyTorch for every ``impl``. ``lse`` is ``None``.
        impl: ``"auto"``, ``"reference"``, ``"eager"``, ``"triton"`` or ``"cuda"``, which has no
            backward and serves calls that need no gradient.

    Returns:
        ``out`` ``[B, T, H, V]`` in ``v``'s dtype, then the state ``[N, H, K, V]`` with
        ``return_state``, then the statistics with ``return_stats``.

    Raises:
        TypeError: an argument has the wrong type, or ``q`` is no floating tensor.
        ValueError: a shape, dtype, device or value does not fit; names the argument.
        NotImplementedError: an explicit ``impl`` cannot serve the call.

    Reference: Qin et al., "The Devil in Linear Transformer", arXiv 2210.10340; with a gate and
    decay "TransNormerLLM", arXiv 2307.14995.
    """
    return attend(
        "norm_linear_attention",
        q,
        k,
        v,
        decay,
        feature_map=feature_map,
        causal=causal,
        scale=1.0,
        norm=norm,
        norm_weight=norm_weight,
        eps=eps,
        gate=gate,
        gate_activation=gate_activation,
        initial_state=initial_state,
        return_state=return_state,
        cu_seqlens=cu_seqlens,
        return_stats=return_stats,
        impl=impl,
    )
