"""How time is measured: warm-up, interleaved rounds A B B A, medians, ratios within a round.

Clocks drift and neighbours interfere, so no number of one contender is compared with a number of
another taken at another time: every round times each contender twice, in mirrored order, and
ratios are taken inside the round. On a GPU a contender is a CUDA graph of many calls between two
events; contenders rotate through several sets of inputs, so that no cache keeps them.
"""

from __future__ import annotations

import ctypes
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

MIN_ROUNDS = 2  # a ratio needs a range
CPU_SAMPLE_SECONDS = 0.004  # a sample of short calls repeats them for so long
GRAPH_SECONDS = 0.002  # so long lasts the CUDA graph of one sample, at least
GRAPH_LAUNCHES = 10  # and so many calls it holds, at least
MAX_REPEATS = 64  # decode contenders keep room for so many steps
REPLAYS = 10  # timed replays per sample; every round takes two samples of each contender

_PROCESS = Path("/proc/self")


def nothing() -> None:
    """Does nothing."""


@dataclass(frozen=True)
class Contender:
    """Something to time: ``run(i)`` makes one call on input set ``i``."""

    name: str
    run: Callable[[int], Any]
    sets: int = 1
    reset: Callable[[], Any] = nothing  # before each sample, outside the measured time


@dataclass
class Timing:
    """Seconds per call: all samples, and the median of each round."""

    samples: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)
    launch: str = "eager"  # or "graph"
    eager_s: float | None = None  # one call without the graph

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quantile(self, fraction: float) -> float:
        """Linear interpolation between the sorted samples."""
        ordered = sorted(self.samples)
        position = fraction * (len(ordered) - 1)
        below = math.floor(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])


@dataclass(frozen=True)
class Ratio:
    """Time of one contender over another's: median and range of the ratios of the rounds."""

    median: float
    low: float
    high: float


