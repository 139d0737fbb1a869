"""``python -m bench report``: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import bench_results as made_up
import pytest

from bench import findings, html, report
from bench.document import Document, Paragraph, Section, Table
from bench.errors import BenchError
from bench.metrics import summarise
from bench.records import read_study
from bench.strict_json import dumps, read_json


def make(directory: Path, *options: str) -> tuple[str, str]:
    """Runs the command; returns the Markdown and the page."""
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    assert report.run(parser.parse_args([str(directory), *options])) == 0
    return (directory / "report.md").read_text(), (directory / "report.html").read_text()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("full")
    made_up.write_results(directory)
    make(directory)
    return directory


@pytest.fixture(scope="module")
def markdown(full: Path) -> str:
    return (full / "report.md").read_text()


@pytest.fixture(scope="module")
def page(full: Path) -> str:
    return (full / "report.html").read_text()


class Elements(HTMLParser):
    """Every start tag with its attributes, in order; checks that tags are closed in turn."""

    VOID = frozenset({"meta", "br", "img", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.found if name == tag)


# --- what is written -----------------------------------------------------------------------------


PLOTS = (
    "loss_and_logits",
    "speed_and_loss",
    "logits_over_steps",
    "local_and_global",
    "heads_max_logit",
    "heads_entropy",
    "heads_first_token_share",
    "activations",
    "entropy_and_logits",
    "speed_ratios",
    "speed_over_length",
)


def test_every_plot_is_written_and_shown(full: Path, markdown: str, page: str) -> None:
    names = {path.name for path in (full / "plots").iterdir()}
    assert names == {f"{name}.{ending}" for name in PLOTS for ending in ("png", "svg")}
    assert all(f"](plots/{name}.png)" in markdown for name in PLOTS)
    assert page.count("<svg ") == len(PLOTS)
    assert "No figure" not in markdown


@pytest.mark.parametrize(
    "text",
    [
        "1.905 ± 0.007",  # best loss
        "13,282 ± 894",  # peak max logit
        "0.90 (0.85 to 0.97)",  # speed ratio
        "fla is not installed",
        "output over its budget",
        "needs a GPU",
        made_up.SHA256,
        made_up.ENVIRONMENT["commit"],
        "Every mixer at every learning rate",
        "What this does not show",
        "gla (score)",
    ],
)
def test_numbers_and_names_are_in_both(text: str, markdown: str, page: str) -> None:
    assert text in markdown
    assert text in page


def test_the_page_needs_nothing_else(page: str) -> None:
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)|\bsrc=|<script|<link", page)
    for attributes in Elements(page).of("a"):
        assert (attributes["href"] or "").startswith("#")


def test_the_page_is_well_formed_and_links_lead_somewhere(page: str) -> None:
    elements = Elements(page)
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:href="|url\()#([^")]+)', page)
    assert set(targets) <= set(ids)


def test_the_page_is_accessible(page: str) -> None:
    elements = Elements(page)
    levels = [int(tag[1]) for tag, _ in elements.found if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))
    assert next(elements.of("html"))["lang"] == "en"
    for drawing in elements.of("svg"):
        assert drawing["role"] == "img"
        assert len(drawing["aria-label"] or "") > 20
    frames = [a for a in elements.of("div") if a.get("class") == "scroll"]
    assert len(frames) == len(list(elements.of("table")))
    assert all(frame["tabindex"] == "0" and frame["aria-labelledby"] for frame in frames)
    assert all("scope" in attributes for attributes in elements.of("th"))


def test_the_page_fits_a_phone_and_follows_the_theme(page: str) -> None:
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "prefers-color-scheme: dark" in page
    assert "stroke: var(--ink)" in page
    assert "DejaVu" not in page
    assert "#1c2430" not in page.split("</style>", 1)[1]


def test_text_is_escaped() -> None:
    table = Table("<T>", ("a & b",), [("<i>x</i>",)], 1)
    text = html.to_html(Document("<D>", "`<s>`", [Section("S", [Paragraph("1 < 2"), table])]))
    assert "<i>" not in text
    assert "<code>&lt;s&gt;</code>" in text
    assert "&lt;i&gt;x&lt;/i&gt;" in text
    assert "1 &lt; 2" in text


def test_headlines_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_up.write_verify(tmp_path)
    make(tmp_path)
    printed = capsys.readouterr().out
    assert "All 24 comparisons with float64 are within their error budget." in printed
    assert "report.html" in printed


def test_the_one_figure_goes_where_it_is_wanted(tmp_path: Path) -> None:
    made_up.write_study(tmp_path, mixers=("mhsa", "ls"))
    wanted = tmp_path / "docs" / "logit_growth.png"
    make(tmp_path, "--figure", str(wanted))
    assert wanted.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# --- what is missing or wrong --------------------------------------------------------------------


def test_missing_parts_are_said(tmp_path: Path) -> None:
    made_up.write_verify(tmp_path)
    markdown, page = make(tmp_path)
    for command in ("logits", "speed"):
        assert f"`python -m bench {command} --out" in markdown
    assert "24 comparisons with float64 are within" in markdown
    assert "<svg" not in page


def test_a_study_alone_is_a_report(tmp_path: Path) -> None:
    made_up.write_study(tmp_path, mixers=("mhsa",), learning_rates=(1e-2,), seeds=(0,))
    markdown, _ = make(tmp_path)
    assert "No figure `loss_and_logits`: it needs finished runs at two learning rates" in markdown
    assert "python -m bench verify" in markdown
    assert "python -m bench speed" in markdown
    assert "One seed: no difference" in markdown


def test_failures_of_verify_are_loud(tmp_path: Path) -> None:
    made_up.write_verify(tmp_path, fails=True)
    markdown, page = make(tmp_path)
    assert "1 of 24 comparisons with float64 FAILED" in markdown
    assert "Failed comparisons" in page


def test_interrupted_runs_are_readable(tmp_path: Path) -> None:
    made_up.write_study(
        tmp_path,
        mixers=("mhsa", "ls"),
        unfinished=[("ls", 1e-1, 1)],
        absent=[("ls", 1e-1, 0)],
        nan=[("mhsa", 1e-1)],
    )
    for path in (tmp_path / "logits").glob("*.jsonl"):
        if not path.read_text().splitlines()[-1].startswith('{"kind":"result"'):
            path.write_text(path.read_text() + '{"kind":"step","st')  # cut short
    markdown, _ = make(tmp_path)
    assert "10 of 12 training runs are finished; everything below speaks of those." in markdown
    assert "`mhsa` at 0.1 (nan)" in markdown
    assert "| ls | 0.1 | 1 | 16 of 40 |" in markdown


def test_nothing_finished_yet(tmp_path: Path) -> None:
    started = [("mhsa", 1e-2, 0)]
    made_up.write_study(
        tmp_path, mixers=("mhsa",), learning_rates=(1e-2,), seeds=(0,), unfinished=started
    )
    markdown, _ = make(tmp_path)
    assert "No training run has finished yet." in markdown
    assert "0 of 1 training runs are finished." in markdown


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"holds no results .*run python -m bench first"):
        make(tmp_path)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="is not a folder"):
        make(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": 1}', '{"environment": {}, "rows": [{}]}'])
def test_damaged_results_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "speed.json").write_text(content)
    with pytest.raises(BenchError, match=r"speed\.json|damaged"):
        make(tmp_path)


def test_figure_without_data_is_refused(tmp_path: Path) -> None:
    made_up.write_verify(tmp_path)
    with pytest.raises(BenchError, match=r"no figure of .*: it holds no study"):
        make(tmp_path, "--figure", str(tmp_path / "x.png"))


# --- sentences -----------------------------------------------------------------------------------


def sentences(directory: Path, **options: object) -> str:
    made_up.write_study(directory, **options)  # type: ignore[arg-type]
    study = read_study(directory)
    summary = summarise(study)
    found = findings.study_findings(study, summary) + findings.study_caveats(study, summary)
    return "\n".join(found)


def test_what_passed_100_and_what_did_not(tmp_path: Path) -> None:
    found = sentences(tmp_path)
    assert "logits passed 100 in `mhsa` from learning rate 0.03 on (up to 13,914)" in found
    assert "Attention logits never passed 100 in `mhsa+qknorm` (at most 16.6)." in found
    assert "Pre-normalisation scores, another quantity that a norm follows: `gla` from" in found


def test_close_results_are_not_ranked(tmp_path: Path) -> None:
    made_up.write_study(tmp_path, mixers=("mhsa", "ls"))
    study = read_study(tmp_path)
    for run in study.runs:
        assert run.result is not None
        run.result.val_loss = 2.0 + 0.1 * run.config.seed + 0.01 * (run.config.mixer == "ls")
    found = "\n".join(findings.study_findings(study, summarise(study)))
    assert "`mhsa` with 2.050 ± 0.071" in found
    assert "Not distinguishable from it: `ls` (2.060 ± 0.071)" in found


def test_one_seed_ranks_nothing(tmp_path: Path) -> None:
    found = sentences(tmp_path, mixers=("mhsa", "ls"), seeds=(0,))
    assert "It rests on one seed, so close rivals cannot be told apart." in found
    assert "next to `mhsa`" not in found


def test_an_unfinished_grid_does_not_compare_sensitivities(tmp_path: Path) -> None:
    found = sentences(tmp_path, mixers=("mhsa", "ls"), absent=[("ls", 1e-1, 1)])
    assert "matters least" not in found


def test_caveats_are_computed(tmp_path: Path) -> None:
    found = sentences(tmp_path)
    assert "131,000 to 136,000 parameters" in found
    assert "81,920 tokens each" in found
    assert "at the edge of the grid" in found
    assert "nothing here concerns loss spikes" in found
    assert "nothing here concerns attention sinks" in found
    assert "source code" in found


def test_caveats_of_the_machine() -> None:
    busy = {**made_up.ENVIRONMENT, "load_average": 7.5, "dirty": True, "commit": "other"}
    found = "\n".join(findings.machine_caveats([made_up.ENVIRONMENT, busy]))
    assert "nothing about a GPU" in found
    assert "load 7.5 on 2 cores" in found
    assert "different commits" in found
    assert "not committed" in found
    on_gpu = {**made_up.ENVIRONMENT, "gpu": {"name": "some GPU"}}
    assert findings.machine_caveats([on_gpu]) == []


def test_caveats_of_the_timings(tmp_path: Path) -> None:
    made_up.write_speed(tmp_path)
    found = "\n".join(findings.speed_caveats(read_json(tmp_path / "speed.json")))
    assert "ratios from 0.96 to 1.07" in found
    assert "changed by 5 %" in found


def test_speed_finding_prefers_the_backward_pass(tmp_path: Path) -> None:
    made_up.write_speed(tmp_path)
    found = findings.speed_finding(read_json(tmp_path / "speed.json")["rows"])
    assert "`gated_sdpa` 1.10 of sdpa" in found
    assert findings.speed_finding([]) == ""


def test_made_up_results_are_strict_json(full: Path) -> None:
    for path in full.glob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)
    assert dumps(float("nan")) == '"nan"'


def test_speed_finding_names_peers_and_not_our_other_implementations() -> None:
    ratio = {"eager": {"median": 0.1}, "sdpa": {"median": 0.5}}
    rows = [
        made_up.speed_row("triton", 64, 1e-3, ratio_to=ratio, sweep=False),
        made_up.speed_row("eager", 64, 1e-2, sweep=False),
    ]
    assert "`gated_sdpa` 0.50 of sdpa" in findings.speed_finding(rows)
    rows[0]["ratio_to"].pop("sdpa")
    assert findings.speed_finding(rows) == ""
