"""Shared by all tests: fixed seeds and examples, and poisoned uninitialised memory."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples in every run; ``--hypothesis-profile=explore`` draws new ones.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("repeatable", derandomize=True, **_COMMON)
settings.register_profile("explore", **_COMMON)
settings.load_profile("repeatable")

# The problems are small and often run beside each other: more threads would only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# Triton reads it when it is imported: kernels then run on CPU tensors, in its interpreter. Tests
# that compile kernels do so in a process of their own.
os.environ["TRITON_INTERPRET"] = "1"


def _speed_up_the_interpreter() -> None:
    """Has it patch Triton's language once per helper function, not at each of its calls.

    The calls took half of the time of a kernel.
    """
    if importlib.util.find_spec("triton") is None:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patched: set[Any] = set()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.fn not in patched:
            patched.add(function.fn)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


_speed_up_the_interpreter()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fills ``torch.empty`` and its relatives with NaN, so that reading them shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are then not usable on a CPU, as for most users: the slow interpreter is not run."""
    monkeypatch.delenv("TRITON_INTERPRET")


@pytest.fixture
def controls(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """Serves ``impl="cuda"`` by csrc/ on the CPU; what steers its threads, see ``cuda_build``."""
    from cuda_build import cuda_on_cpu

    with cuda_on_cpu(monkeypatch) as library:
        yield library
