"""The softmax engine: operators and autograd shared by gated_sdpa and ls_attention."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from attnvariants import _checks
from attnvariants._select import forward_only, select
from attnvariants._types import AttentionStats, Window
from attnvariants.ops import _cuda_softmax_forward
from attnvariants.ops._library import call_reference, once_differentiable, register

GATE_ACTIVATIONS = ("sigmoid", "ns_sigmoid", "softplus")

_ENGINES = {
    "eager": "attnvariants.eager.softmax",
    "triton": "attnvariants.kernels.softmax",
    "cuda": "attnvariants.ops._cuda_softmax_forward",  # without a backward
}


def attend(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    *,
    causal: bool,
    window: Window,
    softmax_scale: float | None,
    gate_activation: str,
    cu_seqlens: Tensor | None,
    return_stats: bool,
    impl: str,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """Validates a call of ``function``, selects the implementation and runs it."""
    shapes = _checks.Shapes(function)
    shapes.bind("q", q, "B T H K")
    shapes.bind("k", k, "B S Hkv K")
    shapes.bind("v", v, "B S Hkv V")
    if gate is not None:
        shapes.bind("gate", gate, "B T H V", "B T H")
    shapes.at_least_one("B", "T", "S", "H")
    shapes.head_dims()
    shapes.head_ratio()
    _checks.flag(function, "causal", causal)
    _checks.flag(function, "return_stats", return_stats)
    _checks.choice(function, "gate_activation", gate_activation, GATE_ACTIVATIONS)
    softmax_scale = _checks.scale(function, "softmax_scale", softmax_scale, shapes["K"] ** -0.5)
    windows = _checks.windows(function, window, shapes["Hkv"])
    _checks.cu_seqlens(function, cu_seqlens, shapes["B"], shapes["T"])
    if cu_seqlens is not None and shapes["S"] != shapes["T"]:
        raise ValueError(
            f"{function}: packed sequences (cu_seqlens) take as many keys as queries, "
            f"got S={shapes['S']} and T={shapes['T']}"
        )
    _checks.same_device(function, q=q, k=k, v=v, gate=gate, cu_seqlens=cu_seqlens)
    q, k, v, gate = _checks.autocast(q, k, v, gate)  # type: ignore[assignment]
    dtype = _checks.same_dtype(function, q=q, k=k, v=v)
    if gate is not None:
        _checks.dtype_among(function, "gate", gate, (dtype, _checks.state_dtype(dtype)))

    obstacles = forward_only(function, q, k, v, gate) or _cuda_softmax_forward.obstacles(windows)
    impl = select(function, impl, q.device, dtype, obstacles)
    if impl == "reference":
        from attnvariants.reference.gated_sdpa import gated_sdpa

        options = {"softmax_scale": softmax_scale, "gate_activation": gate_activation}
        options |= {"causal": causal, "window": window, "cu_seqlens": cu_seqlens}
        return call_reference(gated_sdpa, q, k, v, gate, return_stats=return_stats, **options)
    activation = None if gate is None else gate_activation
    out, lse, max_logit = _SoftmaxAttention.apply(
        q, k, v, gate, cu_seqlens, windows, causal, softmax_scale, activation, return_stats, impl
    )
    return (out, AttentionStats(max_logit, lse)) if return_stats else out


class _SoftmaxAttention(torch.autograd.Function):
    """Keeps the gated output and not the one before the gate: the backward needs no more.

    With ``Y = act(L) O`` the gradient of the gate is ``dL = dY Y (log act)'(L)`` and the row sum
    of the softmax backward is ``D = sum(dO O) = sum(dY Y)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None,
        cu_seqlens: Tensor | None,
        windows: list[int],
        causal: bool,
        softmax_scale: float,
        activation: str | None,
        stats: bool,
        impl: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        options = (windows, causal, softmax_scale, activation)
        out, lse, max_logit = torch.ops.attnvariants.softmax_forward(
            q, k, v, gate, cu_seqlens, *options, stats, impl
        )
        ctx.save_for_backward(q, k, v, gate, cu_seqlens, out, lse)
        ctx.mark_non_differentiable(max_logit)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.impl = options, impl
        return out, lse, max_logit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Any) -> tuple[Any, ...]:
        q, k, v, gate, cu_seqlens, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        dq, dk, dv, dgate = torch.ops.attnvariants.softmax_backward(
            dout, dlse, q, k, v, gate, out, lse, cu_seqlens, *ctx.options, ctx.impl
        )
        return dq, dk, dv, None if gate is None else dgate, *(None,) * 7


def _forward(q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, impl = args
    return importlib.import_module(_ENGINES[impl]).forward(q, *inputs)


def _backward(dout: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, impl = args
    return importlib.import_module(_ENGINES[impl]).backward(dout, *inputs)


def _forward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    cu_seqlens: Tensor | None,
    windows: list[int],
    causal: bool,
    softmax_scale: float,
    gate_activation: str | None,
    stats: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    wide = _checks.state_dtype(q.dtype)
    if impl == "eager":
        lse = q.new_empty(batch, length, heads, dtype=wide)
    else:  # kernels write tiles of queries, and return a view
        lse = q.new_empty(batch, heads, length, dtype=wide).transpose(1, 2)
    out = q.new_empty(batch, length, heads, v.shape[-1])
    return out, lse, q.new_empty(heads if stats else 0, dtype=wide)


def _backward_shapes(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dgate = q.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dgate


register(
    "softmax_forward(Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? cu_seqlens, "
    "int[] windows, bool causal, float softmax_scale, str? gate_activation, bool stats, "
    "str impl) -> (Tensor out, Tensor lse, Tensor max_logit)",
    _forward,
    _forward_shapes,
)
register(
    "softmax_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? gate, "
    "Tensor out, Tensor lse, Tensor? cu_seqlens, int[] windows, bool causal, "
    "float softmax_scale, str? gate_activation, str impl) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dgate)",
    _backward,
    _backward_shapes,
)
