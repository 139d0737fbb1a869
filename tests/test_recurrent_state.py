"""The state of linear attention between calls."""

from __future__ import annotations

import pytest
import torch

from attnvariants import RecurrentState


def test_starts_empty() -> None:
    state = RecurrentState(2, 3, 4, 5)
    assert state.state.shape == (2, 3, 4, 5)
    assert state.state.dtype == state.dtype == torch.float32
    assert not state.state.any()
    assert state.lengths.dtype == torch.int32
    assert state.lengths.tolist() == [0, 0]
    assert state.max_filled == 0
    assert state.device == torch.device("cpu")
    assert (state.batch_size, state.num_heads, state.key_dim, state.value_dim) == (2, 3, 4, 5)
    assert state.nbytes == 2 * 3 * 4 * 5 * 4 + 2 * 4


def test_float64() -> None:
    assert RecurrentState(1, 1, 2, 2, dtype=torch.float64).state.dtype == torch.float64


def test_bf16_takes_float32_rounded() -> None:
    state = RecurrentState(2, 3, 4, 5, dtype=torch.bfloat16)
    new = torch.randn(2, 3, 4, 5)
    state.update(new, 7)
    assert torch.equal(state.state, new.bfloat16())
    assert state.nbytes == 2 * 3 * 4 * 5 * 2 + 2 * 4


def test_update_copies_in_place() -> None:
    state = RecurrentState(2, 3, 4, 5)
    address = state.state.data_ptr()
    new = torch.randn(2, 3, 4, 5, requires_grad=True)
    state.update(new, 7)
    assert state.state.data_ptr() == address
    assert torch.equal(state.state, new)
    assert not state.state.requires_grad
    assert state.lengths.tolist() == [7, 7]
    state.update(new, 9, torch.tensor([0, 2, 9], dtype=torch.int32))
    assert state.lengths.tolist() == [9, 14]
    assert state.max_filled == 16  # an upper bound, known without asking the device


def test_reset_forgets_everything_in_place() -> None:
    state = RecurrentState(2, 3, 4, 5)
    address = state.state.data_ptr()
    state.update(torch.full((2, 3, 4, 5), torch.nan), 7)
    state.reset()
    assert state.state.data_ptr() == address
    assert not state.state.any()
    assert state.lengths.tolist() == [0, 0]
    assert state.max_filled == 0


def test_update_compiles() -> None:
    state = RecurrentState(2, 3, 4, 5)
    update = torch.compile(
        lambda state, new: state.update(new, 3), fullgraph=True, backend="aot_eager"
    )
    for _ in range(3):
        new = torch.randn(2, 3, 4, 5)
        update(state, new)
    assert torch.equal(state.state, new)
    assert state.lengths.tolist() == [9, 9]
    assert state.max_filled >= 9


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "RecurrentState: batch_size must be at least 1"),
        ({"num_heads": 1.5}, TypeError, "num_heads must be an int"),
        ({"key_dim": 300}, ValueError, "key_dim must be at most 256, got 300"),
        ({"value_dim": 0}, ValueError, "value_dim must be at least 1"),
        (
            {"dtype": torch.float16},
            ValueError,
            "dtype must be one of float32, float64, bfloat16, got",
        ),
        ({"dtype": "float32"}, TypeError, "dtype must be a torch.dtype"),
    ],
)
def test_constructor_errors(change: dict, error: type[Exception], message: str) -> None:
    sizes = {"batch_size": 2, "num_heads": 3, "key_dim": 4, "value_dim": 5}
    with pytest.raises(error, match=message):
        RecurrentState(**sizes | change)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3, 5, 4), 1), ValueError, r"state has shape .* expected \[B=2, H=3, K=4"),
        ((torch.ones(2, 3, 4, 5).double(), 1), ValueError, "state has dtype float64, expected fl"),
        ((torch.ones(2, 3, 4, 5, device="meta"), 1), ValueError, "one device"),
        ((None, 1), TypeError, "state must be a tensor"),
        ((torch.ones(2, 3, 4, 5), 0), ValueError, "length must be at least 1, got 0"),
        ((torch.ones(2, 3, 4, 5), 1.0), TypeError, "length must be an int"),
        (
            (torch.ones(2, 3, 4, 5), 1, torch.tensor([0, 1], dtype=torch.int32)),
            *(ValueError, "cu_seqlens has 2 entries, expected one per row and a last one"),
        ),
        ((torch.ones(2, 3, 4, 5), 1, torch.tensor([0, 1, 1])), TypeError, "cu_seqlens has dtype"),
    ],
)
def test_update_errors(arguments: tuple, error: type[Exception], message: str) -> None:
    state = RecurrentState(2, 3, 4, 5)
    with pytest.raises(error, match=message):
        state.update(*arguments)
    assert not state.state.any()
    assert state.lengths.tolist() == [0, 0]
