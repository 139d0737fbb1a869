"""The calls that ``python -m bench compile`` compiles.

A family of kernels joins with a function that turns a case and its tensors into calls of the
launchers, and with its cases in :func:`compile_cases`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attnvariants import KVCache, _checks
from bench.cases import Case

HALF = ("bfloat16", "float16")
UNALIGNED = "unaligned strides"
Calls: TypeAlias = Mapping[str, Callable[[], Any]]  # by name, in the order in which they run


@dataclass(frozen=True)
class CompileCase:
    """One case in one dtype.

    ``launchers(case, tensors)`` gives the calls; it belongs to a module, so that it can travel to
    another process. ``kernels`` are the names in the configuration tables, each with the call that
    launches it. In half precision every kernel has to use tensor cores, but those in
    ``without_dots``. ``quick``: part of the cases that reach every configuration.
    """

    case: Case
    dtype: str
    launchers: Callable[[Case, dict[str, Tensor]], Calls]
    kernels: Mapping[str, str]
    without_dots: tuple[str, ...] = ()
    quick: bool = False

    @property
    def label(self) -> str:
        return self.case.name

    def calls(self, device: str) -> Calls:
        """What the case runs, on random tensors."""
        return self.launchers(self.case, self.case.tensors(getattr(torch, self.dtype), device))

    def needs_tensor_cores(self, kernel: str) -> bool:
        """Whether ``kernel`` would be slow without them; float32 is multiplied exactly instead."""
        return self.dtype in HALF and table_name(kernel) not in self.without_dots


def table_name(kernel: str) -> str:
    """The name in the configuration tables of a kernel's function."""
    return kernel.removesuffix("_kernel")


# --- softmax attention ---------------------------------------------------------------------------

