"""A made-up folder of benchmark results, shaped like a real one, for the tests of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.records import (
    CorpusInfo,
    Eval,
    Grid,
    Header,
    Probe,
    Result,
    RunConfig,
    RunWriter,
    Settings,
    Step,
    run_path,
    write_grid,
)
from bench.strict_json import write_json

MIXERS = ("mhsa", "mhsa+qknorm", "ls", "gated", "gla", "transnormer")
LEARNING_RATES = (1e-2, 3e-2, 1e-1)
SHA256 = "0123456789abcdef" * 4
LINEAR = ("gla", "transnormer")
STEPS, EVERY, LAYERS, HEADS = 40, 5, 2, 4

ENVIRONMENT: dict[str, Any] = {
    "date": "2026-01-02T03:04:05+00:00",
    "attnvariants": "0.1.0",
    "commit": "abcdef0123456789abcdef0123456789abcdef01",
    "dirty": False,
    "python": "3.11.2",
    "torch": "2.13.0",
    "triton": None,
    "numpy": "2.4.6",
    "os": "Linux",
    "device": "cpu",
    "cpu": "Some processor",
    "cores": 2,
    "threads": 2,
    "memory_bytes": 8 << 30,
    "load_average": 0.5,
    "gpu": None,
}


# --- the study ---------------------------------------------------------------------------------


def rank(mixer: str) -> int:
    """The mixers differ a little; patterns come last."""
    return MIXERS.index(mixer) if mixer in MIXERS else len(MIXERS)


def final_loss(mixer: str, lr: float, seed: int = 0) -> float:
    """Lowest at 1e-2, higher at large learning rates unless the mixer is bounded."""
    slope = {"mhsa+qknorm": 0.1, "gla": 0.03, "transnormer": 0.1}.get(mixer, 0.3)
    return 1.9 + 0.02 * rank(mixer) + slope * abs(math.log10(lr / 1e-2)) + 0.01 * seed


def peak_logit(mixer: str, lr: float, seed: int = 0) -> float:
    """Grows as a power of the learning rate; qk-norm bounds it."""
    power = 0.4 if mixer == "mhsa+qknorm" else 2.5
    base = 6.0 if mixer == "mhsa+qknorm" else 40.0 + 5.0 * rank(mixer)
    return base * (lr / 1e-2) ** power * (1 + 0.1 * seed)


def write_run(
    directory: Path,
    config: RunConfig,
    *,
    nan: bool = False,
    finished: bool = True,
) -> None:
    """One run's file; ``nan`` ends it halfway, without ``finished`` it has no result."""
    settings = config.settings
    linear = config.mixer in LINEAR
    local = 3 if config.mixer == "ls" else 0
    groups = [["local"] * local + ["global"] * (HEADS - local)] * LAYERS
    peak = peak_logit(config.mixer, config.lr, config.seed)
    loss = final_loss(config.mixer, config.lr, config.seed)
    last = settings.steps // 2 if nan or not finished else settings.steps
    parameters = 131_000 + 1_000 * rank(config.mixer)

    def heads(value: float) -> list[list[float] | None]:
        shade = [0.5 + 0.5 * (head + 1) / HEADS for head in range(HEADS)]
        return [[value * s * (1 + 0.2 * layer) / 1.2 for s in shade] for layer in range(LAYERS)]

    def none() -> list[list[float] | None]:
        return [None] * LAYERS

    with RunWriter(run_path(directory, config.key)) as writer:
        kinds = ["linear_score" if linear else "softmax_logit"] * LAYERS
        pattern = [config.mixer] * LAYERS
        writer.write(Header(config.key, config, pattern, parameters, groups, kinds))
        for step in range(0, last, EVERY):
            grown = step / settings.steps
            broken = nan and step + EVERY >= last
            value = math.nan if broken else 5.5 + (loss - 5.5) * min(1.0, 2 * grown)
            writer.write(
                Step(
                    step,
                    loss=value,
                    lr=config.lr * min(1.0, (step + 1) / 10),
                    grad_norm=math.nan if broken else 1.0,
                    max_logit=heads(-math.inf if step == 0 else max(1.0, peak * grown * 1.1)),
                    max_activation=[10.0 + 1e3 * config.lr * step, 12.0 + 2e3 * config.lr * step],
                    grad_rms=[1e-3] * LAYERS,
                    output_logit_max=10.0,
                    log_z=5.0,
                    tokens_per_s=30_000.0,
                    losses=[value] * EVERY,
                    grad_norms=[1.0] * EVERY,
                )
            )
        for step in sorted({0, settings.steps // 2, last}):
            grown = step / settings.steps
            writer.write(
                Probe(
                    step,
                    entropy=none() if linear else heads(3.5 / (1 + peak * grown / 20)),
                    entropy_uniform=none() if linear else heads(3.9),
                    first_token_share=none() if linear else heads(0.03),
                    mean_row_max=heads(1.0 + peak * grown / 3),
                    max_logit=heads(1.0 + peak * grown),
                    logit_rms=heads(1.0 + peak * grown / 8),
                    logit_change=none() if step == 0 else heads(peak / 2),
                    gate_mean=heads(0.5 - 0.3 * grown) if config.mixer == "gated" else none(),
                    gate_below_01=heads(0.3) if config.mixer == "gated" else none(),
                    max_state=heads(100.0) if linear else none(),
                    max_activation=[10.0, 12.0],
                    median_activation=[0.5, 0.5],
                    activation_rms=[1.0, 1.0],
                )
            )
            writer.write(Eval(step, 5.5 + (loss - 5.5) * grown))
        if not finished:
            return
        peaks = {"local": peak * 0.4 if local else None, "global": peak}
        writer.write(
            Result(
                status="nan" if nan else "ok",
                steps_done=last,
                val_loss=math.nan if nan else loss,
                best_val_loss=loss,
                initial_loss=5.5,
                final_loss=math.nan if nan else loss - 0.05,
                peak_max_logit=peak,
                peak_max_logit_local=peaks["local"],
                peak_max_logit_global=peaks["global"],
                peak_max_activation=1e3 * config.lr * last,
                spike_score_loss=None,
                spike_score_grad_norm=0.0,
                steps_to_logit_100=20 if peak > 100 else None,
                cpu_seconds=5.0,
                wall_seconds=6.0,
                tokens_per_s=30_000.0 - 2_000.0 * rank(config.mixer),
                parameters=parameters,
                peak_memory_bytes=300 << 20,
                stats_overhead=0.04,
            )
        )


def write_study(
    directory: Path,
    *,
    mixers: Sequence[str] = MIXERS,
    learning_rates: Sequence[float] = LEARNING_RATES,
    seeds: Sequence[int] = (0, 1),
    nan: Sequence[tuple[str, float]] = (),
    unfinished: Sequence[tuple[str, float, int]] = (),
    absent: Sequence[tuple[str, float, int]] = (),
) -> None:
    """``logits/``, with failed cells, runs without a result and runs that never began."""
    settings = Settings(steps=STEPS, stats_every=EVERY, layers=LAYERS, heads=HEADS)
    configs = [
        RunConfig(mixer, lr, seed, SHA256, settings)
        for mixer in mixers
        for lr in learning_rates
        for seed in seeds
    ]
    runs = [{"key": c.key, "mixer": c.mixer, "lr": c.lr, "seed": c.seed} for c in configs]
    corpus = CorpusInfo("stdlib", "/usr/lib/python3", SHA256, 4_000_000, 3_600_000, 400_000, 200)
    write_grid(
        directory,
        Grid(
            "smoke",
            list(mixers),
            list(learning_rates),
            list(seeds),
            settings,
            corpus,
            ENVIRONMENT,
            runs,
        ),
    )
    for config in configs:
        cell = (config.mixer, config.lr)
        if (*cell, config.seed) not in absent:
            finished = (*cell, config.seed) not in unfinished
            write_run(directory, config, nan=cell in nan, finished=finished)


# --- verify and speed --------------------------------------------------------------------------


def write_verify(directory: Path, *, fails: bool = False) -> None:
    """``verify.json``; with ``fails`` one comparison is over its budget."""
    rows = [
        {
            "function": function,
            "impl": implementation,
            "dtype": dtype,
            "case": "causal",
            "name": name,
            "error": 2e-6,
            "budget": 1e-5,
            "ok": True,
        }
        for function in ("gated_sdpa", "ls_attention", "gated_linear_attention")
        for implementation in ("reference", "eager")
        for dtype in ("float32", "bfloat16")
        for name in ("output", "grad q")
    ]
    if fails:
        rows[-1] |= {"error": math.nan, "ok": False}
    not_run = [
        {"function": name, "impl": "triton", "dtype": "", "case": "", "reason": "needs a GPU"}
        for name in ("gated_sdpa", "ls_attention")
    ]
    write_json(
        directory / "verify.json", {"environment": ENVIRONMENT, "rows": rows, "not_run": not_run}
    )


def speed_row(
    contender: str,
    length: int,
    seconds: float,
    *,
    function: str = "gated_sdpa",
    mode: str = "forward+backward",
    ours: bool = True,
    ratio_to: dict[str, dict[str, float]] | None = None,
    sweep: bool = True,
) -> dict[str, Any]:
    """A row of ``speed.json`` with plausible numbers."""
    return {
        "case": f"{function} B2 T{length} H8 D64",
        "function": function,
        "mode": mode,
        "shape": {"B": 2, "T": length, "H": 8, "D": 64},
        "dtype": "float32",
        "contender": contender,
        "ours": ours,
        "status": "ok",
        "reason": None,
        "median_s": seconds,
        "q20_s": seconds * 0.95,
        "q80_s": seconds * 1.1,
        "rounds": 7,
        "peak_bytes": 50 << 20,
        "tokens_per_s": 2 * length / seconds,
        "tflops": 0.05,
        "gbytes_per_s": 3.0,
        "floor_s": seconds * 0.4,
        "percent_of_floor": 40.0,
        "ratio_to": ratio_to or {},
        "sweep": sweep,
        "launch": "eager",
        "eager_s": None,
        "cache_bytes": None,
    }


def write_speed(directory: Path, *, environment: dict[str, Any] = ENVIRONMENT) -> None:
    """``speed.json``: a sweep over lengths, single cases, a missing peer and a refused one."""
    rows = []
    for length in (1024, 2048, 4096):
        quadratic = 1e-8 * length**2
        rows.append(speed_row("sdpa + gate", length, quadratic, ours=False))
        ratio = {"sdpa + gate": {"median": 0.9, "low": 0.85, "high": 0.97}}
        rows.append(speed_row("eager", length, quadratic * 0.9, ratio_to=ratio))
        ratio = {"sdpa": {"median": 0.2 * 2048 / length, "low": 0.15, "high": 0.3}}
        rows.append(
            speed_row("eager", length, 1e-5 * length, function="ls_attention", ratio_to=ratio)
        )
    ratio = {"sdpa": {"median": 1.1, "low": 0.98, "high": 1.21}}
    ratio["sdpa + gate"] = {"median": 0.9, "low": 0.85, "high": 0.97}
    rows.append(speed_row("eager", 2048, 0.038, ratio_to=ratio, sweep=False))
    rows.append(speed_row("sdpa + gate", 2048, 0.042, ours=False, sweep=False))
    rows.append(speed_row("sdpa", 2048, 0.0345, ours=False, sweep=False))
    decode = speed_row("eager", 2048, 1e-4, mode="decode", sweep=False)
    rows.append(decode | {"percent_of_floor": None, "tflops": None, "floor_s": None})
    gone = dict.fromkeys(
        ("median_s", "q20_s", "q80_s", "rounds", "peak_bytes", "tokens_per_s", "tflops")
        + ("gbytes_per_s", "floor_s", "percent_of_floor")
    )
    fla = speed_row("fla", 2048, 1.0, function="gated_linear_attention", ours=False, sweep=False)
    rows.append(fla | gone | {"status": "missing", "reason": "fla is not installed"})
    bad = speed_row("eager", 2048, 1.0, function="norm_linear_attention", sweep=False)
    rows.append(bad | gone | {"status": "failed verify", "reason": "output over its budget"})
    write_json(
        directory / "speed.json",
        {
            "environment": environment,
            "protocol": {"rounds": 7, "warmup": 2, "interleaved": True},
            "anchors": {
                "measured": [{"moment": "start", "copy_bytes_per_s": 8e9}],
                "drift": 0.05,
            },
            "noise": [{"case": "c", "mode": "forward", "median": 1.0, "low": 0.96, "high": 1.07}],
            "rows": rows,
        },
    )


def write_results(directory: Path) -> None:
    """Everything a full run leaves behind."""
    write_json(directory / "environment.json", ENVIRONMENT)
    write_verify(directory)
    write_speed(directory)
    write_study(directory)
