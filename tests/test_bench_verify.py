"""``python -m bench verify`` finds what is wrong, and says what it did not look at."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attnvariants
from attnvariants._select import FUNCTIONS, Availability
from bench import verify
from bench.cases import DECAYS, Case
from bench.errors import BenchError
from bench.records import read_json
from bench.verify_cases import verify_cases
from bench.workers import Failure, Message

pytestmark = pytest.mark.usefixtures("without_interpreter")


def _run(out: Path, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return verify.run(parser.parse_args([*arguments, "--device", "cpu", "--out", str(out)]))


def _break(monkeypatch: pytest.MonkeyPatch, function: str, wrong: Callable[..., Any]) -> None:
    """Replaces a public function by ``wrong(right, ...)``, for one implementation."""
    right = getattr(attnvariants, function)

    def broken(*arguments: Any, impl: str, **options: Any) -> Any:
        if impl != "eager":
            return right(*arguments, impl=impl, **options)
        return wrong(right, *arguments, impl="reference", **options)

    monkeypatch.setattr(attnvariants, function, broken, raising=False)


def test_cases_reach_every_function_and_edge() -> None:
    cases = verify_cases()
    assert {case.function for case in cases} == set(FUNCTIONS)
    assert {case.function for case in verify_cases(quick=True)} == set(FUNCTIONS)
    names = [(case.function, case.name) for case in cases]
    assert len(set(names)) == len(names)
    assert {1, 17, 64, 65, 200, 1000} <= {case.length for case in cases}
    assert {case.decays for case in cases} == set(DECAYS)
    assert any(0 in case.sequences for case in cases)
    assert any(case.key_dim != case.values for case in cases)
    assert any(case.keys > case.length for case in cases)
    for case in cases:
        assert not case.sequences or sum(case.sequences) == case.length
        assert sum(case.steps) in (0, case.length)


def test_reference_passes_in_every_dtype(tmp_path: Path) -> None:
    assert _run(tmp_path, "--quick", "--impls", "reference") == 0
    content = read_json(tmp_path / "verify.json")
    assert content["ok"]
    assert {row["function"] for row in content["rows"]} == set(FUNCTIONS)
    assert {row["dtype"] for row in content["rows"]} == set(verify.DTYPES)
    assert all(row["ratio"] <= 1 for row in content["rows"])
    assert {"environment", "summary", "not_run", "seconds", "device"} <= set(content)


def test_a_wrong_result_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(right: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        result = right(*arguments, **options)
        parts = result if isinstance(result, tuple) else (result,)
        parts = (parts[0] * (1 + 1e-3), *parts[1:])
        return parts if isinstance(result, tuple) else parts[0]

    _break(monkeypatch, "gated_sdpa", wrong)
    options = ("--functions", "gated_sdpa", "--dtypes", "float32", "--quick")
    assert _run(tmp_path, *options, "--impls", "reference") == 0
    assert _run(tmp_path, *options) == 1
    content = read_json(tmp_path / "verify.json")
    assert not content["ok"]
    failed = [row for row in content["rows"] if not row["ok"]]
    assert {row["impl"] for row in failed} == {"eager"}
    assert "out" in {row["name"] for row in failed}
    assert "FAILED gated_sdpa eager float32" in capsys.readouterr().out


def test_a_wrong_gradient_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(right: Callable[..., Any], q: Any = None, **options: Any) -> Any:
        return right(q=q * 0.5 + (q * 0.5).detach(), **options)

    _break(monkeypatch, "gated_linear_attention", wrong)
    options = ("--functions", "gated_linear_attention", "--dtypes", "float32", "--quick")
    assert _run(tmp_path, *options, "--impls", "eager") == 1
    failed = [row for row in read_json(tmp_path / "verify.json")["rows"] if not row["ok"]]
    assert {row["name"] for row in failed} == {"dq"}


def test_a_wrong_decode_step_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(right: Callable[..., Any], q: Any, k: Any, v: Any, cache: Any, **kw: Any) -> Any:
        out = right(q, k, v, cache, **kw)
        cache.lengths.sub_(1)
        return out

    _break(monkeypatch, "attention_decode", forgets)
    options = ("--functions", "attention_decode", "--dtypes", "float32", "--quick")
    assert _run(tmp_path, *options, "--impls", "eager") == 1
    failed = [row for row in read_json(tmp_path / "verify.json")["rows"] if not row["ok"]]
    assert {row["name"] for row in failed} == {"out", "lengths"}


def test_a_call_that_raises_fails_and_an_unsupported_one_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(error: Exception) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            raise error

        return call

    options = ("--functions", "diag_attention", "--dtypes", "float32", "--quick")
    _break(monkeypatch, "diag_attention", raises(RuntimeError("it broke")))
    assert _run(tmp_path, *options, "--impls", "eager") == 1
    rows = read_json(tmp_path / "verify.json")["rows"]
    assert all(row["name"] == "call" and "it broke" in row["reason"] for row in rows)

    _break(monkeypatch, "diag_attention", raises(NotImplementedError("no such block")))
    assert _run(tmp_path, *options) == 0
    content = read_json(tmp_path / "verify.json")
    assert {row["impl"] for row in content["rows"]} == {"reference"}
    skipped = [entry for entry in content["not_run"] if entry["impl"] == "eager"]
    assert {entry["reason"] for entry in skipped} == {"no such block"}


def test_what_is_not_usable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usable = attnvariants.implementations()
    usable["diag_attention"]["eager"] = Availability(False, "the moon is full")
    monkeypatch.setattr(attnvariants, "implementations", lambda: usable, raising=False)
    options = ("--functions", "diag_attention", "--dtypes", "float32", "--quick")
    assert _run(tmp_path, *options) == 0
    not_run = read_json(tmp_path / "verify.json")["not_run"]
    assert {"eager", "triton", "cuda"} == {entry["impl"] for entry in not_run}
    with pytest.raises(BenchError, match="nothing to verify here: eager: the moon is full"):
        _run(tmp_path, *options, "--impls", "eager")


def test_result_is_strict_json(tmp_path: Path) -> None:
    _run(tmp_path, "--functions", "diag_attention", "--impls", "reference", "--quick")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "verify.json").read_text(), parse_constant=refuse)


@pytest.mark.parametrize("device", ["tpu9", "meta", "cuda"])
def test_devices_that_are_not_there(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(BenchError, match=f"--device {device}"):
        verify.pick_device(device)


@pytest.mark.parametrize("arguments", [["--functions", "attention"], ["--impls", "fast"]])
def test_unknown_choices_end_with_code_2(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        _run(tmp_path, *arguments)
    assert caught.value.code == 2


def test_worst_ratio_puts_nan_first() -> None:
    rows = [
        verify.Row("f", "eager", "float32", "a", "out", 0.5, 1.0, True),
        verify.Row("f", "eager", "float32", "b", "out", float("nan"), 1.0, False),
    ]
    (entry,) = verify.summarize(rows)
    assert entry["worst"] == "out of b"
    assert entry["failed"] == 1


def test_inputs_have_the_dtypes_of_the_contract() -> None:
    case = Case(
        "gated_linear_attention",
        "all",
        g="channel",
        gate="headwise",
        norm_weight="head",
        initial_state=True,
        sequences=(30, 34),
    )
    tensors = case.tensors(torch.bfloat16)
    assert {name for name, t in tensors.items() if t.dtype == torch.float32} == {
        "g",
        "initial_state",
    }
    assert tensors["cu_seqlens"].tolist() == [0, 30, 64]
    assert tensors["initial_state"].shape == (2, 2, 16, 16)
    assert bool((tensors["g"] <= 0).all())
    again = case.tensors(torch.bfloat16)
    assert torch.equal(tensors["q"], again["q"])
    assert not torch.equal(tensors["q"], case.tensors(torch.bfloat16, seed=1)["q"])


def test_a_process_that_ends_costs_one_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One case breaks the device, another the process: both are named, the others go on."""
    names = [case.name for case in verify_cases(["diag_attention"])]
    broken = "AcceleratorError: CUDA error: an illegal memory access was encountered"
    asked: list[list[str]] = []

    def run_tasks(function: Any, tasks: Any, jobs: int) -> Iterator[Message]:
        assert jobs == 2
        (task,) = tasks
        asked.append([case.name for case in task.cases])
        for case in task.cases:
            if case.name == names[3]:
                yield Message(0, "failed", Failure("the worker process was killed by SIGSEGV"))
                return
            labels = (task.function, task.impl, task.dtype, case.name)
            bad = case.name == names[1]
            row = verify.Row(*labels, "out", 0.0, 1.0, not bad, broken if bad else "")
            yield Message(0, "progress", ([row], []))
            if bad:
                yield Message(0, "failed", Failure("the worker process ended with exit code 1"))
                return
        yield Message(0, "done", None)

    monkeypatch.setattr(verify, "run_tasks", run_tasks)
    options = ("--functions", "diag_attention", "--impls", "eager", "--dtypes", "float32")
    assert _run(tmp_path, *options, "--jobs", "2") == 1
    assert asked == [names, names[2:], names[4:]]
    content = read_json(tmp_path / "verify.json")
    assert [row["case"] for row in content["rows"]] == names
    reasons = {row["case"]: row["reason"] for row in content["rows"] if not row["ok"]}
    assert reasons == {
        names[1]: broken,
        names[3]: "the worker process was killed by SIGSEGV",
    }
    assert content["complete"]


def test_worker_processes_check_as_this_one_does(tmp_path: Path) -> None:
    options = ("--functions", "diag_attention", "--impls", "eager", "--dtypes", "float32")
    _run(tmp_path / "one", *options)
    _run(tmp_path / "two", *options, "--jobs", "2")
    one, two = (read_json(tmp_path / name / "verify.json") for name in ("one", "two"))
    assert one["rows"] == two["rows"]


def test_wide_cases_reach_every_function_at_every_head_dim() -> None:
    added = [case for case in verify_cases(wide=True) if case not in verify_cases()]
    for dim in (64, 96, 128, 256):
        functions = {case.function for case in added if case.key_dim == dim}
        assert functions == set(FUNCTIONS)
    assert not [case for case in verify_cases(quick=True, wide=True) if case in added]


@pytest.mark.parametrize("function", ["attention_decode", "diag_attention"])
def test_wide_cases_are_within_their_budget(function: str, tmp_path: Path) -> None:
    options = ("--functions", function, "--impls", "eager", "--dtypes", "bfloat16", "--wide")
    assert _run(tmp_path, *options) == 0
    names = {row["case"] for row in read_json(tmp_path / "verify.json")["rows"]}
    assert any("D=256" in name for name in names)
