"""Tiles for the tensor cores, csrc/tiles.cuh: fragments as the PTX ISA has them, and products."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from cuda_build import EMULATION, compile_for_cpu
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = 32


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    path = tmp_path_factory.mktemp("cuda") / "tiles.so"
    compile_for_cpu([EMULATION / "tiles.cu", EMULATION / "controls.cpp"], path, "-shared")
    library = ctypes.CDLL(str(path))
    library.cuda_on_cpu_order(1)
    return library


def _pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _fragments(matrix: Tensor, places: list[list[tuple[int, int]]]) -> Tensor:
    """The registers of 32 lanes, from the places of their elements in a matrix."""
    return torch.stack([torch.stack([matrix[place] for place in lane]) for lane in places])


def _places_of_ptx(depth: int) -> tuple[list[list[tuple[int, int]]], ...]:
    """Where elements a_i, b_i and c_i of every lane lie: PTX ISA, m16n8k16 and m16n8k8 (TF32)."""
    a, b, c = [], [], []
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        if depth == 16:
            a.append(
                [
                    (
                        group if i < 2 or 4 <= i < 6 else group + 8,
                        thread * 2 + (i & 1) + (8 if i >= 4 else 0),
                    )
                    for i in range(8)
                ]
            )
            b.append([(thread * 2 + (i & 1) + (8 if i >= 2 else 0), group) for i in range(4)])
        else:
            a.append([(group + 8 * (i in (1, 3)), thread + 4 * (i in (2, 3))) for i in range(4)])
            b.append([(thread + 4 * i, group) for i in range(2)])
        c.append([(group + 8 * (i >= 2), thread * 2 + (i & 1)) for i in range(4)])
    return a, b, c


@pytest.mark.parametrize("dtype", range(3), ids=["tf32", "f16", "bf16"])
def test_fragments_lie_as_the_ptx_isa_says(dtype: int, code: ctypes.CDLL) -> None:
    depth = 8 if dtype == 0 else 16
    a, b, c = (torch.randn(size).bfloat16().float() for size in ((16, depth), (depth, 8), (16, 8)))
    places = _places_of_ptx(depth)
    left, right, acc = (_fragments(x, at) for x, at in zip((a, b, c), places, strict=True))
    left, right = left.to(DTYPES[dtype]), right.to(DTYPES[dtype])
    code.run_fragments(dtype, _pointer(left), _pointer(right), _pointer(acc))
    expected = _fragments(c + a @ b, places[2])
    torch.testing.assert_close(acc, expected, rtol=1e-6, atol=1e-6)


def test_sums_are_cut_off(code: ctypes.CDLL) -> None:
    """As tensor cores do, so that what relies on rounding to nearest shows."""
    left, right = (torch.ones(32, n, dtype=torch.bfloat16) for n in (8, 4))
    for start, end in ((2.0**24 - 1, 2.0**24 + 14), (-(2.0**24) - 30, -(2.0**24) - 14)):
        acc = torch.full((32, 4), start)
        code.run_fragments(2, _pointer(left), _pointer(right), _pointer(acc))
        assert (acc == end).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_from_shared_memory(transposed: bool, code: ctypes.CDLL) -> None:
    """PTX ISA, ldmatrix: lane i addresses row i % 8 of matrix i // 8."""
    x = torch.arange(4 * 64, dtype=torch.int16).view(4, 8, 8)
    out = torch.zeros(32, 4, 2, dtype=torch.int16)
    code.run_matrices(_pointer(x), _pointer(out), transposed)
    for lane in range(32):
        for m in range(4):
            matrix = x[m].T if transposed else x[m]
            pair = matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
            assert out[lane, m].tolist() == pair.tolist()


def test_copies_arrive_when_their_group_is_waited_for(code: ctypes.CDLL) -> None:
    x = torch.randn(32, 3, 4)
    out = torch.empty_like(x)
    code.run_copies(_pointer(x), _pointer(out))
    assert torch.equal(out[:, 0], x[:, 0])
    assert not out[:, 1].any()
    assert out[:, 2].isnan().all()


def test_a_thread_that_returns_before_its_copies_ends_the_process(code: ctypes.CDLL) -> None:
    call = "x = (ctypes.c_char * 64)(); y = ctypes.addressof(x) + 15 & ~15"
    call = f"{call}; ctypes.CDLL({code._name!r}).run_copy_under_way(ctypes.c_void_p(y))"
    done = subprocess.run(
        [sys.executable, "-c", f"import ctypes; {call}"], capture_output=True, text=True
    )
    assert done.returncode < 0
    assert "returns before its copies have arrived" in done.stderr


