"""CUDA C++ for whole sequences of softmax attention as a caller meets it: beside Triton, compiled,
under autocast, and where it refuses.

See ``test_softmax_forward_cuda.py`` for what it computes.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from oracle import assert_matches_definition
from softmax_checks import bounds, cast, draw
from torch import Tensor

import attnvariants
from attnvariants import diag_attention, gated_sdpa, ls_attention
from attnvariants._check_cases import CASES, Case
from attnvariants._check_cases import check as check_case
from attnvariants._verify import Comparison, settle, shuffle_channels, within

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


pytestmark = pytest.mark.usefixtures("controls")


@pytest.mark.parametrize("dtype", [F16, F32])
@pytest.mark.parametrize("function", ["ls_attention", "diag_attention"])
def test_the_same_as_triton(function: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    tensors = cast(draw(batch=1, length=70, heads=2), dtype)
    options: dict[str, Any] = {"window": (None, 9)} if function == "ls_attention" else {}
    call = getattr(attnvariants, function)
    definition = getattr(importlib.import_module(f"attnvariants.reference.{function}"), function)

    def measure(attempt: int) -> list[Comparison]:
        inputs = shuffle_channels(tensors, attempt)
        found, other = (call(**inputs, **options, impl=impl) for impl in ("cuda", "triton"))
        truth, plain = (
            definition(**cast(inputs, x), **options, upcast=False) for x in (torch.float64, dtype)
        )
        return [within("out", found, other.double(), float((plain - truth).abs().max()), dtype)]

    (row,) = settle(measure)
    assert row.ok, row


def test_compile() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        out, stats = ls_attention(
            q, k, v, gate=gate, window=(9, None), return_stats=True, impl="cuda"
        )
        return out * 2, diag_attention(q, k, v, impl="cuda") + stats.lse[..., None]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for length in (70, 40):
        tensors = cast(draw(length=length, kv_heads=2, gate="elementwise"), BF16).values()
        with torch.no_grad():
            torch.testing.assert_close(compiled(*tensors), call(*tensors), rtol=0, atol=0)


@pytest.mark.parametrize("stats", [True, False])
def test_operators(stats: bool) -> None:
    tensors = cast(draw(batch=1, gate="elementwise"), BF16)
    q, k, v, gate = tensors.values()
    arguments = (q, k, v, gate, bounds(12, 8), [-1, 3, 3, -1], True, 0.3, "sigmoid", stats, "cuda")
    torch.library.opcheck(torch.ops.attnvariants.softmax_forward.default, arguments)
    for activation in ("softmax", "relu"):
        arguments = (q, k, v, None, 7, activation, True, 0.3, stats, "cuda")
        torch.library.opcheck(torch.ops.attnvariants.diag_forward.default, arguments)


def test_autocast() -> None:
    tensors = cast(draw(length=20, gate="headwise"), F32)
    with torch.autocast("cpu", BF16):
        found = gated_sdpa(**tensors, impl="cuda")
    assert torch.equal(found, gated_sdpa(**cast(tensors, BF16), impl="cuda"))


def test_inputs_are_left_alone() -> None:
    tensors = cast(draw(length=40, gate="elementwise"), BF16)
    copies = {name: x.clone() for name, x in tensors.items()}
    gated_sdpa(**tensors, softmax_scale=-1.0, impl="cuda")
    assert all(torch.equal(x, copies[name]) for name, x in tensors.items())


@pytest.mark.parametrize("function", ["gated_sdpa", "ls_attention", "diag_attention"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_call_with_a_gradient_is_for_others(function: str, name: str) -> None:
    tensors = cast(draw(), F32)
    tensors[name].requires_grad_()
    options: dict[str, Any] = {"window": 9} if function == "ls_attention" else {}
    call = getattr(attnvariants, function)
    message = rf"{function}: impl='cuda'.*no backward.*gradient.*These can: 'triton', 'eager'"
    with pytest.raises(NotImplementedError, match=message):
        call(**tensors, **options, impl="cuda")
    with torch.no_grad():
        expected = call(**tensors, **options, impl="cuda")
        assert torch.equal(call(**tensors, **options), expected)  # "auto", beside an interpreter
    (gradient,) = torch.autograd.grad(call(**tensors, **options).sum(), tensors[name])
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.function)
def test_the_check_of_an_installation(case: Case, dtype: torch.dtype) -> None:
    rows = check_case(case, "cuda", dtype, torch.device("cpu"))
    assert {row.name for row in rows} <= {"out", "max_logit", "lse"}
    assert all(row.ok for row in rows), rows


def test_windows_that_change_too_often_are_for_others() -> None:
    tensors = cast(draw(batch=1, length=3, heads=140, key_dim=2), BF16)
    many = tuple(1 + i % 2 for i in range(140))
    with pytest.raises(NotImplementedError, match=r"change up to 127 times .* got 139 times"):
        ls_attention(**tensors, window=many, impl="cuda")
    ls_attention(**tensors, window=many)
    fewer = {"window": tuple(1 + i // 2 % 2 for i in range(140))}
    assert_matches_definition(
        "ls_attention", tensors, fewer, impl="cuda", dtype=BF16, gradients=False
    )
