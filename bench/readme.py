"""Rewrites the blocks of a README that come from results: ``python -m bench report --readme``.

A block stands between ``<!-- bench: KIND FOLDER -->`` and ``<!-- /bench -->``; what is between them
is replaced. Kinds: ``study``, the table of a logit study; ``gpu``, what was measured on GPUs, or
that nothing was; ``figure``, which keeps its line, but whose image is drawn again: loss and max
logit of a study over the learning rate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.cases import DECODE
from bench.errors import BenchError
from bench.gather import RUN_FILE, part, study_folder
from bench.metrics import Cell, MixerSummary, summarise
from bench.records import read_study
from bench.speed_cases import speed_cases
from bench.strict_json import read_json
from bench.tables import ABSENT, duration, mean_sd, number

_BLOCK = re.compile(r"(<!-- bench: (\w+) (\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
FIGURE = "figure"
_NAMES = {
    "mhsa": "softmax attention (mhsa)",
    "mhsa+qknorm": "the same with qk-norm",
    "gated": "gated SDPA",
    "gla": "GLA",
    "transnormer": "TransNormerLLM",
}
Row = dict[str, Any]


def rewrite(path: Path) -> list[str]:
    """Rewrites the blocks of the file; returns their kinds.

    Raises:
        BenchError: there is no block, or one is of no known kind.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror or error}") from error
    kinds = [match.group(2) for match in _BLOCK.finditer(text)]
    if not kinds:
        raise BenchError(f"{path} has no block <!-- bench: KIND FOLDER --> ... <!-- /bench -->")
    path.write_text(render(text, path.parent), encoding="utf-8")
    return kinds


def render(text: str, root: Path) -> str:
    """``text`` with its blocks made again; their folders are relative to ``root``."""

    def block(match: re.Match[str]) -> str:
        kind, folder = match.group(2), match.group(3)
        if kind == FIGURE:
            return match.group(0)
        if kind not in _KINDS:
            raise BenchError(f"no block {kind!r}; there are {', '.join((*_KINDS, FIGURE))}")
        lines = "\n".join(_KINDS[kind](root / folder, folder))
        return f"{match.group(1)}{lines}\n{match.group(4)}"

    return _BLOCK.sub(block, text)


