"""The README's blocks are what the results say, and a run of many sections is read as one."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import bench_results as made_up
import pytest

from bench import gather, readme, report
from bench.errors import BenchError
from bench.records import read_json, write_json
from bench.speed_cases import speed_cases

ROOT = Path(__file__).resolve().parents[1]
GPU = made_up.ENVIRONMENT | {"gpu": {"name": "NVIDIA Made-Up"}, "device": "cuda"}
HEADLINE = next(e.case for e in speed_cases("cuda", quick=True) if e.case.name.startswith("decode"))


def _gpu_run(root: Path, *, dry: bool = False) -> Path:
    """A folder as ``bench gpu`` leaves it, with two speed sections."""
    folder = root / "results" / "nvidia-made-up"
    made_up.write_verify(folder / "verify")
    made_up.write_study(folder / "logits-ls", mixers=("mhsa",), learning_rates=(1e-2,), seeds=(0,))
    made_up.write_study(folder / "logits-sweep", mixers=("mhsa", "ls"), seeds=(0,))
    ratio = {"triton": {"median": 0.5, "low": 0.4, "high": 0.6}}
    ratio["sdpa decode"] = {"median": 0.25, "low": 0.2, "high": 0.3}
    common = {"sweep": False, "launch": "graph", "eager_s": 2e-5, "cache_bytes": 1 << 20}
    common |= {"case": HEADLINE.name, "mode": "decode", "function": HEADLINE.function}
    decode = [
        made_up.speed_row("cuda", 1, 5e-6, ratio_to=ratio) | common,
        made_up.speed_row("triton", 1, 1e-5) | common,
        made_up.speed_row("sdpa decode", 1, 2e-5, ours=False) | common,
    ]
    for name, rows, drift in (("decode", decode, 0.01), ("softmax", [], 0.07)):
        other = made_up.speed_row("triton", 64, 1e-3, sweep=False)
        content = {
            "environment": GPU,
            "protocol": {"rounds": 7},
            "anchors": {"measured": [{"moment": "start"}], "drift": drift},
            "noise": [],
            "flatness": [],
            "rows": rows or [other],
        }
        write_json(folder / f"speed-{name}" / "speed.json", content)
    states = dict.fromkeys(("verify", "speed-decode", "speed-softmax", "logits-ls"), "finished")
    states |= {"logits-sweep": "cut off"}
    sections = [{"name": name, "state": state} for name, state in states.items()]
    write_json(folder / gather.RUN_FILE, {"environment": GPU, "dry_run": dry, "sections": sections})
    return folder


def _arguments(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return parser.parse_args(arguments)


def test_the_readme_says_what_the_results_say() -> None:
    """Fails where results or the README were changed without `bench report --readme`."""
    text = (ROOT / "README.md").read_text()
    assert readme.render(text, ROOT) == text
    assert "<!-- bench: study bench/results/cpu-smoke -->" in text
    assert "<!-- bench: gpu bench/results -->" in text


def test_a_changed_result_changes_the_readme(tmp_path: Path) -> None:
    block = "<!-- bench: study s -->\nold\n<!-- /bench -->\n"
    made_up.write_study(tmp_path / "s", seeds=(0, 1))
    one = readme.render(block, tmp_path)
    assert "| softmax attention (mhsa) |" in one
    assert "old" not in one
    assert one.count(" * |") == 2 * 3  # the scores of two mixers at three rates
    shutil.rmtree(tmp_path / "s")
    made_up.write_study(tmp_path / "s", seeds=(0,))
    assert readme.render(block, tmp_path) != one


def test_figures_are_drawn_again(tmp_path: Path) -> None:
    made_up.write_study(tmp_path / "s", mixers=("mhsa", "ls"), seeds=(0,))
    text = "<!-- bench: figure s -->\n![alt](docs/a.png)\n<!-- /bench -->\n"
    file = tmp_path / "README.md"
    file.write_text(text)
    report.run(_arguments("--readme", str(file)))
    assert file.read_text() == text
    assert (tmp_path / "docs" / "a.png").read_bytes().startswith(b"\x89PNG")
    made_up.write_study(tmp_path / "one", mixers=("mhsa",), learning_rates=(1e-2,), seeds=(0,))
    file.write_text(text.replace("figure s", "figure one"))
    with pytest.raises(BenchError, match=r"no figure of .*one: it needs finished runs at two"):
        report.run(_arguments("--readme", str(file)))


def test_gpu_results_are_shown_with_their_device(tmp_path: Path) -> None:
    block = "before\n<!-- bench: gpu results -->\n<!-- /bench -->\nbehind\n"
    nothing = readme.render(block, tmp_path)
    assert "**Nothing has been measured on a GPU yet**" in nothing
    _gpu_run(tmp_path, dry=True)
    assert readme.render(block, tmp_path) == nothing
    folder = _gpu_run(tmp_path)
    text = readme.render(nothing, tmp_path)
    assert text.startswith("before\n")
    assert text.endswith("<!-- /bench -->\nbehind\n")
    assert "**NVIDIA Made-Up** (commit abcdef0, torch 2.13.0, triton None, 2026-01-02" in text
    assert "Nothing has been measured" not in text
    count = len(read_json(folder / "verify" / "verify.json")["rows"])
    assert f"- {count} comparisons with float64, all within their budget." in text
    assert "- Section `logits-sweep`: cut off." in text
    # The fastest of ours, beside peers only.
    row = f"| {HEADLINE.name}, decode | cuda | 5.00 µs | 40 | sdpa decode 0.25 (0.20 to 0.30) |"
    assert row in text
    assert readme.render(text, tmp_path) == text


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "README.md"
    file.write_text("<!-- bench: gpu results -->\n<!-- /bench -->\n")
    assert report.run(_arguments("--readme", str(file))) == 0
    assert "rewritten: gpu" in capsys.readouterr().out
    assert "Nothing has been measured" in file.read_text()
    assert _arguments("--readme").readme == Path("README.md")
    for text, message in (
        ("no block", "has no block"),
        (
            "<!-- bench: other x -->\n<!-- /bench -->",
            "no block 'other'; there are study, gpu, figure",
        ),
        ("<!-- bench: study x -->\n<!-- /bench -->", "x holds no logit study"),
    ):
        file.write_text(text)
        with pytest.raises(BenchError, match=message):
            readme.rewrite(file)
        assert file.read_text() == text


def test_sections_are_reported_as_one_run(tmp_path: Path) -> None:
    found = report.load(_gpu_run(tmp_path))
    assert found.speed is not None
    assert len(found.speed["rows"]) == 4
    assert found.speed["anchors"]["drift"] == 0.07
    assert len(found.speed["anchors"]["measured"]) == 2
    assert found.verify is not None
    assert found.study is not None
    assert len(found.study.grid.runs) > 1  # the larger of the two studies


def test_folders_of_other_runs_are_left_alone(tmp_path: Path) -> None:
    folder = _gpu_run(tmp_path)
    (folder / gather.RUN_FILE).unlink()
    assert gather.part(folder, "speed.json") is None
    assert gather.study_folder(folder) is None
