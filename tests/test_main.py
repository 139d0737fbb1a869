"""The command line of the package: it never crashes, and it notices what is wrong."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnvariants import __main__ as command
from attnvariants import __version__, implementations
from attnvariants._check_cases import CASES
from attnvariants._select import FUNCTIONS, IMPLEMENTATIONS
from attnvariants._verify import Comparison

pytestmark = pytest.mark.usefixtures("without_interpreter")

ROOT = Path(__file__).resolve().parents[1]


def test_every_function_has_a_case() -> None:
    assert tuple(case.function for case in CASES) == FUNCTIONS


def test_plain_listing(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    text = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert lines["attnvariants"] == [__version__]
    assert lines["torch"] == [torch.__version__]
    assert lines["function"] == list(IMPLEMENTATIONS)
    for function, entries in implementations().items():
        usable = [entries[impl].usable for impl in IMPLEMENTATIONS]
        assert lines[function] == ["yes" if one else "no" for one in usable]
        for impl, entry in entries.items():
            assert entry.usable or f"no {impl}: {entry.reason}" in text


def test_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "attnvariants"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "gated_sdpa" in done.stdout
    assert not done.stderr


def test_check_covers_what_is_usable(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=_refuse)
    expected = {
        (function, impl, dtype)
        for function, entries in implementations().items()
        for impl, entry in entries.items()
        for dtype in ("float32", "bfloat16")
        if entry.usable
    }
    assert {(row["function"], row["impl"], row["dtype"]) for row in report["checks"]} == expected
    assert all(row["ok"] and row["error"] <= row["budget"] for row in report["checks"])
    assert report["environment"]["torch"] == torch.__version__
    assert report["implementations"]["gated_sdpa"]["eager"]["usable"] is True


@pytest.mark.parametrize("function", ["attention_decode", "linear_attention_decode"])
def test_check_notices_a_wrong_step(
    function: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stem = {"attention_decode": "softmax_decode"}.get(function, "linear_decode")
    engine = importlib.import_module(f"attnvariants.eager.{stem}")
    attend = engine.attend

    def wrong(*args: Any) -> Any:
        result = attend(*args)
        for tensor in result if isinstance(result, tuple) else (result,):
            tensor += 1.0
        return result

    monkeypatch.setattr(engine, "attend", wrong)
    monkeypatch.setattr(command, "CASES", [c for c in CASES if c.function == function])
    assert command.main(["--check"]) == 1
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line.startswith(function)][1:]
    assert [(row[1], row[3]) for row in rows] == [
        *[("eager", "FAIL")] * 2,
        *[("reference", "ok")] * 2,
    ]
    assert "4 comparisons with float64" in text
    assert "2 failed" in text


def test_nan_is_a_failure_and_strict_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Comparison("out", 0.0, 0.0), Comparison("dq", float("nan"), 1.0)]
    monkeypatch.setattr(command, "check", lambda *args: rows)
    monkeypatch.setattr(command, "CASES", CASES[:1])
    assert command.main(["--check", "--json"]) == 1
    check = json.loads(capsys.readouterr().out, parse_constant=_refuse)["checks"][0]
    assert (check["ok"], check["worst"], check["error"]) == (False, "dq", "nan")


def test_exception_is_a_failure_with_its_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no kernel image\nlong explanation")

    monkeypatch.setattr(command, "check", broken)
    assert command.main(["--check"]) == 1
    text = capsys.readouterr().out
    assert "RuntimeError: no kernel image\n" in text
    assert "long explanation" not in text
    assert command.main(["--check", "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["checks"][0]["ok"]


def test_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert command.describe()["triton"] == "not installed"


@pytest.mark.parametrize(
    ("error", "state"),
    [(None, "built"), (ImportError("undefined symbol"), "built, but does not load: undefined sym")],
)
def test_extension(error: Exception | None, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        assert name == "attnvariants._C"
        if error is not None:
            raise error

    assert command.describe()["C++ extension"] in ("built", "not built")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", load)
    assert command.describe()["C++ extension"].startswith(state)


def test_cuda_devices_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="Some GPU", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert command.describe()["devices"].endswith("cuda:0 Some GPU (sm_90)")


def test_unknown_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["--verify"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --verify" in capsys.readouterr().err


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")
