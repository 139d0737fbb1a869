"""The CUDA C++ decode kernel for softmax attention, its threads run as fibers on the CPU.

These are the sources, the binding and the Python side that serve ``impl="cuda"``; only the
compiler, the device and the dispatch key are others.
"""

from __future__ import annotations

import copy
import ctypes
import itertools

import pytest
import torch
from decode_checks import F32, assert_decodes, cut, decode, draw, make_cache, spread, whole

from attnvariants import KVCache, _counters, attention_decode
from attnvariants._verify import within
from attnvariants.ops import _cuda_softmax_decode

HALF = (torch.bfloat16, torch.float16)


pytestmark = pytest.mark.usefixtures("controls")


@pytest.mark.parametrize(
    ("prompt", "dtype"), [(15, F32), (33, F32), (250, F32), (750, F32), *((750, x) for x in HALF)]
)
def test_rings_and_whole_caches_of_several_parts(prompt: int, dtype: torch.dtype) -> None:
    """The ring of 250 slots is filling, just full, or has been around twice."""
    tensors = draw(2, 770, 6, 3, key_dim=64, value_dim=40)
    assert_decodes(tensors, (250, None, 33), prompt, [1, 8, 1, 3], dtype, impl="cuda")


@pytest.mark.parametrize("prompt", [0, 3, 1200])
def test_more_parts_than_lanes(prompt: int, controls: ctypes.CDLL) -> None:
    """Of an empty cache all parts but the first are empty."""
    controls.cuda_on_cpu_processors(64)
    tensors = draw(1, 1210, 1, 1, key_dim=128, value_dim=128)
    assert_decodes(tensors, None, prompt, [2, 1], impl="cuda")


@pytest.mark.parametrize("dtype", [*HALF, F32])
@pytest.mark.parametrize(("heads", "kv_heads", "steps"), [(8, 1, [3, 8]), (3, 1, [1, 7])])
@pytest.mark.parametrize("activation", ["sigmoid", "ns_sigmoid", "softplus"])
def test_groups_of_heads_and_gates(
    heads: int, kv_heads: int, steps: list[int], activation: str, dtype: torch.dtype
) -> None:
    tensors = draw(2, 80, heads, kv_heads)
    tensors["gate"] = 5 * torch.randn(2, 80, heads, 7, dtype=torch.float64)
    assert_decodes(tensors, 40, 55, steps, dtype, impl="cuda", gate_activation=activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, F32])
def test_gate_per_head(dtype: torch.dtype) -> None:
    tensors = draw(2, 30, 4, 2)
    tensors["gate"] = torch.randn(2, 30, 4, dtype=torch.float64)
    assert_decodes(tensors, (None, 9), 20, [1, 3], dtype, impl="cuda")


def test_gate_in_float32_beside_bfloat16() -> None:
    tensors = {name: x.bfloat16() for name, x in draw(2, 30, 4, 2).items()}
    for shape in ((2, 30, 4, 7), (2, 30, 4)):
        wide = tensors | {"gate": torch.randn(shape)}
        out = decode(wide, 9, 20, [1, 3], impl="cuda")["out"]
        truth, plain = (
            whole({name: x.to(dtype) for name, x in wide.items()}, 9, 20, [1, 3])["out"]
            for dtype in (torch.float64, torch.bfloat16)
        )
        row = within("out", out, truth, float((plain - truth).abs().max()), torch.bfloat16)
        assert row.ok, row


@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(1, 1), (8, 8), (17, 256), (256, 16), (96, 80), (128, 128)]
)
@pytest.mark.parametrize("heads", [1, 3, 6])
@pytest.mark.parametrize("dtype", [*HALF, F32])
def test_head_dims(key_dim: int, value_dim: int, heads: int, dtype: torch.dtype) -> None:
    tensors = draw(1, 40, heads, 1, key_dim, value_dim)
    assert_decodes(tensors, 20, 30, [1, 2], dtype, impl="cuda")


@pytest.mark.parametrize("heads", [2, 8])
def test_order_of_threads_and_blocks_does_not_matter(heads: int, controls: ctypes.CDLL) -> None:
    """To the last bit: a race or a dependence between blocks would show."""
    tensors = {name: x.float() for name, x in draw(2, 300, heads, 2, 64, 64).items()}
    tensors["gate"] = torch.randn(2, 300, heads, 64)
    expected = None
    for order in range(6):
        controls.cuda_on_cpu_order(order)
        found = decode(tensors, (70, None), 280, [1, 5, 8], impl="cuda")
        expected = expected or found
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_nan_spreads() -> None:
    tensors = {name: x.float() for name, x in draw(1, 21, 2, 1).items()}
    tensors["k"][:, 3] = torch.nan
    found = decode(tensors, None, 20, [1], impl="cuda")
    assert all(found[name].isnan().all() for name in ("out", "lse", "max_logit"))


