"""A small decoder language model whose layers take any of the attention variants, or a pattern.

Pre-RMSNorm, GELU MLP of four times the width, untied output head, bytes as vocabulary: the usual
small proxy in which logit growth has been studied (Wortsman et al., arXiv 2309.14322).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnvariants
from bench.corpus import VOCABULARY
from bench.errors import BenchError
from bench.records import Settings

BOS = VOCABULARY  # id of the begin-of-sequence token, where there is one


def _gated(gate: str | None, qk_norm: bool = False) -> Callable[[Settings, int], nn.Module]:
    def make(settings: Settings, layer: int) -> nn.Module:
        return attnvariants.GatedAttention(
            settings.width, settings.heads, gate=gate, qk_norm=qk_norm, rope_base=_rope(settings)
        )

    return make


def _ls(gate: str | None) -> Callable[[Settings, int], nn.Module]:
    def make(settings: Settings, layer: int) -> nn.Module:
        return attnvariants.LSAttention(
            settings.width,
            settings.heads,
            num_local_heads=settings.local_heads,
            local_window=settings.local_window,
            gate=gate,
            rope_base=_rope(settings),
        )

    return make


def _gla(settings: Settings, layer: int) -> nn.Module:
    return attnvariants.GatedLinearAttention(settings.width, settings.heads)


def _transnormer(preset: str) -> Callable[[Settings, int], nn.Module]:
    def make(settings: Settings, layer: int) -> nn.Module:
        build = getattr(attnvariants.NormLinearAttention, f"transnormer_{preset}")
        place = {"layer_index": layer, "num_layers": settings.layers} if preset == "llm" else {}
        return build(settings.width, settings.heads, **place)

    return make


def _diag(settings: Settings, layer: int) -> nn.Module:
    return attnvariants.DiagAttention(settings.width, settings.heads)


MIXERS: dict[str, Callable[[Settings, int], nn.Module]] = {
    "mhsa": _gated(None),
    "mhsa+qknorm": _gated(None, qk_norm=True),
    "ls": _ls(None),
    "ls+gate": _ls("elementwise"),
    "gated": _gated("elementwise"),
    "gated-headwise": _gated("headwise"),
    "gla": _gla,
    "transnormer": _transnormer("llm"),
    "transnormer-t1": _transnormer("t1"),
    "transnormer-t2": _transnormer("t2"),
    "diag": _diag,
}


def parse_pattern(text: str) -> list[str]:
    """``"gla*3,gated"`` as ``["gla", "gla", "gla", "gated"]``.

    Raises:
        BenchError: a mixer is unknown or a count is not a positive number.
    """
    pattern: list[str] = []
    for part in text.split(","):
        name, star, count = (piece.strip() for piece in part.partition("*"))
        if name not in MIXERS:
            raise BenchError(
                f"unknown mixer {name!r} in {text!r}: known are {', '.join(MIXERS)}, and patterns "
                "of them such as 'gla*3,gated'"
            )
        if star and not (count.isdecimal() and int(count) > 0):
            raise BenchError(f"the pattern {text!r} needs a positive number after '*'")
        pattern += [name] * (int(count) if star else 1)
    return pattern


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, mixer: nn.Module, width: int) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(width, eps=1e-6)
        self.mixer = mixer
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class DecoderLM(nn.Module):
    """Next-byte prediction: ``tokens [B, T]`` to logits ``[B, T, vocabulary]``.

    The pattern is repeated over the layers. Positions come from RoPE inside the softmax mixers,
    or from a learned embedding added to the input; linear mixers bring their own.
    """

    def __init__(self, settings: Settings, mixer: str) -> None:
        super().__init__()
        names = itertools.cycle(parse_pattern(mixer))
        self.pattern = list(itertools.islice(names, settings.layers))
        width, vocabulary = settings.width, VOCABULARY + settings.bos
        self.embedding = nn.Embedding(vocabulary, width)
        learned = settings.positions == "learned"
        self.positions = nn.Embedding(settings.length, width) if learned else None
        self.blocks = nn.ModuleList(
            Block(MIXERS[name](settings, layer), width) for layer, name in enumerate(self.pattern)
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self._init(settings)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logits and the largest |hidden state| after each layer, ``[layers]``."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        largest = []
        for block in self.blocks:
            x = block(x)
            largest.append(x.detach().abs().amax())
        return self.head(self.norm(x)), torch.stack(largest)

    @property
    def mixers(self) -> dict[str, nn.Module]:
        """The attention layer of each block by its module name."""
        return {
            f"blocks.{index}.mixer": block.get_submodule("mixer")
            for index, block in enumerate(self.blocks)
        }

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def _init(self, settings: Settings) -> None:
        """Normal with std ``1/sqrt(fan_in)``; embeddings 0.02; residual outputs ``/ sqrt(2L)``."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                std = 1 / math.sqrt(module.in_features)
                if name.endswith((".mixer.o_proj", ".down")):
                    std /= math.sqrt(2 * settings.layers)
                if name.endswith((".q_proj", ".k_proj")) and settings.init == "small":
                    std = 0.02
                nn.init.normal_(module.weight, std=std)


def _rope(settings: Settings) -> float | None:
    return 10000.0 if settings.positions == "rope" else None
