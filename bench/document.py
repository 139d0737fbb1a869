"""A report as plain blocks, and the same blocks as Markdown. ``bench.html`` makes the web page.

Text may hold ```code``` in backticks; nothing else is marked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Cells are ready text; the first ``labels`` columns name the row, the rest are numbers.

    ``groups``, one for each row, become headings above the rows that share one.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1
    note: str = ""
    groups: Sequence[str] = ()

    def grouped(self) -> list[tuple[str | None, Sequence[str]]]:
        """The rows, each with the heading that goes above it, if any."""
        headings: list[str | None] = [*self.groups] or [None] * len(self.rows)
        above = [None, *headings]
        return [
            (group if group != last else None, row)
            for last, group, row in zip(above, headings, self.rows, strict=False)
        ]


@dataclass(frozen=True)
class Plot:
    """A figure, its file name without ending, what it shows, and the same for the blind."""

    name: str
    caption: str
    alt: str
    figure: Figure


Block: TypeAlias = Paragraph | Bullets | Table | Plot


@dataclass
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Document:
    """The whole report."""

    title: str
    subtitle: str
    sections: list[Section]

    def plots(self) -> list[Plot]:
        return [block for s in self.sections for block in s.blocks if isinstance(block, Plot)]


def to_markdown(document: Document, plots: str) -> str:
    """The report as Markdown; its images lie in the folder ``plots`` beside it."""
    parts = [f"# {document.title}", document.subtitle]
    for section in document.sections:
        parts.append(f"## {section.title}")
        parts += [_markdown(block, plots) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block, plots: str) -> str:
    if isinstance(block, Paragraph):
        return block.text
    if isinstance(block, Bullets):
        return "\n".join(f"* {item}" for item in block.items)
    if isinstance(block, Plot):
        return f"![{block.alt}]({plots}/{block.name}.png)\n\n{block.caption}"
    return _markdown_table(block)


def _markdown_table(table: Table) -> str:
    rules = ["---"] * table.labels + ["---:"] * (len(table.columns) - table.labels)
    rows: list[Sequence[str]] = [table.columns, rules]
    for heading, row in table.grouped():
        if heading is not None:
            rows.append([f"**{heading}**"] + [""] * (len(row) - 1))
        rows.append(row)
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    note = [table.note] if table.note else []
    return "\n\n".join([f"### {table.title}", "\n".join(lines), *note])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
