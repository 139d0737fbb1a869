"""The ``torch.ops.attnvariants`` namespace, and the one way to register an operator in it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from attnvariants._checks import autocasting

_library = torch.library.Library("attnvariants", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an opaque operator: its schema, its implementation and its shape function.

    Operators carry no autograd formula: an ``autograd.Function`` on top of the forward and the
    backward operator does, which costs a third of the overhead of ``register_autograd``.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, _isolated(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnvariants::{name}", fake, lib=_library)


def declare(schema: str) -> None:
    """Defines an operator that the extension ``attnvariants._C`` implements for CUDA tensors.

    Only implementations behind a registered operator call it, so it needs no shape function.
    """
    _library.define(schema)


def call_reference(definition: Callable[..., Any], *tensors: Any, **options: Any) -> Any:
    """Calls a definition, which chooses its own precision, with autocast off."""
    device = tensors[0].device
    if not autocasting(device):
        return definition(*tensors, **options)
    with torch.autocast(device.type, enabled=False):
        return definition(*tensors, **options)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Marks the backward of an ``autograd.Function`` that has no derivative of its own.

    Torch's decorator of this name drops a dependence on the inputs without a word.
    """

    @functools.wraps(backward)
    def run(*args: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError(
                "attnvariants: gradients of gradients (create_graph=True) take impl='reference'"
            )
        return backward(*args)

    return run


def _isolated(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps autograd and autocast, which reach into operators, out of an implementation.

    Autograd does where an operator is called without its ``autograd.Function``, as the graphs of
    ``torch.export`` do. Such a call has no gradient, and torch says so in the backward. Kernels are
    launched on the current device, so that is the one of the tensors meanwhile.
    """

    @functools.wraps(implementation)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = args[0].device
        with torch.no_grad(), _current(device):
            if not autocasting(device):
                return implementation(*args, **kwargs)
            with torch.autocast(device.type, enabled=False):
                return implementation(*args, **kwargs)

    return run


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
