"""Choice of the implementation: an explicit one never falls back."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from attnvariants import _select, implementations
from attnvariants._select import (
    CUDA_FUNCTIONS,
    FORWARD_ONLY,
    FUNCTIONS,
    IMPLEMENTATIONS,
    TRITON_FUNCTIONS,
    forward_only,
    select,
)

CPU, F32 = torch.device("cpu"), torch.float32


def test_implementations_lists_everything_with_a_reason() -> None:
    table = implementations()
    assert tuple(table) == FUNCTIONS
    for rows in table.values():
        assert set(rows) == set(IMPLEMENTATIONS)
        assert rows["reference"].usable
        assert rows["eager"].usable
        assert all(row.reason for row in rows.values())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_auto_takes_the_fastest_that_serves_the_device(function: str) -> None:
    assert select(function, "auto", CPU, F32) == "eager"
    assert select(function, "reference", CPU, F32) == "reference"


@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_an_explicit_choice_that_cannot_serve_says_what_can(
    impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(NotImplementedError, match=rf"impl='{impl}'.*These can: 'eager'"):
        select("gated_sdpa", impl, CPU, F32)


@pytest.mark.parametrize("function", sorted(TRITON_FUNCTIONS))
def test_kernels_refuse_float64(function: str) -> None:
    assert select(function, "triton", CPU, F32) == "triton"
    with pytest.raises(NotImplementedError, match="takes float16, bfloat16 and float32 tensors"):
        select(function, "triton", CPU, torch.float64)


@pytest.mark.parametrize("function", sorted(TRITON_FUNCTIONS))
def test_kernels_without_a_device_say_how_to_run_them(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    entry = implementations()[function]["triton"]
    assert entry.usable == torch.cuda.is_available()
    assert entry.usable or "set TRITON_INTERPRET=1 before import" in entry.reason


@pytest.mark.parametrize("function", sorted(CUDA_FUNCTIONS))
def test_cuda_kernels_without_the_extension_say_how_to_build_it(function: str) -> None:
    if importlib.util.find_spec("attnvariants._C") is not None:
        pytest.skip("the extension is built")
    with pytest.raises(NotImplementedError, match=r"the extension is not built.*These can"):
        select(function, "cuda", CPU, F32)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("without", ["", "triton", "cuda"])
@pytest.mark.parametrize("gradient", [True, False])
def test_auto_on_a_device(
    gradient: bool, without: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole sequences go to Triton, which has a backward; CUDA C++ stands in where it can."""
    if function not in CUDA_FUNCTIONS:
        pytest.skip("no CUDA C++ kernel")
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(_select, "_obstacle", lambda _, impl, *__: "no" * (impl == without))
    x = torch.zeros(1, requires_grad=gradient)
    found = select(function, "auto", CPU, F32, forward_only(function, x, None))
    if function not in FORWARD_ONLY:
        assert found == ("triton" if without == "cuda" else "cuda")
    elif without == "triton":
        assert found == ("eager" if gradient else "cuda")
    else:
        assert found == "triton"


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("capability", "found"), [((7, 5), {"eager"}), ((8, 0), {"triton", "cuda"})]
)
def test_kernels_refuse_old_gpus(
    capability: tuple[int, int], found: set[str], function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_select, "_missing", lambda *_: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.delenv("TRITON_INTERPRET")
    device = torch.device("cuda", 0)
    assert select(function, "auto", device, F32) in found
    for impl in {"triton", "cuda"} - found:
        with pytest.raises(NotImplementedError, match=r"capability 8\.0 or newer, got 7\.5"):
            select(function, impl, device, F32)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_kernel_without_a_backward_refuses_a_gradient(function: str) -> None:
    x, y = torch.zeros(1, requires_grad=True), torch.zeros(1)
    assert list(forward_only(function, y, None, x)) == ["cuda"] * (function in FORWARD_ONLY)
    assert not forward_only(function, y, None)
    with torch.no_grad():
        assert not forward_only(function, x)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"impl must be one of 'auto', 'cuda'.*got 'flash'"):
        select("gated_sdpa", "flash", CPU, F32)
