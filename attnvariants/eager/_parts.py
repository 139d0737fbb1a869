"""Splits of a call into dense problems: packed sequences by length, heads by mask."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from attnvariants._checks import UNLIMITED, sequence_bounds


def by_length(cu_seqlens: Tensor, length: int) -> list[Tensor]:
    """Token indices ``[n, L]`` of the packed sequences, one tensor per length ``L >= 1``."""
    bounds = sequence_bounds("softmax attention", cu_seqlens, length)
    starts: dict[int, list[int]] = {}
    for start, stop in itertools.pairwise(bounds):
        if stop > start:
            starts.setdefault(stop - start, []).append(start)
    device = cu_seqlens.device
    return [
        torch.tensor(firsts, device=device)[:, None] + torch.arange(size, device=device)
        for size, firsts in starts.items()
    ]


def by_mask(windows: list[int], causal: bool, keys: int) -> dict[tuple[bool, int], list[slice]]:
    """Runs of neighbouring KV heads by ``(causal, window)``.

    A head with a window is causal anyway; a window of all ``keys`` is no further limit.
    """
    runs: dict[tuple[bool, int], list[slice]] = {}
    for head, window in enumerate(windows):
        mask = (causal or window != UNLIMITED, window if window < keys else UNLIMITED)
        found = runs.setdefault(mask, [])
        if found and found[-1].stop == head:
            found[-1] = slice(found[-1].start, head + 1)
        else:
            found.append(slice(head, head + 1))
    return runs


def take_heads(x: Tensor, runs: list[slice], group: int = 1) -> Tensor:
    """The heads of ``runs`` of ``x`` ``[N, T, H, ...]``, ``group`` of them per KV head."""
    taken = [x[:, :, run.start * group : run.stop * group] for run in runs]
    return taken[0] if len(taken) == 1 else torch.cat(taken, dim=2)


def put_heads(target: Tensor, x: Tensor, runs: list[slice], group: int = 1) -> None:
    """Writes ``x`` to the heads that :func:`take_heads` takes."""
    first = 0
    for run in runs:
        count = (run.stop - run.start) * group
        target[:, :, run.start * group : run.stop * group] = x[:, :, first : first + count]
        first += count
