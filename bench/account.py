"""What the linear kernels move and compute, from the launches that they would make.

The launchers run on tensors without memory, and every launch is written down with its tiles and
segments instead of being made. Bytes are counted twice: with every tensor read once per kernel, as
if the L2 cache held what several programs share, and with every program's own reads. What a program
reads again within a chunk is taken to come from its L1 cache in both.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

SHAPES = ((8, 4096, 4, 128, 256), (1, 65536, 16, 128, 128))  # B, T, H, K, V
# Flash-linear-attention's chunk_gla, kernel by kernel, read in its code: GB forward and backward.
PUBLISHED = {(8, 4096, 4, 128, 256): (1.24, 3.42)}
PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Entry:
    """One launch."""

    kernel: str
    programs: int
    read: float  # bytes, each tensor once
    written: float
    requested: float  # bytes that programs read, each on its own
    flops: float
    exponentials: float


@dataclass(frozen=True)
class Account:
    """The launches of one pass, and the bytes that any implementation has to move."""

    shape: tuple[int, int, int, int, int]
    direction: str
    entries: tuple[Entry, ...]
    compulsory: float

    @property
    def moved(self) -> float:
        return sum(entry.read + entry.written for entry in self.entries)

    @property
    def requested(self) -> float:
        return sum(entry.requested + entry.written for entry in self.entries)


def account(shape: tuple[int, int, int, int, int], arch: int = 90) -> list[Account]:
    """Gated linear attention per channel, all in bf16, forward and backward."""
    batch, length, heads, key_dim, value_dim = shape
    kernels: Any = importlib.import_module("attnvariants.kernels.linear")

    def empty(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device="meta")

    rows = (batch, length, heads)
    q, k, g = (empty(*rows, key_dim) for _ in range(3))
    v, dout = (empty(*rows, value_dim) for _ in range(2))
    options = (None, True, 1.0, None, 1e-6, None)
    tokens = batch * length * heads
    forward, backward = 3 * key_dim + 2 * value_dim, 6 * key_dim + 3 * value_dim
    with recorded(arch, q) as entries:
        kernels.forward(q, k, v, g, None, None, None, None, *options)
    found = [Account(shape, PASSES[0], tuple(entries), 2.0 * tokens * forward)]
    with recorded(arch, q) as entries:
        rstd = empty(0, dtype=torch.float32)
        kernels.backward(q, k, v, g, None, None, None, None, None, rstd, dout, None, *options, True)
    return [*found, Account(shape, PASSES[1], tuple(entries), 2.0 * tokens * backward)]


@contextmanager
def recorded(arch: int, q: torch.Tensor) -> Iterator[list[Entry]]:
    """Inside, the launches of the linear kernels are written down for ``arch``, not made.

    ``q`` is that of the call.
    """
    kernels: Any = importlib.import_module("attnvariants.kernels.linear")
    configs: Any = importlib.import_module("attnvariants.kernels._linear_configs")
    entries: list[Entry] = []

    def launch(kernel: Any, programs: int, *arguments: Any, config: Any) -> None:
        given = dict(zip(kernel.arg_names, arguments, strict=True))
        name = kernel.__name__.removesuffix("_kernel")
        entries.append(_COUNTS[name](name, programs, given, q))

    originals = kernels.launch, configs.architecture
    kernels.launch, configs.architecture = launch, lambda: arch
    try:
        yield entries
    finally:
        kernels.launch, configs.architecture = originals


class _Sizes:
    """What the counts below are made of; bytes and FLOPs of all heads and tokens."""

    def __init__(self, given: dict[str, Any], like: torch.Tensor) -> None:
        self.dims, walk = given["dims"], given["walk"]
        self.rows = like.shape[0] * like.shape[1] * like.shape[2]  # tokens times heads
        self.key_slices = -(-self.dims.K // self.dims.BK)
        self.value_slices = -(-self.dims.V // self.dims.BV)
        self.item = like.element_size()
        g, decay = given.get("g"), given["kind"].DECAY
        width = {None: 0, "token": 1, "channel": self.dims.K}[decay]
        self.decay = self.rows * width * (0 if g is None else g.ptr.element_size())
        self.keys = self.rows * self.dims.K * self.item
        self.values = self.rows * self.dims.V * self.item
        self.batch, self.heads = like.shape[0], like.shape[2]
        self.state = 4 * self.heads * self.dims.K * self.dims.V
        self.segments = walk.segments(self.batch)
        self.levels = self.dims.BT.bit_length() - 1
        self.channel = width > 1

    def states(self, tensor: Any) -> float:
        """Bytes of a tensor of states, 0 for ``None``."""
        return 0.0 if tensor is None else float(tensor.numel() * 4)

    def product(self, *sides: int) -> float:
        """FLOPs of a product with one side of the tokens of a chunk, in all chunks."""
        flops = 2.0 * self.rows
        for side in sides:
            flops *= side
        return flops

    def scores(self) -> float:
        """FLOPs of the scores: per level two parts of the sums and the product itself."""
        one = self.product(self.dims.BT, self.dims.K)
        return 3 * self.levels * one if self.channel else one

    def factors(self) -> float:
        """Exponentials of the scores."""
        return self.levels * self.rows * self.dims.K if self.channel else 0.0


def _states(name: str, programs: int, given: dict[str, Any], like: torch.Tensor) -> Entry:
    s = _Sizes(given, like)
    states = s.states(given["start"])
    written = sum(s.states(given[x]) for x in ("finish", "marks", "total"))
    requested = s.value_slices * (s.keys + s.decay) + s.key_slices * s.values
    return Entry(
        name,
        programs,
        s.keys + s.values + s.decay + states,
        written,
        requested + states,
        s.product(s.dims.K, s.dims.V),
        s.value_slices * s.rows * s.dims.K if s.channel else 0.0,
    )


def _scan(name: str, programs: int, given: dict[str, Any], like: torch.Tensor) -> Entry:
    states = given["states"].numel() * 4.0
    read = states + sum(0.0 if given[x] is None else given[x].numel() * 4.0 for x in ("start",))
    finish = 0.0 if given["finish"] is None else given["finish"].numel() * 4.0
    return Entry(name, programs, read, states + finish, read, 0.0, 0.0)


def _forward(name: str, programs: int, given: dict[str, Any], like: torch.Tensor) -> Entry:
    s = _Sizes(given, like)
    states = s.states(given["start"])
    inputs = 2 * s.keys + s.decay
    chunk = s.product(s.dims.BT, s.dims.V) + 2 * s.product(s.dims.K, s.dims.V)
    return Entry(
        name,
        programs,
        inputs + s.values + states,
        s.values + s.states(given["finish"]),
        s.value_slices * inputs + s.values + states,
        s.value_slices * s.scores() + chunk,
        s.value_slices * (s.factors() + 2 * s.rows * s.dims.K * s.channel),
    )


def _backward_qk(name: str, programs: int, given: dict[str, Any], like: torch.Tensor) -> Entry:
    s = _Sizes(given, like)
    stride = min(given["marked"].span >> 1, given["walk"].length >> 1)
    again = max(0.0, (stride / s.dims.BT - 1) / 2)  # chunks replayed for each chunk
    with_dg = given["grads"].dg is not None
    kept, running = s.states(given["marks"]), s.states(given["running"])
    inputs = 2 * s.keys + s.decay
    # For every chunk, states in float32: the kept one, and the running cotangent, which is read for
    # dg and for dk and written.
    state = 4.0 * s.rows / s.dims.BT * s.dims.K * s.dims.V
    requested = inputs + s.key_slices * 2 * s.values + s.states(given["ends"])
    requested += again * (s.keys + s.decay + s.key_slices * s.values)
    requested += state * (3 if with_dg else 2) + (state if kept else 0.0)
    pairs = s.product(s.dims.BT, s.dims.K)
    flops = (3 + again) * s.product(s.dims.K, s.dims.V)
    flops += s.key_slices * 2 * s.product(s.dims.BT, s.dims.V)
    # Per level and for queries and keys each: two parts of the sums, the product, two parts of dg.
    # Two parts also of the sums for each of three factors and of the replayed keys', and of dg.
    flops += (10 * s.levels + 10 + 2 * again) * pairs if s.channel else 4 * pairs
    exponentials = (2 * s.levels + 3 + again) * s.rows * s.dims.K if s.channel else 0.0
    return Entry(
        name,
        programs,
        inputs + 2 * s.values + s.states(given["ends"]) + kept + running,
        2 * s.keys + (s.decay if with_dg else 0) + running,
        requested,
        flops,
        exponentials,
    )


def _backward_v(name: str, programs: int, given: dict[str, Any], like: torch.Tensor) -> Entry:
    s = _Sizes(given, like)
    states = s.states(given["ends"])
    inputs = 2 * s.keys + s.decay
    chunk = s.product(s.dims.BT, s.dims.V) + 2 * s.product(s.dims.K, s.dims.V)
    return Entry(
        name,
        programs,
        inputs + s.values + states,
        s.values + s.states(given["dstart"]),
        s.value_slices * inputs + s.values + states,
        s.value_slices * s.scores() + chunk,
        s.value_slices * (s.factors() + 2 * s.rows * s.dims.K * s.channel),
    )


_COUNTS: dict[str, Callable[[str, int, dict[str, Any], torch.Tensor], Entry]] = {
    "linear_states": _states,
    "linear_scan": _scan,
    "linear_forward": _forward,
    "linear_backward_qk": _backward_qk,
    "linear_backward_v": _backward_v,
}


def lines(accounts: Sequence[Account]) -> Iterator[str]:
    """The account as text."""
    for found in accounts:
        batch, length, heads, key_dim, value_dim = found.shape
        yield f"{found.direction}, B{batch} T{length} H{heads} K{key_dim} V{value_dim}, bf16"
        yield (
            f"  {'kernel':<20}{'programs':>9}{'MB read':>9}{'written':>9}{'requested':>11}"
            f"{'GFLOP':>9}{'G exp':>7}"
        )
        for entry in found.entries:
            yield (
                f"  {entry.kernel:<20}{entry.programs:>9}{entry.read / 1e6:>9.0f}"
                f"{entry.written / 1e6:>9.0f}{entry.requested / 1e6:>11.0f}"
                f"{entry.flops / 1e9:>9.1f}{entry.exponentials / 1e9:>7.2f}"
            )
        yield (
            f"  moved {found.moved / 1e6:.0f} MB, {found.moved / found.compulsory:.2f}x of the "
            f"compulsory {found.compulsory / 1e6:.0f} MB; "
            f"{found.requested / found.compulsory:.2f}x with every program's own reads"
        )
        published = PUBLISHED.get(found.shape)
        if published:
            size = published[PASSES.index(found.direction)] * 1e9
            yield f"  chunk_gla's published structure: {size / found.compulsory:.1f}x"
    both = sum(found.moved for found in accounts) / sum(found.compulsory for found in accounts)
    yield f"  forward and backward together: {both:.2f}x of the compulsory bytes"


def run(args: argparse.Namespace) -> int:
    """``python -m bench speed --account``."""
    for shape in SHAPES:
        for line in lines(account(shape)):
            print(line)
    return 0
