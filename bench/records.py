"""The files of a logit-growth study: strict JSON, one line per record, readable at any moment.

.. code-block:: text

    DIR/logits/grid.json      the study: what runs, on which text, with which software (``Grid``)
    DIR/logits/<key>.jsonl    one run: a ``Header`` line ("config"), then ``Step``, ``Probe`` and
                              ``Eval`` lines as they come, and a ``Result`` line last

``<key>`` is a short hash of everything that decides the run, so a run keeps its file name when it
is resumed. JSON has no NaN and no infinity: they are written as the strings ``"nan"``, ``"inf"``
and ``"-inf"`` and come back as floats. A run without a ``Result`` is unfinished; a last line cut
short by an interruption is ignored when reading.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TextIO, TypeAlias

from bench.errors import BenchError
from bench.strict_json import loads, to_json
from bench.strict_json import read_json as read_json
from bench.strict_json import write_json as write_json

SCHEMA = 1
FOLDER = "logits"
GRID_FILE = "grid.json"

PerLayer: TypeAlias = "list[float | None]"
PerHead: TypeAlias = "list[list[float] | None]"  # [layer][head]; None where it makes no sense


# --- what a study consists of ------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Everything the runs of one study share."""

    steps: int = 100
    batch: int = 16  # sequences per step
    length: int = 128  # tokens per sequence
    width: int = 64
    layers: int = 2
    heads: int = 4
    local_heads: int = 3  # of an "ls" layer
    local_window: int = 16  # visible keys of a local head, the query's own included
    positions: str = "rope"  # "rope" or "learned"
    bos: bool = False  # a begin-of-sequence token before each sequence
    init: str = "fan_in"  # of the q and k projections: "fan_in" (1/sqrt) or "small" (0.02)
    warmup: int = 10  # steps of linear warm-up
    schedule: str = "cosine"  # after the warm-up: "cosine" (to 10 %) or "constant"
    weight_decay: float = 0.0
    clip: float = 1.0  # gradient norm; 0 = off
    z_loss: float = 0.0  # weight of (log Z)^2 on the output logits
    adam_eps: float = 1e-8
    dtype: str = "float32"  # or "bfloat16": autocast, parameters stay float32
    device: str = "cpu"
    compile: bool = False
    stats_every: int = 5
    probe_every: int = 50
    eval_every: int = 50
    probe_sequences: int = 4
    eval_sequences: int = 64
    overhead_pairs: int = 2  # timed step pairs, telemetry off and on, after the run


