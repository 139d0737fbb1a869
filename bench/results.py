"""The results that lie in a folder, as the report reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.metrics import Summary
from bench.records import Study


@dataclass(frozen=True)
class Results:
    """What was found in a folder; ``None`` stands for a part that is not there."""

    directory: Path
    environment: dict[str, Any] | None
    verify: dict[str, Any] | None
    speed: dict[str, Any] | None
    study: Study | None
    summary: Summary | None

    def environments(self) -> list[dict[str, Any]]:
        """Of every part, the folder's own first."""
        parts = [part["environment"] for part in (self.verify, self.speed) if part]
        grid = [self.study.grid.environment] if self.study else []
        return [e for e in (self.environment, *parts, *grid) if e]
