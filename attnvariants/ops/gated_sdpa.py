"""Public function ``gated_sdpa``."""

from __future__ import annotations

from torch import Tensor

from attnvariants._types import AttentionStats, Window
from attnvariants.ops.softmax import attend


def gated_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    causal: bool = True,
    window: Window = None,
    softmax_scale: float | None = None,
    gate_activation: str = "sigmoid",
    cu_seqlens: Tensor | None = None,
    return_stats: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, AttentionStats]:
    """Softmax attention whose output is multiplied by a gate, as one operation.

    ``out = act(gate) * softmax(softmax_scale * q k^T) v``, per head, over the visible keys. The
    gate is computed in float32 and the product is rounded once; the backward keeps ``out`` and
    not the output before the gate, so ``out`` must not be modified in place before it has run
    (autograd raises then). An open gate keeps its gradient in half precision.

    Args:
        q: ``[B, T, H, K]``, float16, bfloat16, float32 or float64 (and then all
            others too); ``K`` up to 256.
        k: ``[B, S, Hkv, K]``, dtype of ``q``; ``H`` is a multiple of ``Hkv`` and query head h
            reads KV head ``h // (H // Hkv)``.
        v: ``[B, S, Hkv, V]``, dtype of ``q``; ``V`` up to 256, ``V != K`` allowed.
        gate: logits, elementwise ``[B, T, H, V]`` or headwise ``[B, T, H]``, in ``q``'s dtype or
            float32 and with any strides; ``None`` is plain attention.
        causal: query i sees no key after it. With ``S > T`` the queries are the last ``T``
            positions; with ``S < T`` the first ``T - S`` see nothing and their ``out`` is 0.
        window: ``None`` (all keys), an int, or one int or ``None`` per KV head. It counts the
            visible keys including the query's own: ``0 <= i - j < window``, also with
            ``causal=False``, which frees the heads without a window only.
        softmax_scale: ``None`` is ``K ** -0.5``.
        gate_activation: ``"sigmoid"``, ``"ns_sigmoid"`` (1/2 + sigmoid/2) or ``"softplus"``.
        cu_seqlens: int32 ``[N + 1]``: bounds of ``N`` independent sequences packed along ``T``
            (``B == 1``, ``S == T``); empty ones are allowed.
        return_stats: also return :class:`AttentionStats`: the detached largest logit per head
            and the differentiable ``lse`` (``-inf`` where nothing is visible).
        impl: ``"auto"``, ``"reference"``, ``"eager"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``out`` ``[B, T, H, V]`` in ``v``'s dtype; ``(out, stats)`` with ``return_stats``.

    Raises:
        TypeError: an argument has the wrong type, or ``q`` is no floating tensor.
        ValueError: a shape, dtype, device or value does not fit; names the argument.
        NotImplementedError: an explicit ``impl`` cannot serve the call.

    Reference: Qiu et al., "Gated Attention for Large Language Models", arXiv 2505.06708.
    """
    return attend(
        "gated_sdpa",
        q,
        k,
        v,
        gate,
        causal=causal,
        window=window,
        softmax_scale=softmax_scale,
        gate_activation=gate_activation,
        cu_seqlens=cu_seqlens,
        return_stats=return_stats,
        impl=impl,
    )
