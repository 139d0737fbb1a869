"""How a decode step shares out the slots of a cache among its programs."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from typing import NamedTuple

import triton
import triton.language as tl
from attnvariants.kernels._tiles import odd


class Run(NamedTuple):
    """Neighbouring KV heads of one capacity, whose slots are cut into equally many parts each.

    A work item is one part of one head; those of a run follow each other head by head. Runs go
    into the kernels as numbers, see :func:`odd`: a table on the device would have to outlive CUDA
    graphs.
    """

    head: int  # the first
    count: int
    parts: int  # per head
    slot: int  # the first of the run
    capacity: int  # slots per head


@functools.lru_cache(maxsize=256)
def share_out(
    capacities: tuple[int, ...], parallel: int, tile: int, resident: int
) -> tuple[Run, ...]:
    """Cuts the slots of every head into parts of about equal size, as many as keep a GPU busy.

    A part is a share of what its head holds when the step runs, which only the device knows.
    Programs start in the order of the runs: those with the longest parts first.

    Args:
        capacities: slots of each KV head.
        parallel: programs per work item.
        tile: slots of a tile.
        resident: programs that run at the same time.
    """
    tiles = Counter(triton.cdiv(capacity, tile) for capacity in capacities)
    size = _tiles_per_part(tiles, parallel, resident)
    found: list[tuple[float, Run]] = []
    head = slot = 0
    for capacity, group in itertools.groupby(capacities):
        count = len(list(group))
        total = triton.cdiv(capacity, tile)
        parts = triton.cdiv(total, size)
        found.append((total / parts, Run(*map(odd, (head, count, parts, slot, capacity)))))
        head += count
        slot += count * capacity
    return tuple(run for _, run in sorted(found, key=lambda entry: -entry[0]))


def _tiles_per_part(tiles: Counter[int], parallel: int, resident: int) -> int:
    """The size with the shortest schedule, where a part costs one tile more than it has."""

    def cost(size: int) -> int:
        programs = parallel * sum(heads * triton.cdiv(n, size) for n, heads in tiles.items())
        return int(triton.cdiv(programs, resident)) * (size + 1)

    longest = max(tiles)
    counts = range(1, min(longest, 2 * resident) + 1)  # of parts, in the longest head
    return min((triton.cdiv(longest, count) for count in counts), key=cost)


@triton.jit
def find_head(index, runs, OF_ITEM: tl.constexpr):
    """The KV head with this number, or that of the work item with this number.

    Returns the head, its first work item, its parts, its first slot and its capacity.
    """
    head = 0
    item = 0
    parts = 1
    slot = 0
    capacity = 1
    first = 0
    for n in tl.static_range(len(runs)):
        run = runs[n]
        count = run.count >> 1
        if OF_ITEM:
            nth = (index - first) // (run.parts >> 1)
            inside = (index >= first) & (nth < count)
        else:
            nth = index - (run.head >> 1)
            inside = (nth >= 0) & (nth < count)
        head = tl.where(inside, (run.head >> 1) + nth, head)
        item = tl.where(inside, first + nth * (run.parts >> 1), item)
        parts = tl.where(inside, run.parts >> 1, parts)
        slot = tl.where(inside, (run.slot >> 1) + nth * (run.capacity >> 1), slot)
        capacity = tl.where(inside, run.capacity >> 1, capacity)
        first += count * (run.parts >> 1)
    return head, item, parts, slot, capacity
