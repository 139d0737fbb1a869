"""One run of the logit-growth study: train a small model and write down what happens."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnvariants import LogitMonitor
from bench.corpus import Corpus
from bench.metrics import first_step_above, head_max, spike_score_olmo_core
from bench.model import BOS, DecoderLM
from bench.probes import Prober
from bench.records import (
    Eval,
    Header,
    Record,
    Result,
    RunConfig,
    Settings,
    Step,
)

FINAL_STEPS = 10  # training losses that final_loss averages


def train(
    config: RunConfig,
    corpus: Corpus,
    write: Callable[[Record], None],
    progress: Callable[[int], None] = lambda step: None,
) -> Result:
    """Trains the model of ``config``, hands every record to ``write`` and returns the last one.

    A loss that is not finite ends the run with status ``"nan"``: that is a result, not an error.
    """
    return _Run(config, corpus, write, progress).train()


class Batches:
    """Random crops of the training text, the same for every mixer with the same seed."""

    def __init__(self, text: Tensor, settings: Settings, seed: int) -> None:
        self._text = text.to(settings.device)
        self._settings = settings
        self._generator = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both ``[B, T]``."""
        settings = self._settings
        starts = torch.randint(
            len(self._text) - settings.length, (settings.batch,), generator=self._generator
        )
        return crops(self._text, starts, settings)


