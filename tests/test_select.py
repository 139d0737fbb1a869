"""Choice of the implementation: an explicit one never falls back."""

from __future__ import annotations

import pytest
import torch

from attnvariants import implementations
from attnvariants._select import FUNCTIONS, IMPLEMENTATIONS, select

CPU = torch.device("cpu")


def test_implementations_lists_everything_with_a_reason() -> None:
    table = implementations()
    assert tuple(table) == FUNCTIONS
    for rows in table.values():
        assert tuple(rows) == IMPLEMENTATIONS
        assert rows["reference"].usable
        assert rows["eager"].usable
        assert all(row.reason for row in rows.values())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_auto_takes_the_fastest_that_serves_the_device(function: str) -> None:
    assert select(function, "auto", CPU) == "eager"
    assert select(function, "reference", CPU) == "reference"


@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_an_explicit_choice_that_cannot_serve_says_what_can(impl: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"impl='{impl}'.*These can: 'eager'"):
        select("gated_sdpa", impl, CPU)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"impl must be one of 'auto', 'cuda'.*got 'flash'"):
        select("gated_sdpa", "flash", CPU)
