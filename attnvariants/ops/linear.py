"""The linear engine: operators and autograd shared by the two linear attentions."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnvariants import _checks
from attnvariants._select import forward_only, select
from attnvariants._types import AttentionStats
from attnvariants.ops._library import call_reference, once_differentiable, register

FEATURE_MAPS = ("elu+1", "elu", "relu", "silu", None)
NORMS = ("model", "head", None)
GATE_ACTIVATIONS = ("sigmoid", "silu", None)

_LOG_DECAYS = {
    "gated_linear_attention": ("g", ("B T H K", "B T H", "H")),
    "norm_linear_attention": ("decay", ("H",)),
}
_ENGINES = {
    "eager": "attnvariants.eager.linear",
    "triton": "attnvariants.kernels.linear",
    "cuda": "attnvariants.ops._cuda_linear_forward",
}


class Options(NamedTuple):
    """What the operators take besides tensors, in the order of their schemas."""

    feature_map: str | None
    causal: bool
    scale: float
    norm: str | None
    eps: float
    gate_activation: str | None


def attend(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    feature_map: str | None,
    causal: bool,
    scale: float | None,
    norm: str | None,
    norm_weight: Tensor | None,
    eps: float,
    gate: Tensor | None,
    gate_activation: str | None,
    initial_state: Tensor | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
    return_stats: bool,
    impl: str,
) -> Any:
    """Validates a call of ``function``, selects the implementation and runs it."""
    shapes = _checks.Shapes(function)
    shapes.bind("q", q, "B T H K")
    shapes.bind("k", k, "B T H K")
    shapes.bind("v", v, "B T H V")
    shapes.at_least_one("B", "T", "H")
    shapes.head_dims()
    g_name, g_shapes = _LOG_DECAYS[function]
    if g is not None:
        shapes.bind(g_name, g, *g_shapes)
    if norm_weight is not None:
        shapes.bind("norm_weight", norm_weight, "H V", "V")
    if gate is not None:
        shapes.bind("gate", gate, "B T H V", "B T H")
    _checks.cu_seqlens(function, cu_seqlens, shapes["B"], shapes["T"])
    shapes.sizes["N"] = shapes["B"] if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is not None:
        shapes.bind("initial_state", initial_state, "N H K V")
    for name, flag in (("return_state", return_state), ("return_stats", return_stats)):
        _checks.flag(function, name, flag)
    scale = _checks.scale(function, "scale", scale, shapes["K"] ** -0.5)
    options = check_options(function, feature_map, causal, scale, norm, eps, gate_activation)
    if not causal and g is not None:
        raise ValueError(f"{function}: {g_name} counts back in time and takes causal=True")

    tensors = {g_name: g, "norm_weight": norm_weight, "gate": gate, "cu_seqlens": cu_seqlens}
    _checks.same_device(function, q=q, k=k, v=v, initial_state=initial_state, **tensors)
    q, k, v, norm_weight, gate = _checks.autocast(q, k, v, norm_weight, gate)  # type: ignore[assignment]
    dtype = _checks.same_dtype(function, q=q, k=k, v=v)
    g = _checks.autocast_decay(g, dtype)
    wide = _checks.state_dtype(dtype)
    for name, tensor in ((g_name, g), ("norm_weight", norm_weight), ("gate", gate)):
        if tensor is not None:
            _checks.dtype_among(function, name, tensor, (dtype, wide))
    if initial_state is not None:
        _checks.dtype_among(function, "initial_state", initial_state, (wide,))

    floating = (q, k, v, g, initial_state, norm_weight, gate)
    impl = select(function, impl, q.device, q.dtype, forward_only(function, *floating))
    if impl == "reference":
        common = {"norm": norm, "norm_weight": norm_weight, "eps": eps, "gate": gate}
        common |= {"gate_activation": gate_activation, "initial_state": initial_state}
        common |= {"return_state": return_state, "return_stats": return_stats}
        common |= {"cu_seqlens": cu_seqlens}
        return _reference(function, q, k, v, g, options, common)
    out, state, max_logit = _LinearAttention.apply(
        q, k, v, g, initial_state, cu_seqlens, norm_weight, gate, options, return_stats, impl
    )
    results = [out]
    if return_state:
        results.append(state)
    if return_stats:
        results.append(AttentionStats(max_logit, None))
    return tuple(results) if len(results) > 1 else out


def check_options(
    function: str,
    feature_map: str | None,
    causal: bool,
    scale: float,
    norm: str | None,
    eps: float,
    gate_activation: str | None,
) -> Options:
    """The checked options."""
    _checks.flag(function, "causal", causal)
    _checks.choice(function, "feature_map", feature_map, FEATURE_MAPS)
    _checks.choice(function, "norm", norm, NORMS)
    _checks.choice(function, "gate_activation", gate_activation, GATE_ACTIVATIONS)
    if eps is None:
        raise TypeError(f"{function}: eps must be a number, got None")
    eps = _checks.scale(function, "eps", eps, 0.0)
    if eps < 0:
        raise ValueError(f"{function}: eps must not be negative, got {eps}")
    return Options(feature_map, causal, scale, norm, eps, gate_activation)


def _reference(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    options: Options,
    common: dict[str, Any],
) -> Any:
    if function == "gated_linear_attention":
        from attnvariants.reference.gated_linear_attention import gated_linear_attention

        return call_reference(gated_linear_attention, q, k, v, g, scale=options.scale, **common)
    from attnvariants.reference.norm_linear_attention import norm_linear_attention

    own = {"feature_map": options.feature_map, "decay": g, "causal": options.causal}
    return call_reference(norm_linear_attention, q, k, v, **own, **common)


class _LinearAttention(torch.autograd.Function):
    """Keeps the normalised output ``y`` and the norm's ``rstd``, never the output before the norm.

    With ``y = r o`` the gradients of q, k, v are those of the attention without a norm for the
    queries ``r q`` and the cotangent ``dy - mean(dy y) y``, with the rows of ``dq`` times ``r``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        norm_weight: Tensor | None,
        gate: Tensor | None,
        options: Options,
        stats: bool,
        impl: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (q, k, v, g, initial_state, cu_seqlens, norm_weight, gate)
        out, y, rstd, state, max_logit = torch.ops.attnvariants.linear_forward(
            *tensors, *options, stats, impl
        )
        scaled = norm_weight is not None or gate is not None  # else y is out
        kept = y if scaled else out if options.norm is not None else None
        ctx.save_for_backward(*tensors, kept, rstd)
        ctx.mark_non_differentiable(max_logit)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.impl = options, impl
        return out, state, max_logit

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, dstate: Tensor | None, _: Any
    ) -> tuple[Tensor | None, ...]:
        *tensors, y, rstd = ctx.saved_tensors
        need_dg = ctx.needs_input_grad[3]
        dq, dk, dv, dg, dinitial, dweight, dgate = torch.ops.attnvariants.linear_backward(
            *tensors, y, rstd, dout, dstate, *ctx.options, need_dg, ctx.impl
        )
        _, _, _, _, initial_state, _, norm_weight, gate = tensors
        return (
            dq,
            dk,
            dv,
            dg if need_dg else None,
            None if initial_state is None else dinitial,
            None,
            None if norm_weight is None else dweight,
            None if gate is None else dgate,
            *(None,) * 3,
        )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    *others, stats, impl = args
    inputs = (q, k, v, g, initial_state, cu_seqlens, *others)
    engine = importlib.import_module(_ENGINES[impl])
    if impl == "eager":
        return tuple(engine.forward(*inputs, stats))
    max_logit = q.new_empty(0, dtype=_checks.state_dtype(q.dtype))
    if stats:  # O(T^2), and kernels never form all scores: in plain PyTorch for every impl
        eager = importlib.import_module(_ENGINES["eager"])
        _, _, feature_map, causal, scale, *_ = others
        max_logit = eager.largest_scores(q, k, v, g, cu_seqlens, feature_map, causal, scale)
    return *engine.forward(*inputs), max_logit


