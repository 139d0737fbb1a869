"""Public function ``diag_attention``."""

from __future__ import annotations

from torch import Tensor

from attnvariants import _checks
from attnvariants._select import forward_only, select
from attnvariants.ops._library import call_reference
from attnvariants.ops.diag import ACTIVATIONS, BlockAttention


def diag_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int = 64,
    activation: str = "softmax",
    causal: bool = True,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention inside non-overlapping blocks of the sequence: transNormer's DiagAttention.

    ``out = act(softmax_scale * q k^T) v`` within each block of ``block_size`` tokens, where
    ``act`` is a softmax over the visible keys or a relu (ReLA, which has no row sum). The last
    block may be shorter. Costs ``T * block_size``.

    Args:
        q: ``[B, T, H, K]``, float16, bfloat16, float32 or float64; ``K`` up to 256.
        k: ``[B, T, Hkv, K]``, dtype of ``q``; ``H`` is a multiple of ``Hkv``.
        v: ``[B, T, Hkv, V]``, dtype of ``q``; ``V`` up to 256, ``V != K`` allowed.
        block_size: tokens per block, at least 1.
        activation: ``"softmax"`` or ``"relu"``.
        causal: a query sees no key after it; otherwise its whole block.
        softmax_scale: ``None`` is ``K ** -0.5``.
        cu_seqlens: int32 ``[N + 1]``: bounds of ``N`` independent sequences packed along ``T``
            (``B == 1``); blocks restart where a sequence starts.
        impl: ``"auto"``, ``"reference"``, ``"eager"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``out`` ``[B, T, H, V]`` in ``v``'s dtype.

    Raises:
        TypeError: an argument has the wrong type, or ``q`` is no floating tensor.
        ValueError: a shape, dtype, device or value does not fit; names the argument.
        NotImplementedError: an explicit ``impl`` cannot serve the call.

    Reference: Qin et al., "The Devil in Linear Transformer", arXiv 2210.10340.
    """
    return diag_attention_with_stats(
        q,
        k,
        v,
        block_size=block_size,
        activation=activation,
        causal=causal,
        softmax_scale=softmax_scale,
        cu_seqlens=cu_seqlens,
        stats=False,
        impl=impl,
    )[0]


def diag_attention_with_stats(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int = 64,
    activation: str = "softmax",
    causal: bool = True,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    stats: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """:func:`diag_attention` and the largest visible logit per head, detached fp32 ``[H]``.

    With ``stats=False`` the second result is ``None``.
    """
    function = "diag_attention"
    shapes = _checks.Shapes(function)
    shapes.bind("q", q, "B T H K")
    shapes.bind("k", k, "B T Hkv K")
    shapes.bind("v", v, "B T Hkv V")
    shapes.at_least_one("B", "T", "H")
    shapes.head_dims()
    shapes.head_ratio()
    _checks.positive_int(function, "block_size", block_size)
    _checks.choice(function, "activation", activation, ACTIVATIONS)
    _checks.flag(function, "causal", causal)
    softmax_scale = _checks.scale(function, "softmax_scale", softmax_scale, shapes["K"] ** -0.5)
    _checks.cu_seqlens(function, cu_seqlens, shapes["B"], shapes["T"])
    _checks.same_device(function, q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    q, k, v = _checks.autocast(q, k, v)  # type: ignore[assignment]
    _checks.same_dtype(function, q=q, k=k, v=v)

    impl = select(function, impl, q.device, q.dtype, forward_only(function, q, k, v))
    if impl == "reference":
        from attnvariants.reference import diag_attention as reference

        options = {"block_size": block_size, "activation": activation, "causal": causal}
        options |= {"softmax_scale": softmax_scale, "cu_seqlens": cu_seqlens}
        out, found = call_reference(reference.diag_attention, q, k, v, return_stats=True, **options)
        return out, found.max_logit if stats else None
    out, max_logit = BlockAttention.apply(
        q, k, v, cu_seqlens, block_size, activation, causal, softmax_scale, stats, impl
    )
    return out, max_logit if stats else None
