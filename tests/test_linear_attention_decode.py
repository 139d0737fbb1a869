"""Decoding from a state gives what linear attention gives for the whole sequence."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from linear_decode_checks import F32, assert_decodes, check_bf16_state, cut, decode, draw, log_decay
from torch import Tensor

from attnvariants import RecurrentState, linear_attention_decode
from attnvariants._verify import within

IMPLEMENTATIONS = ("eager", "reference", "triton")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("steps", [[1] * 12, [1, 3, 8], [12]])
@pytest.mark.parametrize("kind", ["channel", "token", "constant", "none"])
def test_decays(kind: str, steps: list[int], impl: str) -> None:
    tensors = draw(2, 12)
    shapes = {"channel": (2, 12, 3, 5), "token": (2, 12, 3), "constant": (3,)}
    if kind != "none":
        tensors["g"] = log_decay(shapes[kind])
    assert_decodes(tensors, steps, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32, torch.float64])
@pytest.mark.parametrize(("norm", "weight"), [("model", (3, 40)), ("head", (40,))])
def test_precisions_and_epilogue(
    norm: str, weight: tuple[int, ...], dtype: torch.dtype, impl: str
) -> None:
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("kernels take no float64")
    tensors = draw(2, 20, key_dim=24, value_dim=40) | {"g": log_decay((2, 20, 3, 24))}
    tensors["gate"] = torch.randn(2, 20, 3, 40, dtype=torch.float64)
    tensors["norm_weight"] = torch.randn(weight, dtype=torch.float64)
    tensors["initial_state"] = torch.randn(2, 3, 24, 40, dtype=torch.float64)
    assert_decodes(tensors, [1] * 16 + [4], dtype, impl=impl, norm=norm, eps=1e-2)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", ["sigmoid", "silu", None])
@pytest.mark.parametrize("elementwise", [True, False])
def test_gates(elementwise: bool, activation: str | None, impl: str) -> None:
    tensors = draw(2, 6)
    gate = 3 * torch.randn(2, 6, 3, 7, dtype=torch.float64)
    tensors["gate"] = gate if elementwise else gate[..., 0]
    assert_decodes(tensors, [1, 1, 4], gate_activation=activation, scale=0.3, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("norm", ["model", None])
@pytest.mark.parametrize("feature_map", ["elu+1", "elu", "relu", "silu", None])
def test_norm_linear_attention(feature_map: str | None, norm: str | None, impl: str) -> None:
    tensors = draw(2, 12) | {"g": log_decay((3,))}
    tensors["gate"] = torch.randn(2, 12, 3, 7, dtype=torch.float64)
    tensors["initial_state"] = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    options = {"feature_map": feature_map, "norm": norm, "gate_activation": "sigmoid", "eps": 0.1}
    assert_decodes(tensors, [1] * 9 + [3], impl=impl, **options)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(2, 9, 3, 5), (2, 9, 3), (3,)])
def test_hard_resets(shape: tuple[int, ...], impl: str) -> None:
    tensors = draw(2, 9)
    tensors["g"] = log_decay(shape).masked_fill(torch.rand(shape) < 0.3, -torch.inf)
    tensors["initial_state"] = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    assert_decodes(tensors, [1] * 6 + [3], impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_reset_token_sees_only_itself(impl: str) -> None:
    q, k, v = (torch.randn(2, 1, 3, 5) for _ in range(3))
    state = torch.randn(2, 3, 5, 5)
    out = linear_attention_decode(
        q, k, v, torch.full((2, 1, 3), -torch.inf), state, scale=1.0, impl=impl
    )
    assert torch.equal(state, k[:, 0, :, :, None] * v[:, 0, :, None])
    truth = (q.double() * k.double()).sum(-1, keepdim=True) * v.double()
    plain = float(((q * k).sum(-1, keepdim=True) * v - truth).abs().max())
    row = within("out", out, truth, plain, F32)
    assert row.ok, row


@settings(max_examples=25)
@given(
    steps=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    key_dim=st.integers(1, 9),
    value_dim=st.integers(1, 9),
    rank=st.sampled_from([0, 1, 3, 4]),
)
def test_any_shapes(steps: list[int], key_dim: int, value_dim: int, rank: int) -> None:
    torch.manual_seed(0)
    tensors = draw(2, sum(steps), 3, key_dim, value_dim)
    if rank:
        full = (2, sum(steps), 3, key_dim)
        tensors["g"] = log_decay((3,) if rank == 1 else full[:rank])
    assert_decodes(tensors, steps)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_plain_tensor_as_state(impl: str) -> None:
    tensors = {name: x.float() for name, x in draw(2, 1).items()}
    memory = torch.randn(2, 7, 3, 5)  # also through a strided view
    state = memory.permute(0, 2, 3, 1)
    carried = RecurrentState(2, 3, 5, 7)
    carried.update(state, 4)
    out = linear_attention_decode(**tensors, g=None, state=state, impl=impl)
    same = linear_attention_decode(**tensors, g=None, state=carried, impl=impl)
    assert torch.equal(state, carried.state)
    assert carried.lengths.tolist() == [5, 5]
    row = within("out", out, same.double(), 0.0, F32)  # another order of summation at most
    assert row.ok, row


def test_state_that_requires_grad_is_updated_without_history() -> None:
    tensors = {name: x.float().requires_grad_() for name, x in draw(2, 1).items()}
    for impl in IMPLEMENTATIONS:
        state = torch.zeros(2, 3, 5, 7, requires_grad=True)
        out = linear_attention_decode(**tensors, g=None, state=state, impl=impl)
        assert not out.requires_grad
        assert state.detach().any()
        assert state.grad_fn is None


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_strided_inputs(impl: str) -> None:
    tensors = {name: x.float() for name, x in draw(2, 4).items()}
    tensors["gate"] = torch.randn(2, 4, 3, 1).expand(2, 4, 3, 7)
    strided = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in tensors.items()}
    strided["gate"] = tensors["gate"]
    plain = decode(tensors, [1, 3], norm="model", impl=impl)
    other = decode(strided, [1, 3], norm="model", impl=impl)
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_autocast_keeps_decay_and_state() -> None:
    tensors = {name: x.float() for name, x in draw(2, 1).items()}
    g = log_decay((2, 1, 3, 5)).half().float()
    states = [torch.zeros(2, 3, 5, 7) for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_attention_decode(**tensors, g=g, state=states[0])
        assert torch.equal(out, linear_attention_decode(**tensors, g=g.half(), state=states[2]))
    low = {name: x.bfloat16() for name, x in tensors.items()}
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, linear_attention_decode(**low, g=g, state=states[1]))
    assert all(torch.equal(states[0], other) for other in states[1:])


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("full", [True, False])
def test_opcheck(full: bool, impl: str) -> None:
    tensors = {name: x.float() for name, x in draw(2, 2).items()}
    args: tuple[Any, ...] = (*tensors.values(), log_decay((3,)).float() if full else None)
    args += (torch.randn(2, 3, 5, 7), torch.ones(2, dtype=torch.int32) if full else None)
    args += (torch.randn(3, 7), torch.randn(2, 2, 3)) if full else (None, None)
    args += ("elu+1" if full else None, 0.5, "model" if full else None, 1e-6, "silu", impl)
    torch.library.opcheck(torch.ops.attnvariants.linear_attention_decode.default, args)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_compiles_without_recompiling(impl: str) -> None:
    tensors = {name: x.float() for name, x in draw(2, 8).items()} | {"g": log_decay((3,)).float()}
    plain, compiled = RecurrentState(2, 3, 5, 7), RecurrentState(2, 3, 5, 7)
    torch._dynamo.reset()
    step = torch.compile(linear_attention_decode, fullgraph=True, backend="aot_eager")
    for t in range(8):
        new = {n: x.contiguous() for n, x in cut(tensors, t, t + 1).items()}
        with torch._dynamo.config.patch(error_on_recompile=True):
            out = step(**new, state=compiled, norm="model", impl=impl)
        expected = linear_attention_decode(**new, state=plain, norm="model", impl=impl)
        assert torch.equal(out, expected)
        assert torch.equal(compiled.state, plain.state)
        assert torch.equal(compiled.lengths, plain.lengths)


def good() -> dict[str, Any]:
    tensors: dict[str, Any] = {name: x.float() for name, x in draw(2, 2).items()}
    return tensors | {"g": None, "state": torch.ones(2, 3, 5, 7)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"state": None}, TypeError, "state must be a RecurrentState or a tensor .* got NoneType"),
        ({"state": torch.ones(2, 3, 7, 5)}, ValueError, r"state has shape .* expected \[B=2, H=3"),
        ({"state": torch.ones(2, 3, 5, 7).double()}, ValueError, "state has dtype float64, expect"),
        ({"state": torch.ones(2, 3, 5, 7).half()}, ValueError, "state has dtype float16, expected"),
        ({"state": torch.ones(2, 3, 1, 7).expand(2, 3, 5, 7)}, ValueError, "must not be expanded"),
        ({"state": torch.ones(2, 3, 5, 7, device="meta")}, ValueError, "one device.*state on meta"),
        ({"state": RecurrentState(1, 3, 5, 7)}, ValueError, "state has shape"),
        ({"q": torch.ones(2, 2, 3)}, ValueError, "q has shape"),
        ({"k": torch.ones(2, 2, 1, 5)}, ValueError, "k has shape .* expected .*H=3"),
        ({"v": torch.ones(2, 1, 3, 7)}, ValueError, "v has shape .* expected .*Q=2"),
        (
            {"k": torch.ones(2, 2, 3, 5).half()},
            ValueError,
            "must share one dtype, got q float32, k float",
        ),
        ({"g": torch.ones(2, 2, 3, 7)}, ValueError, r"g has shape .* or \[B=2, Q=2, H=3\] or \[H"),
        ({"g": torch.ones(4)}, ValueError, "g has shape"),
        ({"g": torch.ones(3).double()}, ValueError, "g has dtype float64"),
        ({"norm_weight": torch.ones(5)}, ValueError, "norm_weight has shape"),
        ({"gate": torch.ones(2, 2, 3, 5)}, ValueError, "gate has shape"),
        ({"gate": torch.ones(2, 2, 3).bfloat16()}, ValueError, "gate has dtype bfloat16"),
        ({"scale": "1"}, TypeError, "scale must be a number or None"),
        ({"feature_map": "exp"}, ValueError, r"feature_map must be one of 'elu\+1'"),
        ({"norm": "group"}, ValueError, "norm must be one of 'model', 'head', None"),
        ({"eps": -1.0}, ValueError, "eps must not be negative"),
        ({"gate_activation": "softplus"}, ValueError, "gate_activation must be one of"),
        ({"impl": "cuda"}, NotImplementedError, "impl='cuda' cannot serve .* 'eager'"),
        ({"impl": "quick"}, ValueError, "impl must be one of"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = good() | change
    with pytest.raises(error, match=message):
        linear_attention_decode(**arguments)
    state = arguments["state"]
    if isinstance(state, Tensor) and state.device.type != "meta":
        assert (state == 1).all()


def test_empty_step() -> None:
    empty = {name: x[:, :0] for name, x in good().items() if name in "qkv"}
    with pytest.raises(ValueError, match="dimension Q must be at least 1, got 0"):
        linear_attention_decode(**good() | empty)


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("norm", ["model", "head", None])
@pytest.mark.parametrize("value_dim", [24, 7])
def test_bf16_state(value_dim: int, norm: str | None, impl: str) -> None:
    check_bf16_state(impl, norm, value_dim)
