"""Finds the parts of a run: beside each other, or in the folders of ``python -m bench gpu``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.records import FOLDER, GRID_FILE
from bench.strict_json import read_json

RUN_FILE = "run.json"


def part(directory: Path, name: str, *keys: str) -> dict[str, Any] | None:
    """The file ``name`` of a folder and of its sections as one; ``None`` where there is none.

    Raises:
        BenchError: one is damaged, or has not the ``keys`` that it must have.
    """
    found = [_read(path, keys) for path in _places(directory, name)]
    return _join(found) if found else None


def study_folder(directory: Path) -> Path | None:
    """Where the logit study lies; of several, the one with most runs."""
    places = _places(directory, f"{FOLDER}/{GRID_FILE}")
    runs = {path.parent.parent: len(read_json(path)["runs"]) for path in places}
    return max(runs, key=lambda folder: runs[folder]) if runs else None


def _places(directory: Path, name: str) -> list[Path]:
    sections: list[str] = []
    if (directory / RUN_FILE).exists():
        sections = [entry["name"] for entry in read_json(directory / RUN_FILE)["sections"]]
    folders = [directory, *(directory / section for section in sections)]
    return [folder / name for folder in folders if (folder / name).exists()]


def _read(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    content = read_json(path)
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise BenchError(f"{path} is damaged or of another version: it has no {missing[0]!r}")
    return dict(content)


def _join(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Lists one behind the other, anchors too, with the largest drift; the rest of the first."""
    joined = dict(found[0])
    for other in found[1:]:
        for key, value in other.items():
            if isinstance(value, list) and isinstance(joined.get(key), list):
                joined[key] = [*joined[key], *value]
            elif key == "anchors":
                joined[key] = _join_anchors(joined.get(key), value)
            else:
                joined.setdefault(key, value)
    return joined


def _join_anchors(one: dict[str, Any] | None, other: dict[str, Any]) -> dict[str, Any]:
    if not one:
        return other
    return {
        "measured": [*one["measured"], *other["measured"]],
        "drift": max(one["drift"], other["drift"]),
    }
