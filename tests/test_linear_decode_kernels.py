"""The decode kernels for linear attention, with heads cut into several programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from attnvariants.kernels._feature_map import apply_map
from decode_checks import spread
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_decode_checks import F32, assert_decodes, check_bf16_state, draw, epilogue, log_decay
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from attnvariants import RecurrentState, linear_attention_decode
from attnvariants.kernels import linear_decode

NORMS = ("model", "head", None)


@pytest.fixture
def _cut_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if 16 columns of a small head filled a program's registers."""
    config = linear_decode.Config(BV=16, warps=1)
    monkeypatch.setattr(linear_decode, "configure", lambda *_: config)


@pytest.mark.usefixtures("_cut_heads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32])
@pytest.mark.parametrize("gate", ["elementwise", "headwise", None])
@pytest.mark.parametrize("norm", NORMS)
def test_heads_in_several_programs(norm: str | None, gate: str | None, dtype: torch.dtype) -> None:
    tensors = epilogue(draw(2, 6, 3, key_dim=9, value_dim=40), gate)
    tensors["g"] = log_decay((2, 6, 3, 9))
    assert_decodes(tensors, [1, 1, 4], dtype, impl="triton", norm=norm, eps=1e-2)


# The interpreter adds 256 channels up one after another, as float32 elsewhere does not.
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("key_dim", "value_dim", "dtype"),
    [(256, 256, torch.float16), (1, 1, F32), (65, 130, F32), (16, 256, F32)],
)
def test_head_dims(key_dim: int, value_dim: int, dtype: torch.dtype, norm: str | None) -> None:
    tensors = epilogue(draw(1, 9, 2, key_dim=key_dim, value_dim=value_dim))
    tensors["g"] = log_decay((2,))
    options = {"norm": norm, "eps": 1e-2, "feature_map": "elu+1", "gate_activation": "sigmoid"}
    assert_decodes(tensors, [1, 8], dtype, impl="triton", **options)


@settings(max_examples=20)
@given(
    steps=st.lists(st.integers(1, 8), min_size=1, max_size=2),
    # RMSNorm over two or three numbers leaves a budget from too few of them.
    dims=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(4, 9)),
    rank=st.sampled_from([0, 1, 3, 4]),
    norm=st.sampled_from(NORMS),
    feature_map=st.sampled_from(["elu+1", "elu", "relu", "silu", None]),
)
def test_any_shapes(
    steps: list[int],
    dims: tuple[int, int, int],
    rank: int,
    norm: str | None,
    feature_map: str | None,
) -> None:
    torch.manual_seed(0)
    heads, key_dim, value_dim = dims
    tensors = epilogue(draw(2, sum(steps), heads, key_dim, value_dim))
    options: dict[str, Any] = {"norm": norm, "eps": 0.1, "gate_activation": "sigmoid"}
    if rank:
        full = (2, sum(steps), heads, key_dim)
        tensors["g"] = log_decay((heads,) if rank == 1 else full[:rank])
    if rank < 2:
        options["feature_map"] = feature_map
    assert_decodes(tensors, steps, impl="triton", **options)


@pytest.mark.usefixtures("_cut_heads")
def test_long_memory_keeps_the_decay() -> None:
    """An exponential that is off by two roundings would be off by 100 after 60 tokens."""
    tensors = draw(1, 64, 8, key_dim=4, value_dim=4)
    tensors["g"] = -torch.logspace(-3, 0, 8, dtype=torch.float64)
    assert_decodes(tensors, [8] * 8, impl="triton")


