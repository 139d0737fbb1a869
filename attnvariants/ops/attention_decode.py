"""Public function ``attention_decode``: one step of softmax attention over a cache."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from attnvariants import _checks
from attnvariants._select import select
from attnvariants._types import AttentionStats
from attnvariants.kv_cache import KVCache
from attnvariants.ops._library import call_reference, register
from attnvariants.ops.softmax import GATE_ACTIVATIONS

MAX_STEPS = 8
_MAX_KV_HEADS = 128  # of csrc/softmax_decode.h

_ENGINES = {
    "eager": "attnvariants.eager.softmax_decode",
    "triton": "attnvariants.kernels.softmax_decode",
    "cuda": "attnvariants.ops._cuda_softmax_decode",
}


def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    *,
    gate: Tensor | None = None,
    softmax_scale: float | None = None,
    gate_activation: str = "sigmoid",
    return_stats: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, AttentionStats]:
    """Appends 1 to 8 tokens to ``cache`` and attends from them, as one operation.

    ``out = act(gate) * softmax(softmax_scale * q k^T) v``. Row r of the step has the absolute
    position ``i = cache.lengths[b] + r`` and sees the keys ``0 <= i - j < window`` of its KV head,
    cached and new ones; the new keys overwrite the oldest ones of a ring afterwards only. So a
    prompt appended to the cache and any sequence of steps give what ``gated_sdpa`` or
    ``ls_attention`` gives for the whole sequence. Positional encoding, if any, is applied before.

    The step is inference: it is not differentiable, and ``out`` has no history. It waits for no
    device, so that a CUDA graph captures it; recorded by one, or by ``torch.compile``, it cannot
    check that the cache has room, which is then the caller's duty. Under autocast the inputs are
    cast to the cache's dtype.

    Args:
        q: ``[B, Q, H, K]`` with ``Q`` from 1 to 8, float16, bfloat16, float32 or float64
            (and then all others too).
        k: new keys ``[B, Q, Hkv, K]``, dtype of ``q`` and of the cache; ``H`` is a multiple of
            ``Hkv``.
        v: new values ``[B, Q, Hkv, V]``.
        cache: :class:`KVCache`, modified in place: keys, values and lengths.
        gate: logits, elementwise ``[B, Q, H, V]`` or headwise ``[B, Q, H]``, in ``q``'s dtype or
            float32; ``None`` is plain attention.
        softmax_scale: ``None`` is ``K ** -0.5``.
        gate_activation: ``"sigmoid"``, ``"ns_sigmoid"`` (1/2 + sigmoid/2) or ``"softplus"``.
        return_stats: also return :class:`AttentionStats` of this step: the largest visible logit
            per head ``[H]`` and ``lse`` ``[B, Q, H]``.
        impl: ``"auto"``, ``"reference"``, ``"eager"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``out`` ``[B, Q, H, V]`` in ``v``'s dtype; ``(out, stats)`` with ``return_stats``.

    Raises:
        TypeError: an argument has the wrong type, or ``q`` is no floating tensor.
        ValueError: a shape, dtype, device or value does not fit, or the cache is full. The cache
            is then unchanged.
        NotImplementedError: an explicit ``impl`` cannot serve the call.
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"attention_decode: cache must be a KVCache, got {type(cache).__name__}")
    shapes = cache.shapes("attention_decode")
    shapes.bind("q", q, "B Q H K")
    shapes.bind("k", k, "B Q Hkv K")
    shapes.bind("v", v, "B Q Hkv V")
    if gate is not None:
        shapes.bind("gate", gate, "B Q H V", "B Q H")
    shapes.at_least_one("H")
    shapes.head_ratio()
    steps = shapes["Q"]
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(
            f"attention_decode: a step takes 1 to {MAX_STEPS} tokens, got {steps}; "
            f"append a prompt with cache.append"
        )
    _checks.flag("attention_decode", "return_stats", return_stats)
    _checks.choice("attention_decode", "gate_activation", gate_activation, GATE_ACTIVATIONS)
    softmax_scale = _checks.scale(
        "attention_decode", "softmax_scale", softmax_scale, shapes["K"] ** -0.5
    )
    _checks.same_device("attention_decode", q=q, k=k, v=v, gate=gate, cache=cache.k)
    cast = _checks.autocast(q, k, v, gate, dtype=cache.dtype)
    inputs = [x if x is None else x.detach() for x in cast]
    q, k, v, gate = inputs  # type: ignore[assignment]
    dtype = _checks.same_dtype("attention_decode", q=q, k=k, v=v, cache=cache.k)
    if gate is not None:
        accepted = (dtype, _checks.state_dtype(dtype))
        _checks.dtype_among("attention_decode", "gate", gate, accepted)
    impl = select("attention_decode", impl, q.device, dtype, _obstacles(cache))
    cache.reserve("attention_decode", steps)

    if impl == "reference":
        from attnvariants.reference.attention_decode import attention_decode as definition

        options = {"softmax_scale": softmax_scale, "gate_activation": gate_activation}
        return call_reference(
            definition, q, k, v, cache, gate=gate, return_stats=return_stats, **options
        )
    out, row_max, lse = torch.ops.attnvariants.attention_decode(
        *(q, k, v, gate, cache.k, cache.v, cache.lengths, cache.capacities),
        cache.max_length if _checks.recording() else cache.max_filled,
        softmax_scale,
        None if gate is None else gate_activation,
        impl,
    )
    cache.advance(steps)
    return (out, AttentionStats(row_max.amax((0, 1)), lse)) if return_stats else out


def _obstacles(cache: KVCache) -> dict[str, str]:
    if cache.num_kv_heads > _MAX_KV_HEADS:
        return {"cuda": f"it takes up to {_MAX_KV_HEADS} KV heads, got {cache.num_kv_heads}"}
    if not (cache.k.is_contiguous() and cache.v.is_contiguous() and cache.lengths.is_contiguous()):
        return {"cuda": "it takes a cache with contiguous buffers"}
    return {}


def _implementation(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    capacities: list[int],
    max_filled: int,
    softmax_scale: float,
    gate_activation: str | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return importlib.import_module(_ENGINES[impl]).attend(
        *(q, k, v, gate, k_cache, v_cache, lengths, capacities),
        *(max_filled, softmax_scale, gate_activation),
    )


def _shapes(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    statistics = q.new_empty(q.shape[:3], dtype=_checks.state_dtype(q.dtype))
    return q.new_empty(*q.shape[:3], v.shape[3]), statistics, torch.empty_like(statistics)


register(
    "attention_decode(Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor(c!) lengths, int[] capacities, SymInt max_filled, "
    "float softmax_scale, str? gate_activation, str impl) "
    "-> (Tensor out, Tensor row_max, Tensor lse)",
    _implementation,
    _shapes,
)
