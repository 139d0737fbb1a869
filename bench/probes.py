"""Statistics of attention on a fixed batch, from explicit float32 scores of every layer.

Kernels never hold the score matrix, so a probe takes the arguments with which each layer called
its attention function and computes the scores again, by definition.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, repeat
from torch import Tensor, nn

from attnvariants._checks import windows
from attnvariants.modules import diag_attention
from attnvariants.reference.gated_linear_attention import log_decay
from attnvariants.reference.gated_sdpa import GATE_ACTIVATIONS, visible_keys
from attnvariants.reference.norm_linear_attention import FEATURE_MAPS, masked_scores
from bench.metrics import attention_entropy
from bench.model import DecoderLM
from bench.records import PerHead, Probe

CLOSED_GATE = 0.1


@dataclass
class Scores:
    """All scores of one layer: logits ``[B, H, T, T]``, 0 where not ``visible [H, T, T]``."""

    values: Tensor
    visible: Tensor
    softmax: bool
    gate: Tensor | None  # values in [0, 1], [B, T, H, V] or [B, T, H]
    state: Tensor | None  # the last one, [B, H, K, V]


class Prober:
    """Probes one model again and again on the same ``tokens [B, T]``."""

    def __init__(self, model: DecoderLM, tokens: Tensor) -> None:
        self._model = model
        self._tokens = tokens
        self._previous: list[Tensor] | None = None

    @torch.no_grad()
    def __call__(self, step: int, autocast: Callable[[], Any]) -> Probe:
        with captured_calls(self._model) as calls, hidden_states(self._model) as hidden, autocast():
            self._model(self._tokens)
        layers = [scores_of(function, arguments) for function, arguments in calls]
        values = [layer.values for layer in layers]
        previous, self._previous = self._previous, values
        statistics = [layer_statistics(layer) for layer in layers]

        def column(name: str) -> PerHead:
            return [row.get(name) for row in statistics]

        return Probe(
            step=step,
            entropy=column("entropy"),
            entropy_uniform=column("entropy_uniform"),
            first_token_share=column("first_token_share"),
            mean_row_max=column("mean_row_max"),
            max_logit=column("max_logit"),
            logit_rms=column("logit_rms"),
            logit_change=[
                (new - old).abs().amax((0, 2, 3)).tolist()
                for new, old in zip(values, previous, strict=True)
            ]
            if previous
            else [None] * len(values),
            gate_mean=column("gate_mean"),
            gate_below_01=column("gate_below_01"),
            max_state=column("max_state"),
            max_activation=[float(x.abs().amax()) for x in hidden],
            median_activation=[float(x.abs().median()) for x in hidden],
            activation_rms=[float(x.square().mean().sqrt()) for x in hidden],
        )


def layer_statistics(layer: Scores) -> dict[str, list[float]]:
    """What one layer's scores say, per head."""
    values, visible = layer.values, layer.visible
    size = values if layer.softmax else values.abs()
    row_max = size.masked_fill(~visible, -torch.inf).amax(-1)  # [B, H, T]
    squares = values.square().sum((0, 2, 3)) / (values.shape[0] * visible.sum((1, 2)))
    found = {
        "mean_row_max": row_max.mean((0, 2)),
        "max_logit": row_max.amax((0, 2)),
        "logit_rms": squares.sqrt(),
    }
    if layer.softmax:
        attention = values.masked_fill(~visible, -torch.inf).softmax(-1)
        found["entropy"] = attention_entropy(attention).mean((0, 2))
        found["entropy_uniform"] = visible.sum(-1).float().log().mean(-1)
        found["first_token_share"] = attention[..., 0].mean((0, 2))
    if layer.gate is not None:
        gate = layer.gate if layer.gate.dim() == 4 else layer.gate[..., None]
        found["gate_mean"] = gate.mean((0, 1, 3))
        found["gate_below_01"] = (gate < CLOSED_GATE).float().mean((0, 1, 3))
    if layer.state is not None:
        found["max_state"] = layer.state.abs().amax((0, 2, 3))
    return {name: value.float().tolist() for name, value in found.items()}


