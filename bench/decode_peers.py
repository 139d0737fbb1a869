"""Peers of a decode step that come with PyTorch: SDPA and FlexAttention over full-length caches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case
from bench.torch_peers import Call, Inputs, gated, needs_compiler


def sdpa_decode(case: Case, inputs: Inputs, mode: str) -> Call:
    """Writes the new token into full-length caches, then SDPA over them and the gate."""
    q, k_cache, v_cache, append = _full_caches(case, inputs)
    mask = _decode_mask(case, q)

    def call() -> Tensor:
        append()
        out = F.scaled_dot_product_attention(
            q, k_cache, v_cache, attn_mask=mask, enable_gqa=case.heads != case.key_heads
        )
        return gated(out.transpose(1, 2), inputs)

    return call


def flex_decode(case: Case, inputs: Inputs, mode: str) -> Call:
    """The same through FlexAttention, compiled, with the windows in its mask."""
    needs_compiler(inputs)
    q, k_cache, v_cache, append = _full_caches(case, inputs)
    group = case.heads // case.key_heads
    sizes = tuple(window or case.keys for window in case.windows for _ in range(group))
    attend, mask = _compiled_flex(sizes, case.keys, str(q.device), str((case.name, q.dtype)))

    def call() -> Tensor:
        append()
        out = attend(q, k_cache, v_cache, block_mask=mask, enable_gqa=group > 1)
        return gated(out.transpose(1, 2), inputs)

    return call


def _full_caches(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Callable[[], None]]:
    """The query, caches ``[B, Hkv, S, D]``, and what writes the new token into them."""
    k_cache, v_cache = (
        inputs[name].transpose(1, 2).clone(memory_format=torch.contiguous_format) for name in "kv"
    )
    new = slice(case.keys - case.length, case.keys)
    k_new, v_new = k_cache[:, :, new].clone(), v_cache[:, :, new].clone()

    def append() -> None:
        k_cache[:, :, new] = k_new
        v_cache[:, :, new] = v_new

    return inputs["q"].transpose(1, 2), k_cache, v_cache, append


def _decode_mask(case: Case, like: Tensor) -> Tensor | None:
    if all(window is None for window in case.windows):
        return None
    distance = torch.arange(case.keys - 1, -1, -1, device=like.device)  # [S]
    group = case.heads // case.key_heads
    rows = [distance < (window or case.keys) for window in case.windows for _ in range(group)]
    return torch.stack(rows)[None, :, None]  # [1, H, 1, S]


@functools.lru_cache(maxsize=1)
def _compiled_flex(
    sizes: tuple[int, ...], keys: int, device: str, key: str
) -> tuple[Callable[..., Tensor], Any]:
    """The compiled function and the mask, shared by all caches of a case (``key``)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()
    attend: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    if all(size >= keys for size in sizes):
        return attend, None
    first = torch.tensor([keys - size for size in sizes], device=device)  # visible key of a head

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j >= first[h]

    mask = create_block_mask(visible, None, len(sizes), 1, keys, device=device)
    return attend, mask


def plain_step(case: Case, inputs: Inputs, mode: str) -> Call:
    """One step of the recurrence in plain PyTorch, the state in place."""
    state = inputs["initial_state"].clone()
    scale = case.options.get("scale", case.key_dim**-0.5)
    g = inputs.get("g")

    def call() -> Tensor:
        q, k, v = (x[:, 0].float() for x in features(case, inputs))
        if g is not None:
            decay = g[:, 0].float().exp()
            state.mul_(decay[..., None] if decay.dim() == 3 else decay[..., None, None])
        state.add_(k[..., None] * v[..., None, :])
        out = (scale * q[..., None, :] @ state).squeeze(-2)[:, None]
        return normed(case, out).to(inputs["v"].dtype)

    return call


def features(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q and k behind the feature map of the case, and v."""
    q, k = inputs["q"], inputs["k"]
    if case.options.get("feature_map") == "elu+1":
        q, k = F.elu(q) + 1, F.elu(k) + 1
    return q, k, inputs["v"]


def normed(case: Case, out: Tensor) -> Tensor:
    """``out [B, T, H, V]`` behind an RMSNorm over all heads, where the case has one."""
    if case.options.get("norm") != "model":
        return out
    return F.rms_norm(out.flatten(2), (case.heads * case.values,), eps=1e-6).view_as(out)
