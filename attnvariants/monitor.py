"""LogitMonitor: how large the attention logits of a model grow, per layer and head."""

from __future__ import annotations

from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnvariants.modules._common import AttentionLayer


class LogitMonitor:
    """Collects the largest logit of every attention layer and head while its block is active.

    ::

        with LogitMonitor(model) as monitor:
            for step, batch in enumerate(loader):
                loss(model(batch)).backward()
                ...
                if step % 10 == 0:
                    log(monitor.read())

    Layers ask their attention function for its maximum and fold it into a buffer on the device.
    That costs softmax layers no extra pass over the scores; linear layers have no scores and pay
    for a pass over all pairs. Outputs do not change. Nothing waits for the device before
    :meth:`read`. Micro-batches, sequences of any kind and the second pass of activation
    checkpointing are covered, because a maximum may be taken twice. A linear layer that continues
    from a cached state has no scores with earlier tokens: a step reports none, a longer
    continuation those among its own tokens.

    A compiled model is compiled once more when the block is first entered.

    Args:
        model: any module that contains attention layers of this package.

    Attributes:
        kinds: per module name, ``"softmax_logit"``: the largest visible ``scale * q.k``; or
            ``"linear_score"``: the largest unnormalised ``|phi(q).phi(k) * decay|`` (of relu
            DiagAttention, ``scale * q.k``). Never put the two on one axis without a label.
        head_groups: per module name, ``"local"`` or ``"global"`` for each head. A local head sees
            fewer pairs, so its maximum is lower by chance alone.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` has no attention layer of this package.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        named = model.named_modules()
        self._layers = {name: layer for name, layer in named if isinstance(layer, AttentionLayer)}
        if not self._layers:
            raise ValueError(
                f"model {type(model).__name__} contains no attention layer of attnvariants "
                f"(GatedAttention, LSAttention, DiagAttention, GatedLinearAttention, "
                f"NormLinearAttention)"
            )
        self._maxima: list[Tensor] = []
        self.kinds = {name: layer.logit_kind for name, layer in self._layers.items()}
        self.head_groups = {name: layer.head_groups for name, layer in self._layers.items()}

    def __enter__(self) -> LogitMonitor:
        """Starts watching, from -inf.

        Raises:
            RuntimeError: another monitor, or this one, already watches a layer.
        """
        for name, layer in self._layers.items():
            if layer._running_max is not None:
                raise RuntimeError(f"a LogitMonitor already watches the layer {name!r}")
        self._maxima = []
        with torch.inference_mode(False):
            for layer in self._layers.values():
                device = next(layer.parameters()).device
                maximum = torch.full(
                    (layer.num_heads,), -torch.inf, dtype=torch.float32, device=device
                )
                layer._running_max = maximum
                self._maxima.append(maximum)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stops watching; what was collected can still be read."""
        for layer in self._layers.values():
            layer._running_max = None

    @torch.no_grad()
    def read(self) -> dict[str, Tensor]:
        """The maxima since the last read, and starts anew.

        One transfer to the host for all layers. Where ``torch.distributed`` is initialised, the
        maximum over all ranks: one collective call, which every rank must join.

        Returns:
            Per module name, fp32 ``[H]`` on the CPU; ``-inf`` where nothing ran.

        Raises:
            RuntimeError: the monitor was never entered.
        """
        if not self._maxima:
            raise RuntimeError("call read() inside or after `with LogitMonitor(model)`")
        device = self._maxima[0].device
        packed = torch.cat([maximum.to(device) for maximum in self._maxima])
        for maximum in self._maxima:
            maximum.fill_(-torch.inf)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(packed, dist.ReduceOp.MAX)
        parts = packed.cpu().split([maximum.numel() for maximum in self._maxima])
        return dict(zip(self._layers, parts, strict=True))