@triton.jit
def _evaluate(p_x, p_decay, p_elu, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x = tl.load(p_x + index)
    tl.store(p_decay + index, linear_decode._decay(x))
    tl.store(p_elu + index, apply_map(x, "elu"))


def test_exponentials() -> None:
    x = torch.cat([-torch.logspace(-30, 0, 512), -torch.linspace(0, 87, 512)])
    decay, elu = torch.empty_like(x), torch.empty_like(x)
    _evaluate[(1,)](x, decay, elu, x.numel())
    eps = torch.finfo(F32).eps
    assert ((decay - x.double().exp()) / x.double().exp()).abs().max() < 0.75 * eps
    exact = x.double().expm1()
    assert ((elu - exact) / exact)[exact != 0].abs().max() < 2 * eps
    assert not elu[exact == 0].any()


def test_limits_of_the_decay() -> None:
    x = torch.tensor([-torch.inf, -1e30, -87.5, 0.0])
    decay, elu = torch.empty_like(x), torch.empty_like(x)
    _evaluate[(1,)](x, decay, elu, x.numel())
    assert decay.tolist() == [0.0, 0.0, 0.0, 1.0]
    assert elu.tolist() == [-1.0, -1.0, -1.0, 0.0]


@pytest.mark.usefixtures("_cut_heads")
@pytest.mark.parametrize("norm", NORMS)
def test_inputs_and_state_with_any_strides(norm: str | None) -> None:
    tensors = {
        name: x.float() for name, x in epilogue(draw(2, 3, 3, key_dim=9, value_dim=20)).items()
    }
    tensors["g"] = log_decay((2, 3, 3, 9)).float()
    state = tensors.pop("initial_state")
    apart = {name: spread(x) for name, x in tensors.items()} | {"state": spread(state)}
    out = linear_attention_decode(**tensors, state=state, norm=norm, impl="triton")
    other = linear_attention_decode(**apart, norm=norm, impl="triton")
    assert torch.equal(out, other)
    assert torch.equal(state, apart["state"])


@pytest.mark.parametrize("rank", [1, 2])
def test_norm_weight_for_all_heads_or_each(rank: int) -> None:
    tensors = epilogue(draw(2, 4, 3)) | {"g": log_decay((2, 4, 3))}
    tensors["norm_weight"] = tensors["norm_weight"] if rank == 2 else tensors["norm_weight"][0]
    assert_decodes(tensors, [1, 3], impl="triton", norm="head", eps=1e-2)


def test_nothing_is_read_by_the_host() -> None:
    called = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    tensors = {name: x.float() for name, x in draw(2, 3).items()}
    g, state = log_decay((3,)).float(), RecurrentState(2, 3, 5, 7)
    with Spy():
        linear_attention_decode(**tensors, g=g, state=state, norm="model", impl="triton")
    assert "attnvariants::linear_attention_decode" in called
    reads = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"}
    assert not reads & set(called)
    assert state.lengths.tolist() == [3, 3]


@pytest.mark.parametrize("norm", NORMS)
def test_launches_depend_on_sizes_only(norm: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def record(kernel: Any, programs: int, *_: Any, **__: Any) -> None:
        launched.append((kernel.__name__, programs))

    monkeypatch.setattr(linear_decode, "launch", record)
    with FakeTensorMode():
        q, lengths = torch.zeros(2, 3, 4, 128), torch.zeros(2, dtype=torch.int32)
        state = torch.zeros(2, 4, 128, 128)
        linear_decode.attend(
            *(q, q, q, torch.zeros(4), state, lengths, None, None, None, 1.0, norm, 1e-6, None)
        )
    whole = norm == "head"
    assert launched[0] == ("_advance_state", 2 * 4 * (1 if whole else 4))
    assert launched[1:] == ([("_finish", 2 * 3 * 4)] if norm == "model" else [])


@pytest.mark.parametrize(
    ("arguments", "columns"),
    [
        ((4096, 128, 128, None, 132), 32),
        ((4096, 64, 128, "model", 132), 64),
        ((16, 64, 128, "model", 132), 32),  # few heads
        ((16, 128, 128, "head", 132), 128),  # finished in one launch
        ((16, 256, 256, "head", 132), 32),  # does not fit
        ((16, 16, 16, None, 132), 16),
    ],
)
def test_columns_of_a_program(arguments: tuple[Any, ...], columns: int) -> None:
    config = linear_decode.configure(*arguments)
    assert columns == config.BV
    assert config.warps == max(1, arguments[1] * columns // 1024)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value_dim", [24, 7])
def test_bf16_state(value_dim: int, norm: str | None) -> None:
    check_bf16_state("triton", norm, value_dim)
