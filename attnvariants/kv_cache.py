"""Key/value cache of softmax attention: global heads at full length, local heads as rings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnvariants import _checks, _counters
from attnvariants._types import Window


class HeadRun(NamedTuple):
    """Neighbouring KV heads of equal capacity: one rectangular block of a cache buffer."""

    heads: slice
    slots: slice
    capacity: int

    def view(self, buffer: Tensor) -> Tensor:
        """The run's part of ``buffer [B, slots, D]`` as ``[B, heads, capacity, D]``, not a copy."""
        return buffer[:, self.slots].unflatten(1, (-1, self.capacity))


def head_runs(capacities: Sequence[int]) -> list[HeadRun]:
    """Groups neighbouring KV heads of equal capacity; head h starts at ``sum(capacities[:h])``."""
    runs = []
    head = slot = 0
    for capacity, group in itertools.groupby(capacities):
        heads = len(list(group))
        runs.append(
            HeadRun(slice(head, head + heads), slice(slot, slot + heads * capacity), capacity)
        )
        head += heads
        slot += heads * capacity
    return runs


def write(run: HeadRun, buffer: Tensor, lengths: Tensor, new: Tensor) -> None:
    """Writes ``new [B, T, Hkv, D]`` behind ``lengths`` into ``buffer [B, slots, D]``, in place.

    Only the heads of ``run`` are written, and ``lengths`` is not advanced. Position p goes to slot
    ``p mod capacity`` of its head; of more tokens than slots only the last ones are written.
    """
    batch, length = new.shape[:2]
    first = max(0, length - run.capacity)
    steps = torch.arange(first, length, device=new.device)
    slots = (lengths[:, None] + steps) % run.capacity  # [B, steps]
    rows = torch.arange(batch, device=new.device)[:, None]
    run.view(buffer)[rows, :, slots] = new[:, first:, run.heads]


