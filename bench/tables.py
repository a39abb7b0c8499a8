"""Text of the benchmarks' tables."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from train.tables import quantity


def prose(text: str) -> str:
    """A paragraph, wrapped."""
    return textwrap.fill(text, 105, break_long_words=False, break_on_hyphens=False)


def bullets(lines: Sequence[str]) -> str:
    """A list of points, wrapped."""
    return "\n".join(textwrap.indent(prose(line), "  ").replace("  ", "- ", 1) for line in lines)


def timing(times: Mapping[str, float]) -> str:
    """The median of a result of `bench.steps.milliseconds`, and its quartiles: 1.30 (1.23-1.45)."""
    return f"{quantity(times['median'])} ({spread(times)})"


def spread(times: Mapping[str, float]) -> str:
    """The quartiles of a result of `bench.steps.milliseconds`: 1.23-1.45."""
    return f"{quantity(times['low'])}-{quantity(times['high'])}"
