"""The files of a logit-growth study."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.errors import BenchError
from bench.records import (
    CorpusInfo,
    Eval,
    Grid,
    Header,
    Probe,
    Result,
    RunConfig,
    RunWriter,
    Settings,
    Step,
    is_finished,
    read_grid,
    read_run,
    read_study,
    run_path,
    to_line,
    write_grid,
)
from bench.strict_json import dumps, loads, read_json, write_json

INF, NAN = math.inf, math.nan
CONFIG = RunConfig("gla*1,gated", 0.01, 3, "abc", Settings(bos=True, device="cuda:1"))
HEADER = Header(CONFIG.key, CONFIG, ["gla", "gated"], 12, [["global"]] * 2, ["a", "b"])
STEP = Step(
    4, NAN, 0.01, INF, [[1.0, -INF], None], [2.0], [1e-3], 3.0, -1.0, 9.5, [1.0, NAN], [INF]
)
PROBE = Probe(5, *[[[0.5], None]] * 10, *[[1.0, 2.0]] * 3)
RESULT = Result(
    *("nan", 4, NAN, 2.5, 5.5, NAN, INF, None, 3.0, 1.0, None, 0.0, 30),
    *(1.5, 2.5, 100.0, 12, None, -0.01),
)


def write(path: Path, *records: Any) -> None:
    with RunWriter(path) as writer:
        for record in records:
            writer.write(record)


def grid(*configs: RunConfig) -> Grid:
    runs = [{"key": c.key, "mixer": c.mixer, "lr": c.lr, "seed": c.seed} for c in configs]
    corpus = CorpusInfo("topics", "/topics.py", "abc", 10, 9, 1, 1)
    environment = {"gpu": None, "date": "2026-01-01"}
    return Grid("smoke", ["mhsa"], [0.01], [0], Settings(), corpus, environment, runs)


def same(a: Any, b: Any) -> bool:
    return bool(repr(a) == repr(b))  # NaN is not equal to itself


def test_json_is_strict_and_comes_back() -> None:
    value = {"a": [1, 2.5, NAN, (INF, -INF)], "status": "nan", "text": "inside", "none": None}
    text = dumps(value)
    json.loads(text, parse_constant=pytest.fail)
    assert same(
        loads(text),
        {"a": [1, 2.5, NAN, [INF, -INF]], "status": "nan", "text": "inside", "none": None},
    )


def test_every_kind_of_line_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.jsonl"
    write(path, HEADER, STEP, PROBE, Eval(5, NAN), RESULT)
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    run = read_run(path)
    assert run is not None
    assert same(run.header, HEADER)
    assert run.config == CONFIG
    assert same(run.steps, [STEP])
    assert same(run.probes, [PROBE])
    assert same(run.evals, [Eval(5, NAN)])
    assert same(run.result, RESULT)
    assert same(run.losses(), [1.0, NAN])
    assert run.grad_norms() == [INF]


def test_the_config_line_is_flat() -> None:
    line = json.loads(to_line(HEADER))
    assert line["kind"] == "config"
    assert line["mixer"] == "gla*1,gated"
    assert line["steps"] == 100
    assert line["corpus_sha256"] == "abc"


def test_key_depends_on_every_setting() -> None:
    changes: dict[type, Any] = {bool: True, int: 77, float: 0.77, str: "other"}
    variants = [CONFIG]
    variants += [dataclasses.replace(CONFIG, mixer="ls"), dataclasses.replace(CONFIG, lr=0.02)]
    variants += [dataclasses.replace(CONFIG, seed=4), dataclasses.replace(CONFIG, corpus_sha256="")]
    for field in dataclasses.fields(Settings):
        settings = dataclasses.replace(Settings(), **{field.name: changes[type(field.default)]})
        variants.append(dataclasses.replace(CONFIG, settings=settings))
    keys = {config.key for config in variants}
    assert len(keys) == len(variants)


def test_key_is_the_same_in_another_process() -> None:
    code = "from bench.records import *; print(RunConfig('mhsa', 0.1, 0, 'abc').key)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == RunConfig("mhsa", 0.1, 0, "abc").key


def test_a_line_cut_short_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write(path, HEADER, Eval(0, 1.0), Eval(1, 2.0), RESULT)
    whole = path.read_text()
    for cut in (1, 10, len(to_line(RESULT))):
        path.write_text(whole[:-cut])
        run = read_run(path)
        assert run is not None
        assert run.evals == [Eval(0, 1.0), Eval(1, 2.0)]
        assert run.result is None
        assert not is_finished(path)
    path.write_text(to_line(HEADER))  # not even the first line is whole
    assert read_run(path) is None
    assert read_run(tmp_path / "absent.jsonl") is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 2"),
        ("[]", "line 2"),
        ('{"kind":"other"}', "line 2"),
        ('{"kind":"eval","step":1}', "line 2"),
        ('{"kind":"eval","step":1,"val_loss":2,"more":3}', "line 2"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, bad: str, message: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(to_line(HEADER) + "\n" + bad + "\n" + to_line(RESULT) + "\n")
    with pytest.raises(BenchError, match=message):
        read_run(path)


def test_run_without_config_line(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(to_line(RESULT) + "\n")
    with pytest.raises(BenchError, match="the config line is missing"):
        read_run(path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(BenchError, match="cannot read"):
        read_run(path)


def test_study_reads_started_runs_in_the_grids_order(tmp_path: Path) -> None:
    configs = [RunConfig("mhsa", lr, 0, "abc") for lr in (0.1, 0.2, 0.3)]
    write_grid(tmp_path, grid(*configs))
    for config in (configs[2], configs[0]):
        write(run_path(tmp_path, config.key), dataclasses.replace(HEADER, config=config))
    study = read_study(tmp_path)
    assert study.grid == grid(*configs)
    assert [run.config.lr for run in study.runs] == [0.1, 0.3]
    assert not (tmp_path / "logits" / "grid.json.partial").exists()


def test_missing_and_foreign_studies(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="cannot read"):
        read_study(tmp_path)
    write_json(tmp_path / "logits" / "grid.json", {"schema": 99})
    with pytest.raises(BenchError, match="schema 99"):
        read_grid(tmp_path)
    write_json(tmp_path / "logits" / "grid.json", [1])
    with pytest.raises(BenchError, match="damaged"):
        read_grid(tmp_path)
    (tmp_path / "logits" / "grid.json").write_text("{")
    with pytest.raises(BenchError, match="not valid JSON"):
        read_grid(tmp_path)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["file.json"]
