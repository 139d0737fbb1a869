"""What runs CUDA threads as fibers: it computes as a device does, and betrays wrong kernels."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_build import EMULATION, compile_for_cpu
from torch import Tensor


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    path = tmp_path_factory.mktemp("cuda") / "example.so"
    compile_for_cpu([EMULATION / "example.cu", EMULATION / "controls.cpp"], path, "-shared")
    return path


def _pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _sum(code: ctypes.CDLL, x: Tensor, barrier: bool, order: int) -> Tensor:
    out = torch.empty_like(x)
    code.cuda_on_cpu_order(order)
    code.run_sum(*x.shape, _pointer(x), _pointer(out), barrier)
    return out


def test_barriers_and_dynamic_shared_memory(library: Path) -> None:
    code, x = ctypes.CDLL(str(library)), torch.arange(3 * 70.0).view(3, 70)
    for order in range(4):
        assert torch.equal(_sum(code, x, True, order), x.sum(1, keepdim=True).expand(3, 70))


@pytest.mark.parametrize("order", range(4))
def test_a_missing_barrier_shows(library: Path, order: int) -> None:
    """Shared memory is NaN at first; a thread reads what others have not written."""
    found = _sum(ctypes.CDLL(str(library)), torch.ones(2, 64), False, order)
    assert found.isnan().any()


def test_blocks_overlap(library: Path) -> None:
    """A block that arrives before it has written is found out in some order, not in ascending."""
    code, x = ctypes.CDLL(str(library)), torch.ones(6, 64)
    for barrier in (True, False):
        right = []
        for order in range(40):
            parts, out = torch.full_like(x, torch.nan), torch.zeros(1)
            arrived = torch.zeros(1, dtype=torch.int32)
            code.cuda_on_cpu_order(order)
            code.run_sum_of_blocks(
                *(6, 64, _pointer(x), _pointer(parts), _pointer(arrived), _pointer(out), barrier)
            )
            right.append(out.item() == x.sum())
        assert right[0]
        assert all(right) == barrier


def test_shuffles_votes_and_atomics(library: Path) -> None:
    out = torch.zeros(8 * 64 + 1, dtype=torch.int32)
    ctypes.CDLL(str(library)).run_warp_functions(_pointer(out))
    assert out[-1] == 64
    votes = sum(1 << lane for lane in range(0, 32, 3))
    for i, row in enumerate(out[:-1].view(64, 8).tolist()):
        warp, lane = 100 + i // 32 * 32, i % 32
        up, down = (lane - 3 if lane >= 3 else lane), (lane + 3 if lane < 29 else lane)
        moved = [warp + (lane ^ 5), warp + 7, warp + up, warp + down]
        assert row == [*moved, votes - (1 << 32) if votes >> 31 else votes, int(i >= 32), 1, 1]


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (0, "warps diverge at __syncthreads"),
        (1, "warps diverge at __syncthreads"),
        (2, "threads of a warp diverge at a barrier"),
    ],
)
def test_divergent_barriers_end_the_process(library: Path, which: int, message: str) -> None:
    code = f"import ctypes; ctypes.CDLL({str(library)!r}).run_wrong({which})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode < 0
    assert message in done.stderr
    assert "example.cu:" in done.stderr


def test_half_precision_rounds_as_torch_does(library: Path) -> None:
    powers = torch.randint(-30, 20, (20000,)).float().exp2()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 65519.0, 65520.0, 2.0**-25])
    x = torch.cat([torch.randn(20000) * powers, special])
    bf16, fp16 = (torch.empty(x.numel(), dtype=torch.int16) for _ in range(2))
    back = torch.empty(x.numel(), 2)
    ctypes.CDLL(str(library)).round_trip(
        *(_pointer(x), x.numel(), _pointer(bf16), _pointer(fp16), _pointer(back))
    )
    assert torch.equal(bf16, x.bfloat16().view(torch.int16))
    assert torch.equal(fp16, x.half().view(torch.int16))
    assert torch.equal(back, torch.stack([x.bfloat16().float(), x.half().float()], dim=1))
