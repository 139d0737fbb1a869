"""``python -m bench gpu`` keeps to its time box, resumes, and goes through every section."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import __main__, gpu, gpu_process, gpu_sections, report
from bench.environment import describe
from bench.errors import BenchError
from bench.gpu_process import CUT_OFF, Outcome
from bench.gpu_sections import Section
from bench.records import read_json, write_json
from bench.timing import Anchors

ENVIRONMENT = describe()
ANCHORS = Section("anchors", (), ("anchors",), least=30, always=True)
PLAN = [
    ANCHORS,
    Section("verify", ("verify",), ("verify",), weight=1),
    Section("speed", ("speed",), ("speed",), weight=2, resumes=True, timed=True),
    Section("study", ("study",), ("study",), weight=1, timed=True),
    ANCHORS,
]


class Fake:
    """Stands in for the processes: what each section does, and a clock that it moves."""

    def __init__(self, folder: Path, **behaviour: list[tuple[float, int]]) -> None:
        self.folder, self.behaviour = folder, behaviour
        self.time = 0.0
        self.limits: list[tuple[str, float]] = []
        self.copy = [1.0]

    def __call__(
        self, section: Section, command: Sequence[str], folder: Path, limit: float
    ) -> Outcome:
        self.limits.append((section.name, limit))
        seconds, code = self.behaviour.get(section.name, [(10.0, 0)])[0]
        if len(self.behaviour.get(section.name, [])) > 1:
            self.behaviour[section.name].pop(0)
        self.time += min(seconds, limit)
        if section is ANCHORS:
            path = self.folder / "anchors.json"
            measured = read_json(path)["measured"] if path.exists() else []
            rate = self.copy.pop(0) if len(self.copy) > 1 else self.copy[0]
            write_json(path, {"measured": [*measured, Anchors("now", rate, {})]})
        if code == 99:
            raise KeyboardInterrupt
        return Outcome(CUT_OFF if seconds > limit else code, f"{section.name} said {code}")

    def run(self, seconds: float = 600, *, fresh: bool = False) -> gpu.Box:
        from bench.console import make_console

        self.limits.clear()
        box = gpu.Box(
            self.folder,
            ENVIRONMENT,
            make_console(),
            dry=True,
            start=self,
            now=lambda: self.time,
        )
        try:
            box.run(PLAN, seconds, fresh=fresh)
        finally:
            self.code = box.summarise(PLAN)
        return box

    def states(self) -> dict[str, str]:
        content = read_json(self.folder / gpu.RUN_FILE)
        return {entry["name"]: entry["state"] for entry in content["sections"]}


# --- the time box --------------------------------------------------------------------------------


def test_shares_of_the_time_that_is_left() -> None:
    assert gpu.share(PLAN, 600) == 30
    assert gpu.share(PLAN[1:], 430) == 100  # 30 s are kept for the last anchors
    assert gpu.share(PLAN[2:], 330) == 200
    assert gpu.share(PLAN[3:], 130) == 100
    assert gpu.share(PLAN[4:], 400) == 30
    assert gpu.share(PLAN[4:], 20) == 20
    assert gpu.share(PLAN[1:], 25) == 0


def test_time_that_a_section_does_not_need_goes_to_the_others(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    fake.run(460)
    assert [name for name, _ in fake.limits] == ["anchors", "verify", "speed", "study", "anchors"]
    limits = [limit for _, limit in fake.limits]
    assert limits == pytest.approx([30, 105, (440 - 30) * 2 / 3, 400, 30])
    assert fake.code == 0


def test_a_box_that_is_too_small_leaves_sections(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake(tmp_path)
    fake.run(75)
    assert [name for name, _ in fake.limits] == ["anchors", "speed", "study", "anchors"]
    text = capsys.readouterr().out
    assert "verify: no time left" in text
    assert "left: verify\n" in text
    assert f"next: python -m bench gpu --dry-run --out {tmp_path}" in text


# --- what is finished ----------------------------------------------------------------------------


def test_a_later_call_runs_what_is_not_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake(tmp_path, verify=[(5, 1)], speed=[(1e9, 0), (50, 0)], study=[(5, 2), (5, 0)])
    fake.run()
    assert fake.states() == {
        "anchors": "finished",
        "verify": "found faults",
        "speed": "cut off",
        "study": "failed",
    }
    assert fake.code == 1
    text = capsys.readouterr().out
    assert "study: failed after 5 s: study said 2" in text
    assert "left: speed, study" in text
    fake.run()
    assert [name for name, _ in fake.limits] == ["anchors", "speed", "study", "anchors"]
    assert set(fake.states().values()) == {"finished", "found faults"}
    assert "found faults: verify; see output.txt" in capsys.readouterr().out
    fake.run()
    assert [name for name, _ in fake.limits] == ["anchors", "anchors"]
    fake.run(fresh=True)
    assert len(fake.limits) == 5


def test_results_of_another_commit_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(tmp_path)
    monkeypatch.setitem(ENVIRONMENT, "commit", "a" * 40)
    fake.run()
    assert "at commit" not in capsys.readouterr().out
    monkeypatch.setitem(ENVIRONMENT, "commit", "b" * 40)
    fake.run()
    assert capsys.readouterr().out.count("at commit aaaaaaaaaa") == 3  # anchors ran again


def test_fresh_results_do_not_mix_with_old_ones(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    fake.run()
    old = tmp_path / "speed" / "speed.json"
    write_json(old, {"anchors": {"measured": [], "drift": 0.0}})
    fake.run()
    assert old.exists()
    fake.run(fresh=True)
    assert not old.exists()


def test_a_section_that_resumes_is_called_again_while_it_gets_on(tmp_path: Path) -> None:
    fake = Fake(tmp_path, speed=[(20, 2), (20, -11), (20, 0)], study=[(5, -11)])
    fake.run()
    names = [name for name, _ in fake.limits]
    assert names == ["anchors", "verify", *["speed"] * 3, "study", "anchors"]
    first, second, third = (limit for name, limit in fake.limits if name == "speed")
    assert (second, third) == (first - 20, first - 40)
    assert fake.states()["speed"] == "finished"
    assert fake.states()["study"] == "failed"


def test_an_interrupted_call_is_resumed(tmp_path: Path) -> None:
    fake = Fake(tmp_path, speed=[(5, 99), (5, 0)])
    with pytest.raises(KeyboardInterrupt):
        fake.run()
    assert fake.states() == {"anchors": "finished", "verify": "finished", "speed": "cut off"}
    fake.run()
    assert [name for name, _ in fake.limits] == ["anchors", "speed", "study", "anchors"]


def test_sections_between_anchors_that_differ_are_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake(tmp_path)
    fake.copy = [1.0, 1.02]
    write_json(tmp_path / "speed" / "speed.json", {"anchors": {"measured": [], "drift": 0.08}})
    box = fake.run()
    assert box.records["verify"].drift == 0.0  # shows no times
    assert box.records["study"].drift == pytest.approx(0.02)
    assert box.records["speed"].drift == pytest.approx(0.08)
    text = capsys.readouterr().out
    assert text.count("anchors drifted by") == 1
    assert "anchors drifted by 8 %: trust ratios only" in text
    fake.copy = [1.0, 1.1]
    fake.run(fresh=True)
    assert "anchors drifted by 10 %" in capsys.readouterr().out


# --- processes -----------------------------------------------------------------------------------


def _process(folder: Path, code: str, limit: float = 60) -> Outcome:
    return gpu_process.run_process([sys.executable, "-c", code], folder, limit, os.environ)


def test_what_a_process_says_and_writes(tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'x.json')!r}, 'w').close(); print('done'); print('written: x')"
    assert _process(tmp_path, code) == Outcome(0, "done", True)
    found = _process(tmp_path, "import sys; print('bad input', file=sys.stderr); sys.exit(2)")
    assert found == Outcome(2, "bad input", False)
    assert (tmp_path / "output.txt").read_text().count("$ ") == 2


def test_an_interrupted_process_may_say_what_it_has(tmp_path: Path) -> None:
    code = (
        "import time\n"
        "try: print('begun', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt: print('kept')\n"
    )
    begin = time.monotonic()
    assert _process(tmp_path, code, 8).message == "kept"
    assert time.monotonic() - begin < 30


def test_nothing_of_a_process_outlives_its_limit(tmp_path: Path) -> None:
    """A process that hears no signal, and one that it has started."""
    child = "import time, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    found = _process(tmp_path, code, 6)
    assert found.code == CUT_OFF
    assert _gone(found.message)


def _gone(process: str) -> bool:
    """Within five seconds, which the system has to clear it away."""
    status = Path(f"/proc/{process}/stat")
    for _ in range(100):
        if not status.exists() or status.read_text().split()[2] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end it")
def test_a_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    sleep = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); "
    sleep += "time.sleep(60)"
    code = (
        "import os, pathlib, sys\n"
        "from bench.gpu_process import run_process\n"
        f"run_process([sys.executable, '-c', {sleep!r}], pathlib.Path({str(tmp_path)!r}), 60, "
        "os.environ)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    for _ in range(200):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            break
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert _gone((tmp_path / "pid").read_text())


# --- the command ---------------------------------------------------------------------------------


def _run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    return gpu.run(parser.parse_args(arguments))


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "describe", lambda: ENVIRONMENT | {"gpu": None})
    with pytest.raises(BenchError, match="no CUDA device is found; --dry-run"):
        _run("--minutes", "30")
    monkeypatch.setattr(gpu, "describe", lambda: ENVIRONMENT | {"gpu": {"name": "X"}})
    with pytest.raises(BenchError, match="--minutes says how long"):
        _run()
    with pytest.raises(BenchError, match="must be above 0"):
        _run("--minutes", "0")


def test_a_terminated_run_says_what_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminated(*arguments: object) -> Outcome:
        os.kill(os.getpid(), signal.SIGTERM)
        return Outcome(0, "not reached")

    monkeypatch.setattr(gpu, "run_process", terminated)
    with pytest.raises(KeyboardInterrupt):
        _run("--dry-run", "--out", str(tmp_path))
    (entry,) = read_json(tmp_path / gpu.RUN_FILE)["sections"]
    assert (entry["name"], entry["state"]) == ("anchors-start", "cut off")


def test_results_are_filed_under_the_device() -> None:
    assert gpu.folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_every_command_is_one_that_bench_takes() -> None:
    parser = __main__.parser()
    names = [section.name for section in gpu_sections.sections()]
    assert len(set(names)) == len(names)
    for section in gpu_sections.sections():
        for command in filter(None, (section.command, section.dry)):
            arguments = [part.format(root="r", folder="r/f", jobs="3") for part in command]
            args: Any = parser.parse_args(arguments)
            assert args.command == command[0]
            if section.resumes:
                assert args.resume


def test_a_dry_run_goes_through_every_kind_of_section(tmp_path: Path) -> None:
    """Those that differ in their arguments only are left out here, to save time."""
    kinds = (
        *("verify", "replay", "sanitize", "speed-decode", "tune-_attend_parts-K128"),
        *("tune-softmax_forward-K128", "logits-ls"),
    )
    assert _run("--dry-run", "--sections", *kinds, "--out", str(tmp_path)) == 0
    content = read_json(tmp_path / gpu.RUN_FILE)
    states = {entry["name"]: entry["state"] for entry in content["sections"]}
    moments = ("anchors-start", "anchors-middle", "anchors-end")
    assert states == dict.fromkeys((*kinds, *moments, "report"), "finished")
    moments_measured = [
        entry["moment"] for entry in read_json(tmp_path / "anchors.json")["measured"]
    ]
    assert moments_measured == ["start", "middle", "end"]
    found = report.load(tmp_path)
    assert found.verify is not None
    assert found.speed is not None
    assert found.study is not None
    assert {row["contender"] for row in found.speed["rows"] if row["ours"]} == {"triton", "eager"}
    assert read_json(tmp_path / "tune-softmax_forward-K128" / "tune.json")["timed"]
