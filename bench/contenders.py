"""Turns a case into things to time: ours in every implementation, and the peers."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnvariants
from bench import peers
from bench.cases import DECODE, DECODING, TRAINING, Case
from bench.speed_cases import SpeedCase
from bench.timing import MAX_REPEATS, Contender, nothing, reason

MOST_SETS = {"cpu": 64, "cuda": 512}
_DEFAULT_CACHE = 32 * 2**20
_CACHE_SIZES = Path("/sys/devices/system/cpu/cpu0/cache")

# Relative error between two right results of different algorithms, far below that of a wrong one.
AGREEMENT = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,  # TF32 kernels included
    torch.float16: 1e-2,
    torch.bfloat16: 3e-2,
}


class InputSets:
    """Random inputs: several sets, together three times as large as the processor's cache.

    A CPU gets one set where arithmetic decides the time. Decode steps get one set as well: what
    they read are the caches and states that every contender fills from it, and of these each
    contender has as many as :meth:`rotation` says.
    """

    def __init__(self, case: Case, mode: str, dtype: torch.dtype, device: torch.device) -> None:
        self.case, self.mode, self.device = case, mode, device
        first = case.tensors(dtype, device)
        self.nbytes = sum(tensor.nbytes for tensor in first.values())
        several = device.type == "cuda" and mode != DECODING
        count = self.rotation(self.nbytes) if several else 1
        self.sets = [first]
        self.sets += [case.tensors(dtype, device, seed) for seed in range(1, count)]
        self.cotangents: list[Tensor] = []
        if mode == TRAINING:
            shape = (case.batch, case.length, case.heads, case.values)
            for tensors in self.sets:
                for tensor in tensors.values():
                    tensor.requires_grad_(tensor.is_floating_point())
                self.cotangents.append(torch.randn(shape, device=device).to(dtype))

    def rotation(self, size: int) -> int:
        """How many sets of ``size`` bytes the processor's cache cannot keep."""
        return min(math.ceil(3 * cache_bytes(self.device) / size), MOST_SETS[self.device.type])


