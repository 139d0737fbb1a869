"""The report as one web page that needs nothing else: style and figures are inside.

It reads at the width of a phone and of a desktop, in light and dark, without scripts; wide tables
scroll in their own frame.
"""

from __future__ import annotations

import html
import io
import re

from matplotlib.figure import Figure

from bench import plot_style
from bench.document import Block, Bullets, Document, Paragraph, Plot, Section, Table

# Colours of the figures that change with the theme.
_THEMED = {
    plot_style.INK: "--ink",
    plot_style.MUTED: "--muted",
    plot_style.RULE: "--rule",
    plot_style.PAPER: "--paper",
    plot_style.DANGER: "--danger",
    plot_style.BLUE: "--blue",
    plot_style.VERMILLION: "--vermillion",
    plot_style.GREEN: "--green",
}

_BAD = frozenset({"nan", "inf", "diverged", "failed verify"})  # cells in the colour of danger

_STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1c2430; --muted: #5b6675; --rule: #d3d9e2; --paper: #ffffff; --page: #f5f7fa;
  --danger: #b3261e; --blue: #0072b2; --vermillion: #d55e00; --green: #009e73;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6eaf0; --muted: #9aa6b5; --rule: #333c48; --paper: #171c23; --page: #0f1318;
    --danger: #ff8a80; --blue: #6684ff; --vermillion: #ff8142; --green: #2cc295;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 var(--font); overflow-wrap: break-word;
}
main, header, nav { max-width: 1180px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 28px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 0 0 12px; }
h3 { font-size: 1rem; line-height: 1.35; margin: 24px 0 8px; }
p, ul { margin: 0 0 12px; max-width: 75ch; }
ul { padding-left: 1.2em; }
li { margin: 0 0 8px; }
.subtitle, .note, figcaption { color: var(--muted); font-size: 0.875rem; line-height: 1.45; }
nav ul {
  list-style: none; display: flex; flex-wrap: wrap; gap: 4px 16px;
  padding: 0; margin: 12px 0; max-width: none;
}
nav li { margin: 0; }
a { color: var(--blue); }
nav a { display: inline-block; padding: 4px 0; text-decoration: none; }
nav a:hover { text-decoration: underline; }
a:focus-visible, .scroll:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
section {
  background: var(--paper); border: 1px solid var(--rule); border-radius: 10px;
  padding: 20px 16px; margin: 0 0 16px;
}
code { font: 0.875em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.plots { columns: 420px 2; column-gap: 40px; margin: 16px 0 12px; }
figure { margin: 0 0 28px; max-width: 540px; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { margin-top: 8px; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px; }
.scroll + .note { margin-top: 8px; }
table {
  border-collapse: separate; border-spacing: 0; min-width: 100%;
  font-size: 0.875rem; line-height: 1.35;
}
th, td { padding: 7px 10px; text-align: right; white-space: nowrap; vertical-align: top; }
th { font-weight: 600; }
tbody th { font-weight: 500; }
thead th { color: var(--muted); vertical-align: bottom; white-space: normal; min-width: 4.5em; }
tbody th, tbody td { border-top: 1px solid var(--rule); }
.group th { font-weight: 600; background: var(--page); }
.group span { position: sticky; left: 10px; }
.text { text-align: left; }
.bad { color: var(--danger); }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: min(24em, 60vw); }
th:first-child { position: sticky; left: 0; background: var(--paper); }
td { font-variant-numeric: tabular-nums; }
@media (max-width: 640px) {
  main { padding: 0 6px; }
  th:first-child { white-space: normal; max-width: 10em; }
}
@media (min-width: 1000px) {
  section { padding: 28px; }
  .lead { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 520px); gap: 0 40px; }
  .lead h2 { grid-column: 1 / -1; }
  .lead .plots { columns: auto 1; grid-column: 2; grid-row: 2 / span 20; margin: 0; }
}
@media print { body { background: none; } section { border: 0; break-inside: avoid-page; } }
""".strip()


def to_html(document: Document) -> str:
    """The whole page."""
    sections = document.sections
    links = "".join(
        f'<li><a href="#{_anchor(s.title)}">{html.escape(s.title)}</a></li>' for s in sections
    )
    body = "\n".join(_section(section, lead=n == 0) for n, section in enumerate(sections))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(document.title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n"
        f"<body>\n<header>\n<h1>{html.escape(document.title)}</h1>\n"
        f'<p class="subtitle">{_inline(document.subtitle)}</p>\n</header>\n'
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n'
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(section: Section, *, lead: bool) -> str:
    """Neighbouring figures share a grid."""
    parts: list[str] = []
    figures: list[str] = []
    for block in section.blocks:
        if isinstance(block, Plot):
            figures.append(_figure(block))
            continue
        if figures:
            parts.append(_grid(figures))
            figures = []
        parts.append(_block(block))
    if figures:
        parts.append(_grid(figures))
    anchor = _anchor(section.title)
    two_columns = ' class="lead"' if lead and any("<figure" in part for part in parts) else ""
    return (
        f'<section{two_columns} aria-labelledby="{anchor}">\n'
        f'<h2 id="{anchor}">{html.escape(section.title)}</h2>\n' + "\n".join(parts) + "\n</section>"
    )


def _grid(figures: list[str]) -> str:
    return '<div class="plots">\n' + "\n".join(figures) + "\n</div>"


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Table):
        return _table(block)
    return _figure(block)


def _table(table: Table) -> str:
    anchor = _anchor(table.title)

    def classes(column: int, text: str = "") -> str:
        names = ["text"] if column < table.labels else []
        names += ["long"] if len(text) > 40 else []
        names += ["bad"] if text in _BAD else []
        return f' class="{" ".join(names)}"' if names else ""

    head = "".join(
        f'<th scope="col"{classes(n)}>{_inline(name)}</th>' for n, name in enumerate(table.columns)
    )
    rows = []
    for heading, row in table.grouped():
        if heading is not None:
            rows.append(
                f'<tr class="group"><th class="text" scope="rowgroup" colspan="{len(row)}">'
                f"<span>{_inline(heading)}</span></th></tr>"
            )
        first = f'<th scope="row"{classes(0)}>{_inline(row[0])}</th>'
        rest = "".join(
            f"<td{classes(n, cell)}>{_inline(cell)}</td>" for n, cell in enumerate(row[1:], start=1)
        )
        rows.append(f"<tr>{first}{rest}</tr>")
    note = f'\n<p class="note">{_inline(table.note)}</p>' if table.note else ""
    return (
        f'<h3 id="{anchor}">{_inline(table.title)}</h3>\n'
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{anchor}">\n'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table>"
        f"\n</div>{note}"
    )


def _figure(plot: Plot) -> str:
    drawing = inline_svg(plot.figure, plot.name, plot.alt)
    return f"<figure>\n{drawing}\n<figcaption>{_inline(plot.caption)}</figcaption>\n</figure>"


def inline_svg(figure: Figure, name: str, alt: str) -> str:
    """The figure as an ``<svg>`` element in the page's colours and font, its ids unique."""
    buffer = io.StringIO()
    with plot_style.style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for pattern in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->"):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    used = set(re.findall(r"(?:href=\"|url\()#([^\")]+)", text))
    text = re.sub(
        r' id="([^"]*)"',
        lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "",
        text,
    )
    text = re.sub(r"(href=\"|url\()#", rf"\1#{name}-", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)
    text = re.sub(
        r'style="[^"]*"',
        lambda match: re.sub(
            r"#[0-9a-f]{6}",
            lambda color: f"var({_THEMED[color[0]]})" if color[0] in _THEMED else color[0],
            match[0],
        ),
        text,
    )
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    opening = f'<svg {view[0]} role="img" aria-label="{html.escape(alt)}">'
    text = re.sub(r"^<svg[^>]*>", lambda _: opening, text, count=1)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