def figures(path: Path) -> list[tuple[Path, Path]]:
    """The study and the image of every figure, as paths."""
    found = []
    for match in _BLOCK.finditer(path.read_text(encoding="utf-8")):
        image = re.search(r"\]\((\S+\.png)\)", match.group(0))
        if match.group(2) == FIGURE and image:
            found.append((path.parent / match.group(3), path.parent / image.group(1)))
    return found


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The first column is text, the others are numbers."""
    yield f"| {' | '.join(columns)} |"
    yield "|".join(("", "---", *["---:"] * (len(columns) - 1), ""))
    for row in rows:
        yield f"| {' | '.join(row)} |"


# --- studies -------------------------------------------------------------------------------------


def _study(directory: Path, name: str) -> Iterator[str]:
    place = study_folder(directory) if directory.is_dir() else None
    if place is None:
        raise BenchError(f"{name} holds no logit study")
    study = read_study(place)
    summary = summarise(study)
    rates = study.grid.learning_rates
    ends = list(dict.fromkeys((rates[0], rates[-1])))
    cells = {(cell.mixer, cell.lr): cell for cell in summary.cells}
    columns = ["mixer", *(f"loss at {rate:g}" for rate in ends)]
    columns += [*(f"peak at {rate:g}" for rate in rates), "LR sensitivity"]
    settings = study.grid.settings
    heads = (
        f"LS ({settings.local_heads} local heads, {settings.heads - settings.local_heads} global)"
    )
    rows = []
    for mixer in summary.mixers:
        label = {**_NAMES, "ls": heads}.get(mixer.mixer, mixer.mixer)
        losses = [_loss(cells.get((mixer.mixer, rate))) for rate in ends]
        peaks = [_peak(cells.get((mixer.mixer, rate))) for rate in rates]
        rows.append([label, *losses, *peaks, _sensitivity(mixer)])
    yield from _table(columns, rows)


def _loss(cell: Cell | None) -> str:
    return ABSENT if cell is None or cell.val_loss is None else mean_sd(cell.val_loss, 3)


def _peak(cell: Cell | None) -> str:
    """With a star where it is no softmax logit."""
    if cell is None or cell.peak_max_logit is None:
        return ABSENT
    star = "" if cell.logit_kind == "softmax_logit" else " *"
    return number(cell.peak_max_logit.mean) + star


def _sensitivity(mixer: MixerSummary) -> str:
    return ABSENT if mixer.lr_sensitivity is None else mean_sd(mixer.lr_sensitivity, 3)


# --- GPUs ----------------------------------------------------------------------------------------


def _gpu(directory: Path, name: str) -> Iterator[str]:
    found = False
    for folder in sorted(directory.iterdir()) if directory.is_dir() else []:
        if not (folder / RUN_FILE).exists():
            continue
        run = read_json(folder / RUN_FILE)
        if run["environment"]["gpu"] and not run["dry_run"]:
            yield from (
                ("", *_device(folder, f"{name}/{folder.name}", run))
                if found
                else _device(folder, f"{name}/{folder.name}", run)
            )
            found = True
    if not found:
        yield (
            f"**Nothing has been measured on a GPU yet**: `{name}` holds no results of one. "
            "`python -m bench gpu --minutes M`"
        )
        yield "measures there, and `python -m bench report --readme` then puts the numbers here."


def _device(folder: Path, name: str, run: dict[str, Any]) -> Iterator[str]:
    environment = run["environment"]
    commit, date = (environment["commit"] or "unknown")[:7], environment["date"][:10]
    versions = f"torch {environment['torch']}, triton {environment['triton']}"
    yield f"**{environment['gpu']['name']}** (commit {commit}, {versions}, {date}; `{name}`)"
    yield ""
    verify = part(folder, "verify.json", "rows")
    if verify:
        failed = sum(not row["ok"] for row in verify["rows"])
        verdict = f"{failed} outside" if failed else "all within"
        yield f"- {len(verify['rows']):,} comparisons with float64, {verdict} their budget."
    for entry in run["sections"]:
        if entry["state"] not in ("finished", "found faults"):
            yield f"- Section `{entry['name']}`: {entry['state']}."
    speed = part(folder, "speed.json", "rows")
    rows = _headlines(speed["rows"]) if speed else []
    if rows:
        yield ""
        columns = ("call", "ours", "time", "% of floor", "our time / a peer's (range)")
        yield from _table(columns, rows)


def _headlines(rows: Sequence[Row]) -> list[list[str]]:
    """The fastest of ours in the cases of ``speed --quick``, beside every peer."""
    names = {entry.case.name for entry in speed_cases("cuda", quick=True) if not entry.sweep}
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = (row["case"], row["mode"], row["dtype"])
        if row["case"] not in names or not row["ours"] or row["status"] != "ok":
            continue
        if key not in best or row["median_s"] < best[key]["median_s"]:
            best[key] = row
    ours = {row["contender"] for row in rows if row["ours"]}
    return [
        [
            f"{row['case']}, {row['mode']}",
            row["contender"],
            f"{number(1e6 * row['median_s'])} µs"
            if row["function"] in DECODE
            else f"{duration(row['median_s'])} ms",
            number(row["percent_of_floor"], 0),
            "; ".join(
                f"{peer} {r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f})"
                for peer, r in row["ratio_to"].items()
                if peer not in ours
            )
            or ABSENT,
        ]
        for row in best.values()
    ]


_KINDS: dict[str, Callable[[Path, str], Iterator[str]]] = {"study": _study, "gpu": _gpu}
