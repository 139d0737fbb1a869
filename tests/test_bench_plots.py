"""Every figure of the report, from made-up results; what cannot be drawn says why."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import bench_results as made_up
import pytest
from matplotlib.figure import Figure

from bench import plot_style, plots, plots_heads, plots_speed
from bench.metrics import Summary, summarise
from bench.plot_style import NotDrawn
from bench.records import Study, read_study
from bench.strict_json import read_json


def study_of(directory: Path, **options: object) -> Study:
    made_up.write_study(directory, **options)  # type: ignore[arg-type]
    return read_study(directory)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return study_of(tmp_path_factory.mktemp("study"), nan=[("gated", 1e-1)])


@pytest.fixture(scope="module")
def summary(study: Study) -> Summary:
    return summarise(study)


@pytest.fixture(scope="module")
def speed_rows(tmp_path_factory: pytest.TempPathFactory) -> list[plots_speed.Row]:
    directory = tmp_path_factory.mktemp("speed")
    made_up.write_speed(directory)
    rows: list[plots_speed.Row] = read_json(directory / "speed.json")["rows"]
    return rows


def draw(figure: Figure) -> Figure:
    """Lays the figure out and renders it; any warning fails the test."""
    with plot_style.style():
        figure.canvas.draw()
    return figure


def words(figure: Figure) -> str:
    """All text in the figure, legends included."""
    return "\n".join(str(t.get_text()) for t in figure.findobj(match=_is_text))  # type: ignore[attr-defined]


def _is_text(artist: object) -> bool:
    return hasattr(artist, "get_text")


def crosses(figure: Figure, panel: int) -> list[tuple[float, float]]:
    return [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]))  # type: ignore[index]
        for line in figure.axes[panel].lines
        if line.get_marker() == "x"
    ]


# --- every figure ------------------------------------------------------------------------------


DRAWN: dict[str, Callable[[Study, Summary], Figure]] = {
    "loss and logits": plots.loss_and_logits,
    "logits over steps": lambda study, _: plots.logits_over_steps(study),
    "activations": lambda study, _: plots.activations(study),
    "pareto": plots.pareto,
    "max logit of heads": lambda study, _: plots_heads.head_map(study, "max_logit"),
    "entropy of heads": lambda study, _: plots_heads.head_map(study, "entropy"),
    "first token": lambda study, _: plots_heads.head_map(study, "first_token_share"),
    "local and global": lambda _, summary: plots_heads.local_and_global(summary),
    "entropy and logits": lambda study, _: plots_heads.entropy_and_logits(study),
}


@pytest.mark.parametrize("name", DRAWN)
def test_it_renders_and_names_the_mixers(name: str, study: Study, summary: Summary) -> None:
    figure = draw(DRAWN[name](study, summary))
    found = words(figure)
    assert figure.get_figwidth() == plot_style.WIDTH
    assert all(mixer in found for mixer in ("mhsa", "mhsa+qknorm", "ls"))


@pytest.mark.parametrize("name", ["loss and logits", "logits over steps", "max logit of heads"])
def test_scores_are_never_silently_logits(name: str, study: Study, summary: Summary) -> None:
    found = words(DRAWN[name](study, summary))
    assert "gla (score)" in found
    assert "transnormer (score)" in found
    assert "mhsa (score)" not in found


def test_scores_are_dashed_and_logits_solid(study: Study) -> None:
    looks = plots.looks(study)
    assert {mixer for mixer, look in looks.items() if look.linestyle == "--"} == {
        "gla",
        "transnormer",
    }


def test_linear_mixers_have_no_entropy(study: Study) -> None:
    assert "gla" not in words(plots_heads.head_map(study, "entropy"))
    assert "gla" not in words(plots_heads.entropy_and_logits(study))


# --- loss and logits over the learning rate ------------------------------------------------------


def test_nan_is_a_cross_on_the_upper_edge(study: Study, summary: Summary) -> None:
    figure = plots.loss_and_logits(study, summary)
    assert crosses(figure, 0) == [(0.1, 1.0)]
    assert "diverged, NaN" in words(figure)


def test_a_divergence_on_the_scale_keeps_its_value(study: Study) -> None:
    summary = summarise(study)
    cells = [
        cell
        if (cell.mixer, cell.lr) != ("ls", 3e-2)
        else type(cell)(**{**vars(cell), "status": "diverged"})
        for cell in summary.cells
    ]
    figure = plots.loss_and_logits(study, Summary(cells, summary.mixers, 36, 36))
    loss = sum(made_up.final_loss("ls", 3e-2, seed) for seed in (0, 1)) / 2
    assert (3e-2, pytest.approx(loss)) in crosses(figure, 0)


def test_a_far_divergence_does_not_squeeze_the_others(tmp_path: Path) -> None:
    study = study_of(tmp_path, mixers=("mhsa", "ls"), learning_rates=(1e-2, 1e-1))
    for run in study.runs:
        if run.config.mixer == "ls" and run.config.lr == 1e-1 and run.result:
            run.result.val_loss = 1e6
    figure = draw(plots.loss_and_logits(study, summarise(study)))
    assert figure.axes[0].get_ylim()[1] < 3
    assert crosses(figure, 0) == [(0.1, 1.0)]


def test_infinite_peaks_are_crosses_and_absent_ones_nothing(tmp_path: Path) -> None:
    study = study_of(tmp_path, mixers=("mhsa", "ls"), learning_rates=(1e-2, 1e-1), seeds=(0,))
    peaks = iter((math.inf, -math.inf, 5.0, 50.0))
    for run in study.runs:
        assert run.result is not None
        run.result.peak_max_logit = next(peaks)
    figure = draw(plots.loss_and_logits(study, summarise(study)))
    assert crosses(figure, 1) == [(0.01, 1.0)]


def test_danger_lines_are_drawn_where_the_data_comes_near(study: Study, summary: Summary) -> None:
    figure = plots.loss_and_logits(study, summary)
    levels = {float(line.get_ydata()[0]) for line in figure.axes[1].lines}  # type: ignore[index]
    assert {1e2, 1e3, 1e4} <= levels


# --- heads -------------------------------------------------------------------------------------


def test_local_heads_stand_left_of_global_ones(tmp_path: Path) -> None:
    study = study_of(tmp_path, mixers=("ls",), seeds=(0,))
    for run in study.runs:
        run.header.head_groups = [["global", "local", "local", "local"]] * 2
    figure = plots_heads.head_map(study, "max_logit")
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["local", "global"]


def test_many_heads_get_a_colour_bar_instead_of_numbers(tmp_path: Path) -> None:
    study = study_of(tmp_path, mixers=("mhsa",), learning_rates=(1e-2,), seeds=(0,))
    for run in study.runs:
        run.header.head_groups = [["global"] * 16] * 12
        for step in run.steps:
            step.max_logit = [[1.0 + head for head in range(16)]] * 12
    figure = draw(plots_heads.head_map(study, "max_logit"))
    assert len(figure.axes) == 2


def test_hybrids_and_values_that_are_not_finite(tmp_path: Path) -> None:
    study = study_of(tmp_path, mixers=("mhsa", "gla,gated"), learning_rates=(1e-2, 1e-1))
    for run in study.runs:
        if run.config.mixer != "mhsa":
            run.header.logit_kinds = ["linear_score", "softmax_logit"]
            run.steps[-1].max_logit = [[math.inf, math.nan, 3.0, -math.inf], None]
            run.probes[-1].entropy = [None, [math.nan, 0.0, 1.0, 2.0]]
    summary = summarise(study)
    found = [draw(plot(study, summary)) for name, plot in DRAWN.items() if "global" not in name]
    assert any("gla,gated (both)" in words(figure) for figure in found)


def test_short_numbers_of_the_heat_map() -> None:
    values = (0.0023, 1.046, 12.3, 525_788.0, math.inf, -math.inf, math.nan)
    assert [plots_heads.short(v) for v in values] == ["0.00", "1.05", "12", "530k", "inf", "-", ""]


# --- partial and missing data ------------------------------------------------------------------


def test_one_learning_rate_is_no_curve(tmp_path: Path) -> None:
    study = study_of(tmp_path, mixers=("mhsa",), learning_rates=(1e-2,))
    with pytest.raises(NotDrawn, match="two learning rates"):
        plots.loss_and_logits(study, summarise(study))
    with pytest.raises(NotDrawn, match="two mixers"):
        plots.pareto(study, summarise(study))
    with pytest.raises(NotDrawn, match="local heads"):
        plots_heads.local_and_global(summarise(study))
    draw(plots.logits_over_steps(study))


def test_unfinished_runs_are_drawn_as_far_as_they_came(tmp_path: Path) -> None:
    runs = [("mhsa", lr, 0) for lr in made_up.LEARNING_RATES]
    study = study_of(tmp_path, mixers=("mhsa",), seeds=(0,), unfinished=runs)
    draw(plots.logits_over_steps(study))
    draw(plots.activations(study))
    with pytest.raises(NotDrawn, match="finished"):
        plots_heads.head_map(study, "max_logit")


def test_nothing_recorded_yet(tmp_path: Path) -> None:
    study = study_of(tmp_path, mixers=("mhsa",), seeds=(0,))
    for run in study.runs:
        run.steps.clear()
        run.probes.clear()
        run.result = None
    for plot in (plots.logits_over_steps, plots.activations, plots_heads.entropy_and_logits):
        with pytest.raises(NotDrawn, match="no run"):
            plot(study)


def test_activations_without_gates_are_one_panel(tmp_path: Path) -> None:
    study = study_of(tmp_path, mixers=("mhsa", "ls"), seeds=(0,))
    assert len(plots.activations(study).axes) == 1


# --- speed -------------------------------------------------------------------------------------


def test_speed_over_length_has_ours_solid_and_peers_dashed(
    speed_rows: list[plots_speed.Row],
) -> None:
    figure = draw(plots_speed.speed_over_length(speed_rows))
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert {"gated_sdpa", "ls_attention", "sdpa + gate"} <= set(lines)
    assert lines["gated_sdpa"].get_linestyle() == "-"
    assert lines["sdpa + gate"].get_linestyle() == "--"
    assert [round(float(y), 6) for y in lines["ls_attention"].get_ydata()] == [5.0] * 3


def test_speed_ratios_name_case_and_peer(speed_rows: list[plots_speed.Row]) -> None:
    found = words(draw(plots_speed.speed_ratios(speed_rows)))
    assert "gated_sdpa B2 T2048 H8 D64, forward+backward" in found
    assert "sdpa + gate" in found


def test_speed_without_sweep_or_peers_is_not_drawn(speed_rows: list[plots_speed.Row]) -> None:
    with pytest.raises(NotDrawn, match="sweep"):
        plots_speed.speed_over_length([row for row in speed_rows if not row["sweep"]])
    with pytest.raises(NotDrawn, match="no peer"):
        plots_speed.speed_ratios([row for row in speed_rows if row["sweep"]])


# --- style -------------------------------------------------------------------------------------


def test_saved_files_are_the_same_every_time(
    tmp_path: Path, study: Study, summary: Summary
) -> None:
    for name in ("a", "b"):
        plot_style.save(plots.pareto(study, summary), tmp_path / name)
    for ending in ("png", "svg"):
        first, second = (tmp_path / f"{name}.{ending}" for name in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("name", ["loss and logits", "activations", "logits over steps"])
def test_legends_fit_the_figure(name: str, tmp_path: Path) -> None:
    mixers = (*made_up.MIXERS, "gated-headwise", "gla*3,gated", "transnormer-t1")
    study = study_of(tmp_path, mixers=mixers, seeds=(0,), learning_rates=(1e-2, 1e-1))
    figure = draw(DRAWN[name](study, summarise(study)))
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_unknown_mixers_get_looks_of_their_own() -> None:
    names = ["mhsa", *(f"pattern {n}" for n in range(5)), "ls"]
    found = plot_style.looks(names, dashed=["pattern 0"])
    assert len({(look.color, look.marker) for look in found.values()}) == len(names)
    assert found["pattern 0"].linestyle == "--"
    assert found["ls"].color == plot_style.looks(["x", "ls"])["ls"].color


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.003, "0.003"), (300, "300"), (20_000, "20k"), (2.5e6, "2.5M"), (1e9, "1G")],
)
def test_tick_labels_are_plain(value: float, text: str) -> None:
    assert plot_style.compact(value) == text


def test_many_ratios_are_drawn_in_several_figures(
    speed_rows: list[plots_speed.Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plots_speed.ratio_groups(speed_rows) == {"speed_ratios": speed_rows}
    monkeypatch.setattr(plots_speed, "MOST_BARS", 1)
    ours = [r for r in speed_rows if r["ours"] and not r["sweep"] and r["status"] == "ok"]
    slow = ours[0] | {"contender": "slow", "median_s": 9.0}
    fast = ours[0] | {"ratio_to": {**ours[0]["ratio_to"], "slow": {"median": 0.1}}}
    groups = plots_speed.ratio_groups([slow, fast, *speed_rows])
    assert set(groups) == {
        f"speed_ratios_{r['function']}_{r['mode'].replace('+', '_')}" for r in ours
    }
    (row,) = groups["speed_ratios_gated_sdpa_forward_backward"]
    assert row == ours[0]  # neither the slow one nor the ratio to it
