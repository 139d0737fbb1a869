"""What people would use otherwise: PyTorch's attention, FlexAttention, FlashAttention, fla.

Every peer starts from the same ``[B, T, H, D]`` tensors as ours and returns ``[B, T, H, V]``.
Peers that are not installed, or cannot do a case, say why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.nn.attention import SDPBackend

from bench import decode_peers as decoding
from bench import package_peers as packages
from bench import torch_peers as pytorch
from bench.cases import Case
from bench.torch_peers import Call, Inputs, Missing

__all__ = ["Missing", "Peer", "peer"]


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


_PEERS = {
    entry.name: entry
    for entry in (
        Peer("sdpa", False, pytorch.sdpa),
        Peer("sdpa + gate", True, pytorch.sdpa_gate),
        Peer("sdpa + gate, compiled", True, pytorch.sdpa_gate_compiled()),
        Peer("sdpa flash, compiled", True, pytorch.sdpa_gate_compiled(SDPBackend.FLASH_ATTENTION)),
        Peer("sdpa cudnn, compiled", True, pytorch.sdpa_gate_compiled(SDPBackend.CUDNN_ATTENTION)),
        Peer("sdpa math", True, pytorch.sdpa_backend(SDPBackend.MATH, "cpu cuda")),
        Peer("sdpa flash", True, pytorch.sdpa_backend(SDPBackend.FLASH_ATTENTION, "cpu cuda")),
        Peer("sdpa efficient", True, pytorch.sdpa_backend(SDPBackend.EFFICIENT_ATTENTION, "cuda")),
        Peer("sdpa cudnn", True, pytorch.sdpa_backend(SDPBackend.CUDNN_ATTENTION, "cuda")),
        # Full attention where ours has windows: another function.
        Peer("mhsa flash", False, pytorch.sdpa_backend(SDPBackend.FLASH_ATTENTION, "cpu cuda")),
        Peer("mhsa cudnn", False, pytorch.sdpa_backend(SDPBackend.CUDNN_ATTENTION, "cuda")),
        Peer("two calls", True, pytorch.two_calls),
        Peer("two calls of ours", True, pytorch.own_two_calls),
        Peer("sdpa in blocks", True, pytorch.blocks),
        Peer("flex", True, pytorch.flex),
        Peer("token loop", True, pytorch.token_loop(unbind=False)),
        Peer("token loop, unbind", True, pytorch.token_loop(unbind=True)),
        Peer("sdpa decode", True, decoding.sdpa_decode),
        Peer("flex decode", True, decoding.flex_decode),
        Peer("plain step", True, decoding.plain_step),
        Peer("fa3", True, packages.flash(packages.FA3)),
        Peer("fa4", True, packages.flash(packages.FA4)),
        Peer("fa3 two calls", True, packages.flash(packages.FA3, windows=True)),
        Peer("fa4 two calls", True, packages.flash(packages.FA4, windows=True)),
        Peer("fa3 decode", True, packages.fa3_decode),
        Peer("fla chunk_gla", True, packages.chunk_gla),
        Peer("fla chunk_simple_gla", True, packages.chunk_simple_gla),
        Peer("fla chunk_linear_attn", True, packages.chunk_linear),
        Peer("fla fused_recurrent_gla", True, packages.fused_recurrent_gla),
        Peer("fla fused_recurrent_simple_gla", True, packages.fused_recurrent_simple_gla),
        Peer("fla fused_recurrent_linear_attn", True, packages.fused_recurrent_linear),
    )
}
