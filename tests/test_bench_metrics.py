"""Definitions of the logit-growth study on series with known answers, and summaries of a grid."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import metrics
from bench.metrics import Spread, compare, spread
from bench.records import (
    CorpusInfo,
    Grid,
    Header,
    Probe,
    Result,
    Run,
    RunConfig,
    Settings,
    Study,
)

NAN, INF = math.nan, math.inf


# --- one series --------------------------------------------------------------------------------


def test_lr_sensitivity() -> None:
    assert metrics.lr_sensitivity([2.0, 1.5, 3.5], 5.0) == pytest.approx((0.5 + 0 + 2) / 3)
    assert metrics.lr_sensitivity([2.0, NAN, 9.0], 5.0) == pytest.approx((0 + 3 + 3) / 3)
    assert metrics.lr_sensitivity([INF, NAN], 5.0) == 0.0
    assert metrics.lr_sensitivity([1.0], 5.0) == 0.0


def noise(n: int) -> list[float]:
    """Mean 0, population sd 1 over any even window."""
    return [(-1.0) ** i for i in range(n)]


def test_spikes_of_olmo_core_are_upward_only() -> None:
    score = metrics.spike_score_olmo_core
    assert score(noise(128) + [6.01]) == 100.0
    assert score(noise(128) + [5.99]) == 0.0
    assert score(noise(128) + [-50.0]) == 0.0
    assert score(noise(128) + [NAN]) == 100.0
    assert score(noise(200) + [100.0] + noise(27)) == pytest.approx(100 / 100)
    assert score([100.0] + noise(128) + [0.0, 50.0], recent=1) == 100.0


def test_spikes_of_olmo_2_go_both_ways() -> None:
    score = metrics.spike_score_olmo2
    for value in (7.0, -7.0):  # "at least"
        assert score(noise(1000) + [value]) == 100.0
        assert score(noise(1000) + [0.99 * value]) == 0.0
    assert score(noise(10) + [20.0], window=10) == 100.0


@pytest.mark.parametrize("score", [metrics.spike_score_olmo2, metrics.spike_score_olmo_core])
def test_no_spike_verdict_without_a_full_window_or_a_spread(score: Any) -> None:
    window = 1000 if score is metrics.spike_score_olmo2 else 128
    assert score([]) is None
    assert score(noise(window)) is None
    assert score([1.0] * window + [100.0]) == 0.0  # zero standard deviation: never
    assert score([INF] + noise(window - 1) + [100.0]) is None


def test_growth_exponents() -> None:
    assert metrics.growth_exponents([1e-3, 1e-2, 1e-1], [1, 100, 1000]) == pytest.approx([2, 1])
    assert metrics.growth_exponents([1e-3], [5.0]) == []
    assert math.isnan(metrics.growth_exponents([1e-3, 1e-2], [-1.0, 5.0])[0])


def test_first_step_above() -> None:
    series = [(0, 1.0), (5, 100.0), (10, 100.1), (15, 3.0)]
    assert metrics.first_step_above(series, 100) == 10
    assert metrics.first_step_above(series, 200) is None
    assert metrics.first_step_above([(0, NAN)], 0) is None


def test_entropy_of_known_rows() -> None:
    rows = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    expected = torch.tensor([math.log(4), 0.0, math.log(2)])
    torch.testing.assert_close(metrics.attention_entropy(rows), expected)


@given(st.integers(2, 200), st.floats(0.0, 50.0), st.integers(0, 2**31))
def test_entropy_floor_is_a_floor_and_is_attained(length: int, norm: float, seed: int) -> None:
    def entropy(logits: torch.Tensor) -> float:
        return float(metrics.attention_entropy(logits.softmax(-1)))

    extreme = torch.zeros(length, dtype=torch.float64)
    extreme[0] = norm * math.sqrt(length / (length - 1))
    assert float((extreme - extreme.mean()).norm()) == pytest.approx(norm, abs=1e-9)
    floor = metrics.entropy_floor(norm, length)
    assert floor == pytest.approx(entropy(extreme), abs=1e-9)

    other = torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    other = other - other.mean()
    other = other * norm / other.norm().clamp(min=1e-30)
    assert entropy(other) >= floor - 1e-9


def test_entropy_floor_of_one_key() -> None:
    assert metrics.entropy_floor(3.0, 1) == 0.0
    assert metrics.entropy_floor(0.0, 8) == pytest.approx(math.log(8))


def test_sinks_activations_and_depth() -> None:
    assert metrics.sink_rate([[0.31, 0.3], None, [0.9, 0.0]]) == 0.5
    assert metrics.sink_rate([None]) is None
    assert metrics.is_massive(101.0, 0.1)
    assert not metrics.is_massive(101.0, 0.2)
    assert not metrics.is_massive(99.0, 0.001)
    assert metrics.depth_growth(1.0, math.e**3, 6) == pytest.approx(0.5)


def test_heads_by_group() -> None:
    values = [[1.0, 2.0], None, [NAN, 6.0]]
    groups = [["local", "global"], ["local", "local"], ["local", "global"]]
    assert metrics.head_mean(values) == 3.0
    assert metrics.head_max(values) == 6.0
    assert metrics.head_mean(values, groups, "global") == 4.0
    assert metrics.head_max(values, groups, "local") == 1.0
    assert metrics.head_mean([None]) is None
    assert metrics.head_max([[1.0]], [["global"]], "local") is None


def test_spread() -> None:
    assert spread([1.0, None, 3.0, NAN]) == Spread(2.0, math.sqrt(2), 2)
    assert spread([4.0]) == Spread(4.0, None, 1)
    assert spread([None, NAN]) is None
    assert spread([INF, 1.0]) == Spread(INF, None, 2)
    assert str(Spread(1.9764, 0.0041, 3)) == "1.976 ± 0.004"
    assert str(Spread(43.02, 2.41, 3)) == "43.0 ± 2.4"
    assert str(Spread(21250.4, None, 1)) == "21250"


def test_overlapping_intervals_are_not_distinguishable() -> None:
    baseline = Spread(43.0, 2.4, 3)
    assert compare(Spread(32.4, 2.5, 3), baseline) == "lower"
    assert compare(Spread(48.1, 1.2, 3), baseline) == "higher"
    assert compare(Spread(46.0, 1.2, 3), baseline) == "not distinguishable"
    assert compare(Spread(38.0, 2.6, 3), baseline) == "not distinguishable"  # they touch
    assert compare(Spread(1.0, None, 1), baseline) is None
    assert compare(None, baseline) is None


# --- a grid ------------------------------------------------------------------------------------


def make_run(
    mixer: str,
    lr: float,
    seed: int = 0,
    *,
    loss: float = 2.0,
    peak: float = 10.0,
    status: str = "ok",
    initial: float = 5.5,
    kind: str = "softmax_logit",
    finished: bool = True,
    **changes: Any,
) -> Run:
    config = RunConfig(mixer, lr, seed, "abc", Settings(layers=1, heads=2))
    header = Header(config.key, config, [mixer], 100, [["local", "global"]], [kind])
    heads = [[1.0, 3.0]]
    probe = Probe(100, *[heads] * 6, *[[None]] * 4, [9.0], [1.0], [2.0])
    values: dict[str, Any] = {
        "status": status,
        "steps_done": 100,
        "val_loss": loss,
        "best_val_loss": loss,
        "initial_loss": initial,
        "final_loss": loss,
        "peak_max_logit": peak,
        "peak_max_logit_local": peak / 2,
        "peak_max_logit_global": peak,
        "peak_max_activation": 30.0,
        "spike_score_loss": None,
        "spike_score_grad_norm": None,
        "steps_to_logit_100": 40 + seed if peak > 100 else None,
        "cpu_seconds": 6.0,
        "wall_seconds": 7.0,
        "tokens_per_s": 1000.0,
        "parameters": 100,
        "peak_memory_bytes": None,
        "stats_overhead": 0.1,
    }
    result = Result(**(values | changes)) if finished else None
    return Run(header, probes=[probe], result=result)


def make_study(*runs: Run) -> Study:
    configs = [run.config for run in runs]
    grid = Grid(
        preset="smoke",
        mixers=list(dict.fromkeys(c.mixer for c in configs)),
        learning_rates=sorted({c.lr for c in configs}),
        seeds=sorted({c.seed for c in configs}),
        settings=Settings(),
        corpus=CorpusInfo("topics", "/topics.py", "abc", 10, 9, 1, 1),
        environment={},
        runs=[{"key": c.key, "mixer": c.mixer, "lr": c.lr, "seed": c.seed} for c in configs],
    )
    return Study(grid, list(runs))


@pytest.mark.parametrize(
    ("loss", "status", "expected"),
    [
        (2.0, "ok", "ok"),
        (2.09, "ok", "ok"),
        (2.11, "ok", "degraded"),
        (2.99, "ok", "degraded"),
        (3.01, "ok", "diverged"),
        (NAN, "nan", "nan"),
        (NAN, "ok", "nan"),
    ],
)
def test_status_rule(loss: float, status: str, expected: str) -> None:
    assert metrics.status(make_run("mhsa", 0.1, loss=loss, status=status), best=2.0) == expected


def test_a_flat_bad_run_has_diverged() -> None:
    flat = make_run("mhsa", 0.1, loss=5.6, initial=5.5)
    assert metrics.status(flat, best=5.0) == "diverged"  # above its own start
    assert metrics.status(flat, best=5.6) == "diverged"  # also where no run is better
    assert metrics.status(make_run("mhsa", 0.1, finished=False), best=2.0) == "unfinished"


def test_summary_of_a_grid() -> None:
    losses = {("mhsa", 0.01): (2.0, 2.1), ("mhsa", 0.1): (3.0, 3.2), ("ls", 0.01): (1.8, 1.9)}
    peaks = {("mhsa", 0.01): (40.0, 44.0), ("mhsa", 0.1): (4000.0, 4400.0), ("ls", 0.01): (30, 32)}
    runs = [
        make_run(*cell, seed, loss=losses[cell][seed], peak=peaks[cell][seed])
        for seed in (0, 1)
        for cell in losses
    ]
    runs += [make_run("gla", 0.01, seed, peak=9.0, kind="linear_score") for seed in (0, 1)]
    runs.append(make_run("gla", 0.1, finished=False))
    summary = metrics.summarise(make_study(*runs))

    assert [(c.mixer, c.lr, c.seeds) for c in summary.cells] == [
        ("mhsa", 0.01, 2),
        ("mhsa", 0.1, 2),
        ("ls", 0.01, 2),
        ("gla", 0.01, 2),
    ]
    good, bad, ls, gla = summary.cells
    assert (good.status, bad.status) == ("ok", "diverged")
    assert good.val_loss == Spread(2.05, pytest.approx(0.1 / math.sqrt(2)), 2)
    assert good.peak_max_logit_local == Spread(21.0, pytest.approx(math.sqrt(2)), 2)
    assert good.entropy == Spread(2.0, 0.0, 2)
    assert good.gate_mean is None
    assert good.steps_to_logit_100 is None
    assert bad.steps_to_logit_100 == Spread(40.5, pytest.approx(math.sqrt(0.5)), 2)
    assert good.loss_vs_baseline is None  # the baseline itself
    assert (ls.loss_vs_baseline, ls.logit_vs_baseline) == ("lower", "lower")
    assert gla.logit_vs_baseline is None  # another quantity than a softmax logit
    assert gla.logit_kind == "linear_score"

    mhsa = summary.mixers[0]
    assert (mhsa.best_lr, mhsa.largest_ok_lr) == (0.01, 0.01)
    assert mhsa.best_loss == good.val_loss
    assert mhsa.lr_sensitivity == Spread(pytest.approx(0.525), pytest.approx(0.0354, abs=1e-3), 2)
    assert mhsa.growth_exponents == pytest.approx([2.0])
    assert mhsa.steps_to_logit_100 == 40
    assert summary.mixers[1].lr_sensitivity is None  # a single learning rate
    assert (summary.finished, summary.planned) == (8, 9)


def test_summary_with_nan_runs() -> None:
    runs = [
        make_run("mhsa", 0.01, loss=2.0),
        make_run("mhsa", 0.1, loss=NAN, status="nan", peak=INF),
    ]
    summary = metrics.summarise(make_study(*runs))
    assert [cell.status for cell in summary.cells] == ["ok", "nan"]
    assert summary.cells[1].val_loss is None
    sensitivity = summary.mixers[0].lr_sensitivity
    assert sensitivity is not None
    assert sensitivity.mean == pytest.approx((5.5 - 2.0) / 2)
    assert summary.mixers[0].growth_exponents == [INF]


def test_summary_order_does_not_depend_on_where_the_baseline_is() -> None:
    summary = metrics.summarise(make_study(make_run("ls", 0.1, loss=1.0), make_run("mhsa", 0.1)))
    assert [row.mixer for row in summary.mixers] == ["ls", "mhsa"]
    assert [cell.mixer for cell in summary.cells] == ["ls", "mhsa"]
    assert metrics.summarise(make_study(make_run("ls", 0.1))).cells[0].loss_vs_baseline is None


def test_summary_of_nothing() -> None:
    summary = metrics.summarise(make_study(make_run("mhsa", 0.1, finished=False)))
    assert (summary.cells, summary.mixers, summary.planned) == ([], [], 1)


def test_hybrids_have_mixed_logits() -> None:
    run = make_run("gla,gated", 0.1)
    run.header.logit_kinds = ["linear_score", "softmax_logit"]
    assert metrics.logit_kind(run) == "mixed"
