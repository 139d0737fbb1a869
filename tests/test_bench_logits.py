"""The logit-growth study from the command line: planning, workers, resuming, errors."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import bench_tasks
import pytest
import torch

from bench import __main__ as command_line
from bench import logits, metrics
from bench.display import Estimate
from bench.errors import BenchError
from bench.records import Result, Run, RunConfig, Settings, read_study, run_path
from bench.workers import Failure, Message, run_tasks

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--width 32 --heads 2 --length 32 --batch 4 --steps 20 --warmup 2 --corpus topics"
SMALL += " --corpus-bytes 60000 --eval-sequences 4 --probe-sequences 1 --overhead-pairs 0"


def parse(text: str, out: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    logits.add_arguments(parser)
    return parser.parse_args([*text.split(), "--out", str(out)])


def study(text: str, out: Path) -> int:
    return logits.run(parse(f"{SMALL} {text}", out))


def losses(out: Path) -> dict[str, list[float]]:
    return {run.header.key: run.losses() for run in read_study(out).runs}


def finished(out: Path) -> int:
    return sum(run.result is not None for run in read_study(out).runs)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without the cost of starting processes, where those are not what is tested."""

    def one_by_one(function: Any, tasks: Sequence[Any], workers: int) -> Iterator[Message]:
        for index, task in enumerate(tasks):
            yield Message(index, "done", function(task, lambda news: None))

    monkeypatch.setattr(logits, "run_tasks", one_by_one)


# --- a small study from end to end -------------------------------------------------------------


