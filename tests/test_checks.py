"""Shared validation: which argument, what came, what is accepted."""

from __future__ import annotations

import pytest
import torch

from attnvariants import _checks


def test_shapes_bind_letters_and_name_the_mismatch() -> None:
    shapes = _checks.Shapes("f")
    shapes.bind("q", torch.zeros(2, 5, 4, 8), "B T H K")
    shapes.bind("k", torch.zeros(2, 7, 2, 8), "B S Hkv K")
    assert (shapes["S"], shapes["Hkv"]) == (7, 2)
    with pytest.raises(
        ValueError, match=r"f: v has shape \(2, 6, 2, 8\), expected \[B=2, S=7, Hkv=2, V\]"
    ):
        shapes.bind("v", torch.zeros(2, 6, 2, 8), "B S Hkv V")
    with pytest.raises(ValueError, match=r"expected \[B=2, T=5, H=4, V\] or \[B=2, T=5, H=4\]"):
        _checks_with_v(shapes).bind("gate", torch.zeros(2, 5), "B T H V", "B T H")
    with pytest.raises(TypeError, match="q must be a tensor"):
        shapes.bind("q", [1.0], "B T H K")  # type: ignore[arg-type]


def _checks_with_v(shapes: _checks.Shapes) -> _checks.Shapes:
    shapes.sizes.pop("V", None)
    return shapes


def test_alternatives_are_told_apart_by_rank() -> None:
    shapes = _checks.Shapes("f")
    shapes.bind("v", torch.zeros(2, 5, 4, 8), "B T H V")
    assert shapes.bind("gate", torch.zeros(2, 5, 4), "B T H V", "B T H") == "B T H"


def test_dtypes() -> None:
    half, single = torch.zeros(1, dtype=torch.float16), torch.zeros(1)
    assert _checks.same_dtype("f", q=half, k=half) == torch.float16
    with pytest.raises(ValueError, match=r"q, k must share one dtype, got q float16, k float32"):
        _checks.same_dtype("f", q=half, k=single)
    with pytest.raises(TypeError, match="q has dtype int64, expected float16"):
        _checks.same_dtype("f", q=torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="gate has dtype float64, expected float16 or float32"):
        _checks.dtype_among("f", "gate", single.double(), (torch.float16, torch.float32))


def test_devices() -> None:
    with pytest.raises(ValueError, match="one device, got q on cpu, k on meta"):
        _checks.same_device("f", q=torch.zeros(1), k=torch.zeros(1, device="meta"), v=None)


@pytest.mark.parametrize(
    ("window", "error", "message"),
    [
        (0, ValueError, "must be at least 1, got 0"),
        ((4, 4, 4), ValueError, r"window has 3 entries, expected one per KV head \(2\)"),
        ((4, 1.5), TypeError, "got 1.5 of type float"),
        ("4", TypeError, "got '4' of type str"),
        (True, TypeError, "got True of type bool"),
    ],
)
def test_windows_refuse(window: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _checks.windows("f", window, 2)  # type: ignore[arg-type]


def test_windows_accept() -> None:
    assert _checks.windows("f", None, 2) == [-1, -1]
    assert _checks.windows("f", 3, 2) == [3, 3]
    assert _checks.windows("f", [None, 3], 2) == [-1, 3]


@pytest.mark.parametrize(
    ("cu", "batch", "error", "message"),
    [
        ([0, 4], 1, TypeError, "must be an int32 tensor"),
        (torch.tensor([0, 4]), 1, TypeError, "dtype int64, expected int32"),
        (torch.tensor([0], dtype=torch.int32), 1, ValueError, r"expected \[N\+1\]"),
        (torch.tensor([0, 4], dtype=torch.int32), 2, ValueError, "batch of 1, got 2"),
    ],
)
def test_cu_seqlens_refused(cu: object, batch: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _checks.cu_seqlens("f", cu, batch, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 4], "start at 0"),
        ([0, 3], "end at the packed length 4"),
        ([0, 3, 2, 4], "must not decrease"),
    ],
)
def test_cu_seqlens_values(values: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _checks.sequence_bounds("f", torch.tensor(values, dtype=torch.int32), 4)
    assert _checks.sequence_bounds("f", torch.tensor([0, 2, 2, 4], dtype=torch.int32), 4) == [
        0,
        2,
        2,
        4,
    ]


def test_scalars() -> None:
    assert _checks.scale("f", "scale", None, 0.5) == 0.5
    assert _checks.scale("f", "scale", 2, 0.5) == 2.0
    with pytest.raises(ValueError, match="must be finite, got nan"):
        _checks.scale("f", "scale", float("nan"), 0.5)
    with pytest.raises(TypeError, match="must be a number or None, got '1'"):
        _checks.scale("f", "scale", "1", 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="causal must be True or False, got 1"):
        _checks.flag("f", "causal", 1)
    with pytest.raises(ValueError, match="norm must be one of 'model', 'head', None, got 'x'"):
        _checks.choice("f", "norm", "x", ("model", "head", None))
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        _checks.positive_int("f", "block_size", 0)


def test_autocast_casts_only_where_it_is_on() -> None:
    x, index = torch.zeros(2), torch.zeros(2, dtype=torch.int32)
    assert _checks.autocast(x, None, index)[0] is x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, none, kept, double = _checks.autocast(x, None, index, x.double())
    assert a is not None
    assert a.dtype == torch.bfloat16
    assert none is None
    assert kept is index
    assert double is not None
    assert double.dtype == torch.float64
