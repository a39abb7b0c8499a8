"""Shared by the figures of the benchmarks: colours, axes, and saving to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # files only, no window
from matplotlib import pyplot as plt

BLUE, ORANGE, GREEN, RED, GREY = "#2f6db3", "#d9822b", "#3a8f5c", "#b5443c", "#9aa3ad"
PURPLE = "#8a63b5"
COLORS = (GREY, BLUE, GREEN, "black", ORANGE, PURPLE, RED)
_COLUMNS = 7  # of a legend


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes, (rows, columns). width and height: of one panel, in inches."""
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for each in axes.flat:
        each.grid(alpha=0.3)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, path: Path) -> None:
    """Writes the figure with one legend for all panels below it, and closes it."""
    figure.tight_layout()
    entries: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    if entries:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}
        columns = min(len(entries), _COLUMNS)
        figure.legend(entries.values(), entries.keys(), frameon=False, fontsize=8, ncols=columns, **place)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
