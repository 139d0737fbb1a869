"""What people would use otherwise: PyTorch's attention, FlexAttention, FlashAttention, fla.

Every peer starts from the same ``[B, T, H, D]`` tensors as ours and returns ``[B, T, H, V]``.
Peers that are not installed, or cannot do a case, say why; nothing is imported before it is used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.cases import TRAINING, Case

_MOST_SCORE_BYTES = 4 * 2**30
_LONGEST_LOOP = 4096

Call = Callable[[], Tensor]
Inputs = Mapping[str, Tensor]


class Missing(Exception):
    """Why a peer cannot be timed here, in one line."""


@dataclass(frozen=True)
class Peer:
    """``build(case, inputs, mode)`` returns the call, or raises :class:`Missing`.

    ``same``: it computes what ours computes, so the outputs must agree before it is timed. The
    others are what one would use in its place.
    """

    name: str
    same: bool
    build: Callable[[Case, Inputs, str], Call]


def peer(name: str) -> Peer:
    """The peer of this name."""
    return _PEERS[name]


# --- PyTorch -------------------------------------------------------------------------------------


def _heads_first(inputs: Inputs) -> list[Tensor]:
    return [inputs[name].transpose(1, 2) for name in ("q", "k", "v")]


def _attend(case: Case, inputs: Inputs) -> Tensor:
    q, k, v = _heads_first(inputs)
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=case.causal, enable_gqa=case.heads != case.key_heads
    )
    return out.transpose(1, 2)


def _gated(out: Tensor, inputs: Inputs) -> Tensor:
    gate = inputs.get("gate")
    if gate is None:
        return out
    return out * torch.sigmoid(gate if gate.dim() == out.dim() else gate[..., None])


def _sdpa(case: Case, inputs: Inputs, mode: str) -> Call:
    return lambda: _attend(case, inputs)


def _sdpa_gate(case: Case, inputs: Inputs, mode: str) -> Call:
    return lambda: _gated(_attend(case, inputs), inputs)


def _sdpa_gate_compiled(case: Case, inputs: Inputs, mode: str) -> Call:
    _needs_compiler(inputs)
    compiled = _compiled_glue(case.name, mode)
    return lambda: compiled(case, dict(inputs))


@functools.lru_cache(maxsize=1)
def _compiled_glue(*key: str) -> Callable[[Case, Inputs], Tensor]:
    """Compiled for one case and mode: shapes of earlier ones would make it a dynamic one."""
    torch.compiler.reset()
    glue: Callable[[Case, Inputs], Tensor] = torch.compile(
        lambda case, inputs: _gated(_attend(case, inputs), inputs), dynamic=False
    )
    return glue


def _needs_compiler(inputs: Inputs) -> None:
    if inputs["q"].device.type == "cpu" and shutil.which("g++") is None:
        raise Missing("torch.compile on a CPU needs g++")


def _sdpa_backend(backend: SDPBackend, devices: str) -> Callable[[Case, Inputs, str], Call]:
    """One back end of SDPA, with the gate as glue code."""

    def build(case: Case, inputs: Inputs, mode: str) -> Call:
        device = inputs["q"].device.type
        if device not in devices.split():
            raise Missing(f"this back end of SDPA takes {devices} tensors, got {device}")
        scores = case.batch * case.heads * case.length * case.keys * inputs["q"].itemsize
        if backend == SDPBackend.MATH and scores > _MOST_SCORE_BYTES:
            raise Missing(f"its scores alone take {scores / 2**30:.0f} GiB")

        def call() -> Tensor:
            with sdpa_kernel(backend):
                return _gated(_attend(case, inputs), inputs)

        return call

    return build


def _two_calls(case: Case, inputs: Inputs, mode: str) -> Call:
    """Local heads through a dense band mask, global heads causal, then a concatenation."""
    if case.keys > 8192:
        raise Missing(f"its dense mask of {case.keys} x {case.keys} entries is not worth timing")
    local, size = _local_heads(case)
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
        return _gated(torch.cat([near, far], 1).transpose(1, 2), inputs)

    return call


def _local_heads(case: Case) -> tuple[int, int]:
    """How many KV heads are local, and their window; they come first."""
    windows = case.windows
    local = [window for window in windows if window is not None]
    if not local or len(set(local)) > 1 or windows != local + [None] * (len(windows) - len(local)):
        raise Missing("takes one window for the first heads and none for the others")
    if len(local) == len(windows):
        raise Missing("takes at least one global head")
    return len(local), local[0]


def _blocks(case: Case, inputs: Inputs, mode: str) -> Call:
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


def _flex(case: Case, inputs: Inputs, mode: str) -> Call:
    """FlexAttention, compiled, with the windows in its mask and the gate as glue code."""
    device = inputs["q"].device
    if device.type == "cpu" and mode == TRAINING:
        raise Missing("FlexAttention has no backward on a CPU")
    _needs_compiler(inputs)
    group = case.heads // case.key_heads
    sizes = tuple(window or case.keys for window in case.windows for _ in range(group))
    attend, mask = _compiled_flex(sizes, case.length, case.keys, str(device), mode)

    def call() -> Tensor:
        q, k, v = _heads_first(inputs)
        out = attend(q, k, v, block_mask=mask, enable_gqa=group > 1)
        return _gated(out.transpose(1, 2), inputs)

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


def _token_loop(unbind: bool) -> Callable[[Case, Inputs, str], Call]:
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


# --- PyTorch, decoding ---------------------------------------------------------------------------


def _sdpa_decode(case: Case, inputs: Inputs, mode: str) -> Call:
    """Writes the new token into full-length caches, then SDPA over them and the gate."""
    _, k_cache, v_cache = _heads_first(inputs)
    k_cache, v_cache = k_cache.contiguous(), v_cache.contiguous()  # [B, Hkv, S, D]
    q = inputs["q"].transpose(1, 2)
    new = slice(case.keys - case.length, case.keys)
    k_new, v_new = k_cache[:, :, new].clone(), v_cache[:, :, new].clone()
    mask = _decode_mask(case, q)

    def call() -> Tensor:
        k_cache[:, :, new] = k_new
        v_cache[:, :, new] = v_new
        out = F.scaled_dot_product_attention(
            q, k_cache, v_cache, attn_mask=mask, enable_gqa=case.heads != case.key_heads
        )
        return _gated(out.transpose(1, 2), inputs)

    return call


def _decode_mask(case: Case, like: Tensor) -> Tensor | None:
    if all(window is None for window in case.windows):
        return None
    distance = torch.arange(case.keys - 1, -1, -1, device=like.device)  # [S]
    group = case.heads // case.key_heads
    rows = [distance < (window or case.keys) for window in case.windows for _ in range(group)]
    return torch.stack(rows)[None, :, None]  # [1, H, 1, S]


def _plain_step(case: Case, inputs: Inputs, mode: str) -> Call:
    """One step of the recurrence in plain PyTorch, the state in place."""
    state = inputs["initial_state"].clone()
    q, k, v, g = (inputs[name][:, 0].float() for name in ("q", "k", "v", "g"))
    scale = case.key_dim**-0.5

    def call() -> Tensor:
        state.mul_(g.exp()[..., None]).add_(k[..., None] * v[..., None, :])
        return (scale * q[..., None, :] @ state).squeeze(-2)[:, None].to(inputs["v"].dtype)

    return call


# --- FlashAttention ------------------------------------------------------------------------------

_FA3 = "flash_attn_interface", "FlashAttention-3, built from the hopper folder of flash-attention"
_FA4 = "flash_attn.cute", "pip install flash-attn-4"


def _flash(source: tuple[str, str], windows: bool = False) -> Callable[[Case, Inputs, str], Call]:
    """FlashAttention and the gate as glue code; ``windows``: one call per kind of head."""

    def build(case: Case, inputs: Inputs, mode: str) -> Call:
        attend = _from(*source, "flash_attn_func", inputs)
        if not windows:

            def full() -> Tensor:
                q, k, v = (inputs[name] for name in ("q", "k", "v"))
                return _gated(_first(attend(q, k, v, causal=case.causal)), inputs)

            return full
        local, size = _local_heads(case)
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
            return _gated(torch.cat([_first(near), _first(far)], 2), inputs)

        return split

    return build


def _fa3_decode(case: Case, inputs: Inputs, mode: str) -> Call:
    attend = _from(*_FA3, "flash_attn_with_kvcache", inputs)
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
        return _gated(_first(out), inputs)

    return call


# --- fla -----------------------------------------------------------------------------------------

_INSTALL_FLA = "pip install flash-linear-attention"


def _chunk_gla(case: Case, inputs: Inputs, mode: str) -> Call:
    chunk = _from("fla.ops.gla", _INSTALL_FLA, "chunk_gla", inputs)
    return lambda: _first(chunk(*(inputs[name] for name in ("q", "k", "v", "g"))))


def _chunk_simple_gla(case: Case, inputs: Inputs, mode: str) -> Call:
    chunk = _from("fla.ops.simple_gla", _INSTALL_FLA, "chunk_simple_gla", inputs)
    return lambda: _first(chunk(*(inputs[name] for name in ("q", "k", "v", "g"))))


def _chunk_linear(case: Case, inputs: Inputs, mode: str) -> Call:
    """Feature map and RMSNorm over all heads as glue code around fla's kernel."""
    chunk = _from("fla.ops.linear_attn", _INSTALL_FLA, "chunk_linear_attn", inputs)

    def call() -> Tensor:
        q, k = (F.elu(inputs[name]) + 1 for name in ("q", "k"))
        out = _first(chunk(q, k, inputs["v"], scale=1.0, normalize=False))
        return F.rms_norm(out.flatten(2), (case.heads * case.values,), eps=1e-6).view_as(out)

    return call


