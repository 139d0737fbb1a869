"""Comparison of an implementation with the float64 definition, under a budget from the data.

The budget is never chosen by hand: an error may be at most twice the error that the definition
makes when plain PyTorch runs it op by op in the same precision, plus one rounding of the result.
In float64 nothing is exact enough to measure that error, so the one in float32 is scaled down,
and allowed once more for the float64 definition itself.

Both errors are maxima of random roundings, so one draw of few numbers says little. Where a result
misses its budget, both are measured on more roundings of the same problem, and the largest error
found is held against the largest budget found. No draw is discarded.
The tests, ``python -m attnvariants --check`` and ``python -m bench verify`` all judge by it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Log-decays and states stay in float32 where the other inputs are bf16 or fp16.
_AT_LEAST_FLOAT32 = frozenset({"g", "decay", "initial_state"})

_HOPELESS = 4.0  # errors beyond so many budgets are not measured again
_DRAWS = 5


@dataclass(frozen=True)
class Comparison:
    """Largest absolute error of one output or gradient, and what was allowed."""

    name: str
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget  # False for NaN


def compare(
    function: str,
    tensors: Mapping[str, Tensor | None],
    options: Mapping[str, Any] | None = None,
    *,
    impl: str,
    dtype: torch.dtype,
    gradients: bool = True,
    seed: int = 0,
) -> list[Comparison]:
    """Runs ``function`` forward and backward and compares every output and every gradient.

    Args:
        function: name of a public function.
        tensors: its tensor arguments; floating ones are rounded to ``dtype`` first, so that the
            exact run sees the same numbers.
        options: its other arguments, without ``impl``.
        impl: the implementation under test.
        dtype: working precision.
        gradients: compare the gradients of every floating input too.
        seed: of the random cotangents.
    """
    options = dict(options or {})
    rounded = {name: round_to(name, tensor, dtype) for name, tensor in tensors.items()}
    public = getattr(importlib.import_module("attnvariants"), function)
    home = importlib.import_module(f"attnvariants.reference.{function}")
    definition = getattr(home, function)

    def measure(attempt: int) -> list[Comparison]:
        working = shuffle_channels(rounded, attempt)
        run = functools.partial(_run, gradients=gradients, seed=seed + attempt)

        def define(
            inputs: Mapping[str, Tensor | None], precision: torch.dtype
        ) -> dict[str, Tensor]:
            return run(definition, inputs, {**options, "upcast": False}, dtype=precision)

        actual = run(public, working, {**options, "impl": impl}, dtype=dtype)
        truth, errors = exact_and_error(define, working, dtype)
        return [within(name, actual[name], truth[name], errors[name], dtype) for name in truth]

    return settle(measure)


def settle(measure: Callable[[int], list[Comparison]]) -> list[Comparison]:
    """Holds the largest error of several draws against their largest budget, where one missed.

    Args:
        measure: ``measure(draw)`` makes the same comparisons on data with other roundings.
    """
    rows = measure(0)
    missed = [row for row in rows if not row.ok]
    if not missed or not all(row.error <= _HOPELESS * row.budget for row in missed):
        return rows
    draws = [rows, *(measure(draw) for draw in range(1, _DRAWS))]
    return [_worst(same) for same in zip(*draws, strict=True)]


def _worst(rows: Sequence[Comparison]) -> Comparison:
    """One comparison for several draws; NaN stays NaN."""
    errors = torch.tensor([row.error for row in rows], dtype=torch.float64)
    return Comparison(rows[0].name, float(errors.max()), max(row.budget for row in rows))


def exact_and_error(
    define: Callable[[Mapping[str, Tensor | None], torch.dtype], dict[str, Tensor]],
    working: Mapping[str, Tensor | None],
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The results of a definition in float64, and the error of each in plain ``dtype``.

    Args:
        define: ``define(inputs, dtype)`` computes op by op in the dtypes of its inputs; ``dtype``
            is the precision of what it draws itself.
        working: the inputs, rounded to ``dtype``.
        dtype: working precision.
    """
    truth = define({name: _widen(tensor) for name, tensor in working.items()}, dtype)
    if dtype != torch.float64:
        plain = define(working, dtype)
        return truth, {name: _error(plain[name], truth[name].detach()) for name in truth}
    narrow = {name: round_to(name, tensor, torch.float32) for name, tensor in working.items()}
    errors = exact_and_error(define, narrow, torch.float32)[1]
    scale = 1.5 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps  # 2 -> 3 errors
    return truth, {name: scale * error for name, error in errors.items()}


