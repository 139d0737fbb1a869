"""Launches of the linear kernels, behind both linear attentions."""

from __future__ import annotations

import torch
import triton
from attnvariants.kernels._launch import launch
from attnvariants.kernels._linear_configs import STRIDE, Tiles, segment_length, tiles
from attnvariants.kernels._tiles import Strided, odd, strided
from attnvariants.kernels._walk import Dims, Walk
from attnvariants.kernels.linear_backward_qk import (
    QueryKeyGradients,
    linear_backward_qk_kernel,
)
from attnvariants.kernels.linear_backward_v import linear_backward_v_kernel
from attnvariants.kernels.linear_epilogue import (
    Norm,
    Outputs,
    linear_cotangent_kernel,
    linear_norm_kernel,
)
from attnvariants.kernels.linear_forward import linear_forward_kernel
from attnvariants.kernels.linear_states import Kind, linear_scan_kernel, linear_states_kernel
from torch import Tensor


def forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``out``, ``y``, ``rstd`` and the state of the operator ``linear_forward``."""
    call = _Call(q, k, v, g, cu_seqlens, feature_map, causal)
    initial_state = None if initial_state is None else initial_state.contiguous()
    batch, length, heads, value_dim = v.shape
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    scaled = gate is not None or norm_weight is not None
    y = torch.empty_like(out) if scaled else v.new_empty(0)
    shapes = {"model": (batch, length), "head": (batch, length, heads), None: (0,)}
    rstd = v.new_empty(shapes[norm], dtype=torch.float32)
    state = v.new_empty(call.count, heads, q.shape[3], value_dim, dtype=torch.float32)

    config = call.tiles("linear_forward")
    slices = triton.cdiv(value_dim, config.BV)
    walk = call.segments(heads * slices)
    start = call.boundary(walk, k, v, initial_state, state)
    finish = state if causal and walk.whole else None
    deferred = norm == "model" or (norm == "head" and slices > 1)
    squares = None
    if deferred:
        squares = v.new_empty(batch, length, heads, slices, dtype=torch.float32)
    outputs = Outputs(_strided(out), _strided(y) if scaled else None)
    epilogue = _epilogue(v, norm_weight, gate)
    options = _norm(norm, deferred, norm_weight, gate, gate_activation)
    launch(
        linear_forward_kernel,
        walk.segments(batch) * heads * slices,
        *call.inputs,
        *(start, finish, *epilogue, outputs, _by_head(rstd, norm), squares, walk, scale, eps),
        *(config.dims(call.dims), call.kind, options),
        config=config,
    )
    if deferred:
        rows = call.tiles("linear_norm")
        launch(
            linear_norm_kernel,
            triton.cdiv(length, rows.BT) * batch * heads * slices,
            *(*epilogue, outputs, _by_head(rstd, norm), squares, eps, odd(length), odd(heads)),
            *(rows._replace(BV=config.BV).dims(call.dims), options),
            config=rows,
        )
    return out, y, rstd, state


def backward(
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
) -> tuple[Tensor, ...]:
    """The results of the operator ``linear_backward``."""
    call = _Call(q, k, v, g, cu_seqlens, feature_map, causal)
    dout = v.new_zeros(()).expand(v.shape) if dout is None else dout
    epilogue = _epilogue(v, norm_weight, gate)
    options = _norm(norm, False, norm_weight, gate, gate_activation)
    do, dweight, dgate = dout, q.new_empty(0), q.new_empty(0)
    if y is not None:
        do, dweight, dgate = call.cotangent(dout, y, norm_weight, gate, epilogue, options)
    row_scale = (_by_head(rstd, norm), scale)
    initial_state, dstate = (None if x is None else x.contiguous() for x in (initial_state, dstate))
    dinitial = q.new_empty(0) if initial_state is None else torch.empty_like(initial_state)

    by_keys, by_values = call.tiles("linear_backward_qk"), call.tiles("linear_backward_v")
    key_slices = triton.cdiv(call.dims.K, by_keys.BK)
    value_slices = triton.cdiv(call.dims.V, by_values.BV)
    walk = call.segments(q.shape[2] * min(key_slices, value_slices))
    finish = None if initial_state is None else dinitial
    starts = call.boundary(walk, k, v, initial_state, None)
    ends = call.boundary(walk, q, do, dstate, finish, row_scale)
    marked, marks = call.marks(walk, k, v, starts)
    dq, dk = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    dg = call.decay_gradient(g if need_dg else None, key_slices)
    programs = walk.segments(q.shape[0]) * q.shape[2]
    launch(
        linear_backward_qk_kernel,
        programs * key_slices,
        *(*call.inputs, _strided(do), row_scale[0], marks, ends),
        call.new_states(walk.segments(q.shape[0])) if causal else None,
        QueryKeyGradients(_strided(dq), _strided(dk), None if dg is None else _strided(dg)),
        *(walk, marked, scale, by_keys.dims(call.dims), call.kind),
        config=by_keys,
    )
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    queries, keys, _, decay = call.inputs
    launch(
        linear_backward_v_kernel,
        programs * value_slices,
        *(queries, keys, decay, _strided(do), row_scale[0], ends, _strided(dv)),
        finish if causal and walk.whole else None,
        *(walk, scale, by_values.dims(call.dims), call.kind),
        config=by_values,
    )
    if dg is None:
        dg = q.new_empty(0)
    elif g is not None and g.dim() == 1:  # one number per head: in float32 errors do not average
        dg = dg.sum((0, 1), dtype=torch.float64).to(g.dtype)
    elif g is not None and g.dim() == 3:
        dg = dg.view(g.shape[0], -1, *g.shape[1:]).sum(1).to(g.dtype)
    return dq, dk, dv, dg, dinitial, dweight, dgate


class _Call:
    """One call of the engine: what its kernels share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        cu_seqlens: Tensor | None,
        feature_map: str | None,
        causal: bool,
    ) -> None:
        self.q, self.cu_seqlens, self.value_dim = q, cu_seqlens, v.shape[3]
        self.count = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        if g is not None and g.dim() == 1:  # the same for every token
            g = g.expand(q.shape[:3])
        decay = None if g is None else "channel" if g.dim() == 4 else "token"
        self.kind = Kind(decay, feature_map, causal)
        self.g = None if g is None else _strided(g)
        self.inputs = (_strided(q), _strided(k), _strided(v), self.g)
        self.dims = Dims(q.shape[3], self.value_dim, 0, 0, 0, 0)

    def tiles(self, kernel: str) -> Tiles:
        """The tile sizes of ``kernel`` for this call."""
        return tiles(kernel, self.q.dtype, self.dims.K, self.dims.V)

    def segments(self, programs: int) -> Walk:
        """The segments of a kernel with so many ``programs`` for each sequence."""
        length = self.q.shape[1]
        tokens = length * self.q.shape[0]
        span = segment_length(self.count, tokens, programs, length)
        return Walk.of(self.q, self.cu_seqlens, span)

    def boundary(
        self,
        walk: Walk,
        k: Tensor,
        v: Tensor,
        start: Tensor | None,
        finish: Tensor | None,
        row_scale: tuple[Strided | None, float] | None = None,
    ) -> Tensor | None:
        """The states ``[segments, H, K, V]`` that segments start from; ``None`` for zeros.

        With ``row_scale``, of queries and cotangents: the cotangents at their ends. ``finish``
        receives the states behind the sequences, except if nothing had to be done for the others.
        Where every token sees all others, the result is what ``finish`` receives.
        """
        if walk.whole and self.kind.CAUSAL:
            return start
        if not self.kind.CAUSAL and finish is None:
            finish = self.new_states(self.count)
        if walk.whole:
            self.pass_over(walk, k, v, start, finish, row_scale)
            return finish
        decay, slots = self.kind.DECAY, walk.segments(self.q.shape[0])
        own, total = self.new_states(slots), None
        if decay is not None:
            shape = own.shape[:3] if decay == "channel" else own.shape[:2]
            total = own.new_empty(shape)
        self.pass_over(walk, k, v, None, own, row_scale, total=total)
        config = self.tiles("linear_states")
        launch(
            linear_scan_kernel,
            self.count * self.state_tiles(),
            *(own, total, start, finish, walk, config.dims(self.dims), decay),
            row_scale is not None,
            config=config,
        )
        return own if self.kind.CAUSAL else finish

    def marks(
        self, walk: Walk, k: Tensor, v: Tensor, starts: Tensor | None
    ) -> tuple[Walk, Tensor | None]:
        """States every ``STRIDE`` tokens, and the sequences cut there."""
        marked = Walk.of(self.q, self.cu_seqlens, STRIDE, find_owners=False)
        if marked.whole or not self.kind.CAUSAL:
            return marked, starts
        marks = self.new_states(marked.segments(self.q.shape[0]))
        self.pass_over(walk, k, v, starts, None, marked=marked, marks=marks)
        return marked, marks

    def pass_over(
        self,
        walk: Walk,
        k: Tensor,
        v: Tensor,
        start: Tensor | None,
        finish: Tensor | None,
        row_scale: tuple[Strided | None, float] | None = None,
        *,
        total: Tensor | None = None,
        marked: Walk | None = None,
        marks: Tensor | None = None,
    ) -> None:
        """The states of all segments, see :func:`linear_states_kernel`."""
        config = self.tiles("linear_states")
        rstd, scale = row_scale or (None, 1.0)
        launch(
            linear_states_kernel,
            walk.segments(self.q.shape[0]) * self.state_tiles(),
            *(_strided(k), _strided(v), self.g, rstd, start, finish, marks, total),
            *(walk, marked or walk, scale, config.dims(self.dims), self.kind),
            row_scale is not None,
            config=config,
        )

    def state_tiles(self) -> int:
        """Programs for all heads of a segment in passes over the state."""
        config, (key_dim, value_dim, *_) = self.tiles("linear_states"), self.dims
        return self.q.shape[2] * triton.cdiv(key_dim, config.BK) * triton.cdiv(value_dim, config.BV)

    def new_states(self, count: int) -> Tensor:
        """Uninitialised ``[count, H, K, V]``."""
        shape = (count, self.q.shape[2], self.dims.K, self.dims.V)
        return self.q.new_empty(shape, dtype=torch.float32)

    def decay_gradient(self, g: Tensor | None, slices: int) -> Tensor | None:
        """Where the log-decay's gradient goes: per token a part for every slice of the keys."""
        if g is None:
            return None
        if g.dim() == 4:
            return torch.empty_like(g, memory_format=torch.contiguous_format)
        batch, length, heads, _ = self.q.shape
        return self.q.new_empty(batch * slices, length, heads, dtype=torch.float32)

    def cotangent(
        self,
        dout: Tensor,
        y: Tensor,
        norm_weight: Tensor | None,
        gate: Tensor | None,
        epilogue: tuple[Strided | None, Strided | None],
        options: Norm,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The cotangent behind the norm, and the gradients of weight and gate."""
        batch, length, heads, value_dim = y.shape
        config = self.tiles("linear_cotangent")
        tiles = triton.cdiv(length, config.BT)
        do = torch.empty_like(y)
        dgate = None if gate is None else torch.empty_like(gate).contiguous()
        parts = None
        if norm_weight is not None:
            parts = y.new_empty(batch, tiles, heads, value_dim, dtype=torch.float32)
        launch(
            linear_cotangent_kernel,
            batch * tiles * (1 if options.KIND == "model" else heads),
            *(_strided(dout), _strided(y), *epilogue, _strided(do)),
            *(None if dgate is None else _strided(dgate), parts, odd(length), odd(heads)),
            *(config.dims(self.dims), options),
            config=config,
        )
        dweight = y.new_empty(0)
        if parts is not None and norm_weight is not None:
            over = (0, 1) if norm_weight.dim() == 2 else (0, 1, 2)
            dweight = parts.sum(over, dtype=torch.float64).to(norm_weight.dtype)
        return do, dweight, y.new_empty(0) if dgate is None else dgate


def _strided(x: Tensor) -> Strided:
    """``[B, T, H, D]`` or ``[B, T, H]``; Triton 3.6 does not hand on tuples with ``None``."""
    found = strided(x)
    return found if found.dim is not None else found._replace(dim=0)


def _norm(
    norm: str | None, deferred: bool, weight: Tensor | None, gate: Tensor | None, act: str | None
) -> Norm:
    kind = None if gate is None else "headwise" if gate.dim() == 3 else "elementwise"
    weighted = weight is not None
    act = None if gate is None else act
    return Norm(norm, deferred, act, kind, weighted, weighted or gate is not None)


def _epilogue(
    v: Tensor, norm_weight: Tensor | None, gate: Tensor | None
) -> tuple[Strided | None, Strided | None]:
    """Gate and weight."""
    return None if gate is None else _strided(gate), _weight(norm_weight, *v.shape[2:])


def _by_head(rstd: Tensor, norm: str | None) -> Strided | None:
    """``[B, T]`` or ``[B, T, H]`` as ``[B, T, H]``."""
    if norm is None:
        return None
    return Strided(rstd, *rstd.stride(), 0, 0) if norm == "model" else _strided(rstd)


def _weight(norm_weight: Tensor | None, heads: int, value_dim: int) -> Strided | None:
    """``[V]`` or ``[H, V]`` as ``[1, 1, H, V]``."""
    return None if norm_weight is None else _strided(norm_weight.expand(1, 1, heads, value_dim))