def _backward(q: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, impl = args
    return importlib.import_module(_ENGINES[impl]).backward(q, *inputs)


def _forward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    feature_map: str | None,
    causal: bool,
    scale: float,
    norm: str | None,
    eps: float,
    gate_activation: str | None,
    stats: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    batch, length, heads, key_dim = q.shape
    wide = _checks.state_dtype(q.dtype)
    backward = impl != "cuda"  # has none, and keeps nothing for it
    scaled = backward and (norm_weight is not None or gate is not None)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rstd = {"model": (batch, length), "head": (batch, length, heads), None: (0,)}[norm]
    return (
        v.new_empty(v.shape),
        v.new_empty(v.shape if scaled else (0,)),
        v.new_empty(rstd if backward else (0,), dtype=wide),
        v.new_empty(sequences, heads, key_dim, v.shape[-1], dtype=wide),
        v.new_empty(heads if stats else 0, dtype=wide),
    )


def _backward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    y: Tensor | None,
    rstd: Tensor,
    dout: Tensor | None,
    dstate: Tensor | None,
    feature_map: str | None,
    causal: bool,
    scale: float,
    norm: str | None,
    eps: float,
    gate_activation: str | None,
    need_dg: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    def like(tensor: Tensor | None) -> Tensor:
        return q.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    dg = like(g if need_dg else None)
    return like(q), like(k), like(v), dg, like(initial_state), like(norm_weight), like(gate)


_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? initial_state, Tensor? cu_seqlens, "
    "Tensor? norm_weight, Tensor? gate, "
)
_OPTIONS = (
    "str? feature_map, bool causal, float scale, str? norm, float eps, str? gate_activation, "
)
register(
    f"linear_forward({_TENSORS}{_OPTIONS}bool stats, str impl) "
    "-> (Tensor out, Tensor y, Tensor rstd, Tensor state, Tensor max_logit)",
    _forward,
    _forward_shapes,
)
register(
    f"linear_backward({_TENSORS}Tensor? y, Tensor rstd, Tensor? dout, Tensor? dstate, {_OPTIONS}"
    "bool need_dg, str impl) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, "
    "Tensor dinitial_state, Tensor dnorm_weight, Tensor dgate)",
    _backward,
    _backward_shapes,
)
