"""Tables in Markdown that are also readable on a terminal, and quantities as text."""

from __future__ import annotations

import re
from collections.abc import Sequence


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table of rows, the first of which is the header. All columns but the first are right-aligned."""
    rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    widths = [max(2, *(len(cell) for cell in column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(cells) + " |")
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])


def excerpt(text: str, characters: int) -> str:
    """A text as one line of about `characters`, cut after a word. Control characters become spaces."""
    text = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())
    if len(text) <= characters:
        return text
    words = text[:characters].rsplit(" ", 1)[0]
    # Within a word if it is long: Chinese, for example, has no spaces.
    return (words if 2 * len(words) > characters else text[:characters]) + " …"


def quantity(value: float) -> str:
    """Three significant digits: 1,234 · 123 · 12.3 · 1.23."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def size(count: float) -> str:
    """Bytes in MB (10^6 bytes)."""
    return f"{quantity(count / 1e6)} MB"


def mebibytes(count: float) -> str:
    """Bytes in MiB."""
    text = f"{count / 2**20:,.0f}" if abs(count) >= 10 * 2**20 else f"{count / 2**20:.1f}"
    return "0" if text in ("0.0", "-0.0") else text


def duration(seconds: float) -> str:
    """Seconds as minutes and seconds: 1 min 52 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
