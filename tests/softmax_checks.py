"""Inputs for the tests of softmax attention, and properties that its functions share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from oracle import assert_matches_definition
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attnvariants

Inputs = dict[str, Tensor]
F64 = torch.float64
GATES = ("elementwise", "headwise", None)
ACTIVATIONS = ("sigmoid", "ns_sigmoid", "softplus")


def draw(
    *,
    batch: int = 2,
    length: int = 20,
    heads: int = 4,
    kv_heads: int | None = None,
    key_dim: int = 8,
    value_dim: int | None = None,
    keys: int | None = None,
    gate: str | None = None,
) -> Inputs:
    """Random float64 inputs; ``gate`` is "elementwise", "headwise" or ``None``."""
    kv_heads, keys, value_dim = kv_heads or heads, keys or length, value_dim or key_dim
    shapes = {
        "q": (batch, length, heads, key_dim),
        "k": (batch, keys, kv_heads, key_dim),
        "v": (batch, keys, kv_heads, value_dim),
    }
    if gate is not None:
        channels = (value_dim,) if gate == "elementwise" else ()
        shapes["gate"] = (batch, length, heads, *channels)
    return {name: torch.randn(shape, dtype=F64) for name, shape in shapes.items()}


def bounds(*lengths: int) -> Tensor:
    """``cu_seqlens`` of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Inputs:
    """Floating tensors in ``dtype``, others as they are."""
    return {n: x.to(dtype) if x.is_floating_point() else x for n, x in tensors.items()}


def cotangent(out: Tensor) -> Tensor:
    """The same for every dtype of ``out``: its values are exact in all of them."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(out.shape, generator=generator).bfloat16().to(out)


def results(
    function: str, tensors: Mapping[str, Tensor], *, autocast: bool = False, **options: Any
) -> Inputs:
    """The output and the gradient of every floating tensor, for a fixed cotangent."""
    leaves = {
        name: tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = getattr(attnvariants, function)(**leaves, **options)
    out = out[0] if isinstance(out, tuple) else out
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    found = torch.autograd.grad(out, [leaves[name] for name in names], cotangent(out))
    return {"out": out.detach(), **{f"d{n}": x for n, x in zip(names, found, strict=True)}}


def assert_same(actual: Inputs, expected: Inputs) -> None:
    """Equal but for rounding in the order of float64's."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def assert_identical(actual: Inputs, expected: Inputs) -> None:
    """Equal bit for bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def check_definition(
    function: str, tensors: Inputs, dtype: torch.dtype, impl: str = "eager", **options: Any
) -> None:
    """Outputs and gradients of ``impl`` against the definition.

    Half precision is held to the budget of the data, float64 to its last digits. In float32 the
    largest of a few roundings is a matter of luck, so there the budget is that of the root mean
    square.
    """
    if dtype in (torch.bfloat16, torch.float16):
        assert_matches_definition(function, tensors, options, impl=impl, dtype=dtype)
        return
    working = cast(tensors, dtype)
    exact = cast(working, F64)
    found = results(function, working, impl=impl, **options)
    truth = results(function, exact, impl="reference", **options)
    if dtype == F64:
        assert_same(found, truth)
        return
    plain = results(function, working, impl="reference", **options)
    for name, value in truth.items():
        error, plain_error = ((x[name] - value).norm() for x in (found, plain))
        budget = 2 * plain_error + torch.finfo(dtype).eps * value.norm()
        assert error <= budget, f"{name}: rms error {error / plain_error:.2f} x that of float32"


def check_operators(
    function: str, tensors: Inputs, names: set[str], impl: str = "eager", **options: Any
) -> None:
    """``opcheck`` of every operator in ``names``, with the arguments a call of ``function`` has."""
    seen: dict[str, tuple[Any, ...]] = {}

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            namespace, _, name = func._schema.name.partition("::")
            if namespace == "attnvariants":
                seen[name] = tuple(
                    arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args
                )
            return func(*args, **(kwargs or {}))

    with Spy():
        results(function, tensors, impl=impl, **options)
    assert set(seen) == names
    for name, arguments in seen.items():
        torch.library.opcheck(getattr(torch.ops.attnvariants, name).default, arguments)


def check_compile(
    function: str, make: Callable[[int], Inputs], impl: str = "eager", **options: Any
) -> None:
    """One graph without breaks, for two lengths, equal to the call that is not compiled."""
    public = getattr(attnvariants, function)
    compiled = torch.compile(public, fullgraph=True, backend="aot_eager")
    for length in (70, 40):
        tensors = make(length)
        leaves = {name: x.requires_grad_() for name, x in tensors.items() if x.is_floating_point()}
        gradients = []
        for call in (compiled, public):
            out = call(**tensors, impl=impl, **options)
            if isinstance(out, tuple):
                out = torch.cat([out[0].flatten(), out[1].lse.flatten()])
            gradients.append((out, torch.autograd.grad(out.square().sum(), leaves.values())))
        torch.testing.assert_close(*gradients)


def check_autocast(
    function: str,
    tensors: Inputs,
    impls: tuple[str, ...] = ("eager", "reference"),
    **options: Any,
) -> None:
    """As if the caller had cast the floating inputs, forward and backward, in both precisions."""
    single = {n: x.float() if x.is_floating_point() else x for n, x in tensors.items()}
    half = {n: x.bfloat16() if x.is_floating_point() else x for n, x in tensors.items()}
    for impl in impls:
        found = results(function, single, autocast=True, impl=impl, **options)
        wanted = results(function, half, impl=impl, **options)
        assert found["out"].dtype == torch.bfloat16
        assert found["dq"].dtype == torch.float32
        torch.testing.assert_close(found, wanted, check_dtype=False, rtol=0, atol=0)


def check_strides(function: str, tensors: Inputs, impl: str = "eager", **options: Any) -> None:
    """Any strides give the same as contiguous tensors, forward and backward."""
    moved = {}
    for name, tensor in tensors.items():
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan"))
        layout = wide.transpose(1, 2).contiguous().transpose(1, 2)  # [B, H, T, D] in memory
        moved[name] = layout[..., 1::2]
        moved[name].copy_(tensor)
        assert not moved[name].is_contiguous()
    found = results(function, moved, impl=impl, **options)
    assert_same(found, results(function, tensors, impl=impl, **options))


def check_documents(
    function: str, tensors: Inputs, lengths: list[int], impl: str, **options: Any
) -> None:
    """Packed sequences give what a loop over the documents gives."""
    packed = results(function, {**tensors, "cu_seqlens": bounds(*lengths)}, impl=impl, **options)
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    call = getattr(attnvariants, function)
    parts = []
    stop = 0
    for length in lengths:
        start, stop = stop, stop + length
        if length:
            document = {name: x[:, start:stop] for name, x in leaves.items()}
            parts.append(call(**document, impl="reference", **options))
    out = torch.cat(parts, dim=1)
    found = torch.autograd.grad(out, leaves.values(), cotangent(out))
    loop = {"out": out.detach(), **{f"d{n}": x for n, x in zip(leaves, found, strict=True)}}
    assert_same(packed, loop)
