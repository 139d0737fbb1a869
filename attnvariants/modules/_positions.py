"""Positions of tokens, rotary embedding (RoPE) and its learned relative (LRPE)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnvariants._checks import state_dtype
from attnvariants.modules._common import Cache, widen


def token_positions(x: Tensor, past: Cache | None, cu_seqlens: Tensor | None) -> Tensor:
    """Positions of the tokens of ``x [B, T, C]``: ``[T]``, or ``[B, T]`` behind a filled cache.

    They restart with every packed sequence. Nothing is read by the host.
    """
    index = torch.arange(x.shape[1], device=x.device, dtype=torch.int32)
    if past is not None:
        return past.lengths[:, None] + index
    if cu_seqlens is None:
        return index
    sequence = torch.bucketize(index, cu_seqlens[1:], right=True)
    return index - cu_seqlens[sequence]


def rope_frequencies(base: float, head_dim: int, like: Tensor) -> Tensor:
    """``base ** (-2 i / head_dim)`` for each pair of channels, ``[head_dim / 2]``."""
    even = torch.arange(0, head_dim, 2, device=like.device, dtype=state_dtype(like.dtype))
    return base ** (-even / head_dim)


def angles_of(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position times frequency, ``[(B,) T, 1, frequencies]``."""
    angles = positions[..., None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates channel ``i`` of ``x [B, T, H, D]`` with channel ``i + D / 2`` ("rotate half").

    This is the pairing of Llama and of Hugging Face; computed in float32, rounded once.
    """
    cos, sin = angles
    first, second = widen(x).chunk(2, dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(rotated, dim=-1).to(x.dtype)


class LRPE(nn.Module):
    """Linearised relative positional encoding with learned angles, shared by all heads.

    ``"reflect"`` (transNormer): a fixed random Householder reflection ``x - 2 (x.v) v``, then a
    rotation of channel pairs by ``position * theta``, theta ``[D / 2]``. ``"concat"``
    (TransNormerLLM): ``[x cos(position * theta), x sin(position * theta)]``, theta ``[D]``, which
    doubles the head dim. Both make ``q.k`` a function of the distance.
    """

    def __init__(
        self,
        form: str,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if form == "reflect" and head_dim % 2:
            raise ValueError(
                f"LRPE turns pairs of channels and takes an even head_dim, got {head_dim}"
            )
        self.form = form
        self.head_dim = head_dim
        count = head_dim if form == "concat" else head_dim // 2
        self.theta = nn.Parameter(torch.empty(count, device=device, dtype=dtype))
        reflection = torch.empty(head_dim, device=device, dtype=dtype)
        self.register_buffer("reflection", reflection if form == "reflect" else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """RoPE's frequencies for ``theta``; a random direction for the reflection."""
        with torch.no_grad():
            exponents = torch.arange(self.theta.numel(), device=self.theta.device)
            self.theta.copy_(10000.0 ** (-exponents / self.theta.numel()))
            if isinstance(self.reflection, Tensor):
                nn.init.normal_(self.reflection)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x [B, T, H, D]`` at ``positions``, in ``x``'s dtype."""
        wide = widen(x)
        cos, sin = angles_of(positions, widen(self.theta))
        if not isinstance(self.reflection, Tensor):
            return torch.cat([wide * cos, wide * sin], dim=-1).to(x.dtype)
        v = nn.functional.normalize(widen(self.reflection), dim=0)
        reflected = wide - 2 * (wide * v).sum(dim=-1, keepdim=True) * v
        return rotate(reflected, (cos, sin)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.form!r}, head_dim={self.head_dim}"
