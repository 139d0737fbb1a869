"""The tensors of a linear attention by token, ``[B * T, H, D]``, read and written in ranges."""

from __future__ import annotations

import torch
from torch import Tensor

from attnvariants._checks import sequence_bounds
from attnvariants.eager._epilogue import FEATURE_MAPS, IDENTITY, Epilogue


class Inputs:
    """Reads ranges of the inputs in the working precision ``wide``, float32 or float64.

    Attributes:
        bounds: of the sequences among the rows.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        cu_seqlens: Tensor | None,
        feature_map: str | None,
        wide: torch.dtype,
    ) -> None:
        batch, length, self.heads, self.key_dim = q.shape
        self.count, self.value_dim = batch * length, v.shape[-1]
        self.wide, self.device = wide, q.device
        self.q, self.k, self.v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        self.g = None if g is None else self._by_row(g)
        self.constant_decay = g is not None and g.dim() == 1
        self.features = FEATURE_MAPS[feature_map]
        self.bounds = list(range(0, self.count + 1, length))
        if cu_seqlens is not None:
            self.bounds = sequence_bounds("linear attention", cu_seqlens, length)

    def _by_row(self, g: Tensor) -> Tensor:
        """A log-decay of any shape as ``[B * T, H, K]`` or ``[B * T, H, 1]``."""
        if g.dim() == 1:
            return g.expand(self.count, self.heads).unsqueeze(-1)
        return g.flatten(0, 1) if g.dim() == 4 else g.flatten(0, 1).unsqueeze(-1)

    def queries(self, rows: slice) -> Tensor:
        """``phi(q) [rows, H, K]``."""
        return self.features.value(self.q[rows].to(self.wide))

    def keys(self, rows: slice) -> Tensor:
        """``phi(k) [rows, H, K]``."""
        return self.features.value(self.k[rows].to(self.wide))

    def values(self, rows: slice) -> Tensor:
        """``v [rows, H, V]``."""
        return self.v[rows].to(self.wide)

    def log_decays(self, rows: slice) -> Tensor | None:
        """``g [rows, H, K]`` or ``[rows, H, 1]``."""
        return None if self.g is None else self.g[rows].to(self.wide)

    def states(self, initial: Tensor | None) -> Tensor:
        """A copy of ``initial``, or zeros, ``[N, H, K, V]``."""
        if initial is not None:
            return torch.empty(initial.shape, dtype=self.wide, device=self.device).copy_(initial)
        shape = (len(self.bounds) - 1, self.heads, self.key_dim, self.value_dim)
        return torch.zeros(shape, dtype=self.wide, device=self.device)


class Outputs:
    """The results of the forward."""

    def __init__(
        self, inputs: Inputs, v: Tensor, gate: Tensor | None, epilogue: Epilogue, scale: float
    ) -> None:
        self.wide, self.epilogue, self.scale = inputs.wide, epilogue, scale
        self.gate = None if gate is None else gate.flatten(0, 1)
        scaled = gate is not None or epilogue.norm_weight is not None
        batch, length, heads, _ = v.shape
        rstd = {"model": (batch, length), "head": (batch, length, heads), None: (0,)}
        self.out = v.new_empty(v.shape)
        self.y = v.new_empty(v.shape if scaled else (0,))  # without weight and gate it is out
        self.rstd = v.new_empty(rstd[epilogue.norm], dtype=inputs.wide)

    def write(self, rows: slice, o: Tensor) -> None:
        """Scales, normalises and gates ``o [rows, H, V]``."""
        gate = None if self.gate is None else self.gate[rows].to(self.wide)
        out, y, rstd = self.epilogue.forward(o if self.scale == 1 else o * self.scale, gate)
        self.out.flatten(0, 1)[rows] = out
        if self.y.numel():
            self.y.flatten(0, 1)[rows] = y
        if rstd is not None:
            _per_row(self.rstd, self.out)[rows] = rstd


class Gradients:
    """The results of the backward, and the cotangents that it starts from.

    With ``y = r o`` behind the norm, the attention's own backward runs on the queries ``r q`` and
    the cotangent ``dy - mean(dy y) y``, and the rows of its ``dq`` are multiplied by r.
    """

    def __init__(
        self,
        inputs: Inputs,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
        dout: Tensor,
        y: Tensor | None,
        rstd: Tensor,
        epilogue: Epilogue,
        scale: float,
    ) -> None:
        q, k, v, g, norm_weight, gate = tensors
        self.inputs, self.epilogue = inputs, epilogue
        self.dout, self.y = dout.flatten(0, 1), None if y is None else y.flatten(0, 1)
        self.gate = None if gate is None else gate.flatten(0, 1)
        self.scale = scale if epilogue.norm is None else scale * _per_row(rstd.to(inputs.wide), v)
        self.dq, self.dk, self.dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        self.dgate = q.new_empty(0) if gate is None else gate.new_empty(gate.shape)
        self.dg = q.new_empty(0) if g is None else g.new_empty(g.shape)
        # Sums over all tokens, in float64: they are few numbers, and errors do not average out.
        weight = q.new_empty(0) if norm_weight is None else norm_weight
        self.weight_dtype = weight.dtype
        self.weight_sum = torch.zeros_like(weight, dtype=torch.float64)
        self.constant_sum = q.new_zeros(inputs.heads, dtype=torch.float64)

    def row_scale(self, rows: slice) -> Tensor | float:
        """What multiplies the queries, ``scale * r``."""
        return self.scale if isinstance(self.scale, float) else self.scale[rows]

    def cotangent(self, rows: slice, record: bool = True) -> Tensor:
        """The cotangent behind the norm, ``[rows, H, V]``; records those of weight and gate."""
        wide = self.inputs.wide
        y = None if self.y is None else self.y[rows].to(wide)
        gate = None if self.gate is None else self.gate[rows].to(wide)
        do, dweight, dgate = self.epilogue.backward(self.dout[rows].to(wide), y, gate)
        if record and dweight is not None:
            self.weight_sum += dweight
        if record and dgate is not None:
            self.dgate.flatten(0, 1)[rows] = dgate
        return do

    def write(self, rows: slice, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Takes over gradients of the mapped, scaled queries, the mapped keys and the values."""
        inputs = self.inputs
        dq = dq * self.row_scale(rows)
        if inputs.features is not IDENTITY:
            dq = dq * inputs.features.gradient(inputs.q[rows].to(inputs.wide))
            dk = dk * inputs.features.gradient(inputs.k[rows].to(inputs.wide))
        self.dq.flatten(0, 1)[rows] = dq
        self.dk.flatten(0, 1)[rows] = dk
        self.dv.flatten(0, 1)[rows] = dv

    def write_decay(self, rows: slice, dg: Tensor) -> None:
        """Takes over the gradient of the log-decay, ``[rows, H, K]`` or ``[rows, H, 1]``."""
        if self.dg.dim() == 1:
            self.constant_sum += dg.squeeze(-1).sum(0, dtype=torch.float64)
        else:
            self.dg.flatten(0, 1)[rows] = dg if self.dg.dim() == 4 else dg.squeeze(-1)

    def sums(self) -> tuple[Tensor, Tensor]:
        """The gradients of log-decay and weight, when all rows are written."""
        if self.dg.dim() == 1 and self.dg.numel():
            self.dg.copy_(self.constant_sum)
        return self.dg, self.weight_sum.to(self.weight_dtype)


def _per_row(rstd: Tensor, like: Tensor) -> Tensor:
    """``[B, T]`` or ``[B, T, H]`` as ``[B * T, 1 or H, 1]``."""
    return rstd.view(like.shape[0] * like.shape[1], -1, 1)