def judge(
    name: str, actual: Tensor, truth: Tensor, low_precision: Tensor, dtype: torch.dtype
) -> Comparison:
    """Compares ``actual`` with ``truth``, allowing twice the error of ``low_precision``."""
    return within(name, actual, truth, _error(low_precision, truth.detach()), dtype)


def within(
    name: str, actual: Tensor, truth: Tensor, plain_error: float, dtype: torch.dtype
) -> Comparison:
    """Compares ``actual`` with ``truth``, allowing twice ``plain_error`` and one rounding."""
    truth = truth.detach()
    finite = truth[truth.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    rounding = torch.finfo(dtype).eps * largest
    return Comparison(name, _error(actual, truth), 2 * plain_error + rounding)


def _error(actual: Tensor, truth: Tensor) -> float:
    if actual.shape != truth.shape:
        return float("nan")
    actual = actual.detach().double()
    difference = torch.where(actual == truth, 0.0, (actual - truth).abs())  # equal infinities: 0
    return float(difference.max()) if difference.numel() else 0.0


def round_to(name: str, tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The argument ``name`` in ``dtype``; log-decays and states at least in float32."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    wide = name in _AT_LEAST_FLOAT32 and dtype in (torch.float16, torch.bfloat16)
    rounded = tensor.detach().to(torch.float32 if wide else dtype)
    return rounded if rounded is not tensor else tensor.detach()


def shuffle_channels(tensors: Mapping[str, Tensor | None], draw: int) -> dict[str, Tensor | None]:
    """The same problem with the channels of keys and of values in another order; as is for 0."""
    if draw == 0:
        return dict(tensors)
    generator = torch.Generator().manual_seed(draw)
    orders = {
        letter: torch.randperm(tensors[name].shape[-1], generator=generator)  # type: ignore[union-attr]
        for letter, name in (("K", "k"), ("V", "v"))
    }
    axes = {"q": "K", "k": "K", "v": "V", "norm_weight": "V", "initial_state": "KV"}

    def shuffle(name: str, tensor: Tensor) -> Tensor:
        letters = axes.get(name, "")
        if tensor.dim() == 4 and name in ("g", "gate"):  # others have no channels
            letters = "K" if name == "g" else "V"
        for axis, letter in enumerate(letters, start=-len(letters)):
            tensor = tensor.index_select(axis, orders[letter].to(tensor.device))
        return tensor

    return {
        name: None if tensor is None else shuffle(name, tensor) for name, tensor in tensors.items()
    }


def _widen(tensor: Tensor | None) -> Tensor | None:
    return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor


def _run(
    call: Callable[..., Any],
    inputs: Mapping[str, Tensor | None],
    options: Mapping[str, Any],
    gradients: bool,
    dtype: torch.dtype,
    seed: int,
) -> dict[str, Tensor]:
    """Calls forward (and backward) and returns every output and gradient by name."""
    leaves = {
        name: tensor.detach().requires_grad_(gradients)
        for name, tensor in inputs.items()
        if tensor is not None and tensor.is_floating_point()
    }
    result = call(**{**inputs, **leaves}, **options)
    outputs = _name_outputs(result, options)
    if not gradients:
        return outputs
    generator = torch.Generator().manual_seed(seed)
    targets, cotangents = [], []
    for name, output in outputs.items():
        draw = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        if name in ("out", "state") and output.requires_grad:
            targets.append(output)
            rounded = draw.to(dtype if name == "out" else torch.float32)
            cotangents.append(rounded.to(device=output.device, dtype=output.dtype))
    found = torch.autograd.grad(targets, list(leaves.values()), cotangents, allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
        outputs[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return outputs


def _name_outputs(result: Any, options: Mapping[str, Any]) -> dict[str, Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    names = ["out"]
    if options.get("return_state"):
        names.append("state")
    if options.get("return_stats"):
        names.append("stats")
    outputs: dict[str, Tensor] = {}
    for name, part in zip(names, parts, strict=True):
        if name != "stats":
            outputs[name] = part
            continue
        outputs["max_logit"] = part.max_logit
        if part.lse is not None:
            outputs["lse"] = part.lse
    return outputs
