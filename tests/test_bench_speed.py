"""``python -m bench speed`` on tiny shapes: what it writes, and what it refuses to time."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnvariants
from attnvariants._select import FUNCTIONS
from attnvariants._verify import Comparison
from bench import contenders, peers, speed, speed_session, timing
from bench.cases import DECODING, FORWARD, TRAINING, Case
from bench.contenders import InputSets
from bench.environment import describe
from bench.errors import BenchError
from bench.peers import Peer
from bench.records import read_json
from bench.speed_cases import SpeedCase, speed_cases
from bench.speed_rows import Row

pytestmark = pytest.mark.usefixtures("without_interpreter")

BOTH = (FORWARD, TRAINING)
GATED = Case("gated_sdpa", "gated", length=32, gate="elementwise")
LOCAL = Case("ls_attention", "ls", length=48, options={"window": (8, None)})
DECODE = Case("attention_decode", "decode", length=1, key_length=17, gate="elementwise", steps=(1,))
RING = Case(
    "attention_decode",
    "ring",
    length=1,
    key_length=401,
    heads=4,
    steps=(1,),
    options={"window": (9, 9, 9, None)},
)
STEP = Case("linear_attention_decode", "step", length=1, g="channel", initial_state=True)


ENVIRONMENT = describe() | {"commit": "abc"}


def _sweep(length: int) -> SpeedCase:
    return SpeedCase(Case("diag_attention", f"diag {length}", length=length), BOTH, ("sdpa",), True)


CASES = [
    SpeedCase(GATED, BOTH, ("sdpa", "sdpa + gate", "sdpa cudnn", "flex", "fa3")),
    SpeedCase(LOCAL, (FORWARD,), ("sdpa", "two calls")),
    SpeedCase(DECODE, (DECODING,), ("sdpa decode",)),
    SpeedCase(STEP, (DECODING,), ("plain step", "fla fused_recurrent_gla")),
    _sweep(32),
    _sweep(64),
]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny cases, one set of inputs, and anchors that cost nothing."""

    def anchors(moment: str, device: object, dtypes: list[torch.dtype]) -> timing.Anchors:
        rates = {str(dtype).removeprefix("torch."): 1e11 for dtype in dtypes}
        return timing.Anchors(moment, 1e10, rates)

    monkeypatch.setattr(timing, "measure_anchors", anchors)
    monkeypatch.setattr(contenders, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(timing, "CPU_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(speed, "speed_cases", lambda device, quick, lengths, tiny: CASES)


def _run(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    parser = argparse.ArgumentParser()
    speed.add_arguments(parser)
    fixed = ["--quick", "--rounds", "2", "--device", "cpu", "--out", str(out)]
    code = speed.run(parser.parse_args([*fixed, *arguments]))
    return code, read_json(out / "speed.json")


def _peer(monkeypatch: pytest.MonkeyPatch, name: str, same: bool, call: Callable[..., Any]) -> None:
    monkeypatch.setitem(peers._PEERS, name, Peer(name, same, call))


def test_everything_is_timed_or_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(case: Case, inputs: object, mode: str) -> None:
        raise peers.Missing("no time for it")

    _peer(monkeypatch, "flex", True, no_compiler)
    code, content = _run(tmp_path)
    assert code == 0
    assert read_json(tmp_path / "environment.json") == content["environment"]
    parts = {"environment", "protocol", "anchors", "noise", "flatness", "rows", "attempts"}
    assert parts == set(content)
    rows = content["rows"]
    fields = {field.name for field in dataclasses.fields(Row)}
    assert all(set(row) == fields for row in rows)
    timed = [row for row in rows if row["status"] == "ok"]
    assert {(row["function"], row["mode"]) for row in timed if row["ours"]} == {
        ("gated_sdpa", FORWARD),
        ("gated_sdpa", TRAINING),
        ("ls_attention", FORWARD),
        ("attention_decode", DECODING),
        ("linear_attention_decode", DECODING),
        ("diag_attention", FORWARD),
        ("diag_attention", TRAINING),
    }
    for row in timed:
        assert row["reason"] is None
        assert 0 < row["q20_s"] <= row["median_s"] <= row["q80_s"]
        assert row["rounds"] == 2
        assert row["percent_of_floor"] == pytest.approx(100 * row["floor_s"] / row["median_s"])
        assert row["tokens_per_s"] == pytest.approx(
            row["shape"]["B"] * row["shape"]["T"] / row["median_s"]
        )
    missing = {row["contender"]: row["reason"] for row in rows if row["status"] == "missing"}
    assert set(missing) == {"sdpa cudnn", "flex", "fa3", "fla fused_recurrent_gla"}
    assert all(missing.values())
    text = capsys.readouterr().out
    assert "not installed: " in text
    assert "anchors drifted by 0.0 %" in text
    assert "Tokens per second over the length" in text


def test_ratios_flatness_and_noise(tmp_path: Path) -> None:
    _, content = _run(tmp_path, "--functions", "ls_attention", "diag_attention")
    (ours,) = [row for row in content["rows"] if row["case"] == "ls" and row["ours"]]
    assert set(ours["ratio_to"]) == {"sdpa", "two calls"}
    for found in ours["ratio_to"].values():
        assert 0 < found["low"] <= found["median"] <= found["high"]
    assert [(entry["case"], entry["mode"]) for entry in content["noise"]] == [("ls", FORWARD)]
    assert {(entry["mode"], tuple(entry["lengths"])) for entry in content["flatness"]} == {
        (FORWARD, (32, 64)),
        (TRAINING, (32, 64)),
    }


def test_strict_json(tmp_path: Path) -> None:
    _run(tmp_path, "--functions", "ls_attention")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "speed.json").read_text(), parse_constant=refuse)


def test_what_fails_verify_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(case: Case, impl: str, *rest: object) -> list[Comparison]:
        return [Comparison("dq", 2.0, 1.0 if impl == "eager" else 3.0)]

    monkeypatch.setattr(speed_session, "check", wrong)
    code, content = _run(tmp_path, "--functions", "ls_attention")
    assert code == 1
    ours, *others = content["rows"]
    assert (ours["contender"], ours["status"], ours["median_s"]) == ("eager", "failed verify", None)
    assert "dq of" in ours["reason"]
    assert {row["status"] for row in others} == {"missing"}
    assert "failed verify: eager for ls_attention" in capsys.readouterr().out
    code, content = _run(tmp_path, "--functions", "ls_attention", "--impls", "reference")
    assert code == 0
    assert content["rows"][0]["status"] == "ok"


def test_a_verify_call_that_raises_blocks_timing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("bad kernel")

    monkeypatch.setattr(speed_session, "check", fail)
    code, content = _run(tmp_path, "--functions", "ls_attention")
    assert code == 1
    assert "RuntimeError: bad kernel" in content["rows"][0]["reason"]


def test_a_peer_with_other_results_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(case: Case, inputs: dict[str, Tensor], mode: str) -> Callable[[], Tensor]:
        return lambda: 1.1 * inputs["v"]

    _peer(monkeypatch, "two calls", True, build)
    _, content = _run(tmp_path, "--functions", "ls_attention")
    (row,) = [row for row in content["rows"] if row["contender"] == "two calls"]
    assert row["status"] == "missing"
    assert "differs from ours" in row["reason"]


def test_a_peer_that_breaks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(case: Case, inputs: object, mode: str) -> Callable[[], Tensor]:
        raise RuntimeError("no such kernel")

    def late(case: Case, inputs: object, mode: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            raise RuntimeError("out of memory")

        return call

    _peer(monkeypatch, "two calls", True, build)
    _peer(monkeypatch, "sdpa", False, late)
    code, content = _run(tmp_path, "--functions", "ls_attention")
    assert code == 0
    reasons = {row["contender"]: row["reason"] for row in content["rows"]}
    assert reasons["two calls"] == "RuntimeError: no such kernel"
    assert reasons["sdpa"] == "RuntimeError: out of memory"


def test_what_ours_does_not_offer_is_missing_and_not_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attnvariants.diag_attention

    def forward_only(q: Tensor, *arguments: Any, **options: Any) -> Any:
        if q.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("it has no backward")
        return right(q, *arguments, **options)

    monkeypatch.setattr(speed_session, "check", lambda *_: [])
    monkeypatch.setattr(attnvariants, "diag_attention", forward_only)
    code, content = _run(tmp_path, "--functions", "diag_attention")
    assert code == 0
    found = {row["mode"]: row for row in content["rows"] if row["ours"]}
    assert found[FORWARD]["status"] == "ok"
    assert found[TRAINING]["status"] == "missing"
    assert found[TRAINING]["reason"] == "NotImplementedError: it has no backward"


def test_calls_that_would_take_minutes_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(speed_session.LONGEST_CALL, "cpu", 1e-9)
    _, content = _run(tmp_path, "--functions", "ls_attention")
    assert all(row["status"] == "missing" for row in content["rows"])
    assert all("a call takes more than" in row["reason"] for row in content["rows"])


def test_results_so_far_survive_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = speed_session.Session.time

    def interrupted(self: speed_session.Session, entry: SpeedCase, mode: str, dtype: str) -> Any:
        if entry.case.name == "ls":
            raise KeyboardInterrupt
        return original(self, entry, mode, dtype)

    monkeypatch.setattr(speed_session.Session, "time", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, "--functions", "gated_sdpa", "ls_attention")
    rows = read_json(tmp_path / "speed.json")["rows"]
    assert {row["case"] for row in rows} == {"gated"}


def test_a_later_call_goes_on_behind_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, timed = speed_session.Session.time, []

    def broken(self: speed_session.Session, entry: SpeedCase, mode: str, dtype: str) -> Any:
        timed.append((entry.case.name, mode))
        rows = original(self, entry, mode, dtype)
        if (entry.case.name, mode) == ("gated", TRAINING):
            rows[0].reason = "AcceleratorError: CUDA error: an illegal memory access"
        if entry.case.name == "ls":
            raise KeyboardInterrupt
        return rows

    monkeypatch.setattr(speed_session.Session, "time", broken)
    monkeypatch.setattr(speed_session, "describe", lambda: ENVIRONMENT)
    arguments = ("--functions", "gated_sdpa", "ls_attention", "--resume")
    with pytest.raises(BenchError, match="a kernel broke the device in gated, forward\\+backward"):
        _run(tmp_path, *arguments)
    for _ in range(speed_session.MOST_ATTEMPTS):  # the process ends while it times "ls"
        with pytest.raises(KeyboardInterrupt):
            _run(tmp_path, *arguments)
    assert timed == [("gated", FORWARD), ("gated", TRAINING), *[("ls", FORWARD)] * 2]
    code, content = _run(tmp_path, *arguments)
    assert code == 1
    assert len(timed) == 4
    (row,) = [row for row in content["rows"] if row["case"] == "ls"]
    assert row["status"] == "failed verify"
    assert row["reason"] == "not timed: the process ended 2 times while it ran"
    monkeypatch.setattr(speed_session, "describe", lambda: ENVIRONMENT | {"commit": "other"})
    with pytest.raises(BenchError):
        _run(tmp_path, *arguments)
    assert timed[4:] == timed[:2]
    assert "of another commit (abc, now other)" in capsys.readouterr().out


def test_decode_steps_are_shown_in_microseconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(tmp_path, "--mode", "decode")
    text = capsys.readouterr().out
    for name in ("us in a graph", "us eager", "% floor", "caches"):
        assert text.count(name) == 2


def test_decode_cases_fit_a_gpu_of_80_gb() -> None:
    """Inputs, and a cache for each contender: three of ours and the peers; and two in float32."""
    for entry in speed_cases("cuda"):
        case = entry.case
        if case.function == "attention_decode":
            full = 2 * 2 * case.batch * case.keys * case.key_heads * case.key_dim
            rotated = max(full, 3 * 60 * 2**20)
            assert full + rotated * (3 + len(entry.peers)) + 4 * full < 70e9, case.name
    batches = {entry.case.batch for entry in speed_cases("cuda") if entry.modes == (DECODING,)}
    assert {1, 8, 64, 128, 256} <= batches
    assert max(entry.case.keys for entry in speed_cases("cuda") if entry.case.steps) == 65537


def test_tiny_cases_cover_every_function() -> None:
    cases = speed_cases("cuda", tiny=True)
    assert {entry.case.function for entry in cases} == set(FUNCTIONS)
    assert max(entry.case.length for entry in cases) <= 64


def test_nothing_to_time(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="nothing to time"):
        _run(tmp_path, "--functions", "gated_sdpa", "--modes", "decode")


@pytest.mark.parametrize("arguments", [["--lengths", "0"], ["--rounds", "x"], ["--modes", "both"]])
def test_bad_arguments_end_with_code_2(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _run(tmp_path, *arguments)
    assert caught.value.code == 2


def test_what_has_no_backward_is_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed_session, "has_backward", lambda function, impl: impl != "eager")
    code, content = _run(
        tmp_path, "--functions", "diag_attention", "--impls", "eager", "--dtypes", "float32"
    )
    rows = [row for row in content["rows"] if row["contender"] == "eager"]
    assert code == 0
    assert {row["mode"]: (row["status"], row["reason"]) for row in rows} == {
        FORWARD: ("ok", None),
        TRAINING: ("missing", "not timed: it has no backward"),
    }


def test_decode_starts_every_sample_at_the_same_length() -> None:
    inputs = InputSets(DECODE, DECODING, torch.float32, torch.device("cpu"))
    entry = SpeedCase(DECODE, (DECODING,), ())
    (ours,) = contenders.candidates(entry, ["eager"])
    assert ours.prepare(inputs) is None
    contender = ours.contender()
    first, second = contender.run(0), contender.run(0)
    contender.reset()
    assert torch.equal(contender.run(0), first)
    assert not torch.equal(first, second)  # the cache had grown
    assert ours.cache_bytes == 2 * (16 + timing.MAX_REPEATS) * 2 * 16 * 4 + 4


def test_input_sets_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "cache_bytes", lambda device: 20_000)
    cpu = torch.device("cpu")
    training = InputSets(LOCAL, TRAINING, torch.float32, cpu)  # bound by arithmetic
    assert len(training.sets) == 1
    assert training.rotation(2_560) == 24  # 3 x 20,000 bytes
    assert training.rotation(100) == 64
    assert all(tensor.requires_grad for tensor in training.sets[0].values())


def test_every_contender_of_a_step_rotates_over_caches_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(contenders, "cache_bytes", lambda device: 100_000)
    inputs = InputSets(RING, DECODING, torch.float32, torch.device("cpu"))
    entry = SpeedCase(RING, (DECODING,), ("sdpa decode",))
    ours, peer = contenders.candidates(entry, ["eager"])
    assert ours.prepare(inputs) is None
    assert peer.prepare(inputs) is None
    assert len(inputs.sets) == 1
    # Rings are smaller than the inputs that fill them; a peer's caches are not.
    assert ours.cache_bytes is not None
    assert ours.cache_bytes < inputs.nbytes / 2
    assert (ours.sets - 1) * ours.cache_bytes < 300_000 <= ours.sets * ours.cache_bytes
    assert (peer.sets - 1) * inputs.nbytes < 300_000 <= peer.sets * inputs.nbytes
    first = ours.contender().run(0)
    assert torch.equal(ours.contender().run(1), first)  # another cache, as the first one was


def test_graphs_hold_all_caches_equally_often() -> None:
    assert timing.graph_calls(180, 1e-5) == 180
    assert timing.graph_calls(5, 1e-9) == 60
    assert timing.graph_calls(5, 1.0) == 10
    assert timing.graph_calls(1, 1e-4) == 20


def test_the_last_level_cache_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 2**20 <= contenders.cache_bytes(torch.device("cpu")) <= 2**30


def test_lengths_of_the_sweep() -> None:
    cases = [entry for entry in speed_cases("cpu", lengths=[100, 300]) if entry.sweep]
    assert {entry.case.length for entry in cases} == {100, 300}
    assert {entry.case.heads for entry in cases} == {4}


def test_an_unusable_implementation_is_left_out() -> None:
    entry = SpeedCase(LOCAL, BOTH, ())
    impls, available = ["cuda", "triton", "eager"], attnvariants.implementations()["ls_attention"]
    usable = [impl for impl in impls if available[impl].usable]
    found = contenders.candidates(entry, impls)
    assert [candidate.name for candidate in found] == usable
