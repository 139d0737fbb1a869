"""Launches of the linear kernels, behind both linear attentions."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from attnvariants.kernels._launch import launch, tile_dim
from attnvariants.kernels._linear_configs import Tiles, segment_length, tiles
from attnvariants.kernels._tiles import Strided, odd, strided
from attnvariants.kernels._walk import Dims, Walk
from attnvariants.kernels.linear_forward import (
    Epilogue,
    Norm,
    Outputs,
    linear_forward_kernel,
    linear_norm_kernel,
)
from attnvariants.kernels.linear_states import Kind, linear_scan_kernel, linear_states_kernel


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
    batch, length, heads, value_dim = v.shape
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    scaled = gate is not None or norm_weight is not None
    y = torch.empty_like(out) if scaled else v.new_empty(0)
    shapes = {"model": (batch, length), "head": (batch, length, heads), None: (0,)}
    rstd = v.new_empty(shapes[norm], dtype=torch.float32)
    state = v.new_empty(call.count, heads, q.shape[3], value_dim, dtype=torch.float32)

    config = call.tiles("linear_forward")
    walk = call.segments(heads * triton.cdiv(value_dim, config.BV))
    start, finish = initial_state, state
    if not (causal and walk.whole):
        start = call.states(walk, k, v, initial_state, state)
        start, finish = (start if causal else state), None
    slices = triton.cdiv(value_dim, config.BV)
    deferred = norm == "model" or (norm == "head" and slices > 1)
    squares = None
    if deferred:
        squares = v.new_empty(batch, length, heads, slices, dtype=torch.float32)
    outputs = Outputs(strided(out), strided(y) if scaled else None, _by_head(rstd, norm), squares)
    epilogue = Epilogue(
        None if gate is None else strided(gate), _weight(norm_weight, heads, value_dim), eps
    )
    options = Norm(norm, deferred, None if gate is None else gate_activation)
    launch(
        linear_forward_kernel,
        walk.segments(batch) * heads * slices,
        *call.inputs,
        *(start, finish, epilogue, outputs, walk, scale),
        *(config.dims(call.dims), call.kind, options),
        like=q,
        config=config,
    )
    if deferred:
        rows = call.tiles("linear_norm")
        launch(
            linear_norm_kernel,
            triton.cdiv(length, rows.BT) * batch * heads * slices,
            *(epilogue, outputs, odd(length), odd(heads)),
            *(rows._replace(BV=config.BV).dims(call.dims), options),
            like=q,
            config=rows,
        )
    return out, y, rstd, state


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
        self.g = None if g is None else strided(g)
        self.inputs = (strided(q), strided(k), strided(v), self.g)
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

    def states(
        self,
        walk: Walk,
        k: Tensor,
        v: Tensor,
        start: Tensor | None,
        finish: Tensor | None,
        *,
        rstd: Strided | None = None,
        scale: float = 1.0,
        backward: bool = False,
    ) -> Tensor | None:
        """The states that the segments start from (or that arrive at their ends, ``backward``).

        ``finish`` receives the states behind the sequences. Whole sequences need one pass only.
        """
        config = self.tiles("linear_states")
        dims = config.dims(self.dims)
        heads = self.q.shape[2]
        programs = heads * triton.cdiv(dims.K, dims.BK) * triton.cdiv(dims.V, dims.BV)
        decay = self.kind.DECAY
        batch = self.q.shape[0]
        own, total = None, None
        if not walk.whole:
            slots = walk.segments(batch)
            own = self.q.new_empty(slots, heads, dims.K, dims.V, dtype=torch.float32)
            if decay is not None:
                shape = (slots, heads, dims.K) if decay == "channel" else (slots, heads)
                total = self.q.new_empty(shape, dtype=torch.float32)
        whole = (start, finish) if walk.whole else (None, own)
        launch(
            linear_states_kernel,
            walk.segments(batch) * programs,
            *(strided(k), strided(v), self.g, rstd, *whole, None, total, walk, walk, scale),
            *(dims, self.kind, backward),
            like=self.q,
            config=config,
        )
        if walk.whole:
            return start
        launch(
            linear_scan_kernel,
            self.count * programs,
            *(own, total, start, finish, walk, dims, decay, backward),
            like=self.q,
            config=config,
        )
        return own


def _by_head(rstd: Tensor, norm: str | None) -> Strided | None:
    """``[B, T]`` or ``[B, T, H]`` as ``[B, T, H]``."""
    if norm is None:
        return None
    return Strided(rstd, *rstd.stride(), 0, None) if norm == "model" else strided(rstd)


def _weight(norm_weight: Tensor | None, heads: int, value_dim: int) -> Strided | None:
    """``[V]`` or ``[H, V]`` as ``[1, 1, H, V]``."""
    return None if norm_weight is None else strided(norm_weight.expand(1, 1, heads, value_dim))
