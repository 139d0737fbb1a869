"""Shared validation: every message says which argument, what came and what is accepted."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from attnvariants._types import Window

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256
UNLIMITED = -1  # a window of all keys, in the integer lists that operators take


class Shapes:
    """Binds the letters of shape strings to sizes, tensor by tensor.

    ``Shapes("gated_sdpa").bind("q", q, "B T H K")`` remembers the four sizes; a later
    ``bind("k", k, "B S Hkv K")`` must agree on ``B`` and ``K`` and adds ``S`` and ``Hkv``.
    """

    def __init__(self, function: str) -> None:
        self.function = function
        self.sizes: dict[str, int] = {}

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]

    def bind(self, name: str, tensor: Tensor, *specs: str) -> str:
        """Checks ``tensor`` against the first of ``specs`` with its rank and returns that one."""
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{self.function}: {name} must be a tensor {self._describe(specs)}, "
                f"got {type(tensor).__name__}"
            )
        for spec in specs:
            letters = spec.split()
            if len(letters) != tensor.dim():
                continue
            found = dict(zip(letters, tensor.shape, strict=True))
            if any(self.sizes.get(letter, size) != size for letter, size in found.items()):
                break
            self.sizes |= found
            return spec
        raise ValueError(self._mismatch(name, tensor, specs))

    def _mismatch(self, name: str, tensor: Tensor, specs: Sequence[str]) -> str:
        return (
            f"{self.function}: {name} has shape {tuple(tensor.shape)}, "
            f"expected {self._describe(specs)}"
        )

    def _describe(self, specs: Sequence[str]) -> str:
        def one(spec: str) -> str:
            return ", ".join(
                f"{letter}={self.sizes[letter]}" if letter in self.sizes else letter
                for letter in spec.split()
            )

        return " or ".join(f"[{one(spec)}]" for spec in specs)

    def at_least_one(self, *letters: str) -> None:
        """Refuses empty dimensions."""
        for letter in letters:
            if self.sizes[letter] < 1:
                raise ValueError(
                    f"{self.function}: dimension {letter} must be at least 1, "
                    f"got {self.sizes[letter]}"
                )

    def head_dims(self) -> None:
        """Refuses key and value head dims outside 1..256."""
        for letter, owner in (("K", "q and k"), ("V", "v")):
            if not 1 <= self.sizes[letter] <= MAX_HEAD_DIM:
                raise ValueError(
                    f"{self.function}: the head dim of {owner} must be between 1 and "
                    f"{MAX_HEAD_DIM}, got {self.sizes[letter]}"
                )

    def head_ratio(self) -> None:
        """Requires the query heads to be a multiple of the key/value heads."""
        heads, kv_heads = self.sizes["H"], self.sizes["Hkv"]
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"{self.function}: the {heads} heads of q must be a multiple of the "
                f"{kv_heads} heads of k and v"
            )


def same_dtype(function: str, **tensors: Tensor) -> torch.dtype:
    """Requires one floating dtype for all ``tensors`` and returns it."""
    found = {name: tensor.dtype for name, tensor in tensors.items()}
    first = next(iter(found.values()))
    if first not in FLOAT_DTYPES:
        accepted = ", ".join(_short(dtype) for dtype in FLOAT_DTYPES)
        name = next(iter(found))
        raise TypeError(f"{function}: {name} has dtype {_short(first)}, expected {accepted}")
    if any(dtype != first for dtype in found.values()):
        listing = ", ".join(f"{name} {_short(dtype)}" for name, dtype in found.items())
        raise ValueError(f"{function}: {', '.join(found)} must share one dtype, got {listing}")
    return first


def dtype_among(function: str, name: str, tensor: Tensor, accepted: Iterable[torch.dtype]) -> None:
    """Requires the dtype of ``tensor`` to be one of ``accepted``."""
    accepted = tuple(dict.fromkeys(accepted))
    if tensor.dtype not in accepted:
        raise ValueError(
            f"{function}: {name} has dtype {_short(tensor.dtype)}, "
            f"expected {' or '.join(_short(dtype) for dtype in accepted)}"
        )


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and statistics: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def same_device(function: str, **tensors: Tensor | None) -> None:
    """Requires one device for all ``tensors`` that are given."""
    found = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(found.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in found.items())
        raise ValueError(f"{function}: all tensors must be on one device, got {listing}")


def writable(function: str, name: str, tensor: Tensor) -> None:
    """Refuses a tensor to be updated in place whose entries share memory (``expand``)."""
    if any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        raise ValueError(
            f"{function}: {name} is updated in place and must not be expanded, "
            f"got strides {tensor.stride()}"
        )


def choice(function: str, name: str, value: object, options: Sequence[object]) -> None:
    """Requires ``value`` to be one of ``options``."""
    if value not in options:
        listing = ", ".join(repr(option) for option in options)
        raise ValueError(f"{function}: {name} must be one of {listing}, got {value!r}")


def flag(function: str, name: str, value: object) -> None:
    """Requires a bool."""
    if not isinstance(value, bool):
        raise TypeError(
            f"{function}: {name} must be True or False, got {value!r} of type "
            f"{type(value).__name__}"
        )


def positive_int(function: str, name: str, value: object) -> None:
    """Requires an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{function}: {name} must be an int, got {value!r} of type {type(value).__name__}"
        )
    if value < 1:
        raise ValueError(f"{function}: {name} must be at least 1, got {value}")


