"""Numbers as text, and the tables of the report."""

from __future__ import annotations

import math
from pathlib import Path

import bench_results as made_up
import pytest

from bench import tables, tables_timing, tables_verify
from bench.document import Document, Section, Table, to_markdown
from bench.metrics import Spread, summarise
from bench.records import Study, read_study
from bench.strict_json import read_json


@pytest.fixture
def study(tmp_path: Path) -> Study:
    made_up.write_study(
        tmp_path,
        mixers=("mhsa", "ls", "gla"),
        learning_rates=(1e-2, 1e-1),
        nan=[("mhsa", 1e-1)],
        unfinished=[("ls", 1e-1, 1)],
        absent=[("gla", 1e-1, 1)],
    )
    return read_study(tmp_path)


def _cell(table: Table, group: str, label: str) -> dict[str, str]:
    """The row ``label`` of a group, by its columns."""
    rows = zip(table.groups, table.rows, strict=True)
    row = next(row for name, row in rows if (name, row[0]) == (group, label))
    return dict(zip(table.columns, row, strict=True))


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "n/a"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-"),
        (0.0, "0"),
        (0.0123456, "0.0123"),
        (1.23456, "1.23"),
        (12.3456, "12.3"),
        (123.456, "123"),
        (525788.4, "525,788"),
        (-4.5, "-4.50"),
    ],
)
def test_numbers_have_three_figures_and_non_finite_ones_are_said(
    value: float | None, text: str
) -> None:
    assert tables.number(value) == text


def test_fixed_decimals() -> None:
    assert tables.number(1.97, 3) == "1.970"
    assert tables.number(math.nan, 3) == "nan"


def test_mean_and_deviation_share_their_decimals() -> None:
    assert tables.mean_sd(Spread(42.96, 2.44, 3)) == "43.0 ± 2.4"
    assert tables.mean_sd(Spread(1.9764, 0.0043, 3), 3) == "1.976 ± 0.004"


def test_one_seed_has_no_deviation() -> None:
    assert tables.mean_sd(Spread(42.96, None, 1)) == "43.0"
    assert tables.mean_sd(Spread(-math.inf, None, 2)) == "-"
    assert tables.mean_sd(None) == "n/a"


# --- Markdown ----------------------------------------------------------------------------------


def test_markdown_escapes_bars_and_names_groups_once() -> None:
    rows = [("1", "x"), ("2", "a|b"), ("3", "y")]
    table = Table("T", ("n", "what"), rows, 1, "A note.", groups=("first", "first", "second"))
    text = to_markdown(Document("D", "s", [Section("S", [table])]), "plots")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines == [
        "| n | what |",
        "| --- | ---: |",
        "| **first** |  |",
        "| 1 | x |",
        "| 2 | a\\|b |",
        "| **second** |  |",
        "| 3 | y |",
    ]
    assert text.endswith("A note.\n")


# --- the study ---------------------------------------------------------------------------------


def test_cells_hold_loss_peak_final_entropy_and_status(study: Study) -> None:
    summary = summarise(study)
    table = tables.cells(summary, study)
    row = _cell(table, "ls", "0.01")
    assert row["val loss (nats/byte)"] == "1.945 ± 0.007"
    assert row["peak max logit"] == "52.5 ± 3.5"
    assert row["final max logit"] == "50.5 ± 3.4"
    assert row["status"] == "ok"
    assert row["loss vs mhsa"] == "higher"
    assert row["peak vs mhsa"] == "higher"


def test_cells_say_what_failed_and_what_is_unfinished(study: Study) -> None:
    table = tables.cells(summarise(study), study)
    assert _cell(table, "mhsa", "0.1")["status"] == "nan"
    assert _cell(table, "mhsa", "0.1")["val loss (nats/byte)"] == "nan"
    assert _cell(table, "ls", "0.1")["status"] == "degraded; 1/2 seeds"
    assert _cell(table, "ls", "0.1")["peak vs mhsa"] == "n/a"  # one seed decides nothing
    assert _cell(table, "gla (score)", "0.01")["entropy (nats)"] == "n/a"
    assert _cell(table, "gla (score)", "0.01")["peak vs mhsa"] == "n/a"  # another quantity


def test_mixers_over_the_whole_grid(study: Study) -> None:
    table = tables.mixers(summarise(study))
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows["ls"]["parameters"] == "133,000"
    assert rows["ls"]["best val loss (nats/byte)"] == "1.945 ± 0.007"
    assert rows["ls"]["at learning rate"] == "0.01"
    assert rows["ls"]["steps to logit > 100"] == "20"
    assert rows["ls"]["loss spikes (% of steps)"] == "n/a"
    assert rows["ls"]["telemetry overhead (%)"] == "4.0"
    assert rows["mhsa"]["largest ok learning rate"] == "0.01"
    assert "gla (score)" in rows