def scores_of(function: Callable[..., Any], arguments: dict[str, Any]) -> Scores:
    """The scores of one call of a public attention function, from its bound ``arguments``."""
    arguments = {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    return _SCORES[function.__name__](**arguments)


def _softmax_scores(q: Tensor, k: Tensor, **options: Any) -> Scores:
    """Of gated_sdpa and ls_attention."""
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    limits = windows("probe", options["window"], k.shape[2])
    visible = visible_keys(length, length, options["causal"], limits, None, q)
    visible = repeat(visible, "h t s -> (h group) t s", group=group)
    gate = options["gate"]
    return Scores(
        _logits(q, k, options["softmax_scale"], visible),
        visible,
        softmax=True,
        gate=None if gate is None else GATE_ACTIVATIONS[options["gate_activation"]](gate),
        state=None,
    )


def _diag_scores(q: Tensor, k: Tensor, **options: Any) -> Scores:
    """Of diag attention: each query sees its own block only."""
    length = q.shape[1]
    block = torch.arange(length, device=q.device) // options["block_size"]
    visible = block[:, None] == block
    visible = (visible.tril() if options["causal"] else visible).expand(q.shape[2], -1, -1)
    softmax = options["activation"] == "softmax"
    values = _logits(q, k, options.get("softmax_scale"), visible)
    return Scores(values, visible, softmax, gate=None, state=None)


def _logits(q: Tensor, k: Tensor, scale: float | None, visible: Tensor) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k = repeat(k, "b s h d -> b s (h group) d", group=q.shape[2] // k.shape[2])
    return (scale * einsum(q, k, "b t h d, b s h d -> b h t s")).masked_fill(~visible, 0.0)


def _gla_scores(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, **options: Any) -> Scores:
    """Row by row, because every channel of a key decays at its own rate."""
    g = log_decay(g, k)
    scale = k.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    decayed = torch.zeros_like(k)  # k_j * exp(g_{j+1} + ... + g_t) as t advances
    rows = []
    for t in range(k.shape[1]):
        decayed = decayed * g[:, t : t + 1].exp()
        decayed[:, t] = k[:, t]
        rows.append(einsum(q[:, t], decayed, "b h k, b j h k -> b h j"))
    state = einsum(decayed, v, "b j h k, b j h v -> b h k v")
    return _linear(scale * torch.stack(rows, 2), state, options)


def _norm_linear_scores(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Scores:
    phi, decay = FEATURE_MAPS[options["feature_map"]], options["decay"]
    q, k = phi(q), phi(k)
    scores = masked_scores(q, k, decay, options["causal"])
    left = torch.arange(k.shape[1] - 1, -1, -1, device=k.device)
    weights = torch.ones_like(k[0, :, :, :1])  # [T, H, 1]
    if decay is not None:
        weights = torch.where(left[:, None] > 0, left[:, None] * decay, 0.0).exp()[..., None]
    state = einsum(k * weights, v, "b j h k, b j h v -> b h k v")
    return _linear(scores, state, options)


def _linear(scores: Tensor, state: Tensor, options: dict[str, Any]) -> Scores:
    visible = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device)
    causal = options.get("causal", True)
    gate = options["gate"] if options["gate_activation"] == "sigmoid" else None
    return Scores(
        scores,
        visible.tril() if causal else visible,
        softmax=False,
        gate=None if gate is None else gate.sigmoid(),
        state=state,
    )


_SCORES: dict[str, Callable[..., Scores]] = {
    "gated_sdpa": _softmax_scores,
    "ls_attention": _softmax_scores,
    "diag_attention_with_stats": _diag_scores,
    "gated_linear_attention": _gla_scores,
    "norm_linear_attention": _norm_linear_scores,
}


@contextlib.contextmanager
def captured_calls(model: DecoderLM) -> Iterator[list[tuple[Callable[..., Any], dict[str, Any]]]]:
    """Collects, layer by layer, the attention function called and its arguments by name."""
    calls: list[tuple[Callable[..., Any], dict[str, Any]]] = []

    def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        target: Any = function
        bound, named = args, options
        while isinstance(target, functools.partial):
            target, bound, named = target.func, target.args + bound, target.keywords | named
        arguments = inspect.signature(target).bind(*bound, **named)
        arguments.apply_defaults()
        calls.append((target, arguments.arguments))
        return function(*args, **options)

    mixers = list(model.mixers.values())
    for mixer in mixers:
        mixer.__dict__["_call"] = call  # shadows the method through which layers call functions
    in_blocks = diag_attention.diag_attention_with_stats  # the one that is called directly
    diag_attention.diag_attention_with_stats = functools.partial(call, in_blocks)
    try:
        yield calls
    finally:
        diag_attention.diag_attention_with_stats = in_blocks
        for mixer in mixers:
            del mixer.__dict__["_call"]


@contextlib.contextmanager
def hidden_states(model: DecoderLM) -> Iterator[list[Tensor]]:
    """Collects the hidden state after each block, ``[B, T, C]``, in float32."""
    states: list[Tensor] = []

    def hook(block: nn.Module, inputs: Any, output: Tensor) -> None:
        states.append(output.float())

    handles = [block.register_forward_hook(hook) for block in model.blocks]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
