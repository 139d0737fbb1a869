"""Peers that come with PyTorch: SDPA and its back ends, FlexAttention, loops over tokens."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnvariants import ls_attention
from bench.cases import TRAINING, Case

_MOST_SCORE_BYTES = 4 * 2**30
_LONGEST_LOOP = 4096

Call = Callable[[], Tensor]
Inputs = Mapping[str, Tensor]


class Missing(Exception):
    """Why a peer cannot be timed here, in one line."""


def _heads_first(inputs: Inputs) -> list[Tensor]:
    return [inputs[name].transpose(1, 2) for name in ("q", "k", "v")]


def _attend(case: Case, inputs: Inputs) -> Tensor:
    q, k, v = _heads_first(inputs)
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=case.causal, enable_gqa=case.heads != case.key_heads
    )
    return out.transpose(1, 2)


def gated(out: Tensor, inputs: Inputs) -> Tensor:
    """``out`` times its gate, where the case has one."""
    gate = inputs.get("gate")
    if gate is None:
        return out
    return out * torch.sigmoid(gate if gate.dim() == out.dim() else gate[..., None])


def sdpa(case: Case, inputs: Inputs, mode: str) -> Call:
    """Full attention, without gate and window."""
    return lambda: _attend(case, inputs)


def sdpa_gate(case: Case, inputs: Inputs, mode: str) -> Call:
    """Attention and the gate as glue code."""
    return lambda: gated(_attend(case, inputs), inputs)


def sdpa_gate_compiled(backend: SDPBackend | None = None) -> Callable[[Case, Inputs, str], Call]:
    """The same through ``torch.compile``, with a back end of SDPA or torch's choice."""

    def build(case: Case, inputs: Inputs, mode: str) -> Call:
        needs_compiler(inputs)
        if backend is not None:
            _needs_device(inputs, "cuda")
        compiled = _compiled_glue(case.name, mode, str(backend))

        def call() -> Tensor:
            with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
                return compiled(case, dict(inputs))

        return call

    return build


@functools.lru_cache(maxsize=1)
def _compiled_glue(*key: str) -> Callable[[Case, Inputs], Tensor]:
    """Compiled for one case and mode: shapes of earlier ones would make it a dynamic one."""
    torch.compiler.reset()
    glue: Callable[[Case, Inputs], Tensor] = torch.compile(
        lambda case, inputs: gated(_attend(case, inputs), inputs), dynamic=False
    )
    return glue


def needs_compiler(inputs: Inputs) -> None:
    """Refuses a CPU without the compiler that ``torch.compile`` calls."""
    if inputs["q"].device.type == "cpu" and shutil.which("g++") is None:
        raise Missing("torch.compile on a CPU needs g++")


def _needs_device(inputs: Inputs, devices: str) -> None:
    device = inputs["q"].device.type
    if device not in devices.split():
        raise Missing(f"this back end of SDPA takes {devices} tensors, got {device}")


def sdpa_backend(backend: SDPBackend, devices: str) -> Callable[[Case, Inputs, str], Call]:
    """One back end of SDPA, with the gate as glue code."""

    def build(case: Case, inputs: Inputs, mode: str) -> Call:
        _needs_device(inputs, devices)
        scores = case.batch * case.heads * case.length * case.keys * inputs["q"].itemsize
        if backend == SDPBackend.MATH and scores > _MOST_SCORE_BYTES:
            raise Missing(f"its scores alone take {scores / 2**30:.0f} GiB")

        def call() -> Tensor:
            with sdpa_kernel(backend):
                return gated(_attend(case, inputs), inputs)

        return call

    return build