@pytest.fixture(scope="module")
def growth(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The smallest study in which growth is plain to see, and what it printed."""
    out = tmp_path_factory.mktemp("growth")
    printed = io.StringIO()
    text = "--preset quick --batch 4 --length 64 --overhead-pairs 0 --eval-sequences 8 --workers 2"
    with contextlib.redirect_stdout(printed):
        assert logits.run(parse(text, out)) == 0
    return out, printed.getvalue()


def by_cell(out: Path) -> dict[tuple[str, float], Run]:
    return {(run.config.mixer, run.config.lr): run for run in read_study(out).runs}


def result(run: Run) -> Result:
    assert run.result is not None
    return run.result


def test_logits_grow_with_the_learning_rate(growth: tuple[Path, str]) -> None:
    """The claims that hold with a wide margin; nothing is asserted about LS or gates."""
    runs = by_cell(growth[0])
    peak = {cell: result(run).peak_max_logit for cell, run in runs.items()}
    assert peak["mhsa", 3e-2] >= 2 * peak["mhsa", 1e-2]
    for rate in (1e-2, 3e-2):
        assert peak["mhsa+qknorm", rate] <= 0.4 * peak["mhsa", rate]
    entropy = {cell: metrics.head_mean(run.probes[-1].entropy) for cell, run in runs.items()}
    assert entropy["mhsa", 3e-2] < entropy["mhsa", 1e-2]
    assert all(result(run).val_loss < result(run).initial_loss - 1 for run in runs.values())


def test_study_is_written_down(growth: tuple[Path, str]) -> None:
    out, _ = growth
    found = read_study(out)
    assert found.grid.preset == "quick"
    assert found.grid.mixers == ["mhsa", "mhsa+qknorm"]
    assert found.grid.learning_rates == [1e-2, 3e-2]
    assert len(found.grid.corpus.sha256) == 64
    assert found.grid.environment["torch"]
    assert len(found.runs) == len(found.grid.runs) == 4
    for path in (out / "logits").iterdir():
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else ():
            json.loads(line, parse_constant=pytest.fail)


def test_plain_output_has_progress_and_tables(growth: tuple[Path, str]) -> None:
    lines = growth[1].splitlines()
    assert sum("left" in line and "loss" in line for line in lines) == 4
    assert any(line.startswith("text: ") and "sha256" in line for line in lines)
    assert "growth" in growth[1]
    assert "4 of 4 runs" in lines[-1]
    assert max(map(len, lines)) < 250
    assert "\x1b" not in growth[1]


# --- planning ----------------------------------------------------------------------------------


def test_the_control_is_always_there(tmp_path: Path) -> None:
    plan = logits.plan(parse(f"{SMALL} --mixers gla", tmp_path))
    assert plan.grid.mixers == ["gla", "mhsa+qknorm"]
    assert "positive control" in plan.notes[0]
    plan = logits.plan(parse(f"{SMALL} --mixers gla --no-control", tmp_path))
    assert plan.grid.mixers == ["gla"]
    assert plan.notes == []
    plan = logits.plan(parse(SMALL, tmp_path))
    assert plan.grid.mixers == ["mhsa", "mhsa+qknorm", "ls", "gated", "gla", "transnormer"]
    assert len(plan.configs) == 6 * 3 * 2


def test_patterns_get_the_layers_they_need(tmp_path: Path) -> None:
    args = parse(SMALL, tmp_path)
    args.mixers = ["mhsa", "gla * 3, gated", "mhsa"]
    plan = logits.plan(args)
    assert plan.grid.mixers == ["mhsa", "gla*3,gated", "mhsa+qknorm"]
    assert plan.grid.settings.layers == 4
    assert "4 layers instead of 2" in plan.notes[1]
    args.set_layers = 3
    with pytest.raises(BenchError, match="'gla\\*3,gated' needs --layers 4 or more, got 3"):
        logits.plan(args)


def test_every_setting_can_be_overridden(tmp_path: Path) -> None:
    text = "--steps 7 --batch 3 --length 40 --width 48 --layers 3 --heads 6 --bos --lrs 0.5 0.1 0.5"
    text += " --positions learned --z-loss 1e-4 --schedule constant --no-compile --seeds 4 2"
    plan = logits.plan(parse(f"--corpus topics {text}", tmp_path))
    settings = plan.grid.settings
    assert (settings.steps, settings.batch, settings.length, settings.width) == (7, 3, 40, 48)
    assert (settings.heads, settings.local_heads, settings.bos) == (6, 5, True)
    assert (settings.positions, settings.z_loss, settings.compile) == ("learned", 1e-4, False)
    assert plan.grid.learning_rates == [0.1, 0.5]
    assert plan.grid.seeds == [4, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--mixers mhsa nothing", "unknown mixer 'nothing'.*known are mhsa"),
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--heads 3 --width 32", "--width must be a multiple of twice the 3 heads"),
        ("--local-heads 9", "--local-heads must be between 0 and the 2 heads, got 9"),
        ("--lrs 0.1 -0.2", "--lrs takes numbers above 0"),
        ("--lrs nan", "--lrs takes numbers above 0"),
        ("--seeds -1", "--seeds takes"),
        ("--clip -1", "--clip must be 0 or more"),
        ("--adam-eps 0", "--adam-eps must be above 0"),
        ("--workers 0", "--workers must be at least 1"),
        ("--device tpu", "--device takes cpu"),
        ("--device meta", "--device takes cpu"),
        ("--corpus /nowhere", "no corpus '/nowhere'"),
        ("--length 9000", "too few for sequences of 9000"),
        ("--heads 1 --width 600", "the mixer mhsa does not take these sizes: .*256"),
    ],
)
def test_bad_options_are_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BenchError, match=message) as error:
        study(text, tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "logits").exists()


def test_results_folder_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="Not a directory"):
        study("", tmp_path / "file")
    (tmp_path / "logits").write_text("")
    with pytest.raises(BenchError, match=r"Not a directory|File exists"):
        study("", tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_gpu_presets_need_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="none is found: take --preset smoke or cpu"):
        logits.run(parse("--preset gpu-ls", tmp_path))


def test_exit_code_of_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["bench", "logits", "--out", str(tmp_path), "--corpus", str(tmp_path / "nothing")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert command_line.main() == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "no corpus" in captured.err


# --- resuming ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_this_process")
def test_resume_repeats_what_is_missing_and_nothing_else(tmp_path: Path) -> None:
    text = "--mixers mhsa --lrs 1e-2 1e-1 --seeds 0 --workers 1"
    assert study(text, tmp_path) == 0
    whole = losses(tmp_path)
    assert finished(tmp_path) == 4

    with pytest.raises(
        BenchError, match=r"already holds a study \(4 of 4 .*--resume .*--overwrite"
    ):
        study(text, tmp_path)

    paths = [run_path(tmp_path, key) for key in whole]
    paths[0].unlink()
    cut = paths[1].read_text().splitlines(keepends=True)
    paths[1].write_text("".join(cut[:4]) + cut[4][:30])  # interrupted within a line
    assert finished(tmp_path) == 2
    untouched = {path: path.read_bytes() for path in paths[2:]}

    assert logits.run(parse("--resume", tmp_path)) == 0  # needs no options
    assert losses(tmp_path) == whole
    assert finished(tmp_path) == 4
    assert {path: path.read_bytes() for path in paths[2:]} == untouched


@pytest.mark.usefixtures("in_this_process")
def test_resume_adds_mixers_rates_and_seeds_but_no_other_study(tmp_path: Path) -> None:
    assert study("--mixers mhsa --no-control --lrs 1e-2 --seeds 0 --resume", tmp_path) == 0
    first = losses(tmp_path)
    text = "--resume --no-control --mixers ls --lrs 1e-2 2e-2 --seeds 1"
    assert logits.run(parse(text, tmp_path)) == 0
    found = read_study(tmp_path)
    assert found.grid.mixers == ["mhsa", "ls"]
    assert found.grid.learning_rates == [1e-2, 2e-2]
    assert found.grid.seeds == [0, 1]
    assert [run.config.mixer for run in found.runs] == ["mhsa", "ls", "ls"]
    assert len(found.grid.environment["resumed"]) == 1
    assert losses(tmp_path).items() >= first.items()

    before = (tmp_path / "logits" / "grid.json").read_bytes()
    with pytest.raises(BenchError, match=r"differs in steps \(20, now 30\), width \(32, now 64\)"):
        logits.run(parse("--resume --steps 30 --width 64", tmp_path))
    with pytest.raises(BenchError, match="differs in text"):
        logits.run(parse("--resume --corpus stdlib", tmp_path))
    assert (tmp_path / "logits" / "grid.json").read_bytes() == before


@pytest.mark.usefixtures("in_this_process")
def test_overwrite_starts_again(tmp_path: Path) -> None:
    assert study("--mixers mhsa --no-control --lrs 1e-2 --seeds 0", tmp_path) == 0
    with pytest.raises(BenchError, match="unknown mixer"):
        study("--mixers nothing --overwrite", tmp_path)
    assert finished(tmp_path) == 1  # a refused call discards nothing
    assert study("--mixers ls --no-control --lrs 2e-2 --seeds 0 --overwrite", tmp_path) == 0
    assert [run.config.mixer for run in read_study(tmp_path).runs] == ["ls"]
    assert len(list((tmp_path / "logits").glob("*.jsonl"))) == 1


@pytest.mark.usefixtures("in_this_process")
def test_nan_runs_are_results(tmp_path: Path) -> None:
    assert study("--mixers mhsa --no-control --lrs 1e-2 1e30 --seeds 0", tmp_path) == 0
    summary = metrics.summarise(read_study(tmp_path))
    assert [cell.status for cell in summary.cells] == ["ok", "nan"]
    assert finished(tmp_path) == 2


# --- trouble -----------------------------------------------------------------------------------


WITH_LIMIT = """
import os, resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def command(out: Path, *more: str, file_limit: int | None = None) -> subprocess.Popen[str]:
    """The study as a user starts it; ``file_limit`` bytes are all that fits into one file."""
    limited = [] if file_limit is None else ["-c", WITH_LIMIT, str(file_limit)]
    study_command = ["-m", "bench", "logits", *SMALL.split(), *more, "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, *limited, *study_command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # as a terminal would: one group of processes
    )


def test_interrupt_keeps_what_is_written(tmp_path: Path) -> None:
    process = command(tmp_path, "--mixers", "mhsa", "--steps", "100000", "--workers", "2")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if any(path.stat().st_size for path in (tmp_path / "logits").glob("*.jsonl")):
            break
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches the workers as well
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2, out + err
    assert err.strip().count("\n") == 0
    assert "interrupted" in err
    assert "Traceback" not in out + err
    runs = read_study(tmp_path).runs
    assert runs
    assert all(run.result is None for run in runs)
    deadline = time.monotonic() + 10
    while (left := is_alive(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, "a worker is still running"


def is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_full_disk_is_one_line_and_resume_continues(tmp_path: Path) -> None:
    arguments = ("--mixers", "mhsa", "--no-control", "--seeds", "0", "--stats-every", "1")
    process = command(tmp_path, *arguments, "--workers", "1", file_limit=6000)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, out + err
    assert err.strip().count("\n") == 0
    assert "cannot write results" in err
    assert "--resume continues" in err
    (run,) = read_study(tmp_path).runs
    assert run.result is None
    assert 0 < len(run.steps) < 20
    assert logits.run(parse("--resume --no-control --workers 2", tmp_path)) == 0
    assert finished(tmp_path) == 3


def messages(tasks: list[tuple[Any, ...]], workers: int = 2) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {index: [] for index in range(len(tasks))}
    for message in run_tasks(bench_tasks.act, tasks, workers):
        found[message.task].append((message.kind, message.value))
    return found


def test_a_crash_costs_its_own_task_only() -> None:
    tasks: list[tuple[Any, ...]] = [("square", 2), ("raise",), ("kill",), ("exit",), ("square", 3)]
    found = messages(tasks)
    assert found[0] == [("progress", "square"), ("done", 4)]
    assert found[4] == [("progress", "square"), ("done", 9)]
    failures = [found[index][-1] for index in (1, 2, 3)]
    assert all(kind == "failed" and not failure.fatal for kind, failure in failures)
    raised, killed, ended = (failure for _, failure in failures)
    assert raised.message == "RuntimeError: no luck"
    assert "bench_tasks.py" in raised.details
    assert killed.message == "the worker process was killed by SIGKILL"
    assert ended.message == "the worker process ended with exit code 3"


def test_processes_are_used_again_and_fatal_failures_say_so() -> None:
    found = messages([("pid",), ("full",), ("refuse",), ("pid",)], workers=1)
    assert found[0][-1] == found[3][-1]
    assert found[0][-1][1] != os.getpid()
    assert found[1][-1][1].fatal
    assert "No space left on device" in found[1][-1][1].message
    assert found[2][-1][1] == Failure("the corpus is gone", fatal=True)


def test_workers_end_with_the_iterator() -> None:
    iterator = run_tasks(bench_tasks.act, [("pid",), ("sleep", 600)], 1)
    pid = next(message.value for message in iterator if message.kind == "done")
    assert next(iterator).kind == "progress"
    iterator.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_failed_runs_are_reported_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logits, "run_one", bench_tasks.refuse_seed_1)
    text = "--mixers mhsa --no-control --lrs 1e-2 --seeds 0 1 --workers 1"
    assert study(text, tmp_path) == 2
    printed = capsys.readouterr()
    assert "seed 1: failed: RuntimeError: not this one" in printed.out
    assert "1 of 2 runs failed; --resume tries them again" in printed.err
    (details,) = (tmp_path / "logits").glob("*.error.txt")
    assert "Traceback" in details.read_text()
    monkeypatch.undo()
    assert logits.run(parse("--resume --no-control", tmp_path)) == 0
    assert finished(tmp_path) == 2


# --- the estimate ------------------------------------------------------------------------------


def test_estimate_of_the_time_left() -> None:
    runs = [RunConfig(mixer, 0.1, 0, "", Settings(steps=100)) for mixer in ("a", "b", "a", "c")]
    estimate = Estimate(runs, workers=2)
    assert estimate.remaining() is None
    estimate.progress(0, 10, now=1.0)
    assert estimate.remaining() is None  # one point is no rate
    estimate.progress(0, 20, now=2.0)  # "a" takes 0.1 s per step, the others are not known yet
    assert estimate.remaining() == pytest.approx(0.1 * (80 + 100 + 100 + 100) / 2)
    outcome = argparse.Namespace(wall_seconds=15.0, steps_done=100)
    estimate.finished(0, outcome)  # type: ignore[arg-type]
    estimate.progress(1, 0, now=10.0)
    estimate.progress(1, 50, now=30.0)  # "b": 0.4 s
    assert estimate.remaining() == pytest.approx((0.4 * 50 + 0.15 * 100 + 0.275 * 100) / 2)
    estimate.finished(2, None)
    estimate.finished(3, None)
    assert estimate.remaining() == pytest.approx(20.0)  # the longest run decides, not the mean
