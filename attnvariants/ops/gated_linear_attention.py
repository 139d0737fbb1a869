"""Public function ``gated_linear_attention``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnvariants.ops.linear import attend


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    scale: float | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    gate: Tensor | None = None,
    gate_activation: str | None = "silu",
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    return_stats: bool = False,
    impl: str = "auto",
) -> Any:
    """Linear attention with a decaying state, and its norm and output gate, as one operation.

    ``S_t = diag(exp g_t) S_{t-1} + k_t v_t^T``, ``o_t = scale * S_t^T q_t`` and
    ``out = act(gate) * norm_weight * RMSNorm(o)``, per head, each part of the latter optional.
    Everything between the inputs and ``out`` is float32 (float64 for float64 inputs).

    Relatives with other names, each one call of this function:

    - RetNet: ``g = torch.log(1 - 2 ** -(5 + head))``, ``[H]``;
    - Lightning Attention as released (TransNormerLLM, MiniMax-01), layer l of L: ``scale=1.0`` and
      ``g = -(2 ** (-8 * (head + 1) / H)) * (1 - l / (L - 1) + 1e-5)``, ``[H]``;
    - Mamba-2's and gated RetNet's scalar decay: ``g`` ``[B, T, H]``;
    - HGRN2: ``k = -torch.expm1(g)``, which is ``1 - exp(g)``, with ``g`` ``[B, T, H, K]``.

    Args:
        q: ``[B, T, H, K]``, float16, bfloat16, float32 or float64 (and then all
            others too); ``K`` up to 256.
        k: ``[B, T, H, K]``, dtype of ``q``.
        v: ``[B, T, H, V]``, dtype of ``q``; ``V`` up to 256, ``V != K`` allowed.
        g: log-decay, ``[B, T, H, K]`` per channel, ``[B, T, H]`` per token, ``[H]`` constant or
            ``None`` for none; dtype of ``q`` or float32. Must be <= 0, which is not checked;
            ``-inf`` forgets everything before the token, exactly.
        scale: ``None`` is ``K ** -0.5``.
        norm: ``"head"`` normalises each head's ``V`` channels, ``"model"`` all heads' channels
            together, ``None`` neither.
        norm_weight: ``[H, V]`` or ``[V]``, dtype of ``q`` or float32; applies without a norm too.
        eps: inside the root of the norm, not negative.
        gate: logits, elementwise ``[B, T, H, V]`` or headwise ``[B, T, H]``, dtype of ``q`` or
            float32.
        gate_activation: ``"silu"``, ``"sigmoid"`` or ``None`` (the gate multiplies as it is).
        initial_state: ``[N, H, K, V]``, float32 (float64 for float64 inputs); zeros if ``None``.
        return_state: also return the state after the last token of every sequence.
        cu_seqlens: int32 ``[N + 1]``: bounds of ``N`` independent sequences packed along ``T``
            (``B == 1``); empty ones are allowed. Without it ``N`` is ``B``.
        return_stats: also return :class:`AttentionStats`, whose ``max_logit`` is the largest
            ``|scale * q_i . k_j * decay_ij|`` over all ``i >= j``; this takes an extra pass of
            O(T^2), in plain PyTorch for every ``impl``. ``lse`` is ``None``.
        impl: ``"auto"``, ``"reference"``, ``"eager"``, ``"triton"`` or ``"cuda"``, which has no
            backward and serves calls that need no gradient.

    Returns:
        ``out`` ``[B, T, H, V]`` in ``v``'s dtype, then the state ``[N, H, K, V]`` with
        ``return_state``, then the statistics with ``return_stats``.

    Raises:
        TypeError: an argument has the wrong type, or ``q`` is no floating tensor.
        ValueError: a shape, dtype, device or value does not fit; names the argument.
        NotImplementedError: an explicit ``impl`` cannot serve the call.

    Reference: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient
    Training", arXiv 2312.06635.
    """
    return attend(
        "gated_linear_attention",
        q,
        k,
        v,
        g,
        feature_map=None,
        causal=True,
        scale=scale,
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