@dataclass(frozen=True)
class RunConfig:
    """What decides one run. ``mixer`` is a name or a pattern such as ``"gla*3,gated"``."""

    mixer: str
    lr: float
    seed: int
    corpus_sha256: str
    settings: Settings = field(default_factory=Settings)

    @property
    def key(self) -> str:
        text = json.dumps([SCHEMA, to_json(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class CorpusInfo:
    """Which text the models read."""

    name: str  # "stdlib", "topics", "torch" or the file's or folder's name
    path: str
    sha256: str  # of the bytes used
    bytes: int
    train_bytes: int
    val_bytes: int
    files: int
    source: str = "stdlib"  # what --corpus takes to read it again


@dataclass
class Grid:
    """The whole study, ``grid.json``. ``runs`` lists ``{"key", "mixer", "lr", "seed"}``."""

    preset: str
    mixers: list[str]
    learning_rates: list[float]
    seeds: list[int]
    settings: Settings
    corpus: CorpusInfo
    environment: dict[str, Any]
    runs: list[dict[str, Any]]
    schema: int = SCHEMA


# --- the lines of a run ------------------------------------------------------------------------


@dataclass
class Header:
    """First line of a run: its configuration and the model it makes."""

    kind: ClassVar[str] = "config"
    key: str
    config: RunConfig  # flattened in the file: mixer, lr, seed, steps, width, ...
    pattern: list[str]  # mixer of each layer
    parameters: int
    head_groups: list[list[str]]  # [layer][head]: "local" or "global"
    logit_kinds: list[str]  # per layer: "softmax_logit" or "linear_score"


@dataclass
class Step:
    """Training telemetry, every ``stats_every`` steps.

    ``losses`` and ``grad_norms`` (before clipping) hold every step since the previous record, the
    one of this record last, which ``loss`` and ``grad_norm`` repeat.
    """

    kind: ClassVar[str] = "step"
    step: int  # 0-based
    loss: float  # nats per byte, without the z-loss
    lr: float
    grad_norm: float
    max_logit: PerHead  # max since the previous record
    max_activation: PerLayer  # max |hidden state| after each layer
    grad_rms: PerLayer
    output_logit_max: float
    log_z: float  # mean log-sum-exp of the output logits
    tokens_per_s: float
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)


@dataclass
class Probe:
    """Statistics on a fixed batch of validation text, through explicit fp32 scores.

    ``None`` stands where a statistic makes no sense: entropy in a linear layer, a gate where
    there is none.
    """

    kind: ClassVar[str] = "probe"
    step: int  # optimizer steps taken so far: 0 = at initialisation
    entropy: PerHead  # nats, mean over rows; softmax layers
    entropy_uniform: PerHead  # the entropy that uniform attention would have: the ceiling
    first_token_share: PerHead  # mean attention on the first token
    mean_row_max: PerHead
    max_logit: PerHead
    logit_rms: PerHead  # over visible pairs
    logit_change: PerHead  # max |z - z of the previous probe|; None in the first one
    gate_mean: PerHead
    gate_below_01: PerHead  # share of gate values below 0.1
    max_state: PerHead  # max |S_T|, linear layers
    max_activation: PerLayer
    median_activation: PerLayer  # median |hidden state|, for the massive-activation rule
    activation_rms: PerLayer


@dataclass
class Eval:
    """Loss on the fixed validation batch."""

    kind: ClassVar[str] = "eval"
    step: int  # optimizer steps taken so far
    val_loss: float


@dataclass
class Result:
    """Last line of a run.

    ``status`` is ``"ok"`` or ``"nan"`` here; ``"degraded"`` and ``"diverged"`` compare runs of
    the whole grid and are decided by ``bench.metrics``.
    """

    kind: ClassVar[str] = "result"
    status: str
    steps_done: int
    val_loss: float
    best_val_loss: float
    initial_loss: float  # validation loss before the first step
    final_loss: float  # mean training loss of the last 10 steps
    peak_max_logit: float  # over steps, layers and heads
    peak_max_logit_local: float | None
    peak_max_logit_global: float | None
    peak_max_activation: float
    spike_score_loss: float | None  # % of steps; None: the window never filled
    spike_score_grad_norm: float | None
    steps_to_logit_100: int | None
    cpu_seconds: float
    wall_seconds: float
    tokens_per_s: float
    parameters: int
    peak_memory_bytes: int | None  # CUDA only: on a CPU the process is mostly PyTorch itself
    stats_overhead: float | None  # time of a step with telemetry over one without, minus 1


Record: TypeAlias = Header | Step | Probe | Eval | Result


@dataclass
class Run:
    """All lines of one run; ``result`` is ``None`` while it is unfinished."""

    header: Header
    steps: list[Step] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    evals: list[Eval] = field(default_factory=list)
    result: Result | None = None

    @property
    def config(self) -> RunConfig:
        return self.header.config

    def losses(self) -> list[float]:
        """Training loss of every step."""
        return [loss for step in self.steps for loss in step.losses]

    def grad_norms(self) -> list[float]:
        """Gradient norm of every step, before clipping."""
        return [norm for step in self.steps for norm in step.grad_norms]


@dataclass
class Study:
    """A grid and those of its runs that have been started, in the grid's order."""

    grid: Grid
    runs: list[Run]


# --- writing -----------------------------------------------------------------------------------


def to_line(record: Record) -> str:
    """One record as one line of JSON, without the newline."""
    values = to_json(record)
    if isinstance(record, Header):
        config = values.pop("config")
        values |= config.pop("settings") | config
    return json.dumps({"kind": record.kind, **values}, allow_nan=False, separators=(",", ":"))


class RunWriter:
    """Writes one run's file line by line, each line on disk before the next begins."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("w", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._file.write(to_line(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def write_grid(directory: Path, grid: Grid) -> None:
    """Writes ``directory/logits/grid.json``."""
    write_json(directory / FOLDER / GRID_FILE, grid)


def run_path(directory: Path, key: str) -> Path:
    """Where the run ``key`` of the study in ``directory`` lives."""
    return directory / FOLDER / f"{key}.jsonl"


# --- reading -----------------------------------------------------------------------------------


def read_grid(directory: Path) -> Grid:
    """Reads ``directory/logits/grid.json``.

    Raises:
        BenchError: there is none, or it is of another version.
    """
    path = directory / FOLDER / GRID_FILE
    values = read_json(path)
    with _blaming(path):
        if values["schema"] != SCHEMA:
            raise BenchError(f"{path} has schema {values['schema']}, this version reads {SCHEMA}")
        values["settings"] = Settings(**values["settings"])
        values["corpus"] = CorpusInfo(**values["corpus"])
        return Grid(**values)


def read_run(path: Path) -> Run | None:
    """Reads one run's file, finished or not; ``None`` where not even its first line is there.

    Raises:
        BenchError: the file cannot be read or a line in it is damaged.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"cannot read {path}: {error}") from error
    run: Run | None = None
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last "\n" is cut short
        with _blaming(path, number):
            record = _from_line(line)
            if isinstance(record, Header):
                run = Run(record)
            elif run is None:
                raise ValueError("the config line is missing")
            elif isinstance(record, Step):
                run.steps.append(record)
            elif isinstance(record, Probe):
                run.probes.append(record)
            elif isinstance(record, Eval):
                run.evals.append(record)
            else:
                run.result = record
    return run


def read_study(directory: Path) -> Study:
    """Reads the grid in ``directory`` and every run of it that has been started.

    Raises:
        BenchError: there is no study, or a file of it is damaged.
    """
    grid = read_grid(directory)
    runs = (read_run(run_path(directory, entry["key"])) for entry in grid.runs)
    return Study(grid, [run for run in runs if run is not None])


def is_finished(path: Path) -> bool:
    """Whether the run in ``path`` has its result line."""
    run = read_run(path)
    return run is not None and run.result is not None


_KINDS: dict[str, type[Record]] = {cls.kind: cls for cls in (Header, Step, Probe, Eval, Result)}
_SETTINGS = {f.name for f in dataclasses.fields(Settings)}
_CONFIG = {"mixer", "lr", "seed", "corpus_sha256"}


def _from_line(line: str) -> Record:
    values = loads(line)
    cls = _KINDS[values.pop("kind")]
    if cls is Header:
        settings = Settings(**{name: values.pop(name) for name in _SETTINGS})
        config = {name: values.pop(name) for name in _CONFIG}
        values["config"] = RunConfig(**config, settings=settings)
    return cls(**values)


@contextlib.contextmanager
def _blaming(path: Path, line: int | None = None) -> Iterator[None]:
    """Turns whatever a damaged file causes into one clear line."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        where = f"{path}, line {line}" if line else str(path)
        raise BenchError(f"{where} is damaged or of another version: {error}") from error
