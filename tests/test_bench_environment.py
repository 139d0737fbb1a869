"""The environment record: complete, JSON-ready, and silent about what it cannot find out."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from bench import environment


def test_describes_this_machine() -> None:
    found = environment.describe()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["torch"] == torch.__version__
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 2**20
    assert found["date"].endswith("+00:00")
    assert set(found["peers"]) == set(environment.PEERS)
    assert (found["gpu"] is None) == (not torch.cuda.is_available())


def test_one_line_names_the_versions() -> None:
    found = environment.describe()
    line = environment.one_line(found)
    assert "\n" not in line
    assert found["torch"] in line
    assert found["attnvariants"] in line


def test_missing_tools_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    assert environment._git() == (None, None)
    assert environment._version("no-such-package-anywhere") is None
    assert "unknown commit" in environment.one_line(environment.describe())


def test_failing_and_hanging_tools_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise subprocess.TimeoutExpired("git", 10)

    monkeypatch.setattr(environment.subprocess, "run", fail)
    assert environment._output("git", "status") is None


def test_a_busy_machine_is_said() -> None:
    found = environment.describe() | {"cores": 4}
    assert environment.disturbance(found | {"load_average": 1.9}) is None
    assert environment.disturbance(found | {"load_average": None}) is None
    assert "load average 6.0 on 4 cores" in str(
        environment.disturbance(found | {"load_average": 6.0})
    )
