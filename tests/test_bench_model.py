"""The small language model of the logit-growth study."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from bench.errors import BenchError
from bench.model import BOS, MIXERS, DecoderLM, parse_pattern
from bench.records import Settings

SMALL = Settings(width=32, layers=2, heads=4, length=24, local_heads=3, local_window=4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mhsa", ["mhsa"]),
        ("gla*3,gated", ["gla", "gla", "gla", "gated"]),
        (" ls * 2 , mhsa+qknorm ", ["ls", "ls", "mhsa+qknorm"]),
    ],
)
def test_patterns(text: str, expected: list[str]) -> None:
    assert parse_pattern(text) == expected


@pytest.mark.parametrize(
    "text", ["nothing", "gla,", "", "gla**2", "gla*0", "gla*x", "gla*-1", "*3"]
)
def test_bad_patterns_say_what_is_known(text: str) -> None:
    with pytest.raises(BenchError, match=r"known are mhsa, .*diag|positive number"):
        parse_pattern(text)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_trains_and_is_causal(mixer: str) -> None:
    torch.manual_seed(0)
    model = DecoderLM(SMALL, mixer)
    tokens = torch.randint(256, (2, SMALL.length))
    logits, activations = model(tokens)
    assert logits.shape == (2, SMALL.length, 256)
    assert activations.shape == (2,)
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 256
    with torch.no_grad():
        other = model(changed)[0]
    torch.testing.assert_close(other[:, :-1], logits[:, :-1])
    assert not torch.equal(other[:, -1], logits[:, -1])


def test_pattern_is_repeated_over_the_layers() -> None:
    model = DecoderLM(dataclasses.replace(SMALL, layers=5), "gla,ls")
    assert model.pattern == ["gla", "ls", "gla", "ls", "gla"]
    kinds = [type(mixer).__name__ for mixer in model.mixers.values()]
    assert kinds == ["GatedLinearAttention", "LSAttention"] * 2 + ["GatedLinearAttention"]
    assert list(model.mixers)[1] == "blocks.1.mixer"
    assert model.get_submodule("blocks.1.mixer") is model.mixers["blocks.1.mixer"]
    assert model.mixers["blocks.1.mixer"].head_groups == ["local"] * 3 + ["global"]


def test_mixers_differ_as_named() -> None:
    def layer(name: str) -> torch.nn.Module:
        return DecoderLM(SMALL, name).mixers["blocks.0.mixer"]

    assert layer("mhsa").gate is None
    assert not layer("mhsa").qk_norm
    assert layer("mhsa+qknorm").qk_norm
    assert layer("gated").gate == "elementwise"
    assert layer("gated-headwise").gate == "headwise"
    assert (layer("ls").gate, layer("ls+gate").gate) == (None, "elementwise")
    assert layer("ls").local_window == 4


def test_positions() -> None:
    assert DecoderLM(SMALL, "mhsa").positions is None
    learned = DecoderLM(dataclasses.replace(SMALL, positions="learned"), "mhsa,ls")
    assert learned.positions.weight.shape == (SMALL.length, SMALL.width)
    assert all(mixer.rope_base is None for mixer in learned.mixers.values())
    tokens = torch.zeros(1, SMALL.length, dtype=torch.long)
    logits, _ = learned(tokens)  # without positions all of them would be equal
    assert not torch.allclose(logits[0, 0], logits[0, 1])


def test_bos_has_an_id_of_its_own() -> None:
    model = DecoderLM(dataclasses.replace(SMALL, bos=True), "mhsa")
    assert model.embedding.num_embeddings == BOS + 1
    assert model(torch.full((1, 2), BOS))[0].shape[-1] == BOS + 1


@pytest.mark.parametrize("init", ["fan_in", "small"])
def test_initial_sizes(init: str) -> None:
    torch.manual_seed(0)
    settings = dataclasses.replace(SMALL, width=128, heads=4, layers=3, init=init)
    model = DecoderLM(settings, "gated")

    def std(name: str) -> float:
        return float(model.get_parameter(name).detach().std())

    near = {"rel": 0.05}
    fan_in = 1 / math.sqrt(128)
    projection = fan_in if init == "fan_in" else 0.02
    assert std("embedding.weight") == pytest.approx(0.02, **near)
    assert std("blocks.1.mixer.q_proj.weight") == pytest.approx(projection, **near)
    assert std("blocks.1.mixer.k_proj.weight") == pytest.approx(projection, **near)
    assert std("blocks.1.mixer.v_proj.weight") == pytest.approx(fan_in, **near)
    assert std("blocks.2.mixer.o_proj.weight") == pytest.approx(fan_in / math.sqrt(6), **near)
    assert std("blocks.0.down.weight") == pytest.approx(fan_in / 2 / math.sqrt(6), **near)
    assert std("head.weight") == pytest.approx(fan_in, **near)


def test_parameter_count() -> None:
    model = DecoderLM(Settings(), "mhsa")
    norms = 5 * 64
    assert model.parameter_count() == 2 * 256 * 64 + 2 * 12 * 64 * 64 + norms
