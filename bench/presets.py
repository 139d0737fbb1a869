"""Ready-made studies of logit growth, and the check that a study's settings make sense.

The CPU sizes come from probes in which logit growth was plain to see after 60 to 100 steps; the
GPU sizes are one proxy sweep and two regimes in which papers report their effects.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.corpus import DEFAULT_BYTES
from bench.errors import BenchError
from bench.records import Settings

MIXERS = ("mhsa", "mhsa+qknorm", "ls", "gated", "gla", "transnormer")
CONTROL = "mhsa+qknorm"  # known to hold logits down: shows that the study can see an effect

CHOICES = {
    "positions": ("rope", "learned"),
    "init": ("fan_in", "small"),
    "schedule": ("cosine", "constant"),
    "dtype": ("float32", "bfloat16"),
}


@dataclass(frozen=True)
class Preset:
    """A study: which mixers, learning rates and seeds, at which size, on which text."""

    summary: str
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    settings: Settings
    mixers: tuple[str, ...] = MIXERS
    corpus: str = "stdlib"
    corpus_bytes: int = DEFAULT_BYTES


_GPU = Settings(
    steps=400,
    batch=64,
    length=1024,
    width=384,
    layers=6,
    heads=6,
    local_heads=5,
    local_window=100,
    warmup=40,
    dtype="bfloat16",
    device="cuda",
    compile=True,
    probe_every=100,
    eval_every=100,
    probe_sequences=2,
    eval_sequences=128,
    overhead_pairs=10,
)

PRESETS = {
    "smoke": Preset(
        "all mixers in minutes on 2 cores",
        learning_rates=(1e-2, 3e-2, 1e-1),
        seeds=(0, 1),
        settings=Settings(),
    ),
    "quick": Preset(
        "baseline and control in seconds, for continuous integration",
        learning_rates=(1e-2, 3e-2),
        seeds=(0,),
        settings=Settings(steps=60, eval_sequences=32),
        mixers=("mhsa", CONTROL),
    ),
    "cpu": Preset(
        "softmax mixers, longer and with three seeds, ten minutes on 2 cores",
        learning_rates=(3e-3, 1e-2, 3e-2, 1e-1),
        seeds=(0, 1, 2),
        settings=Settings(steps=300, warmup=20, probe_every=100, eval_every=100),
        mixers=("mhsa", CONTROL, "ls", "gated"),
    ),
    "gpu": Preset(
        "proxy sweep: 6 layers of width 384, 26 million tokens a run",
        learning_rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        seeds=(0,),
        settings=_GPU,
        corpus="torch",
        corpus_bytes=40_000_000,
    ),
    "gpu-ls": Preset(
        "the LS-attention paper's regime: T 2048, 5 local heads of span 50, learned positions",
        learning_rates=(6e-4, 6e-3),
        seeds=(0,),
        settings=dataclasses.replace(
            _GPU,
            steps=1500,
            length=2048,
            width=192,
            local_window=50,  # the query itself counted, as in the code of the time
            positions="learned",
            warmup=100,
            weight_decay=0.1,
            probe_every=300,
            eval_every=300,
        ),
        mixers=("mhsa", CONTROL, "ls"),
        corpus="torch",
        corpus_bytes=40_000_000,
    ),
    "gpu-sinks": Preset(
        "attention sinks: a BOS token before each sequence, 1500 steps, gates against none",
        learning_rates=(3e-3, 1e-2),
        seeds=(0,),
        settings=dataclasses.replace(_GPU, steps=1500, bos=True, warmup=100, probe_every=300),
        mixers=("mhsa", CONTROL, "gated", "gated-headwise"),
        corpus="torch",
        corpus_bytes=40_000_000,
    ),
}


def check(settings: Settings, learning_rates: Sequence[float], seeds: Sequence[int]) -> None:
    """Checks a study before anything runs.

    Raises:
        BenchError: a value is out of range; the message names its option.
    """
    for name in (
        *("steps", "batch", "length", "width", "layers", "heads", "local_window"),
        *("stats_every", "probe_every", "eval_every", "probe_sequences", "eval_sequences"),
    ):
        _require(getattr(settings, name) >= 1, name, "at least 1", settings)
    for name in ("warmup", "weight_decay", "clip", "z_loss", "overhead_pairs"):
        _require(getattr(settings, name) >= 0, name, "0 or more", settings)
    _require(settings.adam_eps > 0, "adam_eps", "above 0", settings)
    _require(
        0 <= settings.local_heads <= settings.heads,
        "local_heads",
        f"between 0 and the {settings.heads} heads",
        settings,
    )
    _require(
        settings.width % (2 * settings.heads) == 0,
        "width",
        f"a multiple of twice the {settings.heads} heads",
        settings,
    )
    for name, options in CHOICES.items():
        _require(getattr(settings, name) in options, name, " or ".join(options), settings)
    if not learning_rates or not all(0 < lr < math.inf for lr in learning_rates):
        raise BenchError(f"--lrs takes numbers above 0, got {list(learning_rates)}")
    if not seeds or any(seed < 0 for seed in seeds):
        raise BenchError(f"--seeds takes numbers of 0 or more, got {list(seeds)}")
    _check_device(settings.device)


def _require(condition: bool, name: str, accepted: str, settings: Settings) -> None:
    if not condition:
        option = "--" + name.replace("_", "-")
        raise BenchError(f"{option} must be {accepted}, got {getattr(settings, name)}")


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BenchError(f"--device takes cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchError(
            "this study runs on a CUDA device and none is found: take --preset smoke or cpu, or "
            "add --device cpu"
        )
    if device.type not in ("cpu", "cuda"):
        raise BenchError(f"--device takes cpu, cuda or cuda:N, got {name!r}")
