"""``bench replay`` finds what depends on a stream or a graph; ``bench sanitize`` what tools say."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import attnvariants
from attnvariants._select import FUNCTIONS, Availability
from bench import anchors, replay, replay_cases, sanitize, timing
from bench.cases import DECODE
from bench.environment import describe
from bench.errors import BenchError
from bench.records import read_json
from bench.replay_cases import CASES, Call

pytestmark = pytest.mark.usefixtures("without_interpreter")


def _run(module: ModuleType, out: Path, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return int(module.run(parser.parse_args([*arguments, "--out", str(out)])))


def _replay(out: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    fixed = ("--device", "cpu", "--dtypes", "float32", "--impls", "eager")
    code = _run(replay, out, *fixed, *arguments)
    return code, read_json(out / "replay.json")["rows"]


# --- graphs and streams --------------------------------------------------------------------------


def test_every_function_is_replayed() -> None:
    assert {case.function for case in CASES} == set(FUNCTIONS)


def test_plain_pytorch_passes(tmp_path: Path) -> None:
    functions = ("diag_attention", "attention_decode", "linear_attention_decode")
    code, rows = _replay(tmp_path, "--functions", *functions)
    assert code == 0
    assert {row["check"] for row in rows} == {
        *("plain call", "side stream", "two streams", "graph", "graph, new inputs")
    }
    assert {row["function"] for row in rows} == set(functions)
    assert {row["mode"] for row in rows} == {"forward", "forward+backward"}


def test_calls_only(tmp_path: Path) -> None:
    code, rows = _replay(tmp_path, "--functions", "diag_attention", "--only-calls")
    assert code == 0
    assert {row["check"] for row in rows} == {"plain call"}


def test_what_changes_from_call_to_call_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = attnvariants.diag_attention, [0]

    def drifts(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        return right(*arguments, **options) + 1e-6 * calls[0]

    monkeypatch.setattr(attnvariants, "diag_attention", drifts)
    code, rows = _replay(tmp_path, "--functions", "diag_attention")
    assert code == 1
    failed = {row["check"] for row in rows if not row["ok"]}
    assert failed == {"side stream", "two streams", "graph", "graph, new inputs"}
    assert "output 0 of step 0 is not that of a plain call" in {row["reason"] for row in rows}


def test_a_graph_that_does_not_see_new_inputs_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(call: Call, device: torch.device) -> tuple[Any, Callable[[], Any]]:
        call.reset()
        return call.run(), lambda: None

    monkeypatch.setattr(replay, "_record", stale)
    code, rows = _replay(tmp_path, "--functions", "diag_attention")
    assert code == 1
    assert {row["check"] for row in rows if not row["ok"]} == {"graph, new inputs"}
    code, rows = _replay(tmp_path, "--functions", "linear_attention_decode")
    assert {row["check"] for row in rows if not row["ok"]} == {"graph", "graph, new inputs"}


def test_a_call_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(attnvariants, "diag_attention", fails)
    code, rows = _replay(tmp_path, "--functions", "diag_attention")
    assert code == 1
    (row,) = rows  # nothing behind it could be trusted
    assert "illegal memory access" in row["reason"]
    assert not read_json(tmp_path / "replay.json")["complete"]


def test_what_an_implementation_does_not_offer_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attnvariants.diag_attention

    def forward_only(q: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and q.requires_grad:
            raise NotImplementedError("it has no backward")
        return right(q, *arguments, **options)

    monkeypatch.setattr(attnvariants, "diag_attention", forward_only)
    code, rows = _replay(tmp_path, "--functions", "diag_attention", "--large", "5000")
    assert code == 0
    reasons = {row["reason"] for row in rows if row["mode"] == "forward+backward"}
    assert reasons == {"not checked: NotImplementedError: it has no backward"}
    forward = [row for row in rows if row["mode"] == "forward"]
    assert len(forward) == 12  # six checks of two cases
    assert not any(row["reason"] for row in forward)


def test_no_kernels_no_replay(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no kernel is usable here"):
        _run(replay, tmp_path, "--device", "cpu")


def test_small_cases_keep_their_features() -> None:
    for case in CASES:
        small = replay_cases.small(case)
        assert (small.gate, small.g, small.heads) == (case.gate, case.g, case.heads)
        assert dict(small.options).keys() >= dict(case.options).keys()
        assert max(small.length, small.key_dim, small.values) <= 20


def test_the_last_row_of_a_large_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, rows = _replay(tmp_path, "--large", "5000")
    large = [row for row in rows if row["check"] == replay.LARGE]
    assert code == 0
    modes = sum(1 if case.function in DECODE else 2 for case in CASES)
    assert len(large) == modes

    right, sizes = attnvariants.diag_attention, []

    def overflows(q: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(q.numel())
        out = right(q, *arguments, **options)
        return out if q.numel() <= 5000 else out * 1.01

    monkeypatch.setattr(attnvariants, "diag_attention", overflows)
    code, rows = _replay(tmp_path, "--functions", "diag_attention", "--large", "5000")
    assert code == 1
    assert max(sizes) > 5000
    failed = [row for row in rows if not row["ok"]]
    assert {row["check"] for row in failed} == {replay.LARGE}
    assert "output 0 differs from that of the row alone by 1.0e-02" in failed[0]["reason"]

    def full(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(replay, "difference_of_last_row", full)
    code, rows = _replay(tmp_path, "--functions", "diag_attention", "--large", "5000")
    assert code == 0
    assert "not checked: OutOfMemoryError" in [row["reason"] for row in rows][-1]


# --- the sanitizer -------------------------------------------------------------------------------

CLEAN = "calls\n========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
FOUND = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at softmax_decode+0x100
========= ERROR SUMMARY: 2 errors
"""
RACE = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"


