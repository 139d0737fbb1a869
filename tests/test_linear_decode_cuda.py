"""The CUDA C++ decode kernel for linear attention, its threads run as fibers on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from decode_checks import spread
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_decode_checks import (
    F32,
    assert_decodes,
    check_bf16_state,
    decode,
    draw,
    epilogue,
    log_decay,
)

from attnvariants import (
    RecurrentState,
    _counters,
    linear_attention_decode,
    norm_linear_attention,
)
from attnvariants.ops.linear import FEATURE_MAPS

NORMS = ("model", "head", None)


pytestmark = pytest.mark.usefixtures("controls")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32])
@pytest.mark.parametrize("gate", ["elementwise", "headwise", None])
@pytest.mark.parametrize("norm", NORMS)
def test_heads_in_several_blocks(norm: str | None, gate: str | None, dtype: torch.dtype) -> None:
    tensors = epilogue(draw(2, 6, 3, key_dim=9, value_dim=72), gate)
    tensors["g"] = log_decay((2, 6, 3, 9))
    assert_decodes(tensors, [1, 1, 4], dtype, impl="cuda", norm=norm, eps=1e-2)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("key_dim", "value_dim", "dtype"),
    [(256, 256, torch.float16), (1, 1, F32), (65, 130, F32), (16, 256, F32), (128, 64, F32)],
)
def test_head_dims(key_dim: int, value_dim: int, dtype: torch.dtype, norm: str | None) -> None:
    tensors = epilogue(draw(1, 9, 2, key_dim=key_dim, value_dim=value_dim))
    tensors["g"] = log_decay((2,))
    options = {"norm": norm, "eps": 1e-2, "feature_map": "elu+1", "gate_activation": "sigmoid"}
    assert_decodes(tensors, [1, 8], dtype, impl="cuda", **options)


@pytest.mark.parametrize("activation", ["sigmoid", "silu", None])
def test_gate_activations(activation: str | None) -> None:
    tensors = epilogue(draw(1, 5, 2))
    tensors["g"] = log_decay((1, 5, 2))
    assert_decodes(tensors, [5], impl="cuda", norm="head", eps=1e-2, gate_activation=activation)


@settings(max_examples=30)
@given(
    steps=st.lists(st.integers(1, 8), min_size=1, max_size=2),
    # RMSNorm over two or three numbers leaves a budget from too few of them.
    dims=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(4, 40)),
    rank=st.sampled_from([0, 1, 3, 4]),
    norm=st.sampled_from(NORMS),
    feature_map=st.sampled_from(["elu+1", "elu", "relu", "silu", None]),
    order=st.integers(0, 100),
)
def test_any_shapes(
    steps: list[int],
    dims: tuple[int, int, int],
    rank: int,
    norm: str | None,
    feature_map: str | None,
    order: int,
    controls: ctypes.CDLL,
) -> None:
    torch.manual_seed(0)
    controls.cuda_on_cpu_order(order)
    heads, key_dim, value_dim = dims
    tensors = epilogue(draw(2, sum(steps), heads, key_dim, value_dim))
    options: dict[str, Any] = {"norm": norm, "eps": 0.1, "gate_activation": "sigmoid"}
    if rank:
        full = (2, sum(steps), heads, key_dim)
        tensors["g"] = log_decay((heads,) if rank == 1 else full[:rank])
    if rank < 2:
        options["feature_map"] = feature_map
    assert_decodes(tensors, steps, impl="cuda", **options)


def test_long_memory_keeps_the_decay() -> None:
    """An exponential that is off by two roundings would be off by 100 after 60 tokens."""
    tensors = draw(1, 64, 8, key_dim=4, value_dim=4)
    tensors["g"] = -torch.logspace(-3, 0, 8, dtype=torch.float64)
    assert_decodes(tensors, [8] * 8, impl="cuda")


def test_the_decay_to_half_a_unit() -> None:
    """Read from a state of ones."""
    g = torch.cat([-torch.logspace(-30, 0, 512), -torch.linspace(0, 87, 508)])
    g = torch.cat([g, torch.tensor([-torch.inf, -1e30, -87.5, 0.0])]).view(1, 1, 4, 256)
    state, none = torch.ones(1, 4, 256, 1), torch.zeros(1, 1, 4, 256)
    linear_attention_decode(none, none, none[..., :1], g, state, impl="cuda")
    found, exact = state.flatten(), g.flatten().double().exp()
    assert found[-4:].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert ((found - exact) / exact)[:-4].abs().max() < 0.75 * torch.finfo(F32).eps


def test_hard_resets_are_exact() -> None:
    """What follows a reset equals, to the last bit, a start from nothing."""
    tensors = {name: x.float() for name, x in draw(1, 6, 2).items()}
    for shape in ((1, 6, 2), (1, 6, 2, 5)):
        g = log_decay(shape).float()
        g[:, 3] = -torch.inf
        state, fresh = torch.randn(1, 2, 5, 7), torch.zeros(1, 2, 5, 7)
        out = linear_attention_decode(**tensors, g=g, state=state, impl="cuda")
        rest = {name: x[:, 3:] for name, x in tensors.items()}
        expected = linear_attention_decode(**rest, g=g[:, 3:], state=fresh, impl="cuda")
        assert torch.equal(out[:, 3:], expected)
        assert torch.equal(state, fresh)


@pytest.mark.parametrize("norm", NORMS)
def test_order_of_threads_and_blocks_does_not_matter(
    norm: str | None, controls: ctypes.CDLL
) -> None:
    tensors = {name: x.float() for name, x in epilogue(draw(2, 6, 3, 40, 72)).items()}
    tensors["g"] = log_decay((2, 6, 3, 40)).float()
    expected = None
    for order in range(6):
        controls.cuda_on_cpu_order(order)
        found = decode(tensors, [1, 5], impl="cuda", norm=norm)
        expected = expected or found
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("norm", NORMS)
def test_inputs_and_state_with_any_strides(norm: str | None) -> None:
    tensors = {
        name: x.float() for name, x in epilogue(draw(2, 3, 3, key_dim=9, value_dim=20)).items()
    }
    tensors["g"] = log_decay((2, 3, 3, 9)).float()
    state = tensors.pop("initial_state")
    apart = {name: spread(x) for name, x in tensors.items()} | {"state": spread(state)}
    wide = torch.full((2, 3, 9, 23), torch.nan)[..., 1:21].copy_(state)
    out = linear_attention_decode(**tensors, state=state, norm=norm, impl="cuda")
    assert torch.equal(out, linear_attention_decode(**apart, norm=norm, impl="cuda"))
    assert torch.equal(state, apart["state"])
    other = linear_attention_decode(**tensors, state=wide, norm=norm, impl="cuda")
    assert torch.equal(out, other)
    assert torch.equal(state, wide)


@pytest.mark.parametrize("wide", ["norm_weight", "gate", "g"])
def test_float32_beside_bfloat16(wide: str) -> None:
    """The same numbers in either dtype give the same result."""
    tensors = {name: x.bfloat16() for name, x in epilogue(draw(2, 3, 3)).items()}
    tensors["g"] = log_decay((2, 3, 3)).bfloat16()
    state = tensors.pop("initial_state").float()
    results = []
    for inputs in (tensors, tensors | {wide: tensors[wide].float()}):
        results.append(
            linear_attention_decode(**inputs, state=state.clone(), norm="head", impl="cuda")
        )
    assert torch.equal(*results)


@pytest.mark.parametrize("rank", [1, 2])
def test_norm_weight_for_all_heads_or_each(rank: int) -> None:
    tensors = epilogue(draw(2, 4, 3)) | {"g": log_decay((2, 4, 3))}
    tensors["norm_weight"] = tensors["norm_weight"] if rank == 2 else tensors["norm_weight"][0]
    assert_decodes(tensors, [1, 3], impl="cuda", norm="head", eps=1e-2)


@pytest.mark.parametrize("norm", ["model", "head"])
def test_counters_are_zero_between_steps(norm: str) -> None:
    tensors = {name: x.float() for name, x in draw(2, 1, 3, 5, 40).items()}
    state = RecurrentState(2, 3, 5, 40)
    arrivals = _counters._arrivals[state.lengths]
    for _ in range(3):
        linear_attention_decode(**tensors, g=None, state=state, norm=norm, impl="cuda")
        assert _counters.counters(state.lengths, 2 * 3, state.lengths) is arrivals
        assert not arrivals.any()


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_nan_passes_every_map(feature_map: str | None) -> None:
    """In steps and in whole sequences: from the third token on, and not before."""
    tensors = {name: x.float() for name, x in draw(1, 5, 1, 16, 16).items()}
    tensors["k"][:, 2, 0, 3] = torch.nan
    state = RecurrentState(1, 1, 16, 16)
    options: dict[str, Any] = {"feature_map": feature_map, "impl": "cuda"}
    steps = linear_attention_decode(**tensors, g=None, state=state, **options)
    whole = norm_linear_attention(**tensors, norm=None, **options)
    for out in (steps, whole):
        assert out.isnan().all(-1).flatten().tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value_dim", [24, 7])
def test_bf16_state(value_dim: int, norm: str | None) -> None:
    check_bf16_state("cuda", norm, value_dim)
