"""The logit-growth study: small models, a grid of learning rates and seeds, in parallel.

Each run is one process and one file (see ``bench.records``), so a study can be stopped at any
moment and continued with ``--resume``. Divergence and NaN are results; what cannot be computed at
all (bad input, a full disk, a crash) ends in one line and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench import presets
from bench.corpus import load
from bench.environment import describe
from bench.errors import BenchError
from bench.model import MIXERS, DecoderLM, parse_pattern
from bench.records import (
    FOLDER,
    GRID_FILE,
    Grid,
    RunConfig,
    RunWriter,
    Settings,
    is_finished,
    read_grid,
    run_path,
    write_grid,
)
from bench.training import train
from bench.workers import Report, run_tasks

USER_ERROR = 2
OUT = Path("runs/latest")

T = TypeVar("T")


# --- command line ------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m bench logits``; every size of a preset can be overridden."""
    names = ", ".join(f"{name} ({preset.summary})" for name, preset in presets.PRESETS.items())
    parser.add_argument("--preset", choices=presets.PRESETS, help=f"{names}; default smoke")
    parser.add_argument("--out", type=Path, default=OUT, help=f"results folder, default {OUT}")
    parser.add_argument(
        "--mixers",
        nargs="+",
        metavar="MIXER",
        help=f"{', '.join(MIXERS)}, or patterns over the layers such as 'gla*3,gated'",
    )
    parser.add_argument("--lrs", nargs="+", type=float, metavar="LR", help="peak learning rates")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED")
    parser.add_argument(
        "--corpus", help="stdlib, topics, torch, a file, a folder, or a pattern 'notes/**/*.md'"
    )
    parser.add_argument("--corpus-bytes", type=int, metavar="N", help="how much of it to use")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="runs at a time; default: one per core"
    )
    parser.add_argument(
        "--no-control", action="store_true", help=f"do not add the control {presets.CONTROL}"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="keep the finished runs in the folder; may add mixers, rates and seeds to them",
    )
    existing.add_argument("--overwrite", action="store_true", help="discard what is there")
    sizes = parser.add_argument_group("model and training", "defaults: those of the preset")
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        options: dict[str, Any] = {"dest": f"set_{field.name}", "default": None}
        if isinstance(field.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif field.name in presets.CHOICES:
            options["choices"] = presets.CHOICES[field.name]
        else:
            kind = type(field.default)
            options |= {"type": kind, "metavar": "NAME" if kind is str else "N"}
        sizes.add_argument(flag, **options)


def run(args: argparse.Namespace) -> int:
    """Plans the study, runs what is missing and prints the tables.

    Raises:
        BenchError: bad input, or nothing more can be written.
    """
    from bench.display import Display  # rich is an optional dependency

    if args.workers is not None and args.workers < 1:
        raise BenchError(f"--workers must be at least 1, got {args.workers}")
    study = plan(args)
    if args.overwrite:
        _discard(args.out)
    todo = [config for config in study.configs if not is_finished(run_path(args.out, config.key))]
    try:
        write_grid(args.out, study.grid)
    except OSError as error:
        raise BenchError(f"cannot write results: {error}") from error
    workers = min(args.workers or _default_workers(study.grid.settings), max(1, len(todo)))
    tasks = [Task(config, study.source, study.limit, args.out) for config in todo]

    display = Display(study.grid, todo, workers, args.out)
    display.introduce(study.notes)
    failed = 0
    with display:
        for message in run_tasks(run_one, tasks, workers):
            if message.kind == "progress":
                display.progress(message.task, message.value)
            elif message.kind == "done":
                display.finished(message.task, message.value)
            elif message.value.fatal:
                raise BenchError(
                    f"{message.value.message}; the results so far are kept, --resume continues"
                )
            else:
                failed += 1
                display.failed(message.task, message.value)
    display.summarise()
    if failed:
        print(
            f"bench: {failed} of {len(todo)} runs failed; --resume tries them again",
            file=sys.stderr,
        )
    return USER_ERROR if failed else 0


# --- one run, in a worker process --------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a worker needs to do one run."""

    config: RunConfig
    source: str
    limit: int
    directory: Path


_load = functools.lru_cache(maxsize=1)(load)


def run_one(task: Task, report: Report) -> Any:
    """Trains one model and writes its file; returns the ``Result``."""
    corpus = _load(task.source, task.limit)
    if corpus.info.sha256 != task.config.corpus_sha256:
        raise BenchError(f"the corpus {corpus.info.path} changed while the study was running")
    with RunWriter(run_path(task.directory, task.config.key)) as writer:
        return train(task.config, corpus, writer.write, report)


# --- planning ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A study ready to run."""

    grid: Grid
    configs: list[RunConfig]  # what this call asks for, finished or not
    source: str
    limit: int
    notes: list[str]  # what the user should know about how the request was understood


def plan(args: argparse.Namespace) -> Plan:
    """Turns the command line, and what lies in the folder, into a study.

    Raises:
        BenchError: an option is wrong, or the folder holds something else.
    """
    notes: list[str] = []
    existing = _existing(args)
    preset = _preset(args.preset, existing if args.resume else None)
    settings = _settings(args, preset.settings)
    mixers = _unique("".join(mixer.split()) for mixer in args.mixers or preset.mixers)
    if presets.CONTROL not in mixers and not args.no_control:
        mixers.append(presets.CONTROL)
        notes.append(f"{presets.CONTROL} is added as the positive control (--no-control: without)")
    settings = _fit_layers(settings, mixers, args.set_layers, notes)
    rates = sorted(_unique(args.lrs or preset.learning_rates))
    seeds = _unique(args.seeds if args.seeds is not None else preset.seeds)
    presets.check(settings, rates, seeds)
    _check_mixers(settings, mixers)

    source, limit = args.corpus or preset.corpus, args.corpus_bytes or preset.corpus_bytes
    corpus = load(source, limit)
    corpus.check_length(settings.length)
    configs = [
        RunConfig(mixer, rate, seed, corpus.info.sha256, settings)
        for seed, rate, mixer in itertools.product(seeds, rates, mixers)
    ]
    grid = Grid(
        preset=args.preset or (existing.preset if existing and args.resume else "smoke"),
        mixers=mixers,
        learning_rates=rates,
        seeds=seeds,
        settings=settings,
        corpus=corpus.info,
        environment=describe(),
        runs=[{"key": c.key, "mixer": c.mixer, "lr": c.lr, "seed": c.seed} for c in configs],
    )
    if existing and args.resume:
        grid = _united(existing, grid)
    return Plan(grid, configs, source, limit, notes)


def _existing(args: argparse.Namespace) -> Grid | None:
    """The study in the results folder that this call must respect, if any."""
    folder = args.out / FOLDER
    if args.overwrite or not (folder / GRID_FILE).exists():
        return None
    grid = read_grid(args.out)
    if not args.resume:
        finished = sum(is_finished(run_path(args.out, entry["key"])) for entry in grid.runs)
        raise BenchError(
            f"{folder} already holds a study ({finished} of {len(grid.runs)} runs finished): add "
            "--resume to continue it, --overwrite to discard it, or another --out"
        )
    return grid


def _discard(out: Path) -> None:
    for path in (out / FOLDER).glob("*.jsonl"):
        path.unlink()


def _preset(name: str | None, existing: Grid | None) -> presets.Preset:
    """What options that are not given default to: the preset, or the study to resume."""
    if name or existing is None:
        return presets.PRESETS[name or "smoke"]
    return presets.Preset(
        summary="",
        learning_rates=tuple(existing.learning_rates),
        seeds=tuple(existing.seeds),
        settings=existing.settings,
        mixers=tuple(existing.mixers),
        corpus=existing.corpus.source,
        corpus_bytes=existing.corpus.bytes,
    )


def _settings(args: argparse.Namespace, base: Settings) -> Settings:
    """``base`` with the sizes given; one head stays global where only ``--heads`` is given."""
    given = {
        field.name: value
        for field in dataclasses.fields(Settings)
        if (value := getattr(args, f"set_{field.name}")) is not None
    }
    if "heads" in given:
        given.setdefault("local_heads", given["heads"] - 1)
    return dataclasses.replace(base, **given)


def _fit_layers(
    settings: Settings, mixers: list[str], given: int | None, notes: list[str]
) -> Settings:
    """Every mixer of a pattern needs a layer; all models of a study have the same depth."""
    longest = max(mixers, key=lambda mixer: len(parse_pattern(mixer)))
    layers = len(parse_pattern(longest))
    if layers <= settings.layers:
        return settings
    if given is not None:
        raise BenchError(f"the pattern {longest!r} needs --layers {layers} or more, got {given}")
    notes.append(f"{layers} layers instead of {settings.layers}, so that {longest} fits")
    return dataclasses.replace(settings, layers=layers)


def _check_mixers(settings: Settings, mixers: list[str]) -> None:
    """Builds every model once, without memory, so that no run fails for its sizes."""
    for mixer in mixers:
        try:
            with torch.device("meta"):
                DecoderLM(settings, mixer)
        except (TypeError, ValueError) as error:
            raise BenchError(f"the mixer {mixer} does not take these sizes: {error}") from error


def _united(existing: Grid, new: Grid) -> Grid:
    """The study in the folder with the new runs added to it.

    Raises:
        BenchError: they differ in more than mixers, learning rates and seeds.
    """
    old_sizes, new_sizes = vars(existing.settings), vars(new.settings)
    differences = [
        f"{name} ({old_sizes[name]}, now {new_sizes[name]})"
        for name in old_sizes
        if old_sizes[name] != new_sizes[name]
    ]
    if existing.corpus.sha256 != new.corpus.sha256:
        differences.append(f"text ({existing.corpus.path}, now {new.corpus.path})")
    if differences:
        raise BenchError(
            f"--resume cannot continue the study there, it differs in {', '.join(differences)}: "
            "give no options but --resume, or another --out"
        )
    known = {entry["key"] for entry in existing.runs}
    environment = dict(existing.environment)
    environment["resumed"] = [*environment.get("resumed", []), new.environment]
    return dataclasses.replace(
        existing,
        mixers=_unique([*existing.mixers, *new.mixers]),
        learning_rates=sorted(_unique([*existing.learning_rates, *new.learning_rates])),
        seeds=_unique([*existing.seeds, *new.seeds]),
        environment=environment,
        runs=existing.runs + [entry for entry in new.runs if entry["key"] not in known],
    )


def _unique(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))


def _default_workers(settings: Settings) -> int:
    """One single-threaded process per core; a GPU is one run's."""
    if settings.device != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
