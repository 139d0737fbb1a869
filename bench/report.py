"""``python -m bench report DIR``: the results in a folder as Markdown, plots and one web page.

Reads ``environment.json``, ``verify.json``, ``speed.json`` and ``logits/``, whatever of them is
there, and says what is missing. Writes ``report.md``, ``report.html`` and ``plots/``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import readme
from bench.document import Bullets, to_markdown
from bench.errors import BenchError
from bench.gather import part, study_folder
from bench.metrics import summarise
from bench.records import FOLDER, GRID_FILE, read_study
from bench.results import Results

PLOTS = "plots"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench report``."""
    parser.add_argument(
        "directory",
        metavar="DIR",
        nargs="?",
        type=Path,
        default=Path("runs/latest"),
        help="folder with the results (default: %(default)s)",
    )
    parser.add_argument(
        "--figure",
        metavar="PNG",
        type=Path,
        help="also save the figure of loss and max logit against the learning rate here",
    )
    parser.add_argument(
        "--readme",
        metavar="FILE",
        nargs="?",
        type=Path,
        const=Path("README.md"),
        help="only rewrite the blocks of this file that come from results (default: %(const)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the report and prints its headlines; with ``--readme`` rewrites its blocks instead."""
    if args.readme:
        kinds = readme.rewrite(args.readme)
        for folder, image in readme.figures(args.readme):
            draw_story(folder, image)
        print(f"rewritten: {', '.join(kinds)} in {args.readme}")
        return 0
    from bench import html, plot_style  # matplotlib: not needed by the other commands
    from bench.sections import build

    folder = args.directory
    document = build(load(folder))
    plots = {plot.name: plot.figure for plot in document.plots()}
    for name, figure in plots.items():
        plot_style.save(figure, folder / PLOTS / name)
    (folder / "report.md").write_text(to_markdown(document, PLOTS), encoding="utf-8")
    (folder / "report.html").write_text(html.to_html(document), encoding="utf-8")
    if args.figure:
        draw_story(folder, args.figure)
    for block in document.sections[0].blocks:
        if isinstance(block, Bullets):
            print("\n".join(f"* {item.replace('`', '')}" for item in block.items))
    print(f"written: {folder / 'report.html'}, report.md and {PLOTS}/ in the same folder")
    return 0


def draw_story(directory: Path, image: Path) -> None:
    """Draws loss and max logit over the learning rate, of the study in a folder.

    Raises:
        BenchError: there is no study with runs at two learning rates.
    """
    from bench import plot_style, plots

    results = load(directory)
    try:
        if results.study is None or results.summary is None:
            raise plot_style.NotDrawn("it holds no study")
        plot_style.save_png(plots.loss_and_logits(results.study, results.summary), image)
    except plot_style.NotDrawn as reason:
        raise BenchError(f"no figure of {directory}: {reason}") from reason


def load(directory: Path) -> Results:
    """Reads every part of the results that is there.

    Raises:
        BenchError: there is none, or one is damaged.
    """
    if not directory.is_dir():
        raise BenchError(f"{directory} is not a folder; give the --out folder of a benchmark run")

    place = study_folder(directory)
    study = read_study(place) if place else None
    verify = part(directory, "verify.json", "environment", "rows", "not_run")
    speed = part(directory, "speed.json", "environment", "rows")
    if verify is None and speed is None and study is None:
        raise BenchError(
            f"{directory} holds no results (verify.json, speed.json, {FOLDER}/{GRID_FILE}); "
            "run python -m bench first"
        )
    summary = summarise(study) if study else None
    environment = part(directory, "environment.json")
    return Results(directory, environment, verify, speed, study, summary)
