"""One call of a public function, by its shapes and options: what is verified and what is timed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SOFTMAX = frozenset({"gated_sdpa", "ls_attention", "diag_attention", "attention_decode"})
DECODE = frozenset({"attention_decode", "linear_attention_decode"})

FORWARD, TRAINING, DECODING = "forward", "forward+backward", "decode"
MODES = (FORWARD, TRAINING, DECODING)

# Log-decays: what a trained gate gives, resets of nearly everything, none, and exact resets.
DECAYS = ("mild", "strong", "zero", "reset")


@dataclass(frozen=True)
class Case:
    """One call of a public function.

    Letters as in the package: ``batch`` B, ``length`` T, ``key_length`` S, ``heads`` H,
    ``kv_heads`` Hkv, ``key_dim`` K, ``value_dim`` V. A decode case processes ``length`` new
    tokens behind ``key_length - length`` cached ones, in calls of ``steps`` tokens.
    """

    function: str
    name: str
    batch: int = 1
    length: int = 64
    key_length: int | None = None  # None: length
    heads: int = 2
    kv_heads: int | None = None  # None: heads
    key_dim: int = 16
    value_dim: int | None = None  # None: key_dim
    gate: str | None = None  # "elementwise" or "headwise"
    g: str | None = None  # log-decay per "channel", "token" or "head"; "decay" for the norm variant
    decays: str = "mild"  # one of DECAYS
    initial_state: bool = False
    norm_weight: str | None = None  # "head" [H, V] or "shared" [V]
    sequences: tuple[int, ...] = ()  # lengths of packed sequences; they add up to length
    steps: tuple[int, ...] = ()
    spread: float = 1.0  # standard deviation of q: larger means larger logits
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> int:
        return self.key_length or self.length

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def values(self) -> int:
        return self.value_dim or self.key_dim

    @property
    def causal(self) -> bool:
        return bool(self.options.get("causal", True))

    @property
    def windows(self) -> list[int | None]:
        """The window of each KV head."""
        window = self.options.get("window")
        if window is None or isinstance(window, int):
            return [window] * self.key_heads
        return list(window)

    @property
    def shape(self) -> dict[str, Any]:
        """The sizes by their letters, for tables and JSON."""
        sizes: dict[str, Any] = {
            "B": self.batch,
            "T": self.length,
            "S": self.keys,
            "H": self.heads,
            "Hkv": self.key_heads,
            "K": self.key_dim,
            "V": self.values,
        }
        if self.options.get("window") is not None:
            sizes["window"] = self.options["window"]
        if "block_size" in self.options:
            sizes["block_size"] = self.options["block_size"]
        return sizes

    def tensors(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Random arguments by name. Log-decays and states stay float32 or wider."""
        draw = _Draw(dtype, torch.device(device), seed)
        batch, length, heads, values = self.batch, self.length, self.heads, self.values
        found = {
            "q": draw.normal(batch, length, heads, self.key_dim, spread=self.spread),
            "k": draw.normal(batch, self.keys, self.key_heads, self.key_dim),
            "v": draw.normal(batch, self.keys, self.key_heads, values),
        }
        if self.g is not None:
            name = "decay" if self.function == "norm_linear_attention" else "g"
            found[name] = draw.log_decay(self._g_shape(), self.decays)
        if self.gate is not None:
            channels = (values,) if self.gate == "elementwise" else ()
            found["gate"] = draw.normal(batch, length, heads, *channels)
        if self.norm_weight is not None:
            rows = (heads,) if self.norm_weight == "head" else ()
            found["norm_weight"] = 1 + 0.2 * draw.normal(*rows, values)
        if self.initial_state:
            count = len(self.sequences) or batch
            found["initial_state"] = draw.normal(count, heads, self.key_dim, values, wide=True)
        if self.sequences:
            ends = torch.tensor((0, *self.sequences)).cumsum(0)
            found["cu_seqlens"] = ends.to(device=device, dtype=torch.int32)
        return found

    def _g_shape(self) -> tuple[int, ...]:
        if self.g == "head":
            return (self.heads,)
        shape = (self.batch, self.length, self.heads)
        return (*shape, self.key_dim) if self.g == "channel" else shape


class _Draw:
    """Random tensors of one seed."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype = dtype
        self.device = device
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, spread: float = 1.0, wide: bool = False) -> Tensor:
        sample = torch.randn(
            shape, generator=self.generator, device=self.device, dtype=torch.float32
        )
        return (sample * spread).to(self.wide if wide else self.dtype)

    def log_decay(self, shape: tuple[int, ...], kind: str) -> Tensor:
        if len(shape) == 1:  # constant per head, slower and slower (RetNet's)
            per_head = torch.arange(shape[0], device=self.device, dtype=torch.float64)
            return torch.log1p(-torch.exp2(-3 - per_head % 8)).to(self.wide)
        if kind == "zero":
            return torch.zeros(shape, dtype=self.wide, device=self.device)
        if kind == "strong":
            return -30 * self.normal(*shape, wide=True).abs()
        g = torch.nn.functional.logsigmoid(self.normal(*shape, wide=True)) / 16
        if kind == "reset":
            hit = torch.rand(shape, generator=self.generator, device=self.device) < 0.05
            g = g.masked_fill(hit, -math.inf)
        return g
