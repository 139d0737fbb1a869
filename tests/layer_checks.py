"""Properties that every layer has, whatever it computes; called by the tests of each layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from oracle import assert_within_budget
from torch import Tensor, nn

Definition = Callable[[nn.Module, Tensor], Tensor]


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def matches_definition(layer: nn.Module, x: Tensor, definition: Definition) -> None:
    """Output and the gradient of the input and of every parameter, in float64."""
    leaves = [x.requires_grad_(), *layer.parameters()]
    actual, expected = layer(x), definition(layer, x)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(expected)
    found = torch.autograd.grad(actual, leaves, cotangent)
    wanted = torch.autograd.grad(expected, leaves, cotangent)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    for name, gradient, truth in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(gradient, truth, msg=lambda text, name=name: f"{name}: {text}")
        assert gradient.abs().max() > 0, f"{name} has no gradient"


def steps_equal_full(layer: nn.Module, x: Tensor, prompt: int, sizes: Sequence[int] = ()) -> None:
    """A prefill and steps of the given sizes, then of one token, against the whole sequence."""
    with torch.no_grad():
        full = layer(x)
        cache = layer.init_cache(x.shape[0], x.shape[1])
        ends = [prompt]
        for size in sizes:
            ends.append(ends[-1] + size)
        ends += range(ends[-1] + 1, x.shape[1] + 1)
        pieces = x.tensor_split(ends[:-1], dim=1)
        found = torch.cat([layer(piece, cache=cache) for piece in pieces], dim=1)
    torch.testing.assert_close(found, full)
    assert cache.lengths.tolist() == [x.shape[1]] * x.shape[0]


def ragged_steps_equal_full(
    layer: nn.Module, x: Tensor, prompts: Sequence[int], steps: int
) -> None:
    """Prompts of different lengths by padding mask, then steps; row by row against alone.

    Odd rows are padded on the left, even ones on the right.
    """
    longest = max(prompts)
    padded = torch.full((len(prompts), longest, x.shape[-1]), torch.nan, dtype=x.dtype)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, count in enumerate(prompts):
        mask[row, longest - count :] = row % 2 == 1
        mask[row, :count] |= row % 2 == 0
        padded[row, mask[row]] = x[row, :count]
    with torch.no_grad():
        cache = layer.init_cache(len(prompts), longest + steps)
        prefill = layer(padded, cache=cache, padding_mask=mask)
        assert cache.lengths.tolist() == list(prompts)
        assert torch.equal(prefill[~mask], torch.zeros_like(prefill[~mask]))
        found = [prefill[row, mask[row]] for row in range(len(prompts))]
        for step in range(steps):
            new = torch.stack([x[row, [count + step]] for row, count in enumerate(prompts)])
            y = layer(new, cache=cache)
            found = [torch.cat([old, row]) for old, row in zip(found, y, strict=True)]
        for row, count in enumerate(prompts):
            alone = layer(x[row : row + 1, : count + steps])[0]
            torch.testing.assert_close(found[row], alone)


def packed_equals_separate(layer: nn.Module, lengths: Sequence[int]) -> None:
    """Packed sequences against one call each, and a packed prefill against the steps after it."""
    x = tokens(1, sum(lengths) + len(lengths), layer.embed_dim)
    x, extra = x.split([sum(lengths), len(lengths)], dim=1)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    rows = x.split(list(lengths), dim=1)
    with torch.no_grad():
        found = layer(x, cu_seqlens=cu_seqlens)
        alone = [layer(row) for row in rows if row.shape[1]]
        torch.testing.assert_close(found, torch.cat(alone, dim=1))
        if not getattr(layer, "causal", True):
            return
        cache = layer.init_cache(len(lengths), max(lengths) + 1)
        torch.testing.assert_close(layer(x, cache=cache, cu_seqlens=cu_seqlens), found)
        last = layer(extra.transpose(0, 1), cache=cache)
        for row, new, y in zip(rows, extra[0], last, strict=True):
            torch.testing.assert_close(layer(torch.cat([row, new[None, None]], 1))[0, -1:], y)


def padding_changes_nothing(layer: nn.Module, x: Tensor) -> None:
    """A mask with padding anywhere: real tokens as if alone, padding 0, no gradient into it."""
    batch, length, _ = x.shape
    mask = torch.rand(batch, length) > 0.3
    mask[0] = False  # a row of padding only
    x = x.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    y = layer(x, padding_mask=mask)
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))
    for row in range(1, batch):
        real = x[row : row + 1, mask[row]]
        torch.testing.assert_close(y[row : row + 1, mask[row]], layer(real))
    y.square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[~mask], torch.zeros_like(x.grad[~mask]))
    assert (x.grad[mask] != 0).all(dim=-1).all()
    nothing = layer(x.detach(), padding_mask=torch.zeros_like(mask))
    assert torch.equal(nothing, torch.zeros_like(nothing))


def copies_are_equal(make: Callable[[], nn.Module], x: Tensor) -> None:
    """The state dict and ``deepcopy`` carry everything; ``reset_parameters`` draws it again."""
    layer, other = make(), make()
    with torch.no_grad():
        y = layer(x)
        assert not torch.equal(other(x), y)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), y)
        assert torch.equal(copy.deepcopy(layer)(x), y)
        torch.manual_seed(3)
        layer.reset_parameters()
        assert not torch.equal(layer(x), y)
        torch.manual_seed(3)
        other.reset_parameters()
        assert torch.equal(layer(x), other(x))


def half_precision_within_budget(layer: nn.Module, x: Tensor, definition: Definition) -> None:
    """A bf16 layer, the layer under autocast, and both with a cache, against float64."""
    assert next(layer.parameters()).dtype == x.dtype == torch.float32
    half, wide = (copy.deepcopy(layer).to(dtype) for dtype in (torch.bfloat16, torch.float64))
    with torch.no_grad():
        low = definition(half, x.bfloat16())
        truth = definition(wide, x.double())
        assert low.dtype == torch.bfloat16
        assert_within_budget(half(x.bfloat16()), truth, low, "bf16")
        assert_within_budget(_cached(half, x.bfloat16()), truth, low, "bf16 with a cache")
        with torch.autocast("cpu", torch.bfloat16):
            y, cached = layer(x), _cached(layer, x)
        assert y.dtype == cached.dtype == torch.bfloat16
        assert_within_budget(y, truth, low, "autocast")
        assert_within_budget(cached, truth, low, "autocast with a cache")
        single = definition(layer, x)
        assert_within_budget(layer(x), truth, single, "fp32")
        assert_within_budget(_cached(layer, x), truth, single, "fp32 with a cache")


def _cached(layer: nn.Module, x: Tensor) -> Tensor:
    if not getattr(layer, "causal", True):
        return layer(x)
    cache = layer.init_cache(x.shape[0], x.shape[1])
    middle = x.shape[1] // 2
    pieces = x.tensor_split([middle, middle + 3, *range(middle + 4, x.shape[1])], dim=1)
    return torch.cat([layer(piece, cache=cache) for piece in pieces], dim=1)


def autocast_backward_reaches_everything(layer: nn.Module, x: Tensor) -> None:
    """Under autocast gradients arrive in the parameters' own dtype."""
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameter.dtype
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0, name


def steps_compile(layer: nn.Module, x: Tensor) -> None:
    """A decode step is one graph too."""
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        cache = layer.init_cache(x.shape[0], x.shape[1])
        found = [layer(x[:, :-3], cache=cache)]
        found += [compiled(new, cache=cache) for new in x[:, -3:].split(1, dim=1)]
        torch.testing.assert_close(torch.cat(found, dim=1), layer(x))


def compiles(layer: nn.Module, x: Tensor, **options: Any) -> None:
    """One graph, forward and backward, with the results of the plain call."""
    torch._dynamo.reset()
    parameters = list(layer.parameters())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(x, **options), layer(x, **options)
    torch.testing.assert_close(actual, expected)
    found = torch.autograd.grad(actual.square().sum(), parameters)
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    torch.testing.assert_close(found, wanted)
