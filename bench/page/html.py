"""Parts of the page: tables that sort, lists of facts, whole documents of measurements."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

Row = dict[str, Any]
THEME, STYLE, SCRIPT = (
    (Path(__file__).parent / name).read_text(encoding="utf-8")
    for name in ("theme.css", "style.css", "sort.js")
)


@dataclass(frozen=True)
class Column:
    """One column: its head, what a row shows in it, and whether that is quoted from a paper."""

    head: str
    value: Callable[[Row], Any]
    quoted: bool = False
    code: bool = False


def keyed(head: str, key: str, *, quoted: bool = False) -> Column:
    """A column that shows one field of a row."""
    return Column(head, lambda row: row.get(key), quoted)


def number(value: float) -> str:
    """Three significant digits; thousands and beyond by k, M, G."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cell(value: Any) -> tuple[str, str]:
    """A value as it is shown and as it is sorted by; "" for none."""
    if value is None:
        return "–", ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value), str(value)
    shown = f"{value}" if isinstance(value, int) else number(value)
    return shown, repr(float(value))


def table(columns: Sequence[Column], rows: Iterable[Row], stale: Callable[[Row], bool]) -> str:
    """A table whose heads sort it; rows that `stale` says so of are marked."""
    rows = list(rows)
    words = [any(isinstance(column.value(row), str) for row in rows) for column in columns]
    styles = ["quoted" if c.quoted else "text" * w for c, w in zip(columns, words, strict=True)]
    heads = "".join(
        f'<th class="{style}"><button>{escape(column.head)}</button></th>'
        for column, style in zip(columns, styles, strict=True)
    )
    lines = []
    for row in rows:
        cells = []
        for column, style in zip(columns, styles, strict=True):
            shown, key = (escape(part) for part in cell(column.value(row)))
            shown = f"<code>{shown}</code>" if column.code else shown
            cells.append(f'<td class="{style}" data-v="{key}">{shown}</td>')
        mark = ' class="stale"' if stale(row) else ""
        lines.append(f"<tr{mark}>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """A list of names and values; what is None is left out."""
    items = (
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in pairs
        if value is not None
    )
    return f"<dl>{''.join(items)}</dl>"


def document(content: Row, hide: Sequence[str]) -> str:
    """Measurements of any form: values as facts, rows as tables, sentences as lists, else JSON.

    hide: fields, of the document and of its rows, that the page shows elsewhere or not at all.
    """
    parts, single = [], []
    for name, value in content.items():
        if name in hide:
            continue
        flat = isinstance(value, list) and value and all(isinstance(v, dict) for v in value)
        if flat:
            heads = list(dict.fromkeys(key for row in value for key in row if key not in hide))
            columns = [Column(head, _plain(head)) for head in heads]
            parts.append(f"<h4>{escape(name)}</h4>{table(columns, value, lambda _: False)}")
        elif value and isinstance(value, list) and all(isinstance(v, str) for v in value):
            items = "".join(f"<li>{escape(each)}</li>" for each in value)
            parts.append(f"<h4>{escape(name)}</h4><ul>{items}</ul>")
        elif isinstance(value, (dict, list)):
            text = escape(json.dumps(value, ensure_ascii=False))
            parts.append(f"<details><summary>{escape(name)}</summary><code>{text}</code></details>")
        else:
            single.append((name, value))
    return facts(single) + "".join(parts)


def _plain(head: str) -> Callable[[Row], Any]:
    def value(row: Row) -> Any:
        found = row.get(head)
        return json.dumps(found) if isinstance(found, (dict, list)) else found

    return value


def whole(title: str, body: str) -> str:
    """The page, self-contained: nothing is loaded from anywhere."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>\n{THEME}{STYLE}</style></head><body>\n{body}\n<script>\n{SCRIPT}</script></body></html>\n"
    )