def test_counters_are_zero_between_steps() -> None:
    """As a replay of a CUDA graph needs them; every cache has its own."""
    tensors = {name: x.float() for name, x in draw(2, 30, 4, 2).items()}
    cache, other = (make_cache(tensors, (9, None)) for _ in range(2))
    arrivals = _counters._arrivals[cache.lengths]
    assert arrivals is not _counters._arrivals[other.lengths]
    for start in range(8, 12):
        attention_decode(**cut(tensors, start, start + 1), cache=cache, impl="cuda")
        assert _counters.counters(cache.lengths, 2 * 3, cache.lengths) is arrivals
        assert not arrivals.any()


def test_a_step_keeps_no_memory_of_its_own() -> None:
    """It may be that of a CUDA graph, which is used again; a copy of a cache has no counters."""
    tensors = {name: x.float() for name, x in draw(2, 30, 4, 2).items()}
    cache = make_cache(tensors, (9, None))
    twin = copy.deepcopy(cache)
    kept = len(_counters._arrivals)
    found = [
        attention_decode(**cut(tensors, 0, 8), cache=each, impl="cuda") for each in (cache, twin)
    ]
    assert torch.equal(*found)
    assert len(_counters._arrivals) == kept


def test_inputs_with_any_strides() -> None:
    tensors = {name: x.float() for name, x in draw(2, 40, 4, 2, 16, 24).items()}
    tensors["gate"] = torch.randn(2, 40, 4)
    plain = decode(tensors, (20, None), 30, [1, 8], impl="cuda")["out"]
    cache = make_cache(tensors, (20, None))
    cache.append(tensors["k"][:, :30], tensors["v"][:, :30])
    out = []
    for end in itertools.pairwise([30, 31, 39]):
        step = {name: spread(x) for name, x in cut(tensors, *end).items()}
        out.append(attention_decode(**step, cache=cache, impl="cuda"))
    assert torch.equal(torch.cat(out, dim=1), plain)


@pytest.mark.parametrize("name", ["q", "k", "v", "gate"])
def test_rows_off_a_multiple_of_16_bytes(name: str) -> None:
    """They are read an element at a time."""
    tensors = {name: x.bfloat16() for name, x in draw(2, 30, 4, 2, 16, 24).items()}
    tensors["gate"] = torch.randn(2, 30, 4, 24).bfloat16()
    plain = decode(tensors, (20, None), 20, [1, 8], impl="cuda")["out"]
    wide = torch.nn.functional.pad(tensors[name], (1, 2), value=torch.nan)
    tensors[name] = wide[..., 1:-2]
    assert torch.equal(decode(tensors, (20, None), 20, [1, 8], impl="cuda")["out"], plain)


@pytest.mark.parametrize(
    ("tiles", "parallel"),
    [([256] * 16, 1), ([32, 32, 256, 7], 2), ([4096], 1), ([512] * 8, 64), ([1, 1, 2], 1)],
)
def test_parts_are_shared_out_for_the_shortest_schedule(
    tiles: list[int], parallel: int, controls: ctypes.CDLL
) -> None:
    """A part costs one tile more than it has; every possible size is tried here."""
    resident = 396

    def cost(size: int) -> int:
        blocks = parallel * sum(-(-n // size) for n in tiles)
        return -(-blocks // resident) * (size + 1)

    controls.split_plan.restype = ctypes.c_int64
    array = (ctypes.c_int64 * len(tiles))(*tiles)
    size = controls.split_plan(
        array, len(tiles), ctypes.c_int64(parallel), ctypes.c_int64(resident)
    )
    assert cost(size) == min(cost(size) for size in range(1, max(tiles) + 1))


def test_no_rows() -> None:
    empty = torch.zeros(0, 1, 2, 4)
    lengths = torch.zeros(0, dtype=torch.int32)
    out, row_max, lse = _cuda_softmax_decode.attend(
        *(empty, empty, empty, None, torch.zeros(0, 6, 4), torch.zeros(0, 6, 4), lengths),
        *([3, 3], 0, 1.0, None),
    )
    assert out.shape == (0, 1, 2, 4)
    assert row_max.shape == lse.shape == (0, 1, 2)


def test_what_it_cannot_serve_is_for_others() -> None:
    x = torch.zeros(1, 1, 129, 2)
    many, spread = KVCache(1, 4, 129, 2, 2), KVCache(1, 4, 1, 2, 2)
    spread.k = torch.zeros(1, 2, 4).mT
    for cache, new, message in (
        (many, x, "takes up to 128 KV heads, got 129. These can: .*'eager'"),
        (spread, x[:, :, :1], "takes a cache with contiguous buffers. These can: .*'eager'"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            attention_decode(new, new, new, cache, impl="cuda")
        assert not cache.lengths.any()
        attention_decode(new, new, new, cache, impl="auto")
        assert cache.lengths.all()
