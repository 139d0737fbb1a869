"""Windows and their conversions."""

from __future__ import annotations

import pytest

from attnvariants import ls_window, window_from_flash


def test_window_from_flash_counts_the_own_key() -> None:
    assert window_from_flash(0) == 1
    assert window_from_flash(99) == 100
    assert window_from_flash(-1) is None


@pytest.mark.parametrize(("left", "error"), [(-2, ValueError), (1.0, TypeError), (True, TypeError)])
def test_window_from_flash_refuses(left: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="left must be"):
        window_from_flash(left)  # type: ignore[arg-type]


def test_ls_window_puts_local_heads_first() -> None:
    assert ls_window(4, 3, 16) == (16, 16, 16, None)
    assert ls_window(2, 0, 16) == (None, None)
    assert ls_window(2, 2, 1) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 0, 4), ValueError, "num_kv_heads must be at least 1, got 0"),
        ((4, 5, 4), ValueError, "num_local_heads must be between 0 and num_kv_heads=4, got 5"),
        ((4, -1, 4), ValueError, "num_local_heads"),
        ((4, 2, 0), ValueError, "local_window must be at least 1, got 0"),
        ((4.0, 2, 4), TypeError, "num_kv_heads must be an int, got 4.0 of type float"),
        ((4, 2, None), TypeError, "local_window must be an int"),
    ],
)
def test_ls_window_refuses(
    arguments: tuple[int, int, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ls_window(*arguments)