def ratio(ours: Timing, peer: Timing) -> Ratio:
    """``ours / peer``, round by round; below 1, ours is faster."""
    ratios = [a / b for a, b in zip(ours.rounds, peer.rounds, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


class Stopwatch(Protocol):
    """What depends on the device."""

    def prepare(self, contender: Contender) -> Timing:
        """Warms the contender up; raises whatever its call raises."""

    def sample(self, contender: Contender) -> list[float]:
        """Seconds per call, one number or several."""


def interleave(
    contenders: Sequence[Contender],
    stopwatch: Stopwatch,
    *,
    rounds: int,
    budget: float,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times the contenders in rounds A B B A.

    Args:
        contenders: with distinct names.
        stopwatch: see :func:`stopwatch_for`.
        rounds: most rounds; fewer, but at least ``MIN_ROUNDS``, where they would take longer
            than ``budget`` seconds.
        budget: see ``rounds``.
        now: the clock of the budget.

    Returns:
        The timings by name, and the reasons by name of contenders whose call fails.
    """
    timings: dict[str, Timing] = {}
    failures: dict[str, str] = {}
    for contender in contenders:
        try:
            timings[contender.name] = stopwatch.prepare(contender)
        except Exception as error:
            failures[contender.name] = reason(error)
    running = [contender for contender in contenders if contender.name in timings]
    start = now()
    for count in range(1, rounds + 1 if running else 1):
        found: dict[str, list[float]] = {contender.name: [] for contender in running}
        for contender in [*running, *reversed(running)]:
            found[contender.name] += stopwatch.sample(contender)
        for name, samples in found.items():
            timings[name].samples += samples
            timings[name].rounds.append(statistics.median(samples))
        if count >= MIN_ROUNDS and (now() - start) * (count + 1) / count > budget:
            break
    return timings, failures


def reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def lost(reason: str | None) -> bool:
    """Whether an error, as :func:`reason` says it, ends all use of the device in this process.

    Most errors of CUDA do not: too little memory, wrong arguments, what a graph cannot capture.
    """
    return any(text in (reason or "") for text in _STICKY)


_STICKY = (
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "device-side assert",
    "unspecified launch failure",
    "launch timed out",
    "hardware stack error",
    "invalid program counter",
    "shared address space",
    "uncorrectable ECC",
)


def stopwatch_for(device: torch.device) -> Stopwatch:
    """The stopwatch of a device."""
    return CudaStopwatch(device) if device.type == "cuda" else CpuStopwatch()


class CpuStopwatch:
    """Wall time of as many calls as make a measurable sample."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.repeats: dict[str, int] = {}

    def prepare(self, contender: Contender) -> Timing:
        self.repeats[contender.name] = 1
        self.sample(contender)  # first call: allocations, compilation
        once = self.sample(contender)[0]
        wanted = math.ceil(CPU_SAMPLE_SECONDS / max(once, 1e-9))
        self.repeats[contender.name] = min(max(1, wanted), MAX_REPEATS)
        return Timing()

    def sample(self, contender: Contender) -> list[float]:
        repeats = self.repeats[contender.name]
        contender.reset()
        start = self.now()
        for index in range(repeats):
            contender.run(index % contender.sets)
        return [(self.now() - start) / repeats]


class CudaStopwatch:
    """Events around replays of a CUDA graph; around plain calls where no graph can be captured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.replays: dict[str, Callable[[], Any]] = {}
        self.launches: dict[str, int] = {}

    def prepare(self, contender: Contender) -> Timing:
        def calls(count: int) -> None:
            for index in range(count):
                contender.run(index % contender.sets)

        self.replays[contender.name] = lambda: calls(contender.sets)
        self.launches[contender.name] = contender.sets
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # warm up where the capture will run
            for _ in range(3):
                contender.reset()
                calls(contender.sets)
        torch.cuda.current_stream(self.device).wait_stream(side)
        eager = statistics.median(self.sample(contender))
        count = graph_calls(contender.sets, eager)
        graph = torch.cuda.CUDAGraph()
        try:
            contender.reset()
            with torch.cuda.graph(graph, stream=side):
                calls(count)
        except Exception:  # a call that waits for the device cannot be captured
            torch.cuda.synchronize(self.device)
            return Timing(launch="eager", eager_s=eager)
        self.replays[contender.name], self.launches[contender.name] = graph.replay, count
        self.sample(contender)
        return Timing(launch="graph", eager_s=eager)

    def sample(self, contender: Contender) -> list[float]:
        replay, launches = self.replays[contender.name], self.launches[contender.name]
        found = []
        for _ in range(REPLAYS):
            contender.reset()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1000 / launches)
        return found


def graph_calls(sets: int, seconds: float) -> int:
    """How many calls of ``seconds`` each a graph holds: all sets equally often."""
    wanted = max(GRAPH_LAUNCHES, math.ceil(GRAPH_SECONDS / max(seconds, 1e-9)))
    return sets * min(math.ceil(wanted / sets), max(1, MAX_REPEATS // sets))


# --- anchors -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Anchors:
    """What the machine could do at one moment of the run."""

    moment: str  # "start", "middle" or "end"
    copy_bytes_per_s: float  # bytes read plus bytes written
    matmul_flops_per_s: dict[str, float]  # by dtype


def measure_anchors(
    moment: str, device: torch.device, dtypes: Sequence[torch.dtype], *, samples: int = 5
) -> Anchors:
    """Copies a buffer larger than any cache and multiplies two large matrices of random numbers."""
    on_gpu = device.type == "cuda"
    elements = (2**31 + 2**28 if on_gpu else 2**28) // 4  # of 4 bytes
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source), device, samples)
    rates = {}
    for dtype in dtypes:
        size = 8192 if on_gpu else 1536
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty(size, size, device=device, dtype=dtype)
        seconds = _seconds(functools.partial(torch.matmul, a, b, out=out), device, samples)
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds
    return Anchors(moment, 2 * source.nbytes / copy, rates)


def drift(anchors: Sequence[Anchors]) -> float:
    """Largest relative difference between two moments, over all anchors."""
    series = [[a.copy_bytes_per_s for a in anchors]]
    for dtype in dict.fromkeys(name for a in anchors for name in a.matmul_flops_per_s):
        of_dtype = [a.matmul_flops_per_s[dtype] for a in anchors if dtype in a.matmul_flops_per_s]
        series.append(of_dtype)
    return max(max(values) / min(values) - 1 for values in series)


def rates(anchors: Sequence[Anchors], dtype: torch.dtype) -> tuple[float, float]:
    """Copy rate and matmul rate of the run: the medians over its moments."""
    name = str(dtype).removeprefix("torch.")
    return (
        statistics.median(a.copy_bytes_per_s for a in anchors),
        statistics.median(
            a.matmul_flops_per_s[name] for a in anchors if name in a.matmul_flops_per_s
        ),
    )


def _seconds(call: Callable[[], Any], device: torch.device, samples: int) -> float:
    """Median seconds of a call of milliseconds; on a GPU, of ten at a time."""
    repeats = 10 if device.type == "cuda" else 1
    found = []
    call()
    for _ in range(samples):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        _synchronize(device)
        found.append((time.perf_counter() - start) / repeats)
    return statistics.median(found)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- memory --------------------------------------------------------------------------------------

MEMORY_NOTE = {
    "cuda": "peak of torch.cuda.max_memory_allocated during one call, above what was allocated "
    "before it",
    "cpu": "high-water mark of the resident set during one call, above what was resident before "
    "it (Linux; freed memory is first returned to the system)",
}


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Most memory that one call holds at a time beyond its inputs; ``None`` where unknown."""
    if device.type == "cuda":
        _synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _PROCESS.joinpath("clear_refs").write_text("5")  # resets the high-water mark
        resident = _status("VmRSS")
    except (OSError, AttributeError, TypeError):  # not Linux, or not glibc
        return None
    call()
    return max(0, _status("VmHWM") - resident)


def _status(key: str) -> int:
    """A size in bytes from the process status."""
    lines = _PROCESS.joinpath("status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
