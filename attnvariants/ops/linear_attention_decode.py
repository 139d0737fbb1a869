"""Public function ``linear_attention_decode``: steps of linear attention from a state."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from attnvariants import _checks
from attnvariants._select import select
from attnvariants.ops._library import call_reference, register
from attnvariants.ops.linear import check_options
from attnvariants.recurrent_state import RecurrentState

_ENGINES = {
    "eager": "attnvariants.eager.linear_decode",
    "triton": "attnvariants.kernels.linear_decode",
    "cuda": "attnvariants.ops._cuda_linear_decode",
}


def linear_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: RecurrentState | Tensor,
    *,
    scale: float | None = None,
    feature_map: str | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    gate: Tensor | None = None,
    gate_activation: str | None = "silu",
    impl: str = "auto",
) -> Tensor:
    """Carries linear attention on from ``state``, usually by one token, as one operation.

    ``S_t = diag(exp g_t) S_{t-1} + phi(k_t) v_t^T`` and ``o_t = scale * S_t^T phi(q_t)``, then
    ``out = act(gate) * norm_weight * RMSNorm(o)``, each part of it optional. Any sequence of steps
    gives what ``gated_linear_attention`` gives for the whole sequence, and with ``scale=1.0`` and
    ``g`` as its ``decay`` what ``norm_linear_attention`` gives.

    The step is inference: it is not differentiable, and ``out`` has no history. It waits for no
    device, so that a CUDA graph captures it.

    Args:
        q: ``[B, Q, H, K]``, float16, bfloat16, float32 or float64 (and then all
            others too); ``K`` up to 256.
        k: ``[B, Q, H, K]``, dtype of ``q``.
        v: ``[B, Q, H, V]``, dtype of ``q``; ``V`` up to 256.
        g: log-decay of at most 0: ``[B, Q, H, K]`` per channel, ``[B, Q, H]`` per token, ``[H]``
            constant, or ``None``; in ``q``'s dtype or float32. ``-inf`` is a hard reset.
        state: :class:`RecurrentState`, or a tensor ``[B, H, K, V]`` in float32 (float64 for
            float64 inputs); updated in place. A bf16 state is read and written in half the bytes;
            every call computes in float32 and rounds it once, see :class:`RecurrentState`.
        scale: ``None`` is ``K ** -0.5``.
        feature_map: phi: ``"elu+1"``, ``"elu"``, ``"relu"``, ``"silu"`` or ``None``.
        norm: ``"model"`` is RMSNorm over all heads together, ``"head"`` per head, ``None`` off.
        norm_weight: ``[H, V]`` or ``[V]``, in ``q``'s dtype or float32.
        eps: inside the root of the norm.
        gate: logits ``[B, Q, H, V]`` or ``[B, Q, H]``, in ``q``'s dtype or float32.
        gate_activation: ``"sigmoid"``, ``"silu"`` or ``None`` (multiply as it is).
        impl: ``"auto"``, ``"reference"``, ``"eager"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``out`` ``[B, Q, H, V]`` in ``v``'s dtype.

    Raises:
        TypeError: an argument has the wrong type, or ``q`` is no floating tensor.
        ValueError: a shape, dtype, device or value does not fit. The state is then unchanged.
        NotImplementedError: an explicit ``impl`` cannot serve the call.
    """
    if not isinstance(state, (RecurrentState, Tensor)):
        raise TypeError(
            f"linear_attention_decode: state must be a RecurrentState or a tensor [B, H, K, V], "
            f"got {type(state).__name__}"
        )
    buffer = (state.state if isinstance(state, RecurrentState) else state).detach()
    function = "linear_attention_decode"
    shapes = _checks.Shapes(function)
    shapes.bind("q", q, "B Q H K")
    shapes.bind("k", k, "B Q H K")
    shapes.bind("v", v, "B Q H V")
    shapes.bind("state", buffer, "B H K V")
    shapes.at_least_one("B", "Q", "H")
    shapes.head_dims()
    if g is not None:
        shapes.bind("g", g, "B Q H K", "B Q H", "H")
    if norm_weight is not None:
        shapes.bind("norm_weight", norm_weight, "H V", "V")
    if gate is not None:
        shapes.bind("gate", gate, "B Q H V", "B Q H")
    _checks.writable(function, "state", buffer)
    scale = _checks.scale(function, "scale", scale, shapes["K"] ** -0.5)
    options = check_options(function, feature_map, True, scale, norm, eps, gate_activation)
    tensors = {"g": g, "norm_weight": norm_weight, "gate": gate}
    _checks.same_device(function, q=q, k=k, v=v, state=buffer, **tensors)
    cast = _checks.autocast(q, k, v, norm_weight, gate)
    q, k, v, norm_weight, gate = (x if x is None else x.detach() for x in cast)  # type: ignore[assignment]
    dtype = _checks.same_dtype(function, q=q, k=k, v=v)
    g = None if g is None else _checks.autocast_decay(g.detach(), dtype)
    wide = _checks.state_dtype(dtype)
    for name, tensor in (("g", g), ("norm_weight", norm_weight), ("gate", gate)):
        if tensor is not None:
            _checks.dtype_among(function, name, tensor, (dtype, wide))
    narrow = () if wide == torch.float64 else (torch.bfloat16,)
    _checks.dtype_among(function, "state", buffer, (wide, *narrow))
    impl = select(function, impl, q.device, q.dtype)

    if impl == "reference":
        from attnvariants.reference.linear_attention_decode import (
            linear_attention_decode as definition,
        )

        epilogue = {"norm": norm, "norm_weight": norm_weight, "eps": eps, "gate": gate}
        epilogue |= {"gate_activation": gate_activation}
        target = state if isinstance(state, RecurrentState) else buffer
        return call_reference(
            definition, q, k, v, g, target, scale=scale, feature_map=feature_map, **epilogue
        )
    lengths = state.lengths if isinstance(state, RecurrentState) else None
    out = torch.ops.attnvariants.linear_attention_decode(
        *(q, k, v, g, buffer, lengths, norm_weight, gate),
        *(feature_map, scale, norm, options.eps, gate_activation, impl),
    )
    if isinstance(state, RecurrentState):
        state.advance(shapes["Q"])
    return out


def _implementation(q: Tensor, *args: object) -> Tensor:
    *inputs, impl = args
    return importlib.import_module(_ENGINES[str(impl)]).attend(q, *inputs)


def _shapes(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return v.new_empty(v.shape)


register(
    "linear_attention_decode(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor(a!) state, "
    "Tensor(b!)? lengths, Tensor? norm_weight, Tensor? gate, str? feature_map, float scale, "
    "str? norm, float eps, str? gate_activation, str impl) -> Tensor",
    _implementation,
    _shapes,
)