def cache_bytes(device: torch.device) -> int:
    """The last-level cache of a device."""
    if device.type == "cuda":
        found = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        return int(found) or 2 * _DEFAULT_CACHE
    sizes = [_DEFAULT_CACHE // 4]
    try:
        texts = [path.read_text().strip() for path in _CACHE_SIZES.glob("index*/size")]
    except OSError:
        texts = []
    sizes += [int(text[:-1]) * 1024 for text in texts if text[:-1].isdigit() and text[-1] == "K"]
    return min(max(sizes), 2 * _DEFAULT_CACHE)


class Candidate:
    """One of ours or a peer, before and after it is prepared on the input sets of a case.

    ``same``: it computes the function of the case, so its output must agree with ours.
    """

    def __init__(self, name: str, *, ours: bool, same: bool, build: Callable[..., Any]) -> None:
        self.name, self.ours, self.same = name, ours, same
        self.cache_bytes: int | None = None
        self._build = build
        self._calls: list[Callable[[], Tensor]] = []
        self._resets: list[Callable[[], Any]] = []

    def prepare(self, inputs: InputSets) -> str | None:
        """Builds the call on every input set; returns why it cannot."""
        self._inputs = inputs
        try:
            for tensors in inputs.sets:
                self._add(inputs, tensors)
            if inputs.mode == DECODING:
                for _ in range(1, inputs.rotation(self.cache_bytes or inputs.nbytes)):
                    self._add(inputs, inputs.sets[0])
        except peers.Missing as error:
            return str(error)
        except Exception as error:
            return reason(error)
        return None

    def _add(self, inputs: InputSets, tensors: dict[str, Tensor]) -> None:
        built = self._build(inputs.case, tensors, inputs.mode)
        call, reset, self.cache_bytes = (
            built if isinstance(built, tuple) else (built, nothing, None)
        )
        self._calls.append(call)
        self._resets.append(reset)

    @property
    def sets(self) -> int:
        """How many sets of inputs, or of caches, the calls go through."""
        return len(self._calls)

    def contender(self, name: str | None = None) -> Contender:
        """What the stopwatch takes."""
        return Contender(name or self.name, self._run, self.sets, self.reset)

    def _run(self, index: int) -> Any:
        if self._inputs.mode != TRAINING:
            with torch.no_grad():
                return self._calls[index]()
        out = self._calls[index]()
        leaves = [x for x in self._inputs.sets[index].values() if x.requires_grad]
        return torch.autograd.grad(out, leaves, self._inputs.cotangents[index], allow_unused=True)

    def reset(self) -> None:
        """Puts caches back to where the case starts."""
        for reset in self._resets:
            reset()

    def once(self) -> Any:
        """One call, for measuring memory."""
        self.reset()
        return self._run(0)

    @functools.cached_property
    def output(self) -> Tensor:
        """The output on the first input set."""
        self.reset()
        with torch.no_grad():
            return self._calls[0]()

    def own_case(self, case: Case) -> Case:
        """The case whose work a peer does that computes another function: full attention."""
        return dataclasses.replace(case, function="gated_sdpa", g=None, gate=None, options={})


def candidates(entry: SpeedCase, impls: Sequence[str]) -> list[Candidate]:
    """Ours, in the implementations that are usable, and the peers of the case."""
    available = attnvariants.implementations()[entry.case.function]
    found = [
        Candidate(impl, ours=True, same=True, build=_builder(impl))
        for impl in impls
        if available[impl].usable
    ]
    for name in entry.peers:
        peer = peers.peer(name)
        found.append(Candidate(name, ours=False, same=peer.same, build=peer.build))
    return found


def disagreement(candidate: Candidate, accepted: Sequence[Candidate]) -> str | None:
    """Why an output is not what the first candidate gives; ``None`` where it need not or is."""
    if not accepted or not candidate.same:
        return None
    try:
        other = candidate.output
    except Exception as error:
        return reason(error)
    expected = accepted[0].output
    if other.shape != expected.shape:
        return f"not timed: its output is {tuple(other.shape)}, ours {tuple(expected.shape)}"
    difference = float((other.double() - expected.double()).norm() / expected.double().norm())
    if difference <= AGREEMENT[expected.dtype]:
        return None
    return f"not timed: its output differs from ours by {difference:.1e}"


def _builder(impl: str) -> Callable[[Case, dict[str, Tensor], str], Any]:
    def build(case: Case, tensors: dict[str, Tensor], mode: str) -> Any:
        function = getattr(attnvariants, case.function)
        if case.function not in DECODE:
            return lambda: function(**tensors, **case.options, impl=impl)
        step = _decode if case.function == "attention_decode" else _linear_decode
        return step(case, tensors, function, impl)

    return build


def _decode(case: Case, tensors: dict[str, Tensor], function: Callable[..., Any], impl: str) -> Any:
    """A step behind a filled cache. Steps of one sample follow each other: the cache has room."""
    options = dict(case.options)
    k, v = tensors["k"], tensors["v"]
    cached = case.keys - case.length
    cache = attnvariants.KVCache(
        case.batch,
        cached + MAX_REPEATS * case.length,
        case.key_heads,
        case.key_dim,
        case.values,
        window=options.pop("window", None),
        dtype=k.dtype,
        device=k.device,
    )
    cache.append(k[:, :cached], v[:, :cached])
    new = {"q": tensors["q"], "k": k[:, cached:], "v": v[:, cached:], "gate": tensors.get("gate")}

    def reset() -> None:
        cache.lengths.fill_(cached)
        cache.max_filled = cached

    return lambda: function(**new, cache=cache, impl=impl, **options), reset, cache.nbytes


def _linear_decode(
    case: Case, tensors: dict[str, Tensor], function: Callable[..., Any], impl: str
) -> Any:
    start = tensors["initial_state"]
    state = attnvariants.RecurrentState(
        case.batch,
        case.heads,
        case.key_dim,
        case.values,
        dtype=start.dtype,
        device=start.device,
    )
    state.state.copy_(start)
    new = {"g": None} | {name: x for name, x in tensors.items() if name != "initial_state"}

    def reset() -> None:
        state.state.copy_(start)

    return lambda: function(**new, state=state, impl=impl, **case.options), reset, state.nbytes
