"""What the numbers of a run depend on: versions, commit, processor, GPU, date."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import attnvariants

PEERS = ("fla-core", "flash_attn_3", "flash-attn-4")  # see bench/PEERS.md
_ROOT = Path(__file__).resolve().parent.parent
_GPU_FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "power.draw",
    "temperature.gpu",
    "clocks_event_reasons.active",
)


def describe() -> dict[str, Any]:
    """The environment as a flat, JSON-ready mapping; what cannot be found out is ``None``."""
    commit, dirty = _git()
    gpu = _gpu()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "attnvariants": attnvariants.__version__,
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "peers": {package: _version(package) for package in PEERS},
        "os": platform.platform(),
        "device": "cuda" if gpu else "cpu",
        "cpu": _cpu_model(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "load_average": _load(),
        "gpu": gpu,
    }


def one_line(environment: dict[str, Any]) -> str:
    """The environment as one line for the head of a table."""
    gpu = environment["gpu"]
    machine = (
        f"{gpu['name']} (driver {gpu['driver_version']})"
        if gpu
        else f"{environment['cpu']}, {environment['cores']} cores, {environment['threads']} threads"
    )
    commit = environment["commit"][:10] if environment["commit"] else "unknown commit"
    return (
        f"attnvariants {environment['attnvariants']} ({commit}"
        f"{', modified' if environment['dirty'] else ''}), torch {environment['torch']}, "
        f"triton {environment['triton'] or 'absent'}, Python {environment['python']}, "
        f"{machine}, {environment['date']}"
    )


def disturbance(environment: dict[str, Any]) -> str | None:
    """A warning where other work would disturb timings on the processor."""
    load, cores = environment["load_average"], environment["cores"]
    if load is None or load < 0.5 * cores:
        return None
    return (
        f"other work is running here (load average {load:.1f} on {cores} cores): "
        "times on the processor will vary, and ratios with them"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """Standard output of a command, or ``None`` where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            command, cwd=_ROOT, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _git() -> tuple[str | None, bool | None]:
    """Commit of the checkout and whether tracked files differ from it; a wheel has neither."""
    commit = _output("git", "rev-parse", "HEAD") if (_ROOT / ".git").exists() else None
    if commit is None:
        return None, None
    status = _output("git", "status", "--porcelain", "--untracked-files=no")
    return commit, None if status is None else bool(status)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _load() -> float | None:
    """Load average of the last minute: above the cores in use, timings are disturbed."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    found: dict[str, Any] = dict.fromkeys(_GPU_FIELDS)
    found.update(
        name=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        memory_bytes=properties.total_memory,
        multiprocessors=properties.multi_processor_count,
        cuda=torch.version.cuda,
    )
    uuid = getattr(properties, "uuid", None)
    line = _output(
        "nvidia-smi",
        f"--id={index if uuid is None else f'GPU-{uuid}'}",
        f"--query-gpu={','.join(_GPU_FIELDS)}",
        "--format=csv,noheader",
    )
    if line:
        values = [value.strip() for value in line.splitlines()[0].split(",")]
        found.update(zip(_GPU_FIELDS, values, strict=False))
    return found
