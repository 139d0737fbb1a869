"""What all layers share: the call, padding, caches, telemetry and the RMS norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnvariants import _checks
from attnvariants._types import Window
from attnvariants.kv_cache import KVCache
from attnvariants.ops.attention_decode import MAX_STEPS
from attnvariants.recurrent_state import RecurrentState

Cache = KVCache | RecurrentState
C = TypeVar("C", KVCache, RecurrentState)


class AttentionLayer(nn.Module):
    """Base of all layers: checks the call, removes padding, and reports logits to a monitor.

    A subclass implements ``_attend`` for tokens without padding, and calls its attention function
    through ``_call``.

    Attributes:
        logit_kind: what the layer's maxima are, ``"softmax_logit"`` or ``"linear_score"``.
    """

    logit_kind = "softmax_logit"
    q_proj: nn.Linear
    _shown: tuple[str, ...] = ("embed_dim", "num_heads", "num_kv_heads", "head_dim")

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None
    ) -> None:
        super().__init__()
        name = type(self).__name__
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _checks.positive_int(name, "embed_dim", embed_dim)
        _checks.positive_int(name, "num_heads", num_heads)
        _checks.positive_int(name, "num_kv_heads", num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"{name}: num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}"
            )
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"{name}: embed_dim={embed_dim} must be a multiple of num_heads={num_heads} "
                    f"where head_dim is not given"
                )
            head_dim = embed_dim // num_heads
        _checks.head_dim(name, "head_dim", head_dim)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self._running_max: Tensor | None = None  # fp32 [H], lent by a LogitMonitor

    @property
    def head_groups(self) -> list[str]:
        """``"local"`` or ``"global"`` for each query head."""
        return ["global"] * self.num_heads

    def forward(
        self,
        x: Tensor,
        *,
        cache: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention over ``x``.

        Args:
            x: ``[B, T, C]``.
            cache: from ``init_cache``. While it is empty the call is a prefill; later calls
                continue behind the tokens it holds, one or several at a time.
            cu_seqlens: int32 ``[N + 1]``: bounds of ``N`` independent sequences packed along
                ``T`` (``B == 1``).
            padding_mask: bool ``[B, T]``, true for real tokens, wherever they stand. Padding
                changes nothing, counts as no position and comes out as 0. (The host waits for
                it; ``cu_seqlens`` and no argument at all keep the call one graph.)

        Returns:
            ``y`` ``[B, T, C]``.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: a shape or dtype does not fit, or arguments exclude each other.
        """
        self._check_call(x, cache, cu_seqlens, padding_mask)
        if padding_mask is None:
            return self._attend(x, cache, cu_seqlens)
        counts = padding_mask.sum(dim=1)
        cu_seqlens = F.pad(counts.cumsum(0), (1, 0)).int()
        real = padding_mask.flatten().nonzero()[:, 0]
        if real.numel() == 0:
            return torch.zeros_like(x)
        y = self._attend(x.flatten(0, 1).index_select(0, real)[None], cache, cu_seqlens)
        padded = y.new_zeros(padding_mask.numel(), self.embed_dim).index_copy(0, real, y[0])
        return padded.view(x.shape)

    def reset_parameters(self) -> None:
        """Draws all parameters again: ``nn.Linear``'s default, ones for norms."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._shown)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_running_max": None}  # copies are not watched

    def _attend(self, x: Tensor, cache: Any, cu_seqlens: Tensor | None) -> Tensor:
        """The layer on ``x`` without padding, ``[B, T, C]`` or packed ``[1, total, C]``."""
        raise NotImplementedError

    def _check_cache(self, cache: Any) -> dict[str, tuple[Any, Any]]:
        """Checks the kind of ``cache``; returns what it has and what it should have, by name."""
        raise NotImplementedError

    def _check_call(
        self, x: Tensor, cache: Any, cu_seqlens: Tensor | None, padding_mask: Tensor | None
    ) -> None:
        name = type(self).__name__
        shapes = _checks.Shapes(name)
        shapes.sizes["C"] = self.embed_dim
        shapes.bind("x", x, "B T C")
        shapes.at_least_one("B", "T")
        dtype = self.q_proj.weight.dtype
        if dtype in _checks.FLOAT_DTYPES and not _checks.autocasting(x.device):
            _checks.dtype_among(name, "x", x, [dtype])  # a quantised layer takes what it takes
        if padding_mask is not None:
            if cu_seqlens is not None:
                raise ValueError(f"{name}: padding_mask and cu_seqlens exclude each other")
            shapes.bind("padding_mask", padding_mask, "B T")
            _checks.dtype_among(name, "padding_mask", padding_mask, [torch.bool])
        _checks.cu_seqlens(name, cu_seqlens, shapes["B"], shapes["T"])
        _checks.same_device(name, x=x, cu_seqlens=cu_seqlens, padding_mask=padding_mask)
        if cache is None:
            return
        rows = shapes["B"] if cu_seqlens is None else cu_seqlens.numel() - 1
        for what, (found, expected) in self._check_cache(cache).items():
            if found != expected:
                raise ValueError(
                    f"{name}: cache has {what} {found}, this layer takes {expected} "
                    f"(make caches with init_cache)"
                )
        _checks.same_device(name, x=x, cache=cache.lengths)
        if cache.batch_size != rows:
            raise ValueError(f"{name}: cache has batch_size {cache.batch_size}, x has {rows} rows")
        if cache.max_filled and (padding_mask is not None or cu_seqlens is not None):
            raise ValueError(
                f"{name}: padding_mask and cu_seqlens take an empty cache; later steps give every "
                f"row the same number of tokens"
            )

    def _call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Calls an attention function; where a monitor watches, also for its statistics."""
        if self._running_max is None:
            return function(*args, **options)
        *results, stats = function(*args, **options, return_stats=True)
        self._record(stats.max_logit)
        return results[0] if len(results) == 1 else tuple(results)

    def _record(self, max_logit: Tensor) -> None:
        """Folds ``max_logit [H]`` into the running maximum, in place and on the device."""
        if self._running_max is not None:
            with torch.no_grad():
                new = max_logit.to(self._running_max)
                self._running_max.copy_(torch.maximum(self._running_max, new))