_SOFTMAX_KERNELS = {
    "softmax_forward": "forward",
    "softmax_backward_rows": "backward",
    "softmax_backward_dq": "backward",
    "softmax_backward_dkdv": "backward",
}
_DECODE_KERNELS = {"_attend_parts": "step", "_add_parts": "step"}
_WITHOUT_DOTS = ("softmax_backward_rows",)  # reads every row once
_HEAD_DIMS = ((16, 16), (32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
_BUCKETS = ((64, 64), (128, 128), (256, 256))  # of the configuration tables

# Everything at once: what takes most registers and shared memory.
_HEAVY: dict[str, Any] = {
    "length": 256,
    "heads": 4,
    "kv_heads": 2,
    "gate": "elementwise",
    "sequences": (100, 0, 156),
    "options": {"window": (64, None), "return_stats": True},
}
_FEATURES: dict[str, dict[str, Any]] = {
    "no gate": {"batch": 2, "length": 256},
    "headwise gate, window": {
        "batch": 2,
        "length": 256,
        "gate": "headwise",
        "options": {"window": 64},
    },
    "not causal, elementwise gate, stats": {
        "batch": 2,
        "length": 64,
        "key_length": 256,
        "gate": "elementwise",
        "options": {"causal": False, "gate_activation": "softplus", "return_stats": True},
    },
}


def softmax(case: Case, tensors: dict[str, Tensor]) -> Calls:
    """Forward and backward behind ``gated_sdpa`` and ``ls_attention``."""
    kernels: Any = importlib.import_module("attnvariants.kernels.softmax")
    q, k, v = (tensors[name] for name in "qkv")
    gate, cu_seqlens = tensors.get("gate"), tensors.get("cu_seqlens")
    window = case.options.get("window")
    windows = _checks.windows(case.function, window, case.key_heads)
    activation = None if gate is None else case.options.get("gate_activation", "sigmoid")
    options = (windows, case.causal, case.key_dim**-0.5, activation)
    stats = bool(case.options.get("return_stats"))

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        return kernels.forward(q, k, v, gate, cu_seqlens, *options, stats)

    def backward() -> tuple[Tensor, ...]:
        dout, out, lse = given()
        dlse = torch.ones_like(lse) if stats else None
        return kernels.backward(dout, dlse, q, k, v, gate, out, lse, cu_seqlens, *options)

    @functools.cache
    def given() -> tuple[Tensor, Tensor, Tensor]:
        out, lse, _ = forward()
        return torch.ones_like(out), out, lse

    return {"forward": forward, "backward": backward}


def diagonal(case: Case, tensors: dict[str, Tensor]) -> Calls:
    """Forward and backward behind ``diag_attention``."""
    kernels: Any = importlib.import_module("attnvariants.kernels.diag")
    q, k, v = (tensors[name] for name in "qkv")
    cu_seqlens = tensors.get("cu_seqlens")
    activation = case.options.get("activation", "softmax")
    options = (case.options["block_size"], activation, case.causal, case.key_dim**-0.5)
    stats = bool(case.options.get("return_stats"))

    def forward() -> Any:
        return kernels.forward(q, k, v, cu_seqlens, *options, stats)

    def backward() -> Any:
        dout, out, lse = given()
        return kernels.backward(dout, q, k, v, out, lse, cu_seqlens, *options)

    @functools.cache
    def given() -> tuple[Tensor, Tensor | None, Tensor | None]:
        out, lse, _ = forward()
        saved = (None, None) if activation == "relu" else (out, lse)
        return torch.ones_like(out), *saved

    return {"forward": forward, "backward": backward}


def decode(case: Case, tensors: dict[str, Tensor]) -> Calls:
    """A step of ``attention_decode`` behind a filled cache; "reset" undoes it."""
    kernels: Any = importlib.import_module("attnvariants.kernels.softmax_decode")
    q, k, v = (tensors[name] for name in "qkv")
    cached = case.keys - case.length
    window = case.options.get("window")
    dims = (case.key_heads, case.key_dim, case.values)
    cache = KVCache(case.batch, case.keys, *dims, window=window, dtype=k.dtype, device=k.device)
    cache.append(k[:, :cached], v[:, :cached])
    gate = tensors.get("gate")
    scale, activation = case.key_dim**-0.5, None if gate is None else "sigmoid"

    def step() -> Any:
        new = (k[:, cached:], v[:, cached:])
        state = (cache.k, cache.v, cache.lengths, cache.capacities, cache.max_filled)
        return kernels.attend(q, *new, gate, *state, scale, activation)

    def reset() -> None:
        cache.lengths.fill_(cached)

    return {"reset": reset, "step": step}


def _softmax_cases() -> list[CompileCase]:
    def make(
        dims: tuple[int, int], dtype: str, name: str, features: dict[str, Any], quick: bool = False
    ) -> CompileCase:
        case = _sized("gated_sdpa", dims, name, features)
        return CompileCase(case, dtype, softmax, _SOFTMAX_KERNELS, _WITHOUT_DOTS, quick)

    found = []
    for dims in _HEAD_DIMS:
        found.append(make(dims, "bfloat16", "all features", _HEAVY, dims in _BUCKETS))
        for name, features in _FEATURES.items():
            headwise = features.get("gate") == "headwise"
            found.append(make(dims, "bfloat16", name, features, headwise and dims == (64, 64)))
    for dims in _BUCKETS:
        found.append(make(dims, "float16", "all features", _HEAVY))
        found.append(make(dims, "float32", "all features", _HEAVY, quick=True))
    found.append(make((96, 96), "float32", "no gate", _FEATURES["no gate"]))
    found.append(make((100, 100), "bfloat16", UNALIGNED, {**_HEAVY, "gate": None}))
    return found


def _diagonal_cases() -> list[CompileCase]:
    def make(
        dims: tuple[int, int], dtype: str, activation: str, block: int, quick: bool = False
    ) -> CompileCase:
        options = {"block_size": block, "activation": activation, "return_stats": True}
        features = {"length": 256, "heads": 4, "kv_heads": 2, "sequences": (100, 0, 156)}
        name = f"{activation}, blocks of {block}"
        case = _sized("diag_attention", dims, name, {**features, "options": options})
        relu = activation == "relu"  # has no row sums, so no kernel that computes them
        kernels = {name: call for name, call in _SOFTMAX_KERNELS.items() if "rows" not in name}
        launched = kernels if relu else _SOFTMAX_KERNELS
        return CompileCase(case, dtype, diagonal, launched, _WITHOUT_DOTS, quick)

    found = []
    for dims in _BUCKETS:
        found.append(make(dims, "bfloat16", "relu", 64, quick=dims == (64, 64)))
        found.append(make(dims, "bfloat16", "softmax", 256))
        found.append(make(dims, "float32", "relu", 64))
    found.append(make((128, 128), "bfloat16", "softmax", 16))
    found.append(make((128, 128), "float16", "relu", 64))
    return found


def _decode_cases() -> list[CompileCase]:
    def make(
        dims: tuple[int, int], dtype: str, name: str, features: dict[str, Any], quick: bool = False
    ) -> CompileCase:
        sizes = {"batch": 2, "key_length": 256 + features["length"], "heads": 8}
        case = _sized("attention_decode", dims, name, {**sizes, **features})
        return CompileCase(case, dtype, decode, _DECODE_KERNELS, ("_add_parts",), quick)

    one = {"length": 1, "kv_heads": 4, "gate": "elementwise", "options": {"window": 64}}
    many = {"length": 8, "kv_heads": 2, "gate": "headwise"}  # more rows than a tile has
    found = []
    for dims in _HEAD_DIMS:
        found.append(make(dims, "bfloat16", "one token, window", one, dims == (128, 128)))
        found.append(make(dims, "bfloat16", "eight tokens", many, dims in _BUCKETS))
    for dims in _BUCKETS:
        found.append(make(dims, "float16", "eight tokens", many))
        found.append(make(dims, "float32", "eight tokens", many, quick=True))
    found.append(make((128, 128), "float32", "one token, window", one))
    found.append(make((128, 128), "bfloat16", "no gate", {"length": 1}))
    return found


def _sized(function: str, dims: tuple[int, int], name: str, features: Mapping[str, Any]) -> Case:
    key_dim, value_dim = dims
    size = f"K={key_dim}" + (f" V={value_dim}" if value_dim != key_dim else "")
    return Case(function, f"{size} {name}", key_dim=key_dim, value_dim=value_dim, **features)


# --- linear attention ----------------------------------------------------------------------------

_LINEAR_KERNELS = {
    "linear_states": "forward",
    "linear_scan": "forward",
    "linear_forward": "forward",
    "linear_norm": "forward",
    "linear_cotangent": "backward",
    "linear_backward_qk": "backward",
    "linear_backward_v": "backward",
}
_LINEAR_WITHOUT_DOTS = ("linear_scan", "linear_norm", "linear_cotangent")
# Long enough, with few enough heads, to be cut into segments.
_LINEAR_HEAVY: dict[str, Any] = {
    "length": 2048,
    "g": "channel",
    "gate": "elementwise",
    "norm_weight": "shared",
    "initial_state": True,
    "sequences": (1000, 0, 1048),
    "options": {"norm": "model"},
}
# Short enough to stay whole, without what comes before and behind the recurrence.
_LINEAR_BARE: dict[str, Any] = {"length": 512, "g": "channel"}
_LINEAR_BARE_KERNELS = {
    name: call
    for name, call in _LINEAR_KERNELS.items()
    if name not in ("linear_scan", "linear_norm", "linear_cotangent")
}
_LINEAR_FEATURES: dict[str, dict[str, Any]] = {
    "per token": {"length": 2048, "g": "token", "gate": "headwise", "options": {"norm": "model"}},
    "no decay": {"length": 2048, "g": None, "gate": "headwise", "options": {"norm": "model"}},
}


def linear(case: Case, tensors: dict[str, Tensor]) -> Calls:
    """Forward and backward behind both linear attentions."""
    kernels: Any = importlib.import_module("attnvariants.kernels.linear")
    names = ("q", "k", "v", "g", "initial_state", "cu_seqlens", "norm_weight", "gate")
    inputs = tuple(tensors.get(name) for name in names)
    activation = "silu" if case.gate else None
    norm, feature_map = case.options.get("norm"), case.options.get("feature_map")
    options = (feature_map, True, case.key_dim**-0.5, norm, 1e-6, activation)

    def forward() -> tuple[Tensor, ...]:
        return kernels.forward(*inputs, *options)

    def backward() -> tuple[Tensor, ...]:
        out, y, rstd, state = given()
        saved = None if norm is None and activation is None else y if y.numel() else out
        dout = torch.ones_like(out)
        return kernels.backward(*inputs, saved, rstd, dout, state, *options, True)

    given = functools.cache(forward)
    return {"forward": forward, "backward": backward}


def _linear_cases() -> list[CompileCase]:
    def make(
        dims: tuple[int, int], dtype: str, name: str, features: dict[str, Any], quick: bool = False
    ) -> CompileCase:
        key_dim, value_dim = dims
        label = f"linear K={key_dim} V={value_dim} {name}"
        case = Case(
            "gated_linear_attention", label, key_dim=key_dim, value_dim=value_dim, **features
        )
        kernels = _LINEAR_KERNELS if features.get("options") else _LINEAR_BARE_KERNELS
        return CompileCase(case, dtype, linear, kernels, _LINEAR_WITHOUT_DOTS, quick)

    per_token = {**_LINEAR_BARE, "g": "token"}
    found = []
    for dims in ((64, 64), (128, 128), (128, 256), (256, 256)):
        found.append(make(dims, "bfloat16", "all features", _LINEAR_HEAVY, dims == (64, 64)))
        found.append(make(dims, "bfloat16", "bare", _LINEAR_BARE, dims in _BUCKETS[1:]))
    found.append(make((128, 256), "bfloat16", "bare, per token", per_token))
    for name, features in _LINEAR_FEATURES.items():
        found.append(make((128, 256), "bfloat16", name, features, name == "per token"))
    for feature_map in ("elu+1", "silu"):
        features = _LINEAR_FEATURES["per token"]
        options = {**features["options"], "feature_map": feature_map}
        name = f"{feature_map}, per token"
        found.append(make((128, 128), "bfloat16", name, {**features, "options": options}))
    for dtype in ("float16", "float32"):
        for dims in ((64, 64), (128, 128), (128, 256), (256, 256)):
            found.append(make(dims, dtype, "all features", _LINEAR_HEAVY))
        found.append(make((128, 128), dtype, "bare, per token", per_token))
    return found


def linear_decode(case: Case, tensors: dict[str, Tensor]) -> Calls:
    """A step of ``linear_attention_decode``."""
    kernels: Any = importlib.import_module("attnvariants.kernels.linear_decode")
    q, k, v = (tensors[name] for name in "qkv")
    state, factors = tensors["initial_state"], (tensors.get("norm_weight"), tensors.get("gate"))
    lengths = torch.zeros(case.batch, dtype=torch.int32, device=q.device)
    feature_map, norm = case.options.get("feature_map"), case.options.get("norm")
    activation = "silu" if case.gate else None

    def step() -> Tensor:
        given = (q, k, v, tensors.get("g"), state, lengths, *factors)
        return kernels.attend(*given, feature_map, case.key_dim**-0.5, norm, 1e-6, activation)

    return {"step": step}


def _linear_decode_cases() -> list[CompileCase]:
    def make(
        dims: tuple[int, int], dtype: str, name: str, features: dict[str, Any], quick: bool = False
    ) -> CompileCase:
        sizes = {"batch": 2, "heads": 4, "initial_state": True}
        case = _sized("linear_attention_decode", dims, name, {**sizes, **features})
        kernels = {"_advance_state": "step"}
        if (case.options["norm"], dims) not in (("head", (64, 64)), ("head", (128, 128))):
            kernels["_finish"] = "step"  # a program does not hold all that the norm runs over
        return CompileCase(case, dtype, linear_decode, kernels, tuple(kernels), quick)

    one = {
        "length": 1,
        "g": "channel",
        "gate": "elementwise",
        "norm_weight": "head",
        "options": {"norm": "head"},
    }
    many = {
        "length": 8,
        "g": "head",
        "gate": "headwise",
        "norm_weight": "shared",
        "options": {"norm": "model", "feature_map": "elu"},
    }
    found = []
    for dims in ((64, 64), (128, 128), (128, 256), (100, 40), (256, 256)):
        found.append(make(dims, "bfloat16", "one token", one, dims == (128, 128)))
        found.append(make(dims, "bfloat16", "eight tokens", many, dims == (64, 64)))
    for dtype in ("float16", "float32"):
        found.append(make((128, 128), dtype, "one token", one))
        found.append(make((256, 256), dtype, "eight tokens", many, dtype == "float32"))
    return found


def compile_cases(*, quick: bool = False) -> list[CompileCase]:
    """All cases, or those that reach every entry of the configuration tables once."""
    cases = [*_softmax_cases(), *_diagonal_cases(), *_decode_cases(), *_linear_cases()]
    cases += _linear_decode_cases()
    return [case for case in cases if case.quick or not quick]