def test_warps_keep_step_or_do_not(code: ctypes.CDLL) -> None:
    """So that a warp that relies on how far another is gets found out."""
    expected, right = torch.arange(32, 64, dtype=torch.int32), {True: 0, False: 0}
    for barrier in right:
        for order in range(1, 41):
            out = torch.zeros(32, dtype=torch.int32)
            code.cuda_on_cpu_order(order)
            code.run_skewed(_pointer(out), barrier)
            right[barrier] += torch.equal(out, expected)
    assert right[True] == 40
    assert 0 < right[False] < 40


@pytest.mark.parametrize("cols", [32, 64, 96, 256])
@pytest.mark.parametrize("dtype", [0, 1])
def test_rows_of_a_tile_lie_in_different_banks(dtype: int, cols: int, code: ctypes.CDLL) -> None:
    """16 bytes of the same columns of 8 rows, as ldmatrix reads them; fp32 has gaps of 16 bytes."""
    size = (4, 2)[dtype]
    offsets = torch.zeros(16, cols, dtype=torch.int32)
    code.run_offsets(dtype, cols, _pointer(offsets))
    pitch = cols * size + (16 if size == 4 else 0)
    whole = torch.arange(0, 16 * pitch, size).view(16, -1)[:, :cols]
    assert torch.equal(offsets.sort(dim=1).values.long(), whole)
    for first in range(0, cols, 16 // size):
        chunk = offsets[:, first : first + 16 // size]
        assert (chunk[:, :1] % 16 == 0).all()
        assert (chunk - chunk[:, :1] == torch.arange(0, 16, size)).all()
        for rows in (chunk[:8, 0], chunk[8:, 0]):
            assert len(set((rows // 16 % 8).tolist())) == 8


class _Products(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("a", "b", "c", "scores", "chained", "outer", "copy")]
        + [(name, ctypes.c_int) for name in ("rows", "depth", "cols")]
        + [(name, ctypes.c_int64) for name in ("a_stride", "b_stride", "c_stride")]
        + [(name, ctypes.c_bool) for name in ("aligned", "in_registers")]
    )


def _close(actual: Tensor, truth: Tensor, plain: Tensor) -> None:
    error, plain_error = ((x.double() - truth).norm() for x in (actual, plain))
    assert error <= 1.5 * plain_error + 1e-7 * truth.norm(), (error / plain_error, error)


@pytest.mark.parametrize(
    ("kind", "depth", "cols", "rows"),
    [(0, 64, 64, 32), (0, 48, 16, 32), (0, 24, 40, 17), (0, 17, 33, 5)]
    + [(1, 96, 32, 32), (1, 80, 8, 20), (1, 5, 7, 1), (2, 16, 128, 32), (2, 8, 72, 31)],
)
@pytest.mark.parametrize("dtype", range(3), ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("in_registers", [False, True])
def test_products(
    in_registers: bool, dtype: int, kind: int, depth: int, cols: int, rows: int, code: ctypes.CDLL
) -> None:
    """Beside NaN in front of, between and behind the rows, which must not be read."""
    wide_k, wide_n = ((64, 64), (96, 32), (16, 128))[kind]
    kinds: Any = {"dtype": DTYPES[dtype]}
    unit = 16 // torch.empty(0, **kinds).element_size()
    aligned = depth % unit == 0 and cols % unit == 0
    inputs, padded = [], []
    for size in (depth, depth, cols):
        wide = torch.full((rows + 2, size + unit), torch.nan, **kinds)
        wide[1:-1, :size] = torch.randn(rows, size)
        padded.append(wide)
        inputs.append(wide[1:-1, :size])
    scores, chained = torch.zeros(ROWS, ROWS), torch.zeros(ROWS, wide_n)
    outer, copy = torch.zeros(wide_k, wide_n), torch.full((rows + 1, cols), torch.nan, **kinds)
    outputs = map(_pointer, (scores, chained, outer, copy))
    strides = [x.stride(0) for x in padded]
    code.run_products(
        dtype,
        kind,
        ctypes.byref(
            _Products(*map(_pointer, inputs), *outputs, rows, depth, cols, *strides, aligned,
                      in_registers)
        ),
    )  # fmt: skip
    a, b, c = (x.double() for x in inputs)
    single = [x.float() for x in inputs]
    _close(scores[:rows, :rows], a @ b.T, single[0] @ single[1].T)
    assert not scores[rows:].any()
    assert not scores[:, rows:].any()
    rounded = scores[:rows, :rows].to(**kinds)
    _close(chained[:rows, :cols], rounded.double() @ c, rounded.float() @ single[2])
    _close(outer[:depth, :cols], a.T @ c, single[0].T @ single[2])
    assert not outer[depth:].any()
    assert torch.equal(copy[:rows], inputs[2])
    assert copy[rows:].isnan().all()
