"""Which implementations exist, which are usable here, and which one serves a call."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

IMPLEMENTATIONS = ("cuda", "triton", "eager", "reference")

FUNCTIONS = (
    "gated_sdpa",
    "ls_attention",
    "diag_attention",
    "gated_linear_attention",
    "norm_linear_attention",
    "attention_decode",
    "linear_attention_decode",
)

# Functions with kernels: filled as kernels/ and csrc/ gain them.
TRITON_FUNCTIONS = frozenset(
    {
        "gated_sdpa",
        "ls_attention",
        "diag_attention",
        "gated_linear_attention",
        "norm_linear_attention",
        "attention_decode",
        "linear_attention_decode",
    }
)
CUDA_FUNCTIONS = frozenset(
    {
        "gated_sdpa",
        "ls_attention",
        "diag_attention",
        "gated_linear_attention",
        "norm_linear_attention",
        "attention_decode",
        "linear_attention_decode",
    }
)
# Those of CUDA_FUNCTIONS whose kernel has no backward.
FORWARD_ONLY = CUDA_FUNCTIONS - {"attention_decode", "linear_attention_decode"}

_NONE: Mapping[str, str] = MappingProxyType({})

_OLDEST = (8, 0)  # compute capability of Ampere


class Availability(NamedTuple):
    """Whether an implementation can be used on this machine, and if not, why."""

    usable: bool
    reason: str


def preference(function: str) -> tuple[str, ...]:
    """The implementations of ``function`` in the order in which ``"auto"`` tries them.

    A decode step goes to CUDA C++. A whole sequence goes to Triton, which also has the backward:
    CUDA C++ comes next, and serves where Triton cannot be used and no gradient is needed.
    """
    if function in FORWARD_ONLY:
        return ("triton", "cuda", "eager", "reference")
    return IMPLEMENTATIONS


def forward_only(function: str, *inputs: torch.Tensor | None) -> Mapping[str, str]:
    """The obstacle that a gradient is to ``"cuda"``, for :func:`select`."""
    if has_backward(function, "cuda") or not torch.is_grad_enabled():
        return _NONE
    if not any(x is not None and x.requires_grad for x in inputs):
        return _NONE
    return {"cuda": "it has no backward, and an input requires a gradient (torch.no_grad() helps)"}


def has_backward(function: str, impl: str) -> bool:
    """Whether ``impl`` computes gradients of ``function``."""
    return not (impl == "cuda" and function in FORWARD_ONLY)


def implementations() -> dict[str, dict[str, Availability]]:
    """Lists, per function, the implementations that are usable here and why the others are not.

    Returns:
        ``{function: {implementation: Availability(usable, reason)}}`` with the implementations in
        the order in which ``impl="auto"`` prefers them.
    """
    return {
        function: {impl: _availability(function, impl) for impl in preference(function)}
        for function in FUNCTIONS
    }


def select(
    function: str,
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    obstacles: Mapping[str, str] = _NONE,
) -> str:
    """Resolves ``impl`` for tensors of ``dtype`` on ``device``.

    ``obstacles`` says why this very call is not for some implementation, where it is not.

    An explicit choice never falls back. ``"auto"`` never takes Triton's interpreter, which is for
    tests.

    Raises:
        ValueError: ``impl`` is not a known name.
        NotImplementedError: the explicit choice cannot serve the call; says what can.
    """
    if impl not in ("auto", *IMPLEMENTATIONS):
        listing = ", ".join(repr(name) for name in ("auto", *IMPLEMENTATIONS))
        raise ValueError(f"{function}: impl must be one of {listing}, got {impl!r}")
    if impl in ("eager", "reference"):
        return impl

    def obstacle_of(name: str) -> str:
        return obstacles.get(name, "") or _obstacle(function, name, device, dtype)

    usable = (name for name in preference(function) if not obstacle_of(name))
    if impl == "auto":
        return next(name for name in usable if not (name == "triton" and interpreting()))
    obstacle = obstacle_of(impl)
    if obstacle:
        raise NotImplementedError(
            f"{function}: impl={impl!r} cannot serve this call: {obstacle}. "
            f"These can: {', '.join(repr(name) for name in usable)}, or 'auto'"
        )
    return impl


def _availability(function: str, impl: str) -> Availability:
    reason = _missing(function, impl)
    if reason:
        return Availability(False, reason)
    return Availability(True, _note(function, impl))


def _note(function: str, impl: str) -> str:
    return {
        "eager": "plain PyTorch, any device",
        "reference": "the definition in plain PyTorch, any device",
        "triton": "Triton's interpreter on CPU tensors" if interpreting() else "CUDA tensors",
        "cuda": "CUDA tensors" if has_backward(function, impl) else "CUDA tensors, no gradients",
    }[impl]


def _missing(function: str, impl: str) -> str:
    """Why ``impl`` cannot be used on this machine at all; empty where it can."""
    if impl == "triton":
        if function not in TRITON_FUNCTIONS:
            return "this version has no Triton kernel for it"
        if importlib.util.find_spec("triton") is None:
            return "the triton package is not installed (pip install triton)"
        if not torch.cuda.is_available() and not interpreting():
            return "no CUDA device (set TRITON_INTERPRET=1 before import to run it on a CPU)"
    if impl == "cuda":
        if function not in CUDA_FUNCTIONS:
            return "this version has no CUDA C++ kernel for it"
        if importlib.util.find_spec("attnvariants._C") is None:
            return (
                "the extension is not built (with a CUDA torch and nvcc: "
                "pip install --no-build-isolation -e .)"
            )
        if not torch.cuda.is_available():
            return "no CUDA device"
    return ""


def _obstacle(function: str, impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why ``impl`` cannot serve tensors of ``dtype`` on ``device``; empty where it can."""
    missing = _missing(function, impl)
    if missing:
        return missing
    on_cuda = device.type == "cuda"
    if (impl == "cuda" and not on_cuda) or (
        impl == "triton" and not on_cuda and not interpreting()
    ):
        return f"it takes CUDA tensors, got {device}"
    if on_cuda and impl in ("cuda", "triton"):
        if torch.version.hip:
            return "its kernels are for NVIDIA GPUs"
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST:
            return f"it takes compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    if impl in ("cuda", "triton") and dtype == torch.float64:
        return "it takes float16, bfloat16 and float32 tensors, got float64"
    return ""


def interpreting() -> bool:
    """Whether Triton kernels run on CPU tensors in Triton's interpreter: right, but very slow."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
