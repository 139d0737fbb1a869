"""Inputs for the tests of the linear attentions, and properties that both functions have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attnvariants

Inputs = dict[str, Tensor]
INF = float("inf")


def _resets(x: Tensor, strength: float) -> Tensor:
    return torch.where(torch.rand_like(x) < 0.05, -strength, F.logsigmoid(x) / 16)


SHAPE = (1, 2, 12, 10)  # B, H, K, V
LOG_DECAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "weak": lambda x: F.logsigmoid(x) / 16,
    "plain": F.logsigmoid,
    "strong": lambda x: 10 * F.logsigmoid(x),
    "very strong": lambda x: 100 * F.logsigmoid(x),
    "mixed": lambda x: F.logsigmoid(x) * torch.exp(3 * torch.randn_like(x[..., :1, :])),
    "resets": lambda x: _resets(x, 300.0),
    "hard resets": lambda x: _resets(x, 1e4),
    "infinite resets": lambda x: _resets(x, INF),
    "zero": torch.zeros_like,
}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def qkv(batch: int, length: int, heads: int, key_dim: int, value_dim: int) -> Inputs:
    return {
        "q": draw(batch, length, heads, key_dim),
        "k": draw(batch, length, heads, key_dim),
        "v": draw(batch, length, heads, value_dim),
    }


def log_decay(tensors: Mapping[str, Tensor], kind: str, strength: str) -> Tensor:
    """A log-decay that goes with q, k, v: per "channel", per "token" or "constant"."""
    batch, length, heads, key_dim = tensors["q"].shape
    shape = {
        "channel": (batch, length, heads, key_dim),
        "token": (batch, length, heads),
        "constant": (heads,),
    }[kind]
    x = draw(*shape) if kind != "constant" else draw(1, heads)
    return LOG_DECAYS[strength](x).view(shape)


def states(tensors: Mapping[str, Tensor], count: int) -> Tensor:
    return draw(count, *tensors["q"].shape[2:], tensors["v"].shape[-1])


def gated(
    length: int = 80,
    kind: str = "channel",
    strength: str = "plain",
    shape: tuple[int, int, int, int] = SHAPE,
) -> Inputs:
    """Inputs of ``gated_linear_attention`` with an initial state."""
    batch, heads, key_dim, value_dim = shape
    tensors = qkv(batch, length, heads, key_dim, value_dim)
    tensors["g"] = log_decay(tensors, kind, strength)
    tensors["initial_state"] = states(tensors, batch)
    return tensors


def normed(length: int = 80, shape: tuple[int, int, int, int] = SHAPE) -> Inputs:
    """Inputs of ``norm_linear_attention`` with an initial state."""
    tensors = qkv(shape[0], length, *shape[1:])
    tensors["initial_state"] = states(tensors, shape[0])
    return tensors


def single(tensors: Inputs) -> Inputs:
    """The same in float32."""
    return {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}


def bounds(*lengths: int) -> Tensor:
    """``cu_seqlens`` of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def run(function: str, tensors: Mapping[str, Tensor], **options: Any) -> Any:
    return getattr(attnvariants, function)(**tensors, **options)