def head_dim(function: str, name: str, value: object) -> None:
    """Requires an int from 1 to the largest head dim."""
    positive_int(function, name, value)
    if isinstance(value, int) and value > MAX_HEAD_DIM:
        raise ValueError(f"{function}: {name} must be at most {MAX_HEAD_DIM}, got {value}")


def dtype_option(
    function: str, name: str, value: object, accepted: Sequence[torch.dtype] = FLOAT_DTYPES
) -> None:
    """Requires a dtype that is one of ``accepted``."""
    listing = ", ".join(_short(dtype) for dtype in accepted)
    if not isinstance(value, torch.dtype):
        raise TypeError(
            f"{function}: {name} must be a torch.dtype ({listing}), got {value!r} of type "
            f"{type(value).__name__}"
        )
    if value not in accepted:
        raise ValueError(f"{function}: {name} must be one of {listing}, got {_short(value)}")


def recording() -> bool:
    """Whether ``torch.compile`` or a CUDA graph records this call, to repeat it without checks."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def scale(function: str, name: str, value: float | None, default: float) -> float:
    """Requires a finite number, or takes ``default`` for ``None``."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{function}: {name} must be a number or None, got {value!r} of type "
            f"{type(value).__name__}"
        )
    if not -float("inf") < value < float("inf"):
        raise ValueError(f"{function}: {name} must be finite, got {value!r}")
    return float(value)


def windows(function: str, window: Window, kv_heads: int) -> list[int]:
    """Turns ``window`` into one integer per KV head, ``UNLIMITED`` for all keys."""
    if window is None or isinstance(window, int):
        entries: list[int | None] = [window] * kv_heads
    elif isinstance(window, Sequence) and not isinstance(window, str):
        entries = list(window)
    else:
        raise TypeError(
            f"{function}: window must be None, an int, or one int or None per KV head, "
            f"got {window!r} of type {type(window).__name__}"
        )
    if len(entries) != kv_heads:
        raise ValueError(
            f"{function}: window has {len(entries)} entries, expected one per KV head ({kv_heads})"
        )
    for entry in entries:
        if entry is None:
            continue
        if isinstance(entry, bool) or not isinstance(entry, int):
            raise TypeError(
                f"{function}: window takes ints and None, got {entry!r} of type "
                f"{type(entry).__name__}"
            )
        if entry < 1:
            raise ValueError(
                f"{function}: window counts the visible keys including the query's own and must "
                f"be at least 1, got {entry}"
            )
    return [UNLIMITED if entry is None else entry for entry in entries]


def cu_seqlens(function: str, cu: Tensor | None, batch: int, length: int) -> None:
    """Checks ``cu_seqlens`` of ``length`` packed tokens.

    Its values are checked where reading them costs nothing: on the CPU, outside of recording.
    """
    if cu is None:
        return
    if not isinstance(cu, Tensor):
        raise TypeError(
            f"{function}: cu_seqlens must be an int32 tensor [N+1], got {type(cu).__name__}"
        )
    if cu.dtype != torch.int32:
        raise TypeError(f"{function}: cu_seqlens has dtype {_short(cu.dtype)}, expected int32")
    if cu.dim() != 1 or cu.numel() < 2:
        raise ValueError(
            f"{function}: cu_seqlens has shape {tuple(cu.shape)}, expected [N+1] with N >= 1"
        )
    if batch != 1:
        raise ValueError(
            f"{function}: packed sequences (cu_seqlens) take a batch of 1, got {batch}"
        )
    if cu.device.type == "cpu" and type(cu) is Tensor and not recording():
        sequence_bounds(function, cu, length)


def sequence_bounds(function: str, cu: Tensor, length: int) -> list[int]:
    """Reads ``cu_seqlens`` to the host and checks its values against the packed ``length``."""
    bounds: list[int] = cu.tolist()
    if bounds[0] != 0 or bounds[-1] != length:
        raise ValueError(
            f"{function}: cu_seqlens must start at 0 and end at the packed length {length}, "
            f"got {bounds[0]} and {bounds[-1]}"
        )
    if any(end < start for start, end in itertools.pairwise(bounds)):
        raise ValueError(f"{function}: cu_seqlens must not decrease, got {bounds}")
    return bounds


def autocasting(device: torch.device) -> bool:
    """Whether autocast is on for ``device``; there is none for tensors without storage."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """Casts float32, bf16 and fp16 tensors to ``dtype`` where autocast is on.

    ``None`` is the autocast dtype.
    """
    device = next(tensor.device for tensor in tensors if isinstance(tensor, Tensor))
    if not autocasting(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device.type) if dtype is None else dtype
    return [
        tensor.to(dtype)
        if isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    ]


def autocast_decay(g: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Log-decays are not cast by autocast; another half precision than ``dtype`` is widened."""
    halves = (torch.float16, torch.bfloat16)
    if isinstance(g, Tensor) and g.dtype in halves and g.dtype != dtype and autocasting(g.device):
        return g.float()
    return g


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