def test_what_a_tool_says() -> None:
    row = sanitize.judge("memcheck", "f", "cuda", 0, CLEAN)
    assert (row.ok, row.summary, row.complaint) == (True, "0 errors", "")
    row = sanitize.judge("memcheck", "f", "cuda", sanitize.COMPLAINT, FOUND)
    assert (row.ok, row.summary) == (False, "2 errors")
    assert "Invalid __global__ read" in row.complaint
    row = sanitize.judge("racecheck", "f", "cuda", sanitize.COMPLAINT, RACE)
    assert row.summary == "1 hazard displayed (1 error, 0 warnings)"
    row = sanitize.judge("memcheck", "f", "cuda", 1, "Traceback\nRuntimeError: broken\n")
    assert (row.ok, row.summary) == (False, "exit code 1")
    assert "RuntimeError: broken" in row.complaint


def test_the_tool_watches_the_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in on PATH that writes down how it was called, and complains about races."""
    tool = tmp_path / "bin" / sanitize.SANITIZER
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> {tmp_path}/asked\n'
        f'if [ "$2" = racecheck ]; then cat <<EOF\n{RACE}EOF\nexit 9; fi\n'
        "echo '========= ERROR SUMMARY: 0 errors'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    here = dict.fromkeys(sanitize.IMPLS, Availability(True, ""))
    monkeypatch.setattr(attnvariants, "implementations", lambda: dict.fromkeys(FUNCTIONS, here))
    assert _run(sanitize, tmp_path, "--functions", "attention_decode", "--impls", "cuda") == 1
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.split()[:3] for line in asked] == [
        ["1", "--tool", "memcheck"],
        ["1", "--tool", "racecheck"],
    ]
    for part in ("--error-exitcode 9", "bench replay --only-calls", "--impls cuda"):
        assert part in asked[0]
    content = read_json(tmp_path / "sanitize.json")
    assert content["complete"]
    assert [row["ok"] for row in content["rows"]] == [True, False]

    functions = ("--functions", "attention_decode", "linear_attention_decode", "--impls", "cuda")
    assert _run(sanitize, tmp_path, *functions, "--resume") == 1
    assert len((tmp_path / "asked").read_text().splitlines()) == 4  # two were there
    assert len(read_json(tmp_path / "sanitize.json")["rows"]) == 4
    monkeypatch.setattr(sanitize, "describe", lambda: describe() | {"commit": "another"})
    assert _run(sanitize, tmp_path, *functions, "--resume") == 1
    assert len((tmp_path / "asked").read_text().splitlines()) == 8


def test_without_the_tool_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    assert _run(sanitize, tmp_path) == 0
    assert "compute-sanitizer is not on PATH" in capsys.readouterr().out
    assert read_json(tmp_path / "sanitize.json")["sanitizer"] is None


# --- anchors -------------------------------------------------------------------------------------


def test_moments_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        timing,
        "measure_anchors",
        lambda moment, device, dtypes: timing.Anchors(moment, 1e9, {"float32": 1e9}),
    )
    for moment in ("start", "end"):
        assert _run(anchors, tmp_path, "--device", "cpu", "--moment", moment) == 0
    measured = read_json(tmp_path / "anchors.json")["measured"]
    assert [entry["moment"] for entry in measured] == ["start", "end"]


# --- what a CPU can try of a GPU's part -----------------------------------------------------------


def test_a_call_is_captured_behind_two_that_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph's part in ``_record``, with stand-ins for streams and graphs."""
    log: list[str] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            assert device.type == "cuda"

        def wait_stream(self, other: object) -> None:
            log.append("wait")

    @contextlib.contextmanager
    def entered(name: str) -> Iterator[None]:
        log.append(f"{name} {{")
        yield
        log.append("}")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    def run() -> list[torch.Tensor]:
        log.append("run")
        return [torch.zeros(1)]

    main = Stream(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered("stream"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: entered("capture"))
    call = Call(run, lambda: log.append("reset"), {}, [])
    outputs, again = replay._record(call, torch.device("cuda"))
    assert torch.equal(outputs[0], torch.zeros(1))
    again()
    warm = ["reset", "wait", "stream {", "run", "run", "}", "wait"]
    assert log == [*warm, "capture {", "run", "}", "replay"]
