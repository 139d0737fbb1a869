"""The account of what the linear kernels move: it follows the launches, and it meets its limits."""

from __future__ import annotations

import pytest

from bench import account
from bench.__main__ import run


@pytest.mark.parametrize("shape", account.SHAPES)
def test_bytes_against_the_compulsory_ones(shape: tuple[int, int, int, int, int]) -> None:
    forward, backward = account.account(shape)
    assert 1 <= forward.moved / forward.compulsory <= 2
    both = (forward.moved + backward.moved) / (forward.compulsory + backward.compulsory)
    assert 1 <= both <= 2.5
    for found in (forward, backward):
        assert found.requested >= found.moved


def test_segments_where_heads_do_not_fill_the_device() -> None:
    filled, cut = (account.account(shape)[0].entries for shape in account.SHAPES)
    assert [entry.kernel for entry in filled] == ["linear_forward"]
    assert [entry.kernel for entry in cut] == ["linear_states", "linear_scan", "linear_forward"]
    assert all(entry.programs >= 64 for entry in (*filled, *cut))


def test_inputs_are_read_and_outputs_written_once() -> None:
    (entry,) = account.account((8, 4096, 4, 128, 256))[0].entries
    tokens = 8 * 4096 * 4
    assert entry.read == 2 * tokens * (3 * 128 + 256)
    assert entry.written == 2 * tokens * 256 + 4 * 8 * 4 * 128 * 256  # and the last states


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["speed", "--account"]) == 0
    out = capsys.readouterr().out
    assert "linear_backward_qk" in out
    assert "of the compulsory" in out
