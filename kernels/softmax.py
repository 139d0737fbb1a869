"""Launches of the softmax kernels, which serve gated_sdpa, ls_attention and diag_attention."""

from __future__ import annotations

from typing import Any

import torch
import triton
from attnvariants.kernels._configs import configure
from attnvariants.kernels._launch import launch, tile_dim
from attnvariants.kernels._schedule import Sizes, bands
from attnvariants.kernels._tiles import odd, strided
from attnvariants.kernels.softmax_backward import (
    softmax_backward_dkdv_kernel,
    softmax_backward_dq_kernel,
    softmax_backward_rows_kernel,
)
from attnvariants.kernels.softmax_forward import Dims, softmax_forward_kernel
from torch import Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    cu_seqlens: Tensor | None,
    windows: list[int],
    causal: bool,
    scale: float,
    activation: str | None,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the operator ``softmax_forward``."""
    return SoftmaxCall(q, k, v, cu_seqlens, windows, causal, scale).forward(gate, activation, stats)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    windows: list[int],
    causal: bool,
    scale: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the operator ``softmax_backward``."""
    call = SoftmaxCall(q, k, v, cu_seqlens, windows, causal, scale)
    dpre, delta, dgate = backward_rows(dout, dlse, gate, out, activation)
    gradients = call.backward(dpre, lse, delta, lse_grad=dlse is not None)
    return *gradients, q.new_empty(0) if dgate is None else dgate


class SoftmaxCall:
    """One call of the engine: what its kernels share."""

    def __init__(
        self,
        q: Tensor,  # [B, T, H, K]
        k: Tensor,  # [B, S, Hkv, K]
        v: Tensor,  # [B, S, Hkv, V]
        cu_seqlens: Tensor | None,
        windows: list[int],
        causal: bool,
        scale: float,
        block: int | None = None,  # tokens per block of block-diagonal attention
        relu: bool = False,
    ) -> None:
        # The kernels take the largest logit of a row before they scale it.
        self.sign = -1 if scale < 0 else 1
        self.q, self.k, self.v = q.neg() if scale < 0 else q, k, v
        self.scale, self.relu = abs(scale), relu
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.bands = bands(tuple(windows), causal, q.device)
        self.mixed = len(set(windows)) > 1
        self.block = None if block is None else min(block, q.shape[1])
        self.sizes = Sizes.of(q, k, cu_seqlens, self.block)
        self.group = q.shape[2] // k.shape[2]
        key_dim, value_dim = q.shape[3], v.shape[3]
        self.dims = Dims(key_dim, value_dim, tile_dim(key_dim), tile_dim(value_dim), self.group)

    def forward(
        self, gate: Tensor | None, activation: str | None, stats: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output ``[B, T, H, V]``, log-sum-exp ``[B, T, H]`` and largest logits ``[H]``."""
        batch, length, heads, _ = self.q.shape
        out = self.v.new_empty(batch, length, heads, self.v.shape[3])
        lse = _row_statistics(self.q, 0 if self.relu else length)
        config, sizes, programs = self.plan("softmax_forward", over_keys=False)
        largest = None
        if stats:
            largest = lse.new_empty(sizes.tiles >> 1, batch, heads)
        launch(
            softmax_forward_kernel,
            programs,
            *(strided(self.q), strided(self.k), strided(self.v)),
            None if gate is None else strided(gate),
            strided(out),
            None if self.relu else lse,
            largest,
            *(self.bands, self.cu_seqlens, sizes, self.scale, self.dims, config),
            activation,
            like=self.q,
            config=config,
        )
        max_logit = lse.new_empty(0) if largest is None else largest.amax((0, 1))
        return out, lse.transpose(1, 2), max_logit

    def backward(
        self, dpre: Tensor, lse: Tensor | None, delta: Tensor | None, lse_grad: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v from that of the output before the gate, contiguous.

        With ``lse_grad`` a gradient of the log-sum-exp is part of ``delta``.
        """
        dq, dk, dv = (x.new_empty(x.shape) for x in (self.q, self.k, self.v))
        statistics = (None if lse is None else lse.transpose(1, 2).contiguous(), delta)
        inputs = [strided(x) for x in (self.q, self.k, self.v, dpre)]
        config, sizes, programs = self.plan("softmax_backward_dkdv", over_keys=True)
        launch(
            softmax_backward_dkdv_kernel,
            programs,
            *(*inputs, *statistics, strided(dk), strided(dv), self.bands, self.cu_seqlens),
            *(sizes, self.scale, self.dims, config, lse_grad),
            like=dk,
            config=config,
        )
        config, sizes, programs = self.plan("softmax_backward_dq", over_keys=False)
        launch(
            softmax_backward_dq_kernel,
            programs,
            *(*inputs, *statistics, strided(dq), self.bands, self.cu_seqlens),
            *(sizes, self.scale, self.dims, config, lse_grad),
            like=dq,
            config=config,
        )
        return dq.mul_(self.sign) if self.sign < 0 else dq, dk, dv

    def plan(self, kernel: str, *, over_keys: bool) -> tuple[Any, Sizes, int]:
        """The configuration of a kernel, its sizes and how many programs it takes."""
        config = configure(kernel, self.q.element_size(), max(self.dims.BK, self.dims.BV))
        if self.block is not None:  # tiles of small blocks need not be larger than these
            widest = tile_dim(self.block)
            config = config._replace(BT=min(config.BT, widest), BS=min(config.BS, widest))
        along, heads = (self.k, self.k.shape[2]) if over_keys else (self.q, self.q.shape[2])
        rows = config.BS if over_keys else config.BT
        batch, length = along.shape[:2]
        size = self.q.element_size() * (self.q.shape[3] + self.v.shape[3])
        # What the programs of one head walk over; query heads of a group share their keys.
        walked = self.q.shape[1] * self.group if over_keys else -(-self.k.shape[1] // self.group)
        sizes = self.sizes.tiled(length, batch * heads, walked * size, self.mixed, rows)
        return config, sizes, (sizes.tiles >> 1) * batch * heads


def backward_rows(
    dout: Tensor,
    dlse: Tensor | None,
    gate: Tensor | None,
    out: Tensor,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient before the gate, D ``[B, H, T]`` and the gradient of the gate."""
    batch, length, heads, value_dim = out.shape
    delta = _row_statistics(out, length)
    dpre = dout if gate is None else out.new_empty(out.shape)
    dgate = None if gate is None else gate.new_empty(gate.shape)
    wide = tile_dim(value_dim)
    config = configure("softmax_backward_rows", out.element_size(), wide)
    launch(
        softmax_backward_rows_kernel,
        triton.cdiv(length, config.BT) * batch * heads,
        strided(dout),
        None if dlse is None else strided(dlse[..., None]),  # without None: Triton 3.6
        None if gate is None else strided(gate),
        strided(out),
        None if gate is None else strided(dpre),
        None if dgate is None else strided(dgate),
        *(delta, odd(length), odd(heads), value_dim, wide, config.BT, activation),
        like=out,
        config=config,
    )
    return dpre, delta, dgate


def _row_statistics(like: Tensor, length: int) -> Tensor:
    """Uninitialised ``[B, H, length]`` in float32: rows of a tile lie side by side."""
    return like.new_empty(like.shape[0], like.shape[2], length, dtype=torch.float32)
