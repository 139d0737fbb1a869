"""One run of the logit-growth study, and the probes of its attention."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attnvariants import LogitMonitor
from bench import metrics
from bench.corpus import Corpus, load
from bench.model import BOS, MIXERS, DecoderLM
from bench.probes import Prober, captured_calls
from bench.records import (
    Eval,
    Header,
    Probe,
    Record,
    Result,
    RunConfig,
    RunWriter,
    Settings,
    Step,
    read_run,
)
from bench.training import Batches, crops, learning_rate, train

TINY = Settings(
    steps=12,
    batch=4,
    length=32,
    width=32,
    layers=2,
    heads=2,
    local_heads=1,
    local_window=8,
    warmup=2,
    probe_every=6,
    eval_every=8,
    probe_sequences=2,
    eval_sequences=6,
    overhead_pairs=1,
)


@pytest.fixture(scope="module")
def text() -> Corpus:
    return load("topics", 60_000)


def run(text: Corpus, mixer: str = "mhsa", lr: float = 1e-2, **changes: Any) -> list[Any]:
    records: list[Record] = []
    settings = dataclasses.replace(TINY, **changes)
    train(RunConfig(mixer, lr, 0, text.info.sha256, settings), text, records.append)
    return records


def of(kind: type, records: list[Any]) -> list[Any]:
    return [record for record in records if isinstance(record, kind)]


# --- probes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("length", [20, 100])
def test_probe_and_monitor_see_the_same_maxima(mixer: str, length: int) -> None:
    """Two roads to one number: explicit scores, and what the attention functions report."""
    torch.manual_seed(1)
    model = DecoderLM(dataclasses.replace(TINY, length=length), mixer)
    tokens = torch.randint(256, (3, length))
    probe = Prober(model, tokens)(0, torch.no_grad)
    with torch.no_grad(), LogitMonitor(model) as monitor:
        model(tokens)
    for layer, seen in zip(probe.max_logit, monitor.read().values(), strict=True):
        torch.testing.assert_close(torch.tensor(layer), seen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mixer", "window"), [("mhsa", None), ("ls", 8), ("gated", None)])
def test_probe_of_uniform_attention(mixer: str, window: int | None) -> None:
    model = DecoderLM(TINY, mixer)
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "gate_proj" in name:
            torch.nn.init.zeros_(parameter)
    probe = Prober(model, torch.randint(256, (2, 32)))(0, torch.no_grad)
    visible = [min(i + 1, window or 32) for i in range(32)]
    first = [1 / n if n == i + 1 else 0 for i, n in enumerate(visible)]
    share = sum(first) / 32
    for layer in range(2):
        assert probe.entropy[layer] == pytest.approx(probe.entropy_uniform[layer], abs=1e-5)
        assert probe.entropy[layer][0] == pytest.approx(sum(map(math.log, visible)) / 32, abs=1e-5)
        assert probe.first_token_share[layer][0] == pytest.approx(share, abs=1e-6)
        assert probe.max_logit[layer] == probe.mean_row_max[layer] == [0.0, 0.0]
        assert probe.logit_rms[layer] == [0.0, 0.0]
    if mixer == "ls":  # the second head sees everything
        assert probe.entropy[0][1] > probe.entropy[0][0] + 0.5
    if mixer == "gated":
        assert probe.gate_mean == [[0.5, 0.5]] * 2
        assert probe.gate_below_01 == [[0.0, 0.0]] * 2
    else:
        assert probe.gate_mean == [None, None]
    assert probe.logit_change == probe.max_state == [None, None]


def attention(model: DecoderLM, tokens: Tensor) -> Tensor:
    """Attention probabilities of the first layer by another way, ``[B, H, T, T]``."""
    with torch.no_grad(), captured_calls(model) as calls:
        model(tokens)
    q, k = (calls[0][1][name].transpose(1, 2) for name in ("q", "k"))
    length = tokens.shape[1]
    bias = torch.full((length, length), -math.inf).triu(1)
    return (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1)


def test_probe_by_hand() -> None:
    torch.manual_seed(2)
    model, tokens = DecoderLM(TINY, "mhsa"), torch.randint(256, (3, 32))
    prober = Prober(model, tokens)
    before = prober(0, torch.no_grad)
    expected = attention(model, tokens)
    torch.testing.assert_close(
        torch.tensor(before.first_token_share[0]), expected[..., 0].mean((0, 2))
    )
    entropy = -(expected * expected.clamp(min=1e-30).log()).sum(-1).mean((0, 2))
    torch.testing.assert_close(torch.tensor(before.entropy[0]), entropy)
    with torch.no_grad():
        model.mixers["blocks.0.mixer"].q_proj.weight.mul_(3)  # logits of layer 0 triple
    after = prober(1, torch.no_grad)
    grown = 3 * torch.tensor(before.max_logit[0])
    torch.testing.assert_close(torch.tensor(after.max_logit[0]), grown)
    torch.testing.assert_close(
        torch.tensor(after.logit_rms[0]), 3 * torch.tensor(before.logit_rms[0])
    )
    assert all(change > 0 for layer in after.logit_change for change in layer)
    assert min(after.logit_change[0]) >= 2 * min(before.max_logit[0]) * 0.99
    assert len(after.max_activation) == len(after.activation_rms) == 2
    for low, middle, high in zip(
        after.median_activation, after.activation_rms, after.max_activation, strict=True
    ):
        assert 0 < low < middle < high


def test_probe_of_linear_layers_has_states_and_no_entropy() -> None:
    torch.manual_seed(0)
    probe = Prober(DecoderLM(TINY, "gla,transnormer"), torch.randint(256, (2, 32)))(
        0, torch.no_grad
    )
    assert probe.entropy == probe.first_token_share == probe.gate_mean == [None, None]
    assert all(value > 0 for layer in probe.max_state for value in layer)
    assert all(value > 0 for layer in probe.mean_row_max for value in layer)


def test_probing_leaves_the_model_alone() -> None:
    model = DecoderLM(TINY, "gated,diag")
    state = {name: set(vars(module)) for name, module in model.named_modules()}
    Prober(model, torch.randint(256, (2, 32)))(0, torch.no_grad)
    assert state == {name: set(vars(module)) for name, module in model.named_modules()}
    assert not any(block._forward_hooks for block in model.blocks)


# --- data and schedule -------------------------------------------------------------------------


def test_crops_predict_the_next_byte() -> None:
    data = torch.arange(100, dtype=torch.uint8)
    inputs, targets = crops(data, torch.tensor([0, 50]), dataclasses.replace(TINY, length=5))
    assert inputs.tolist() == [[0, 1, 2, 3, 4], [50, 51, 52, 53, 54]]
    assert targets.tolist() == [[1, 2, 3, 4, 5], [51, 52, 53, 54, 55]]


def test_crops_with_bos() -> None:
    data = torch.arange(100, dtype=torch.uint8)
    inputs, targets = crops(data, torch.tensor([7]), dataclasses.replace(TINY, length=3, bos=True))
    assert inputs.tolist() == [[BOS, 7, 8]]
    assert targets.tolist() == [[7, 8, 9]]


def test_batches_depend_on_the_seed_only() -> None:
    data = torch.randint(256, (40,), dtype=torch.uint8)  # the last crop must fit as well
    first, same, other = (Batches(data, TINY, seed) for seed in (0, 0, 1))
    for _ in range(20):
        a, b, c = first.next()[0], same.next()[0], other.next()[0]
        assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_schedule() -> None:
    settings = dataclasses.replace(TINY, steps=110, warmup=10)
    rates = [learning_rate(step, 1.0, settings) for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[109] == pytest.approx(0.1, abs=1e-3)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))
    constant = dataclasses.replace(settings, schedule="constant")
    assert [learning_rate(step, 1.0, constant) for step in (4, 50, 109)] == [0.5, 1.0, 1.0]
    assert learning_rate(0, 1.0, dataclasses.replace(TINY, warmup=0)) == 1.0


# --- a whole run -------------------------------------------------------------------------------


def test_records_of_a_run(text: Corpus) -> None:
    records = run(text, "ls")
    assert isinstance(records[0], Header)
    assert isinstance(records[-1], Result)
    assert records[0].head_groups == [["local", "global"]] * 2
    steps, result = of(Step, records), records[-1]
    # the first and last step, every fifth, and those before an evaluation or a probe
    assert [step.step for step in steps] == [0, 4, 5, 7, 9, 11]
    assert [len(step.losses) for step in steps] == [1, 4, 1, 2, 2, 2]
    assert [record.step for record in of(Probe, records)] == [0, 6, 12]
    evals = of(Eval, records)
    assert [record.step for record in evals] == [0, 8, 12]
    for step in steps:
        assert step.loss == step.losses[-1]
        assert step.grad_norm == step.grad_norms[-1] > 0
        assert step.tokens_per_s > 0
        assert len(step.max_activation) == len(step.grad_rms) == 2
    losses = [loss for step in steps for loss in step.losses]
    assert result.status == "ok"
    assert result.steps_done == 12
    assert result.final_loss == pytest.approx(sum(losses[-10:]) / 10)
    assert result.val_loss == evals[-1].val_loss < result.initial_loss == evals[0].val_loss
    assert result.best_val_loss == min(record.val_loss for record in evals)
    everything = [step.max_logit for step in steps]
    groups = records[0].head_groups
    assert result.peak_max_logit_local == max(
        metrics.head_max(m, groups, "local") for m in everything
    )
    assert result.peak_max_logit_global == max(
        metrics.head_max(m, groups, "global") for m in everything
    )
    assert result.peak_max_logit == max(result.peak_max_logit_local, result.peak_max_logit_global)
    assert result.cpu_seconds > 0
    assert result.wall_seconds > 0
    assert result.stats_overhead is not None
    assert result.peak_memory_bytes is None
    assert result.spike_score_loss is None  # 12 steps do not fill the window


def test_a_run_repeats_itself(text: Corpus) -> None:
    first, second = (of(Step, run(text, "gated", overhead_pairs=0)) for _ in range(2))
    keep = {"tokens_per_s": 0.0}
    assert [dataclasses.replace(s, **keep) for s in first] == [
        dataclasses.replace(s, **keep) for s in second
    ]


def test_telemetry_does_not_depend_on_how_often_it_is_read(text: Corpus) -> None:
    often = run(text, stats_every=1, probe_every=100, eval_every=100)
    seldom = run(text, stats_every=100, probe_every=3, eval_every=5)
    assert often[-1].peak_max_logit == seldom[-1].peak_max_logit
    assert often[-1].val_loss == seldom[-1].val_loss
    assert [x for s in of(Step, often) for x in s.losses] == [
        x for s in of(Step, seldom) for x in s.losses
    ]


def test_evaluation_does_not_count_as_training(text: Corpus) -> None:
    """The validation text must not enter the maxima of the step after it."""
    with_evals = of(Step, run(text, eval_every=2, stats_every=1))
    without = of(Step, run(text, eval_every=100, stats_every=1))
    assert [s.max_logit for s in with_evals] == [s.max_logit for s in without]


def test_nan_is_a_result(text: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    config = RunConfig("mhsa", 1e30, 0, text.info.sha256, TINY)
    with RunWriter(path) as writer:
        result = train(config, text, writer.write)
    assert result.status == "nan"
    assert 0 < result.steps_done < TINY.steps
    assert math.isnan(result.val_loss)
    assert math.isfinite(result.final_loss)
    written = read_run(path)
    assert written is not None
    assert written.result is not None
    assert written.result.status == "nan"
    assert metrics.status(written, best=2.0) == "nan"
    assert math.isfinite(written.losses()[result.steps_done - 1])
    assert not math.isfinite(written.losses()[result.steps_done])


def test_weights_that_break_in_the_last_step(text: Corpus) -> None:
    records = run(text, lr=1e30, steps=1, warmup=0)
    assert records[-1].status == "nan"
    assert records[-1].steps_done == 1


def test_progress_is_reported(text: Corpus) -> None:
    seen: list[int] = []
    config = RunConfig("mhsa", 1e-2, 0, text.info.sha256, TINY)
    train(config, text, lambda record: None, seen.append)
    assert seen == [1, 5, 6, 8, 10, 12]


def test_z_loss_pulls_log_z_to_zero(text: Corpus) -> None:
    plain, pulled = run(text, steps=30), run(text, steps=30, z_loss=1.0)
    assert abs(of(Step, pulled)[-1].log_z) < 0.5 * abs(of(Step, plain)[-1].log_z)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"bos": True},
        {"positions": "learned", "clip": 0.0, "weight_decay": 0.1},
        {"schedule": "constant", "init": "small", "overhead_pairs": 0},
    ],
)
def test_options(text: Corpus, changes: dict[str, Any]) -> None:
    records = run(text, "gated,gla", **changes)
    assert records[-1].status == "ok"
    assert records[-1].val_loss < records[-1].initial_loss


def test_compiled_model_learns_the_same(text: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend="aot_eager"))
    plain, compiled = run(text, overhead_pairs=0), run(text, compile=True, overhead_pairs=0)
    for a, b in zip(of(Step, plain), of(Step, compiled), strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4)
        for layer, other in zip(a.max_logit, b.max_logit, strict=True):
            assert other == pytest.approx(layer, rel=1e-3)
