"""Peers of other packages, FlashAttention and fla: imported only when they are used."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case
from bench.decode_peers import features, normed
from bench.torch_peers import Call, Inputs, Missing, gated, local_heads

# --- FlashAttention ------------------------------------------------------------------------------

FA3 = "flash_attn_interface", "FlashAttention-3, see bench/PEERS.md"
FA4 = "flash_attn.cute", "pip install flash-attn-4, see bench/PEERS.md"


def flash(source: tuple[str, str], windows: bool = False) -> Callable[[Case, Inputs, str], Call]:
    """FlashAttention and the gate as glue code; ``windows``: one call per kind of head."""

    def build(case: Case, inputs: Inputs, mode: str) -> Call:
        attend = _from(*source, "flash_attn_func", inputs)
        if not windows:

            def full() -> Tensor:
                q, k, v = (inputs[name] for name in ("q", "k", "v"))
                return gated(_first(attend(q, k, v, causal=case.causal)), inputs)

            return full
        local, size = local_heads(case)
        rows = local * (case.heads // case.key_heads)

        def split() -> Tensor:
            q, k, v = (inputs[name] for name in ("q", "k", "v"))
            near = attend(
                q[:, :, :rows],
                k[:, :, :local],
                v[:, :, :local],
                causal=True,
                window_size=(size - 1, 0),
            )
            far = attend(q[:, :, rows:], k[:, :, local:], v[:, :, local:], causal=True)
            return gated(torch.cat([_first(near), _first(far)], 2), inputs)

        return split

    return build


def fa3_decode(case: Case, inputs: Inputs, mode: str) -> Call:
    """FlashAttention-3 over its own cache, and the gate as glue code."""
    attend = _from(*FA3, "flash_attn_with_kvcache", inputs)
    if any(window is not None for window in case.windows):
        raise Missing("one window for all heads only")
    old = case.keys - case.length
    k_cache, v_cache = inputs["k"].clone(), inputs["v"].clone()
    lengths = torch.full((case.batch,), old, dtype=torch.int32, device=k_cache.device)

    def call() -> Tensor:
        out = attend(
            inputs["q"],
            k_cache,
            v_cache,
            k=inputs["k"][:, old:],
            v=inputs["v"][:, old:],
            cache_seqlens=lengths,
            causal=True,
        )
        return gated(_first(out), inputs)

    return call


# --- fla -----------------------------------------------------------------------------------------

_INSTALL_FLA = "pip install fla-core, see bench/PEERS.md"


def chunk_gla(case: Case, inputs: Inputs, mode: str) -> Call:
    """fla's chunked kernels, decay per channel."""
    chunk = _from("fla.ops.gla", _INSTALL_FLA, "chunk_gla", inputs)
    return lambda: _first(chunk(*(inputs[name] for name in ("q", "k", "v", "g"))))


def chunk_simple_gla(case: Case, inputs: Inputs, mode: str) -> Call:
    """fla's chunked kernels, decay per token."""
    chunk = _from("fla.ops.simple_gla", _INSTALL_FLA, "chunk_simple_gla", inputs)
    return lambda: _first(chunk(*(inputs[name] for name in ("q", "k", "v", "g"))))


def chunk_linear(case: Case, inputs: Inputs, mode: str) -> Call:
    """Feature map and RMSNorm over all heads as glue code around fla's kernel."""
    chunk = _from("fla.ops.linear_attn", _INSTALL_FLA, "chunk_linear_attn", inputs)

    def call() -> Tensor:
        q, k = (F.elu(inputs[name]) + 1 for name in ("q", "k"))
        out = _first(chunk(q, k, inputs["v"], scale=1.0, normalize=False))
        return F.rms_norm(out.flatten(2), (case.heads * case.values,), eps=1e-6).view_as(out)

    return call


def fused_recurrent_gla(case: Case, inputs: Inputs, mode: str) -> Call:
    """One step of fla's recurrent kernel, decay per channel."""
    return _fused_recurrent("fla.ops.gla", "fused_recurrent_gla", case, inputs)


def fused_recurrent_simple_gla(case: Case, inputs: Inputs, mode: str) -> Call:
    """One step of fla's recurrent kernel, decay per token."""
    return _fused_recurrent("fla.ops.simple_gla", "fused_recurrent_simple_gla", case, inputs)


def fused_recurrent_linear(case: Case, inputs: Inputs, mode: str) -> Call:
    """One step of fla's recurrent kernel without decay; feature map and norm as glue code."""
    return _fused_recurrent("fla.ops.linear_attn", "fused_recurrent_linear_attn", case, inputs)


def _fused_recurrent(module: str, name: str, case: Case, inputs: Inputs) -> Call:
    """Reads the state and writes the next one to new memory: fla has no update in place.

    The next call starts from the same state again, as fast as from the new one.
    """
    step = _from(module, _INSTALL_FLA, name, inputs)
    state = inputs["initial_state"].clone()
    decay = [inputs["g"]] if "g" in inputs else []
    scale = case.options.get("scale")

    def call() -> Tensor:
        arguments = (*features(case, inputs), *decay)
        out = step(*arguments, scale=scale, initial_state=state, output_final_state=True)
        return normed(case, _first(out))

    return call


def _from(module: str, install: str, name: str, inputs: Inputs) -> Callable[..., Any]:
    """A function of a package that may be absent, and takes CUDA tensors."""
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        raise Missing(f"not installed: {install}")
    if inputs["q"].device.type != "cuda":
        raise Missing(f"{package} takes CUDA tensors")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except Exception as error:  # a broken build fails in many ways
        raise Missing(f"{module} cannot be imported: {error}") from error
    return function


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