def results(
    function: str, tensors: Mapping[str, Tensor], autocast: bool = False, **options: Any
) -> list[Tensor]:
    """Output, state and the gradients of every floating tensor, for fixed cotangents."""
    leaves = {
        name: tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, state = run(function, leaves, return_state=True, **options)
    generator = torch.Generator().manual_seed(7)
    cotangents = [
        torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x) for x in (out, state)
    ]
    inputs = [leaf for leaf in leaves.values() if leaf.requires_grad]
    found = torch.autograd.grad((out, state), inputs, cotangents, materialize_grads=True)
    return [out.detach(), state.detach(), *found]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Equal but for rounding in the order of float64's."""
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def check_gradients(function: str, tensors: Inputs, impl: str, **options: Any) -> None:
    """Analytic against numeric gradients, of the output and of the state."""
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    fixed = {name: tensor for name, tensor in tensors.items() if name not in names}

    def call(*values: Tensor) -> Any:
        given = dict(zip(names, values, strict=True))
        return run(function, {**given, **fixed}, impl=impl, return_state=True, **options)

    leaves = [tensors[name].detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def check_operators(function: str, tensors: Inputs, *, impl: str = "eager", **options: Any) -> None:
    """``opcheck`` of the forward and the backward operator, as a call of ``function`` uses them."""
    seen: dict[str, tuple[Any, ...]] = {}
    operators = torch.ops.attnvariants

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen[func._schema.name] = tuple(
                arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args
            )
            return func(*args, **(kwargs or {}))

    with Spy():
        results(function, tensors, impl=impl, **options)
    for name in ("linear_forward", "linear_backward"):
        torch.library.opcheck(getattr(operators, name).default, seen[f"attnvariants::{name}"])


def check_compile(
    function: str,
    make: Callable[[int], Inputs],
    *,
    impl: str = "eager",
    lengths: tuple[int, ...] = (70, 40),
    **options: Any,
) -> None:
    """One graph without breaks, for two lengths, equal to the call that is not compiled."""

    def step(**tensors: Tensor) -> tuple[Tensor, ...]:
        out, state, stats = run(
            function, tensors, impl=impl, return_state=True, return_stats=True, **options
        )
        return out, state, stats.max_logit

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for length in lengths:
        tensors = {name: x.requires_grad_() for name, x in make(length).items()}
        found, wanted = compiled(**tensors), step(**tensors)
        leaves = list(tensors.values())
        gradients = [
            torch.autograd.grad(out.square().sum() + state.square().sum(), leaves)
            for out, state, _ in (found, wanted)
        ]
        torch.testing.assert_close((found, gradients[0]), (wanted, gradients[1]))


def check_second_gradients(function: str, tensors: Inputs, **options: Any) -> None:
    """The definition has gradients of gradients; the fast implementation says that it has none."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = run(function, leaves, impl="eager", **options)
    with pytest.raises(NotImplementedError, match="impl='reference'"):
        torch.autograd.grad(out.sum(), leaves["q"], create_graph=True)
    out = run(function, leaves, impl="reference", **options)
    (gradient,) = torch.autograd.grad(out.sum(), leaves["q"], create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), leaves["k"])[0].isfinite().all()


def check_autocast(
    function: str,
    tensors: Inputs,
    *,
    impls: tuple[str, ...] = ("eager", "reference"),
    **options: Any,
) -> None:
    """As if q, k, v, gate and weight had been cast by the caller; nothing else is.

    But a decay in the other half precision, which no call takes, is widened.
    """
    single = {name: tensor.float() for name, tensor in tensors.items()}
    cast = ("q", "k", "v", "gate", "norm_weight")
    half = {name: x.bfloat16() if name in cast else x for name, x in single.items()}
    for impl in impls:
        found = results(function, single, autocast=True, impl=impl, **options)
        wanted = results(function, half, impl=impl, **options)
        assert found[0].dtype == torch.bfloat16
        assert found[1].dtype == torch.float32
        for actual, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(actual, expected, check_dtype=False, rtol=0, atol=0)
    rounded = {name: x.half() if name in ("g", "decay") else x for name, x in single.items()}
    wide = {name: x.float() for name, x in rounded.items()}
    for impl in impls:
        found = results(function, rounded, autocast=True, impl=impl, **options)[0]
        assert torch.equal(found, results(function, wide, autocast=True, impl=impl, **options)[0])


def check_checkpoint(function: str, tensors: Inputs, impl: str = "eager", **options: Any) -> None:
    def step(*values: Tensor) -> Any:
        given = dict(zip(tensors, values, strict=True))
        return run(function, given, impl=impl, **options)

    leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
    plain = torch.autograd.grad(step(*leaves).square().sum(), leaves)
    out = checkpoint(step, *leaves, use_reentrant=False)
    for found, wanted in zip(torch.autograd.grad(out.square().sum(), leaves), plain, strict=True):
        assert torch.equal(found, wanted)


def check_strides(function: str, tensors: Inputs, *, impl: str = "eager", **options: Any) -> None:
    """Any strides give the same as contiguous tensors, forward and backward."""

    def strided(tensor: Tensor) -> Tensor:
        wider = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"))
        wider[..., ::2] = tensor
        view = wider[..., ::2]
        if tensor.dim() > 2:  # also the layout [B, H, T, D]
            view = view.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
        assert not view.is_contiguous() or view.numel() == 1
        return view

    moved = {name: strided(tensor) for name, tensor in tensors.items()}
    expected = results(function, tensors, impl=impl, **options)
    assert_same(results(function, moved, impl=impl, **options), expected)


def check_subsets(function: str, tensors: Inputs, impl: str = "eager", **options: Any) -> None:
    """A gradient does not depend on which other inputs need one."""
    cotangent = torch.randn_like(run(function, tensors, impl=impl, **options))

    def gradients(names: list[str]) -> dict[str, Tensor]:
        leaves = {n: x.detach().requires_grad_(n in names) for n, x in tensors.items()}
        out = run(function, leaves, impl=impl, **options)
        found = torch.autograd.grad(out, [leaves[name] for name in names], cotangent)
        return dict(zip(names, found, strict=True))

    together = gradients(list(tensors))
    for name in tensors:
        torch.testing.assert_close(gradients([name])[name], together[name])