def test_local_and_global_heads_are_apart(study: Study) -> None:
    table = tables.heads(summarise(study))
    assert _cell(table, "ls", "0.01")["peak, local heads"] == "21.0 ± 1.4"
    assert _cell(table, "ls", "0.01")["peak, global heads"] == "52.5 ± 3.5"
    assert _cell(table, "mhsa", "0.01")["peak, local heads"] == "n/a"


def test_unfinished_runs_show_how_far_they_came(study: Study) -> None:
    table = tables.unfinished(study)
    assert table is not None
    assert [row[:4] for row in table.rows] == [("ls", "0.1", "1", "16 of 40")]


def test_nothing_unfinished_is_no_table(tmp_path: Path) -> None:
    made_up.write_study(tmp_path, mixers=("mhsa",), learning_rates=(1e-2,), seeds=(0,))
    assert tables.unfinished(read_study(tmp_path)) is None


# --- speed and correctness -----------------------------------------------------------------------


@pytest.fixture
def speed_rows(tmp_path: Path) -> list[tables_timing.Row]:
    made_up.write_speed(tmp_path)
    rows: list[tables_timing.Row] = read_json(tmp_path / "speed.json")["rows"]
    return rows


def test_speed_shows_the_ratio_beside_each_peer(speed_rows: list[tables_timing.Row]) -> None:
    table = tables_timing.speed(speed_rows, "gated_sdpa")
    assert table is not None
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows[:3]}
    assert table.groups[0] == "gated_sdpa B2 T2048 H8 D64, forward+backward"
    assert rows["sdpa + gate"]["our time / its (range)"] == "0.90 (0.85 to 0.97)"
    assert rows["sdpa"]["our time / its (range)"] == "1.10 (0.98 to 1.21)"
    assert rows["eager (ours)"]["our time / its (range)"] == ""
    assert rows["eager (ours)"]["time in ms (20 to 80 %)"] == "38.0 (36.1 to 41.8)"
    assert rows["eager (ours)"]["% of floor"] == "40"


def test_a_function_without_a_timing_has_no_table(speed_rows: list[tables_timing.Row]) -> None:
    assert tables_timing.speed(speed_rows, "norm_linear_attention") is None


def test_sweep_is_time_per_token(speed_rows: list[tables_timing.Row]) -> None:
    table = tables_timing.sweep(speed_rows)
    assert table is not None
    assert table.columns == (
        "length",
        "sdpa + gate",
        "gated_sdpa, eager",
        "ls_attention, eager",
    )
    assert table.rows[1] == ("2048", "10.2", "9.22", "5.00")


def test_missing_peers_are_said_with_their_reason(speed_rows: list[tables_timing.Row]) -> None:
    table = tables_timing.not_timed(speed_rows)
    assert table is not None
    assert ("fla", "missing", "gated_linear_attention", "fla is not installed") in table.rows
    assert table.rows[1][1] == "failed verify"


def test_verify_names_the_worst_comparison(tmp_path: Path) -> None:
    made_up.write_verify(tmp_path, fails=True)
    rows = read_json(tmp_path / "verify.json")["rows"]
    table = tables_verify.verify_summary(rows)
    assert table.rows[0] == ("reference", "float32", "output, causal", "0.20", "0", "2")
    assert table.rows[-1] == ("eager", "bfloat16", "grad q, causal", "inf", "1", "2")
    failures = tables_verify.verify_failures(rows)
    assert failures is not None
    assert failures.rows[0][-2:] == ("nan", "1.00e-05")


def test_what_was_not_verified_is_grouped_by_reason(tmp_path: Path) -> None:
    made_up.write_verify(tmp_path)
    table = tables_verify.not_verified(read_json(tmp_path / "verify.json")["not_run"])
    assert table is not None
    assert table.rows == [("triton", "gated_sdpa, ls_attention", "needs a GPU")]


def test_facts_write_every_kind_of_value() -> None:
    entries = [("a_b", None), ("c", True), ("d", 4_000_000), ("e", [1, 2]), ("f", 1e-8)]
    rows = tables.facts("Facts", entries).rows
    assert rows == [("a b", "n/a"), ("c", "yes"), ("d", "4,000,000"), ("e", "1, 2"), ("f", "1e-08")]


def test_decode_steps_are_in_microseconds_with_and_without_a_graph() -> None:
    step = made_up.speed_row("cuda", 1, 5e-6, function="attention_decode", mode="decode")
    step |= {"sweep": False, "launch": "graph", "eager_s": 2.5e-5, "cache_bytes": 3 << 20}
    plain = step | {"contender": "eager", "launch": "eager", "eager_s": None, "median_s": 1e-4}
    table = tables_timing.speed([step, plain], "attention_decode")
    assert table is not None
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["microseconds in a CUDA graph"] for row in rows] == ["5.00", tables.ABSENT]
    assert [row["eager"] for row in rows] == ["25.0", "100"]
    assert [row["cache (MiB)"] for row in rows] == ["3.00", "3.00"]
