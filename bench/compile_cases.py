"""The calls that ``python -m bench compile`` compiles, and what it accepts.

A family of kernels joins with a function that turns a case and its tensors into calls of the
launchers, and with its cases in :func:`compile_cases`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bench.cases import Case

Calls: TypeAlias = Mapping[str, Callable[[], Any]]  # by name, in the order in which they run


@dataclass(frozen=True)
class CompileCase:
    """One case in one dtype.

    ``launchers(case, tensors)`` gives the calls; it belongs to a module, so that it can travel to
    another process. In half precision every kernel has to use tensor cores, but those in
    ``without_dots``. ``quick``: part of the cases that reach every configuration.
    """

    case: Case
    dtype: str
    launchers: Callable[[Case, dict[str, Tensor]], Calls]
    without_dots: tuple[str, ...] = ()
    quick: bool = False

    @property
    def label(self) -> str:
        return self.case.name

    def calls(self, device: str) -> Calls:
        """What the case runs, on random tensors."""
        return self.launchers(self.case, self.case.tensors(getattr(torch, self.dtype), device))

    def needs_tensor_cores(self, kernel: str) -> bool:
        """Whether ``kernel`` would be slow without them; float32 is multiplied exactly instead."""
        return self.dtype in ("bfloat16", "float16") and kernel not in self.without_dots


@dataclass(frozen=True)
class AcceptedSpill:
    """A kernel that may spill up to ``stack`` bytes per thread on some chips, and why."""

    kernel: str
    archs: tuple[int, ...]
    stack: int
    reason: str
    case: str = ""  # part of the case's name

    def covers(self, kernel: str, arch: int, case: CompileCase) -> bool:
        return kernel == self.kernel and arch in self.archs and self.case in case.label


ACCEPTED: tuple[AcceptedSpill, ...] = ()


def compile_cases(*, quick: bool = False) -> list[CompileCase]:
    """All cases, or those that reach every entry of the configuration tables once."""
    cases: list[CompileCase] = []
    return [case for case in cases if case.quick or not quick]