class KeyValueLayer(AttentionLayer):
    """A layer whose cache holds keys and values."""

    window: Window = None  # visible keys of each KV head
    k_proj: nn.Linear

    def init_cache(
        self, batch_size: int, max_length: int, *, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache for ``batch_size`` rows of up to ``max_length`` tokens.

        ``dtype`` is that of the stored keys and values; ``None`` is the layer's own.
        """
        weight = self.k_proj.weight
        return KVCache(
            batch_size,
            max_length,
            self.num_kv_heads,
            self.head_dim,
            self.head_dim,
            window=self.window,
            dtype=weight.dtype if dtype is None else dtype,
            device=weight.device,
        )

    def _check_cache(self, cache: Any) -> dict[str, tuple[Any, Any]]:
        name = type(self).__name__
        if not isinstance(cache, KVCache):
            raise TypeError(f"{name}: cache must be a KVCache, got {type(cache).__name__}")
        windows = _checks.windows(name, self.window, self.num_kv_heads)
        return {
            "num_kv_heads": (cache.num_kv_heads, self.num_kv_heads),
            "key_dim": (cache.key_dim, self.head_dim),
            "value_dim": (cache.value_dim, self.head_dim),
            "windows": (cache.windows, windows),
        }

    def _append(self, cache: KVCache, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
        """Stores keys and values in the cache's own dtype, whatever autocast says."""
        with torch.autocast(k.device.type, enabled=False):
            cache.append(k.to(cache.dtype), v.to(cache.dtype), cu_seqlens)


class RecurrentLayer(AttentionLayer):
    """A linear layer: its cache is one state matrix per head."""

    logit_kind = "linear_score"
    key_dim: int
    value_dim: int

    def init_cache(
        self, batch_size: int, max_length: int, *, dtype: torch.dtype | None = None
    ) -> RecurrentState:
        """An empty state for ``batch_size`` rows; its size does not depend on ``max_length``.

        ``dtype`` is float32 (float64 for a float64 layer), whatever the layer's own; bfloat16 has
        to be asked for, see :class:`~attnvariants.RecurrentState`.
        """
        _checks.positive_int(f"{type(self).__name__}.init_cache", "max_length", max_length)
        weight = self.q_proj.weight
        return RecurrentState(
            batch_size,
            self.num_heads,
            self.key_dim,
            self.value_dim,
            dtype=_checks.state_dtype(weight.dtype) if dtype is None else dtype,
            device=weight.device,
        )

    def _check_cache(self, cache: Any) -> dict[str, tuple[Any, Any]]:
        if not isinstance(cache, RecurrentState):
            raise TypeError(
                f"{type(self).__name__}: cache must be a RecurrentState, got {type(cache).__name__}"
            )
        return {
            "num_heads": (cache.num_heads, self.num_heads),
            "key_dim": (cache.key_dim, self.key_dim),
            "value_dim": (cache.value_dim, self.value_dim),
        }

    def _recur(
        self,
        full: Callable[..., Any],
        step: Callable[..., Any],
        length: int,
        cache: RecurrentState | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """``full`` over whole sequences and long continuations, ``step`` for a few new tokens.

        A step sees the state only and not the earlier keys, so it has no scores to report.
        """
        if cache is None:
            return self._call(full, cu_seqlens=cu_seqlens)
        past = filled(cache)
        if past is not None and length <= MAX_STEPS:
            return step(state=past)
        start = None if past is None else widen(past.state.clone())
        out, state = self._call(full, cu_seqlens=cu_seqlens, initial_state=start, return_state=True)
        cache.update(state, length, cu_seqlens)
        return out


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` in float32 with one rounding, also where autocast mixes dtypes."""

    def forward(self, x: Tensor) -> Tensor:
        wide = F.rms_norm(widen(x), self.normalized_shape, widen(self.weight), self.eps)
        return wide.to(x.dtype)


def filled(cache: C | None) -> C | None:
    """``cache`` where it holds earlier tokens, else ``None``."""
    return cache if cache is not None and cache.max_filled > 0 else None


def positive(layer: str, option: str, value: Any, *, or_zero: bool = False) -> float:
    """Requires a finite number above 0 (or 0 itself) and returns it as a float."""
    number = _checks.scale(layer, option, value, -1.0)
    if number < 0 or (number == 0 and not or_zero):
        accepted = "at least 0" if or_zero else "positive"
        raise ValueError(f"{layer}: {option} must be {accepted}, got {value!r}")
    return number


def widen(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 where it is."""
    return x.to(_checks.state_dtype(x.dtype))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, T, heads * D]`` as ``[B, T, heads, D]``."""
    return x.unflatten(-1, (heads, -1))


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """``[B, T, Hkv, D]`` to ``[B, T, Hkv * groups, D]``: neighbouring heads share one KV head."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=2)
