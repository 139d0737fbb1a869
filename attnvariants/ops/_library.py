"""The ``torch.ops.attnvariants`` namespace, and the one way to register an operator in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("attnvariants", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an opaque operator: its schema, its implementation and its shape function.

    Operators carry no autograd formula: an ``autograd.Function`` on top of the forward and the
    backward operator does, which costs a third of the overhead of ``register_autograd``.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnvariants::{name}", fake, lib=_library)