def crops(text: Tensor, starts: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Inputs and targets ``[B, T]``: the ``T + 1`` bytes from each start on, or BOS and ``T``."""
    length = settings.length + (not settings.bos)
    index = starts[:, None] + torch.arange(length)
    tokens = text[index.to(text.device)].long()
    if settings.bos:
        return F.pad(tokens, (1, -1), value=BOS), tokens
    return tokens[:, :-1], tokens[:, 1:]


def learning_rate(step: int, peak: float, settings: Settings) -> float:
    """Linear warm-up, then a cosine to 10 % of the peak, or constant."""
    if step < settings.warmup:
        return peak * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return peak
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return peak * (0.55 + 0.45 * math.cos(math.pi * done))


class _Run:
    """One model in training; ``train`` is the story, the other methods its chapters."""

    def __init__(
        self,
        config: RunConfig,
        corpus: Corpus,
        write: Callable[[Record], None],
        progress: Callable[[int], None],
    ) -> None:
        self.config, self.settings = config, config.settings
        self.write, self.progress = write, progress
        settings, self.device = config.settings, torch.device(config.settings.device)
        corpus.check_length(settings.length)
        torch.manual_seed(config.seed)
        self.model = DecoderLM(settings, config.mixer).to(self.device)
        self.forward = torch.compile(self.model) if settings.compile else self.model
        self.monitor = LogitMonitor(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.lr,
            betas=(0.9, 0.95),
            eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.batches = Batches(corpus.train, settings, config.seed)
        last = len(corpus.val) - settings.length - 1
        starts = torch.linspace(0, last, settings.eval_sequences).long()
        self.val = crops(corpus.val.to(self.device), starts, settings)
        self.prober = Prober(self.model, self.val[0][: settings.probe_sequences])
        self.header = self._header()
        self.steps: list[Step] = []
        self.evals: list[float] = []
        self.training_seconds = 0.0

    def train(self) -> Result:
        cpu, wall = time.process_time(), time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.write(self.header)
        self._eval(0)
        self._probe(0)
        with self.monitor:
            done = self._all_steps()
        if done == self.settings.steps:
            self._eval(done)
        ok = done == self.settings.steps and math.isfinite(self.evals[-1])
        if ok:
            self._probe(done)
        overhead = self._stats_overhead() if ok else None
        result = self._result("ok" if ok else "nan", done, overhead)
        result.cpu_seconds = time.process_time() - cpu
        result.wall_seconds = time.perf_counter() - wall
        self.write(result)
        return result

    def _all_steps(self) -> int:
        """Trains to the end, or to the first loss that is not finite; returns the steps before."""
        settings = self.settings
        pending = _Pending()
        for step in range(settings.steps):
            taken = step + 1
            last = taken == settings.steps
            evaluate = taken % settings.eval_every == 0 and not last
            probe = taken % settings.probe_every == 0 and not last
            stats = step == 0 or last or taken % settings.stats_every == 0 or evaluate or probe
            telemetry = self._step(step, pending, stats)
            if not stats:
                continue
            record = self._record(step, pending, telemetry)
            self.training_seconds += time.perf_counter() - pending.started
            self.progress(taken)
            finite = [math.isfinite(loss) for loss in record.losses]
            if not all(finite):
                return taken - len(finite) + finite.index(False)
            if evaluate:
                self._eval(taken)
                self.monitor.read()  # forgets what the validation text did
            if probe:
                self._probe(taken)
            pending = _Pending()
        return settings.steps

    def _step(self, step: int, pending: _Pending, stats: bool) -> dict[str, Tensor]:
        """One optimizer step; with ``stats`` also what a record says about it, on the device."""
        settings = self.settings
        rate = learning_rate(step, self.config.lr, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = self.batches.next()
        loss, log_z, logits, activations = self._loss(inputs, targets, stats)
        total = loss if settings.z_loss == 0 else loss + settings.z_loss * log_z.square().mean()
        total.backward()
        telemetry = {}
        if stats:
            telemetry = {
                "max_activation": activations,
                "grad_rms": self._grad_rms(),
                "output_logit_max": logits.detach().amax(),
                "log_z": log_z.detach().mean(),
            }
        parameters = list(self.model.parameters())
        norm = nn.utils.clip_grad_norm_(parameters, settings.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        pending.losses.append(loss.detach())
        pending.grad_norms.append(norm.detach())
        return telemetry

    def _loss(
        self, inputs: Tensor, targets: Tensor, stats: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, log Z of each token (where it is needed), output logits, largest activations."""
        with self._autocast():
            logits, activations = self.forward(inputs)
        logits = logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        log_z = logits.logsumexp(-1) if stats or self.settings.z_loss else logits.new_zeros(1)
        return loss, log_z, logits, activations

    def _record(self, step: int, pending: _Pending, telemetry: dict[str, Tensor]) -> Step:
        """Reads from the device what has happened since the last record, and writes it."""
        losses: list[float] = torch.stack(pending.losses).tolist()
        norms: list[float] = torch.stack(pending.grad_norms).tolist()
        maxima = self.monitor.read()
        tokens = len(losses) * self.settings.batch * self.settings.length
        record = Step(
            step=step,
            loss=losses[-1],
            lr=learning_rate(step, self.config.lr, self.settings),
            grad_norm=norms[-1],
            max_logit=[maxima[name].tolist() for name in self.model.mixers],
            max_activation=telemetry["max_activation"].tolist(),
            grad_rms=telemetry["grad_rms"].tolist(),
            output_logit_max=telemetry["output_logit_max"].item(),
            log_z=telemetry["log_z"].item(),
            tokens_per_s=tokens / (time.perf_counter() - pending.started),
            losses=losses,
            grad_norms=norms,
        )
        self.write(record)
        self.steps.append(record)
        return record

    @torch.no_grad()
    def _eval(self, taken: int) -> None:
        batch = self.settings.batch
        inputs, targets = self.val
        losses = [
            self._loss(inputs[start : start + batch], targets[start : start + batch], False)[0]
            * len(inputs[start : start + batch])
            for start in range(0, len(inputs), batch)
        ]
        self.evals.append(float(torch.stack(losses).sum() / len(inputs)))
        self.write(Eval(taken, self.evals[-1]))

    def _probe(self, taken: int) -> None:
        self.write(self.prober(taken, self._autocast))

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.settings.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.settings.dtype))

    def _grad_rms(self) -> Tensor:
        """Root mean square of each layer's gradient, ``[layers]``."""
        squares = []
        for block in self.model.blocks:
            grads = [p.grad.flatten() for p in block.parameters() if p.grad is not None]
            squares.append(torch.cat(grads).square().mean())
        return torch.stack(squares).sqrt()

    def _header(self) -> Header:
        mixers = self.model.mixers
        return Header(
            key=self.config.key,
            config=self.config,
            pattern=self.model.pattern,
            parameters=self.model.parameter_count(),
            head_groups=[self.monitor.head_groups[name] for name in mixers],
            logit_kinds=[self.monitor.kinds[name] for name in mixers],
        )

    def _stats_overhead(self) -> float | None:
        """What the telemetry costs: time of a forward and backward with it over one without."""
        ratios = []
        inputs, targets = self.batches.next()
        for _ in range(self.settings.overhead_pairs):
            plain = self._timed(inputs, targets)
            with self.monitor:
                ratios.append(self._timed(inputs, targets) / plain)
        return statistics.median(ratios) - 1 if ratios else None

    def _timed(self, inputs: Tensor, targets: Tensor) -> float:
        self._synchronize()
        start = time.perf_counter()
        self._loss(inputs, targets, False)[0].backward()
        self._synchronize()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _result(self, status: str, done: int, overhead: float | None) -> Result:
        groups = self.header.head_groups
        losses = [loss for step in self.steps for loss in step.losses][:done]
        norms = [norm for step in self.steps for norm in step.grad_norms][:done]
        peaks = [(step.step, self._peak(step)) for step in self.steps]
        cuda = self.device.type == "cuda"
        return Result(
            status=status,
            steps_done=done,
            val_loss=self.evals[-1] if status == "ok" else math.nan,
            best_val_loss=min(self.evals),
            initial_loss=self.evals[0],
            final_loss=statistics.fmean(losses[-FINAL_STEPS:]) if losses else math.nan,
            peak_max_logit=max(peak for _, peak in peaks),
            peak_max_logit_local=self._group_peak(groups, "local"),
            peak_max_logit_global=self._group_peak(groups, "global"),
            peak_max_activation=max(
                value for step in self.steps for value in step.max_activation if value is not None
            ),
            spike_score_loss=spike_score_olmo_core(losses),
            spike_score_grad_norm=spike_score_olmo_core(norms),
            steps_to_logit_100=first_step_above(peaks, 100.0),
            cpu_seconds=0.0,
            wall_seconds=0.0,
            tokens_per_s=len(losses)
            * self.settings.batch
            * self.settings.length
            / self.training_seconds,
            parameters=self.header.parameters,
            peak_memory_bytes=torch.cuda.max_memory_allocated(self.device) if cuda else None,
            stats_overhead=overhead,
        )

    @staticmethod
    def _peak(step: Step) -> float:
        peak = head_max(step.max_logit)
        return -math.inf if peak is None else peak

    def _group_peak(self, groups: list[list[str]], group: str) -> float | None:
        found = [head_max(step.max_logit, groups, group) for step in self.steps]
        return max((peak for peak in found if peak is not None), default=None)


@dataclass
class _Pending:
    """What has happened since the last record, still on the device."""

    losses: list[Tensor] = field(default_factory=list)
    grad_norms: list[Tensor] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
