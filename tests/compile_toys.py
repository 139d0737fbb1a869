"""Toy kernels, one for each rule of ``python -m bench compile``; run as a program it judges them.

A process of its own, because the tests run with Triton's interpreter and this needs the compiler.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.cases import Case
from bench.compile import compile_all
from bench.compile_cases import CompileCase
from bench.console import make_console
from bench.strict_json import to_json


@triton.jit
def toy_product(p_a, p_b, p_c, size, BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr):
    rows, cols, inner = tl.arange(0, BT), tl.arange(0, BS), tl.arange(0, BK)
    acc = tl.zeros([BT, BS], tl.float32)
    for first in range(0, size, BK):
        a = tl.load(p_a + rows[:, None] * size + first + inner[None, :])
        b = tl.load(p_b + (first + inner)[:, None] * size + cols[None, :])
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(p_c + rows[:, None] * size + cols[None, :], acc.to(p_c.dtype.element_ty))


@triton.jit
def toy_sum(p_a, p_c, BT: tl.constexpr):
    rows = tl.arange(0, BT)
    tl.store(p_c + rows, tl.load(p_a + rows) + 1)


@triton.jit
def toy_broken(p_a, BT: tl.constexpr):
    rows = tl.arange(0, BT)
    tl.store(p_a + rows, tl.load(p_a + rows)[:, None, None])


def _product(size: int, BT: int, BS: int, BK: int, warps: int, stages: int, dtype: Any) -> Any:
    x = torch.empty(size, size, dtype=dtype)
    options = {"num_warps": warps, "num_stages": stages}
    return toy_product[(1,)](x, x, x, size, BT, BS, BK, **options)


def launchers(case: Case, tensors: dict[str, Tensor]) -> dict[str, Any]:
    q = tensors["q"]
    calls = {
        "good": lambda: _product(512, 64, 64, 64, 4, 2, q.dtype),
        "other length": lambda: _product(256, 64, 64, 64, 4, 2, q.dtype),
        "spills": lambda: _product(512, 128, 64, 32, 1, 1, q.dtype),
        "too much shared memory": lambda: _product(512, 128, 128, 128, 8, 5, q.dtype),
        "no dot": lambda: toy_sum[(1,)](q, q, BT=16),
        "broken": lambda: toy_broken[(1,)](q, BT=16),
        "launcher raises": lambda: [][0],
        "crash": os.abort,
    }
    return {case.name: calls[case.name]}


def case(name: str, dtype: str = "bfloat16") -> CompileCase:
    return CompileCase(Case("gated_sdpa", name), dtype, launchers, {"toy_product": name})


CASES = [
    case("good"),
    case("other length"),  # the same binary as "good"
    case("good", "float32"),
    case("spills"),
    case("too much shared memory"),
    case("no dot"),
    case("broken"),
    case("launcher raises"),
    case("crash"),
]

if __name__ == "__main__":
    rows = compile_all(CASES, [int(arch) for arch in sys.argv[1:]], make_console())
    print(json.dumps(to_json(rows)))
