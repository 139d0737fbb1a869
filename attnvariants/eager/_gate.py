"""Output gates and their logarithmic derivatives, in the dtype of their argument."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(activation: str, logits: Tensor) -> Tensor:
    """``act(L)``."""
    if activation == "sigmoid":
        return logits.sigmoid()
    if activation == "ns_sigmoid":
        return 0.5 + 0.5 * logits.sigmoid()
    return _softplus(logits)


def log_derivative(activation: str, logits: Tensor) -> Tensor:
    """``(log act)'(L)``, written with ``sigmoid(-L)``: ``1 - sigmoid(L)`` is 0 for an open gate."""
    if activation == "sigmoid":
        return (-logits).sigmoid()
    opening = logits.sigmoid()
    if activation == "ns_sigmoid":
        return opening * (-logits).sigmoid() / (1 + opening)
    value = _softplus(logits)
    return torch.where(value == 0, 0.0, opening / value)


def _softplus(logits: Tensor) -> Tensor:
    return -F.logsigmoid(-logits)  # F.softplus gives up its accuracy above 20
