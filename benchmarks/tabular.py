"""How a table of the pages is written."""

from __future__ import annotations

from collections.abc import Iterator


def table(header: str, rows: Iterator[str]) -> str:
    """Return a table in Markdown; cells are separated by `` | `` in header and rows."""
    columns = header.count("|") + 1
    return "\n".join([f"| {header} |", "|" + "---|" * columns, *(f"| {row} |" for row in rows)])
