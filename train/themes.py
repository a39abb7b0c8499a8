"""Figures in the colours of a page, for light and for dark mode."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from cycler import cycler

mpl.use("Agg")  # files only, no window
from matplotlib import pyplot as plt

# Line colours, with a contrast of 3 on both backgrounds.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#3b82d0", "#d9772b", "#2f9e63", "#9065d0", "#7d8590"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, "#d6558c", "#8a8f1e")
# Background, text and grid colours of the page's cards.
THEMES = {"": ("#ffffff", "#1f2328", "#d0d7de"), "-dark": ("#161b22", "#e6edf3", "#3d444d")}

Drawing = Callable[[], Any]


def draw_themes(drawing: Drawing) -> dict[str, bytes]:
    """The PNG of a figure in the colours of each of THEMES."""
    found = {}
    for suffix, (face, text, faint) in THEMES.items():
        png = io.BytesIO()
        with plt.rc_context(_style(face, text, faint)):
            figure = drawing()
            figure.savefig(png, format="png", dpi=170, bbox_inches="tight")
            plt.close(figure)
        found[suffix] = png.getvalue()
    return found


def _style(face: str, text: str, faint: str) -> Any:
    return {
        "figure.facecolor": face, "axes.facecolor": face, "savefig.facecolor": face, "text.color": text,
        "axes.labelcolor": text, "axes.titlecolor": text, "axes.edgecolor": faint, "xtick.color": text,
        "ytick.color": text, "grid.color": faint, "legend.labelcolor": text, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": False, "font.size": 10,
        "legend.frameon": False, "legend.fontsize": 8.5, "axes.prop_cycle": cycler(color=CYCLE),
    }  # fmt: skip
