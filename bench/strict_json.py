"""Strict JSON: non-finite floats as strings, files that are either old or new, errors in a line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from bench.errors import BenchError

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_TEXT_KEYS = frozenset({"status", "name"})  # here "nan" is a word, not a number


def to_json(value: Any) -> Any:
    """``value`` with dataclasses as dicts and non-finite floats as strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def from_json(value: Any) -> Any:
    """The inverse of :func:`to_json` for dicts, lists and numbers."""
    if isinstance(value, dict):
        return {
            key: item if key in _TEXT_KEYS and isinstance(item, str) else from_json(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    return value


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON of ``value`` (see :func:`to_json`)."""
    return json.dumps(to_json(value), allow_nan=False, indent=indent, ensure_ascii=False)


def loads(text: str) -> Any:
    """Reads what :func:`dumps` wrote."""
    return from_json(json.loads(text))


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` so that a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(dumps(value, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Reads one JSON file.

    Raises:
        BenchError: it cannot be read or is not JSON.
    """
    try:
        return loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise BenchError(f"{path} is not valid JSON: {error}") from error