class KVCache:
    """Keys and values of earlier tokens, with as many slots per head as the head can see.

    KV head h owns ``capacities[h] = min(window[h] or max_length, max_length)`` consecutive slots
    of one flat buffer, from slot ``offsets[h]`` on; its position p lies in slot
    ``offsets[h] + p mod capacities[h]``. A head without a window so keeps every position, and a
    local head is a ring of exactly ``window`` slots. Positional encoding is applied to keys
    before they are appended, so the order of the slots does not matter.

    ``lengths`` lives on the device and nothing waits for it, so that a CUDA graph can capture a
    decode step. The host knows an upper bound only, ``max_filled``. Calls recorded by a CUDA
    graph or by ``torch.compile`` are not checked against ``max_length``: there, staying within it
    is the caller's duty. Replays of a CUDA graph run no Python; so after ``reset`` append the
    prompt, or take one step, outside the graph.

    Setting an entry of ``lengths`` to 0 empties that row alone. A step cannot be taken back where
    a head has a window, because the ring has overwritten its oldest tokens by then.

    Args:
        batch_size: rows ``B``.
        max_length: most tokens of one row.
        num_kv_heads: key/value heads ``Hkv``.
        key_dim: head dim ``K`` of keys, up to 256.
        value_dim: head dim ``V`` of values, up to 256.
        window: visible keys including the query's own: ``None`` for all, an int, or one int or
            ``None`` per KV head.
        dtype: of keys and values: float16, bfloat16, float32 or float64.
        device: of all buffers; the default device where ``None``.

    Attributes:
        k: ``[B, slots, K]``.
        v: ``[B, slots, V]``.
        lengths: int32 ``[B]``, tokens of each row so far.
        max_filled: host upper bound of ``lengths``; 0 while nothing was appended.
        windows: one int per KV head, -1 for all keys.
        capacities: slots of each KV head.
        offsets: first slot of each KV head.

    Raises:
        TypeError: a size is not an int, or ``window`` or ``dtype`` is of the wrong kind.
        ValueError: a size or a window is out of range.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        num_kv_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        window: Window = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        _checks.positive_int("KVCache", "batch_size", batch_size)
        _checks.positive_int("KVCache", "max_length", max_length)
        _checks.positive_int("KVCache", "num_kv_heads", num_kv_heads)
        _checks.head_dim("KVCache", "key_dim", key_dim)
        _checks.head_dim("KVCache", "value_dim", value_dim)
        _checks.dtype_option("KVCache", "dtype", dtype)
        self.batch_size = batch_size
        self.max_length = max_length
        self.num_kv_heads = num_kv_heads
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.dtype = dtype
        self.windows = _checks.windows("KVCache", window, num_kv_heads)
        self.capacities = [
            max_length if entry == _checks.UNLIMITED else min(entry, max_length)
            for entry in self.windows
        ]
        self.offsets = [0, *itertools.accumulate(self.capacities)][:-1]
        slots = sum(self.capacities)
        self.k = torch.zeros(batch_size, slots, key_dim, dtype=dtype, device=device)
        self.v = torch.zeros(batch_size, slots, value_dim, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        _counters.reserve(self.lengths, batch_size * (num_kv_heads + 1))
        self.max_filled = 0
        self._recorded = False

    @property
    def device(self) -> torch.device:
        """The device of all buffers."""
        return self.k.device

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, the values and the lengths."""
        return self.k.nbytes + self.v.nbytes + self.lengths.nbytes

    def reset(self) -> None:
        """Empties the cache, in place."""
        self.k.zero_()  # what is left in unused slots meets a weight of 0, and 0 * NaN is NaN
        self.v.zero_()
        self.lengths.zero_()
        self.max_filled = 0

    def append(self, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> None:
        """Appends any number of tokens to every row. Nothing is written where an error is raised.

        Under autocast ``k`` and ``v`` are cast to the cache's dtype.

        Args:
            k: ``[B, T, Hkv, K]``, or packed ``[1, total, Hkv, K]`` with ``cu_seqlens``.
            v: ``[B, T, Hkv, V]`` or ``[1, total, Hkv, V]``.
            cu_seqlens: int32 ``[B + 1]``: row n gets the tokens from ``cu_seqlens[n]`` up to
                ``cu_seqlens[n + 1]``. Its values are read by the host.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: a shape, dtype or device does not fit the cache, or a row would grow past
                ``max_length``.
        """
        shapes = self.shapes("KVCache.append")
        if cu_seqlens is not None:
            shapes.sizes["B"] = 1
        shapes.bind("k", k, "B T Hkv K")
        shapes.bind("v", v, "B T Hkv V")
        _checks.same_device("KVCache.append", k=k, v=v, cache=self.k)
        k, v = (x.detach() for x in _checks.autocast(k, v, dtype=self.dtype) if x is not None)
        _checks.same_dtype("KVCache.append", k=k, v=v, cache=self.k)
        if cu_seqlens is not None:
            self._append_packed(k, v, cu_seqlens)
            return
        self.reserve("KVCache.append", k.shape[1])
        for run in head_runs(self.capacities):
            write(run, self.k, self.lengths, k)
            write(run, self.v, self.lengths, v)
        self.lengths.add_(k.shape[1])
        self.advance(k.shape[1])

    def _append_packed(self, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
        _checks.cu_seqlens("KVCache.append", cu_seqlens, k.shape[0], k.shape[1])
        if cu_seqlens.numel() != self.batch_size + 1:
            raise ValueError(
                f"KVCache.append: cu_seqlens has {cu_seqlens.numel()} entries, expected one per "
                f"row of the cache and a last one ({self.batch_size + 1})"
            )
        bounds = _checks.sequence_bounds("KVCache.append", cu_seqlens, k.shape[1])
        longest = max(end - start for start, end in itertools.pairwise(bounds))
        counts = cu_seqlens.diff().to(self.device)
        self.reserve("KVCache.append", longest, counts)
        for row, (start, end) in enumerate(itertools.pairwise(bounds)):
            k_row, v_row, length = (x[row : row + 1] for x in (self.k, self.v, self.lengths))
            for run in head_runs(self.capacities):
                write(run, k_row, length, k[:, start:end])
                write(run, v_row, length, v[:, start:end])
        self.lengths.add_(counts)
        self.advance(longest)

    def shapes(self, function: str) -> _checks.Shapes:
        """The sizes ``B``, ``Hkv``, ``K`` and ``V`` that tensors for this cache must have."""
        shapes = _checks.Shapes(function)
        shapes.sizes = {
            "B": self.batch_size,
            "Hkv": self.num_kv_heads,
            "K": self.key_dim,
            "V": self.value_dim,
        }
        return shapes

    def reserve(self, function: str, count: int, counts: Tensor | int | None = None) -> None:
        """Refuses ``count`` more tokens per row, or ``counts`` by row, where they do not fit."""
        if _checks.recording() or self.max_filled + count <= self.max_length:
            return
        # The bound may be loose (packed or recorded calls): ask the device before refusing.
        needed = int((self.lengths + (count if counts is None else counts)).max())
        if needed > self.max_length:
            raise ValueError(
                f"{function}: {count} more tokens make {needed} in a row, more than the cache's "
                f"max_length={self.max_length}"
            )

    def advance(self, count: int) -> None:
        """Keeps ``max_filled`` an upper bound after ``count`` more tokens per row."""
        if _checks.recording():
            self._recorded = True  # the call may be repeated without Python
        bound = self.max_length if self._recorded else self.max_filled + count
        self.max_filled = min(bound, self.max_length)
