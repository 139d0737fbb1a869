"""The report, section by section, from the results in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from matplotlib.figure import Figure

from bench import findings, plots, plots_heads, plots_speed, tables, tables_timing, tables_verify
from bench.document import Block, Bullets, Document, Paragraph, Plot, Section, Table
from bench.environment import one_line
from bench.errors import BenchError
from bench.plot_style import NotDrawn
from bench.records import Study
from bench.results import Results

NUMBERS = "The numbers are in the table “Every mixer at every learning rate”."


def build(results: Results) -> Document:
    """The whole report.

    Raises:
        BenchError: a part of the results has another shape than this version writes.
    """
    try:
        sections = [
            Section("In short", list(_in_short(results))),
            Section("Training: loss and logits", list(_training(results))),
            Section("Where and when logits grow", list(_growth(results))),
            Section("Speed", list(_speed(results))),
            Section("Correctness", list(_correctness(results))),
            Section("What this does not show", [Bullets(_caveats(results))]),
            Section("How it was measured", list(_conditions(results))),
        ]
        environments = results.environments()
        subtitle = one_line(environments[0]) if environments else "Environment not recorded."
    except (AttributeError, KeyError, TypeError) as error:
        message = f"results in {results.directory} are damaged or of another version: {error!r}"
        raise BenchError(message) from error
    return Document("attnvariants benchmark", subtitle, [s for s in sections if s.blocks])


# --- training ----------------------------------------------------------------------------------


def _in_short(results: Results) -> Iterator[Block]:
    sentences = []
    if results.study and results.summary:
        sentences += findings.study_findings(results.study, results.summary)
    if results.speed:
        sentences.append(findings.speed_finding(results.speed["rows"]))
    if results.verify:
        sentences.append(findings.verify_finding(results.verify["rows"]))
    yield Bullets([sentence for sentence in sentences if sentence])
    if results.study and results.summary:
        study, summary = results.study, results.summary
        yield _plot(
            "loss_and_logits",
            lambda: plots.loss_and_logits(study, summary),
            "Validation loss (above) and peak max logit (below) over the learning rate: read them "
            "together. A logit that grows harms only where the loss rises with it. Dashed lines "
            "are the pre-normalisation scores of linear attention, another quantity. A cross marks "
            "where a seed diverged or ended in NaN, on the upper edge if it is off the scale.",
            f"Two line charts over the learning rate, for {_mixers(study)}: validation loss, and "
            f"peak max logit on a logarithmic scale. {NUMBERS}",
        )


def _training(results: Results) -> Iterator[Block]:
    study, summary = results.study, results.summary
    if study is None or summary is None:
        yield _missing(results, "No logit study", "logits")
        return
    if summary.cells:
        yield tables.cells(summary, study)
        yield tables.mixers(summary)
        yield _plot(
            "speed_and_loss",
            lambda: plots.pareto(study, summary),
            "Best validation loss over training speed; down and to the right is better. The larger "
            "the dot, the more the learning rate matters. Bars are ± sd over seeds.",
            f"Scatter chart of best validation loss over training tokens per second, for "
            f"{_mixers(study)}. The numbers are in the table “Every mixer over the whole grid”.",
        )
    else:
        yield Paragraph("No training run has finished yet.")
    yield from _if_any(tables.unfinished(study))


def _growth(results: Results) -> Iterator[Block]:
    study, summary = results.study, results.summary
    if study is None or summary is None:
        return
    rate = f"{plots.focus_rate(study):g}"
    yield _plot(
        "logits_over_steps",
        lambda: plots.logits_over_steps(study),
        "Largest logit of the model at each recorded step: mean over seeds and their range. A "
        "cross marks a run that ended in NaN.",
        f"Line charts of the max logit over the training step, one for each learning rate, for "
        f"{_mixers(study)}.",
    )
    yield _plot(
        "local_and_global",
        lambda: plots_heads.local_and_global(summary),
        "Peak max logit of local and global heads apart, ± sd over seeds. Where a layer has both, "
        "a maximum over all heads hides one of them.",
        "Bar charts of the peak max logit by mixer, local and global heads apart. The numbers are "
        "in the table “Heads and activations”.",
    )
    for statistic, title in plots_heads.STATISTICS.items():
        yield _plot(
            f"heads_{statistic}",
            lambda statistic=statistic: plots_heads.head_map(study, statistic),  # type: ignore[misc]
            f"{title}, for each layer and head, one seed, learning rate {rate}.",
            f"Heat maps of layers by heads for {_mixers(study)}: {title.lower()}.",
        )
    yield _plot(
        "activations",
        lambda: plots.activations(study),
        f"Largest activation and, where there are gates, their mean, at learning rate {rate}.",
        f"Line charts over the training step, for {_mixers(study)}: max activation, mean gate.",
    )
    yield _plot(
        "entropy_and_logits",
        lambda: plots_heads.entropy_and_logits(study),
        "Attention entropy over the max logit, one mark for each softmax head of each run, on "
        "fixed validation text. Entropy near zero means that each token attends to one other.",
        "Scatter chart of attention entropy over max logit, one mark for each head.",
    )
    if summary.cells:
        yield tables.heads(summary)


# --- speed and correctness -----------------------------------------------------------------------


def _speed(results: Results) -> Iterator[Block]:
    if results.speed is None:
        yield _missing(results, "No timings", "speed")
        return
    rows = results.speed["rows"]
    for name, own in plots_speed.ratio_groups(rows).items():
        yield _plot(
            name,
            lambda own=own: plots_speed.speed_ratios(own),  # type: ignore[misc]
            "Time of this package over that of its peers, timed in turns in one process: median "
            "and range over the rounds.",
            "Bar chart of time ratios by case and peer. The numbers are in the tables of each "
            "function, last column.",
        )
    yield _plot(
        "speed_over_length",
        lambda: plots_speed.speed_over_length(rows),
        "Time per token over the sequence length, both logarithmic; the band spans the 20 and 80 % "
        "quantiles. Flat means that cost grows in step with the length.",
        "Line charts of microseconds per token over the length. The numbers are in the table "
        "“Time per token over the length”.",
    )
    yield Paragraph(
        "Times are medians. % of floor is the least time that the bytes and operations of a call "
        "take at the rates measured on this machine, over the time taken."
    )
    for function in dict.fromkeys(row["function"] for row in rows):
        yield from _if_any(tables_timing.speed(rows, function))
    yield from _if_any(tables_timing.sweep(rows))
    yield from _if_any(tables_timing.not_timed(rows))


def _correctness(results: Results) -> Iterator[Block]:
    if results.verify is None:
        yield _missing(results, "No comparison with float64", "verify")
        return
    rows = results.verify["rows"]
    yield Paragraph(findings.verify_finding(rows))
    yield from _if_any(tables_verify.verify_failures(rows))
    yield tables_verify.verify_summary(rows)
    yield from _if_any(tables_verify.not_verified(results.verify["not_run"]))


# --- conditions ----------------------------------------------------------------------------------


def _caveats(results: Results) -> list[str]:
    found = []
    if results.study and results.summary:
        found += findings.study_caveats(results.study, results.summary)
    if results.speed:
        found += findings.speed_caveats(results.speed)
    return found + findings.machine_caveats(results.environments())


def _conditions(results: Results) -> Iterator[Block]:
    study = results.study
    environments = results.environments()
    if environments:
        yield tables.facts("Environment", _flat(environments[0]))
    if study is not None:
        corpus = study.grid.corpus
        yield tables.facts(
            "Text of the study",
            [
                ("corpus", corpus.name),
                ("path", corpus.path),
                ("sha256 of the bytes used", corpus.sha256),
                ("bytes", f"{corpus.bytes:,}"),
                ("for training / validation", f"{corpus.train_bytes:,} / {corpus.val_bytes:,}"),
                ("files", f"{corpus.files:,}"),
            ],
        )
        grid = study.grid
        rates = ", ".join(f"{rate:g}" for rate in grid.learning_rates)
        entries: list[tuple[str, object]] = [
            ("preset", grid.preset),
            ("learning rates", rates),
            ("seeds", grid.seeds),
        ]
        yield tables.facts("Training protocol", [*entries, *vars(grid.settings).items()])
    if results.speed is not None:
        for part in ("protocol", "anchors"):
            if results.speed.get(part):
                yield tables.facts(f"Speed: {part}", _flat(results.speed[part]))


# --- shared ------------------------------------------------------------------------------------


def _plot(name: str, draw: Callable[[], Figure], caption: str, alt: str) -> Block:
    try:
        return Plot(name, caption, alt, draw())
    except NotDrawn as reason:
        return Paragraph(f"No figure `{name}`: {reason}.")


def _missing(results: Results, what: str, command: str) -> Paragraph:
    return Paragraph(
        f"{what} in this folder: `python -m bench {command} --out {results.directory}` adds it."
    )


def _if_any(table: Table | None) -> Iterator[Table]:
    if table is not None:
        yield table


def _mixers(study: Study) -> str:
    return ", ".join(dict.fromkeys(run.config.mixer for run in study.runs))


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Entries of nested mappings and of lists of them, in one list."""
    for name, value in content.items():
        entries = value if isinstance(value, list) else []
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}, ")
        elif entries and all(isinstance(entry, dict) for entry in entries):
            for number, entry in enumerate(entries, start=1):
                yield from _flat(entry, f"{prefix}{name} {number}, ")
        else:
            yield f"{prefix}{name}", value
