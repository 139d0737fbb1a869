"""The protocol on a clock of our own: order, rounds, statistics, failures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import timing
from bench.timing import Anchors, Contender, CpuStopwatch, Timing, interleave

CPU = torch.device("cpu")


class FakeMachine:
    """A clock that only calls advance, and a record of who was called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def contender(self, name: str, *seconds: float, sets: int = 1) -> Contender:
        """Takes ``seconds`` in turn, the last one for ever."""
        left = list(seconds)

        def run(index: int) -> None:
            assert 0 <= index < sets
            self.calls.append(f"{name}{index}" if sets > 1 else name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return Contender(name, run, sets)

    def stopwatch(self) -> CpuStopwatch:
        return CpuStopwatch(now=lambda: self.now)


def _measure(
    machine: FakeMachine, *contenders: Contender, rounds: int = 3, budget: float = 1e9
) -> tuple[dict[str, Timing], dict[str, str]]:
    return interleave(
        contenders, machine.stopwatch(), rounds=rounds, budget=budget, now=lambda: machine.now
    )


def test_rounds_are_mirrored() -> None:
    machine = FakeMachine()
    _measure(machine, machine.contender("A", 1.0), machine.contender("B", 2.0), rounds=2)
    assert "".join(machine.calls) == "AABB" + "ABBA" * 2  # warm-up, then the rounds


def test_statistics_by_hand() -> None:
    machine = FakeMachine()
    seconds = (9.0, 9.0, 1.0, 3.0, 2.0, 4.0, 3.0, 5.0)  # the first two warm up
    timings, _ = _measure(machine, machine.contender("A", *seconds))
    a = timings["A"]
    assert a.samples == [1.0, 3.0, 2.0, 4.0, 3.0, 5.0]
    assert a.rounds == [2.0, 3.0, 4.0]
    assert a.median == 3.0
    assert a.quantile(0.2) == 2.0
    assert a.quantile(0.8) == 4.0
    assert a.quantile(0.5) == a.median


def test_a_drifting_clock_leaves_the_ratio_alone() -> None:
    slower = [1.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 8.0]
    machine = FakeMachine()
    timings, _ = _measure(
        machine,
        machine.contender("A", *slower),
        machine.contender("B", *(2 * seconds for seconds in slower)),
    )
    found = timing.ratio(timings["A"], timings["B"])
    assert (found.median, found.low, found.high) == (0.5, 0.5, 0.5)


def test_ratio_is_taken_within_rounds() -> None:
    found = timing.ratio(Timing(rounds=[1.0, 4.0, 9.0]), Timing(rounds=[1.0, 2.0, 3.0]))
    assert (found.median, found.low, found.high) == (2.0, 1.0, 3.0)


def test_short_calls_are_repeated_over_the_input_sets() -> None:
    machine = FakeMachine()
    timings, _ = _measure(machine, machine.contender("A", 0.001, sets=3), rounds=2)
    assert timings["A"].median == pytest.approx(0.001)
    assert machine.calls[2:6] == ["A0", "A1", "A2", "A0"]  # 4 ms make a sample


def test_repeats_are_limited() -> None:
    machine = FakeMachine()
    _measure(machine, machine.contender("A", 1e-6), rounds=2)
    assert len(machine.calls) == 2 + 4 * timing.MAX_REPEATS


def test_the_budget_ends_the_rounds_but_not_before_two() -> None:
    machine = FakeMachine()
    timings, _ = _measure(machine, machine.contender("A", 1.0), rounds=50, budget=8.0)
    assert len(timings["A"].rounds) == 4
    machine = FakeMachine()
    timings, _ = _measure(machine, machine.contender("A", 100.0), rounds=50, budget=1.0)
    assert len(timings["A"].rounds) == 2


def test_reset_runs_before_every_sample() -> None:
    machine = FakeMachine()
    run = machine.contender("A", 1.0).run
    contender = Contender("A", run, reset=lambda: machine.calls.append("-"))
    _measure(machine, contender, rounds=2)
    assert "".join(machine.calls) == "-A" * 6


def test_a_failing_contender_is_named_and_the_others_are_timed() -> None:
    machine = FakeMachine()

    def fail(index: int) -> None:
        raise RuntimeError("out of luck\nand more")

    timings, failures = _measure(machine, Contender("B", fail), machine.contender("A", 1.0))
    assert list(timings) == ["A"]
    assert failures == {"B": "RuntimeError: out of luck"}
    assert _measure(machine, Contender("B", fail))[0] == {}


def test_anchors_of_this_machine() -> None:
    found = timing.measure_anchors("start", CPU, [torch.float32], samples=1)
    assert found.copy_bytes_per_s > 1e7
    assert found.matmul_flops_per_s["float32"] > 1e7


def test_drift_and_rates() -> None:
    anchors = [
        Anchors("start", 10.0, {"float32": 100.0}),
        Anchors("middle", 10.5, {"float32": 80.0}),
        Anchors("end", 11.0, {"float32": 90.0}),
    ]
    assert timing.drift(anchors) == pytest.approx(0.25)
    assert timing.rates(anchors, torch.float32) == (10.5, 90.0)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_memory_of_one_call() -> None:
    def call() -> None:
        first = torch.ones(16 << 20)  # 64 MiB
        second = first + 1
        del first
        second + 1

    peak = timing.peak_bytes(call, CPU)
    assert peak is not None
    assert peak / 2**20 == pytest.approx(128, rel=0.1)


def test_unknown_memory_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timing, "_PROCESS", tmp_path / "nowhere")
    assert timing.peak_bytes(lambda: None, CPU) is None


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("AcceleratorError: CUDA error: an illegal memory access was encountered", True),
        ("RuntimeError: Triton Error [CUDA]: an illegal memory access was encountered", True),
        ("AcceleratorError: CUDA error: device-side assert triggered", True),
        ("AcceleratorError: CUDA error: operation not permitted when stream is capturing", False),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB", False),
        ("RuntimeError: Triton Error [CUDA]: invalid argument", False),
        (None, False),
    ],
)
def test_errors_that_end_all_use_of_the_device(text: str | None, ends: bool) -> None:
    assert timing.lost(text) == ends
