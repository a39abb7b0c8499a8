"""The figures of a run: accuracy and loss by epoch, the confusion matrix, the report by class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")  # files only, no window
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from train.metrics import Scores
from train.tables import excerpt
from train.themes import BLUE, CYCLE, GREEN, GREY, ORANGE

_MOST_CLASSES = 30


def draw_all(
    folder: Path, name: str, lines: Sequence[dict[str, Any]], scores: Scores, labels: tuple[str, ...]
) -> None:
    """Writes curves.png, confusion_matrix.png and classification_report.png of the run called `name`.

    lines: of its metrics.jsonl.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file, figure in (
        ("curves", draw_curves([(name, lines)])),
        ("confusion_matrix", draw_confusion(scores, labels)),
        ("classification_report", _report(scores, labels)),
    ):
        figure.savefig(folder / f"{file}.png", dpi=140, bbox_inches="tight")
        plt.close(figure)


def draw_confusion(scores: Scores, labels: tuple[str, ...]) -> Any:
    """Counts by true and predicted class, shaded by the share of the true class."""
    counts = scores.confusion
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(max(4.2, 1.1 * len(labels)), 1.1 * _MOST_CLASSES)
    figure, axes = plt.subplots(figsize=(size, size * 0.9))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(labels) > _MOST_CLASSES:  # too many to read, and the figure would be too large for memory
        axes.set(xlabel="predicted", ylabel="true", title=f"Test texts, accuracy {scores.accuracy:.2%}")
        return figure
    for i in range(len(labels)):
        for j in range(len(labels)):
            axes.text(
                j,
                i,
                f"{counts[i, j]}",
                ha="center",
                va="center",
                color="white" if shares[i, j] > 0.5 else "black",
            )
    names = [plain(label) for label in labels]
    axes.set_xticks(range(len(labels)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(labels)), names)
    axes.set(xlabel="predicted", ylabel="true", title=f"Test texts, accuracy {scores.accuracy:.2%}")
    return figure


def plain(label: str) -> str:
    """A label in which matplotlib sees no formula: two dollar signs would start and end one."""
    return label.replace("$", r"\$")


def _report(scores: Scores, labels: tuple[str, ...]) -> Any:
    rows = scores.report(labels)
    if len(rows) > _MOST_CLASSES:
        rows = sorted(rows, key=lambda row: float(row["f1"]))[:_MOST_CLASSES]
    figure, axes = plt.subplots(figsize=(7, 0.62 * len(rows) + 1.6))
    at = np.arange(len(rows))
    for shift, (key, color) in zip(
        (-0.27, 0, 0.27), (("precision", BLUE), ("recall", ORANGE), ("f1", GREEN)), strict=True
    ):
        values = [row[key] for row in rows]
        axes.plot(values, at + shift, "o", color=color, label=key)
        for value, height in zip(values, at + shift, strict=True):
            axes.annotate(f"{value:.3f}", (value, height), (6, -3), textcoords="offset points", fontsize=7)
    axes.set_yticks(at, [f"{plain(row['label'])} ({row['rows']})" for row in rows])
    axes.invert_yaxis()
    low = min(min(row[key] for row in rows) for key in ("precision", "recall", "f1"))
    axes.set_xlim(max(0.0, low - 0.05), 1.02)
    axes.grid(axis="x", alpha=0.3)
    shown = "Test texts by class" if len(rows) == len(labels) else f"The {len(rows)} hardest classes"
    axes.set_title(shown)
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def save_curves(path: Path, logs: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> None:
    """Writes the figure of `draw_curves` in the format that the ending of `path` names."""
    figure = draw_curves(logs)
    figure.savefig(path, dpi=140, bbox_inches="tight")
    plt.close(figure)


def draw_curves(logs: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> Any:
    """Accuracy and loss by epoch. logs: the name and the lines of metrics.jsonl of each run."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(5.2, 6.4), sharex=True)
    for number, (name, lines) in enumerate(logs):
        style = {"color": CYCLE[number % len(CYCLE)], "marker": "os^Dv*"[number // len(CYCLE) % 6], "ms": 4}
        validated = [line for line in lines if line.keys() >= {"epoch", "val_accuracy", "val_loss"}]
        logged = [line for line in lines if "epoch" in line and line.get("loss") is not None]
        epochs = [line["epoch"] for line in validated]
        top.plot(
            epochs,
            [100 * line["val_accuracy"] for line in validated],
            **style,
            label=plain(excerpt(name, 48)),
        )
        bottom.plot(epochs, [line["val_loss"] for line in validated], **style)
        bottom.plot(
            [line["epoch"] for line in logged], [line["loss"] for line in logged],
            linestyle=":", lw=1.3, color=style["color"],
        )  # fmt: skip
    top.set_ylabel("validation accuracy, %")
    top.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    bottom.set(xlabel="epoch", ylabel="cross-entropy, nats", ylim=(0, None))
    bottom.legend(
        [Line2D([], [], color=GREY, marker="o", ms=4), Line2D([], [], color=GREY, ls=":", lw=1.3)],
        ["validation", "training (with label smoothing and dropout)"], frameon=False, fontsize=8,
    )  # fmt: skip
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