def _fused_recurrent_gla(case: Case, inputs: Inputs, mode: str) -> Call:
    step = _from("fla.ops.gla", _INSTALL_FLA, "fused_recurrent_gla", inputs)
    state = inputs["initial_state"].clone()

    def call() -> Tensor:
        q, k, v, g = (inputs[name] for name in ("q", "k", "v", "g"))
        out, new = step(q, k, v, g, initial_state=state, output_final_state=True)
        state.copy_(new)  # fla has no update in place
        return _first(out)

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


_PEERS = {
    entry.name: entry
    for entry in (
        Peer("sdpa", False, _sdpa),
        Peer("sdpa + gate", True, _sdpa_gate),
        Peer("sdpa + gate, compiled", True, _sdpa_gate_compiled),
        Peer("sdpa math", True, _sdpa_backend(SDPBackend.MATH, "cpu cuda")),
        Peer("sdpa flash", True, _sdpa_backend(SDPBackend.FLASH_ATTENTION, "cpu cuda")),
        Peer("sdpa efficient", True, _sdpa_backend(SDPBackend.EFFICIENT_ATTENTION, "cuda")),
        Peer("sdpa cudnn", True, _sdpa_backend(SDPBackend.CUDNN_ATTENTION, "cuda")),
        Peer("two calls", True, _two_calls),
        Peer("sdpa in blocks", True, _blocks),
        Peer("flex", True, _flex),
        Peer("token loop", True, _token_loop(unbind=False)),
        Peer("token loop, unbind", True, _token_loop(unbind=True)),
        Peer("sdpa decode", True, _sdpa_decode),
        Peer("plain step", True, _plain_step),
        Peer("fa3", True, _flash(_FA3)),
        Peer("fa4", True, _flash(_FA4)),
        Peer("fa3 two calls", True, _flash(_FA3, windows=True)),
        Peer("fa4 two calls", True, _flash(_FA4, windows=True)),
        Peer("fa3 decode", True, _fa3_decode),
        Peer("fla chunk_gla", True, _chunk_gla),
        Peer("fla chunk_simple_gla", True, _chunk_simple_gla),
        Peer("fla chunk_linear_attn", True, _chunk_linear),
        Peer("fla fused_recurrent_gla", True, _fused_recurrent_gla),
    )
}