def own_two_calls(case: Case, inputs: Inputs, mode: str) -> Call:
    """Our own kernels, launched once for the local and once for the global heads, then joined."""
    local, size = local_heads(case)
    rows = local * (case.heads // case.key_heads)
    gate = inputs.get("gate")

    def attend(heads: slice, kv_heads: slice, window: int | None) -> Tensor:
        q, k, v = inputs["q"][:, :, heads], inputs["k"][:, :, kv_heads], inputs["v"][:, :, kv_heads]
        part = None if gate is None else gate[:, :, heads]
        out = ls_attention(q, k, v, window=window, gate=part)
        assert isinstance(out, Tensor)  # no statistics
        return out

    def call() -> Tensor:
        near = attend(slice(None, rows), slice(None, local), size)
        far = attend(slice(rows, None), slice(local, None), None)
        return torch.cat([near, far], 2)

    return call


def two_calls(case: Case, inputs: Inputs, mode: str) -> Call:
    """Local heads through a dense band mask, global heads causal, then a concatenation."""
    if case.keys > 8192:
        raise Missing(f"its dense mask of {case.keys} x {case.keys} entries is not worth timing")
    local, size = local_heads(case)
    group = case.heads // case.key_heads
    position = torch.arange(case.keys, device=inputs["q"].device)
    distance = position[:, None] - position
    band = (distance >= 0) & (distance < size)

    def call() -> Tensor:
        q, k, v = _heads_first(inputs)
        grouped = group > 1
        near = F.scaled_dot_product_attention(
            q[:, : local * group], k[:, :local], v[:, :local], attn_mask=band, enable_gqa=grouped
        )
        far = F.scaled_dot_product_attention(
            q[:, local * group :], k[:, local:], v[:, local:], is_causal=True, enable_gqa=grouped
        )
        return gated(torch.cat([near, far], 1).transpose(1, 2), inputs)

    return call


def local_heads(case: Case) -> tuple[int, int]:
    """How many KV heads are local, and their window; they come first."""
    windows = case.windows
    local = [window for window in windows if window is not None]
    if not local or len(set(local)) > 1 or windows != local + [None] * (len(windows) - len(local)):
        raise Missing("takes one window for the first heads and none for the others")
    if len(local) == len(windows):
        raise Missing("takes at least one global head")
    return len(local), local[0]


def blocks(case: Case, inputs: Inputs, mode: str) -> Call:
    """Blocks as rows of the batch."""
    size = int(case.options.get("block_size", 64))
    if case.length % size:
        raise Missing(f"takes a length that is a multiple of {size}, got {case.length}")

    def call() -> Tensor:
        q, k, v = (
            inputs[name].unflatten(1, (-1, size)).flatten(0, 1).transpose(1, 2)
            for name in ("q", "k", "v")
        )
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=case.causal, enable_gqa=case.heads != case.key_heads
        )
        return out.transpose(1, 2).reshape(case.batch, case.length, case.heads, case.values)

    return call


def flex(case: Case, inputs: Inputs, mode: str) -> Call:
    """FlexAttention, compiled, with the windows in its mask and the gate as glue code."""
    device = inputs["q"].device
    if device.type == "cpu" and mode == TRAINING:
        raise Missing("FlexAttention has no backward on a CPU")
    needs_compiler(inputs)
    group = case.heads // case.key_heads
    sizes = tuple(window or case.keys for window in case.windows for _ in range(group))
    attend, mask = _compiled_flex(sizes, case.length, case.keys, str(device), mode)

    def call() -> Tensor:
        q, k, v = _heads_first(inputs)
        out = attend(q, k, v, block_mask=mask, enable_gqa=group > 1)
        return gated(out.transpose(1, 2), inputs)

    return call


@functools.lru_cache(maxsize=1)
def _compiled_flex(
    sizes: tuple[int, ...], queries: int, keys: int, device: str, mode: str
) -> tuple[Callable[..., Tensor], Any]:
    """The compiled function and the mask, shared by all input sets of a case."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window = torch.tensor(sizes, device=device)
    same = sizes[0] if len(set(sizes)) == 1 else None

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < (window[h] if same is None else same))

    heads = len(sizes) if same is None else None
    mask = create_block_mask(visible, None, heads, queries, keys, device=device)
    attend: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return attend, mask


def token_loop(unbind: bool) -> Callable[[Case, Inputs, str], Call]:
    """The recurrence of gated linear attention in plain PyTorch, token by token.

    Written ``q[:, t]``, as in most reference code, each step's backward fills a gradient as large
    as ``q``; ``unbind`` takes the tokens apart first, which avoids that.
    """

    def tokens(x: Tensor) -> Iterable[Tensor]:
        return x.unbind(1) if unbind else (x[:, t] for t in range(x.shape[1]))

    def build(case: Case, inputs: Inputs, mode: str) -> Call:
        if case.length > _LONGEST_LOOP:
            raise Missing(f"a loop over {case.length} tokens is not worth timing")
        scale = case.key_dim**-0.5

        def call() -> Tensor:
            q, k, v, g = (inputs[name].float() for name in ("q", "k", "v", "g"))
            decay = (g if g.dim() == 4 else g[..., None]).exp()
            state = q.new_zeros(case.batch, case.heads, case.key_dim, case.values)
            outputs = []
            for q_t, k_t, v_t, a_t in zip(*map(tokens, (q, k, v, decay)), strict=True):
                state = a_t[..., None] * state + k_t[..., None] * v_t[..., None, :]
                outputs.append((scale * q_t[..., None, :] @ state).squeeze(-2))
            return torch.stack(outputs, 1).to(inputs["v"].dtype)

        return call

    return build
