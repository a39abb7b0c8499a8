"""The memory of a training step by component: full fine-tuning, LoRA and the head alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import plotting
from bench.steps import MODES, QUICK_SHAPES, SHAPES, held_bytes
from bench.tables import prose
from train.hardware import resolve_device, resolve_precision
from train.tables import markdown, mebibytes

COMPONENTS = {
    "weights": "weights",
    "weight_copies": "their 16-bit copies",
    "weight_casts": "their casts, made at each step",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "activations": "saved activations",
}
_ROOT = Path(__file__).parent.parent


def run(quick: bool) -> dict[str, Any]:
    """One row per model and mode, each measured in its own process."""
    precision = resolve_precision("auto", resolve_device("auto"))
    rows: list[dict[str, Any]] = []
    for model_name, batch, length in QUICK_SHAPES if quick else SHAPES:
        for kind in MODES:
            print(f"memory: {model_name} {batch}x{length} {precision}, {MODES[kind]}", file=sys.stderr)
            measured = in_own_process("bench.peak", kind, model_name, str(batch), str(length), precision)
            rows.append({"model": model_name, "rows": batch, "length": length, "mode": kind, **measured})
    return {"seed": 0, "precision": precision, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """One table per model: a row per component, a column per mode, and LoRA's saving."""
    return "\n\n".join(
        [
            prose(
                f"MiB; {result['precision']}; {result['device']}; each mode in its own process."
                " Backward frees activations and casts while it allocates gradients, so not all of them exist"
                " at once. The measured peak also contains temporary tensors, what the libraries allocate in"
                f" a step, and freed memory that the allocator has kept.{note_on_peaks(result['rows'])}"
            ),
            *(_model_table(rows) for rows in _by_model(result).values()),
        ]
    )


def _model_table(rows: dict[str, dict[str, Any]]) -> str:
    def line(name: str, value: Any) -> list[str]:
        numbers = {kind: value(row) for kind, row in rows.items()}
        saved = numbers["full"] - numbers["lora"]
        return [name, *(mebibytes(each) for each in numbers.values()), mebibytes(saved)]

    def held(row: dict[str, Any], without: Sequence[str]) -> int:
        return sum(size for key, size in row["components"].items() if key not in without)

    first = rows["full"]
    return markdown(
        [
            [f"{first['model']}, {first['rows']} x {first['length']}", *MODES.values(), "LoRA saves"],
            *(line(words, lambda row, key=key: row["components"][key]) for key, words in COMPONENTS.items()),
            line("held after forward", lambda row: held(row, ("gradients",))),
            line("held after backward", lambda row: held(row, ("activations", "weight_casts"))),
            line("measured peak of the steps", peak_above_bare),
            line("- minus what is held", lambda row: peak_above_bare(row) - held_bytes(row["components"])),
            line("the process without a model, not included above", lambda row: row["bare_bytes"]),
        ]
    )


def figures(result: dict[str, Any], folder: Path) -> None:
    """memory.png: one stacked bar per mode, with a line for the measured peak."""
    models = _by_model(result)
    figure, axes = plotting.panels(1, len(models), 5.4, 3.4)
    for (name, rows), axis in zip(models.items(), axes[0], strict=True):
        for at, row in enumerate(rows.values()):
            stack_components(axis, at, row["components"], width=0.55)
            peak = peak_above_bare(row) / 2**20
            label = None if at else "measured peak of the steps"
            axis.plot([at - 0.36, at + 0.36], [peak, peak], color="black", label=label)
            axis.annotate(f"{peak:,.0f}", (at + 0.29, peak), (2, 3), textcoords="offset points", fontsize=8)
        axis.set_xticks(range(len(rows)), [MODES[kind] for kind in rows])
        axis.set(
            ylabel="MiB, each component at its largest",
            title=f"{name}, {row['rows']} x {row['length']} tokens",
        )
    plotting.save(figure, folder / "memory.png")


def stack_components(axis: Any, at: int, components: dict[str, int], width: float) -> None:
    """Draws the components in MiB as one stacked bar at x = `at`; the one at 0 has labels for a legend."""
    colors = (plotting.BLUE, plotting.GREY, "0.8", plotting.GREEN, plotting.RED, plotting.ORANGE)
    bottom = 0.0
    for (key, words), color in zip(COMPONENTS.items(), colors, strict=True):
        tall = components[key] / 2**20
        axis.bar(at, tall, bottom=bottom, width=width, color=color, label=None if at else words)
        bottom += tall


def peak_above_bare(row: dict[str, Any]) -> int:
    """The peak without what the process takes before there is a model."""
    return int(row["peak_bytes"] - row["bare_bytes"])


def in_own_process(module: str, *arguments: str) -> dict[str, Any]:
    """The JSON that `python -m MODULE` prints on its last line. Its stderr is passed on."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=_ROOT, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _by_model(result: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    models: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        models.setdefault(row["model"], {})[row["mode"]] = row
    return models


def note_on_peaks(rows: Iterable[dict[str, Any]]) -> str:
    """A sentence if the peaks are of the whole process and not of the steps, else ""."""
    if all(row["peak_of"] == "steps" for row in rows):
        return ""
    return " This system records one peak for the whole process, so the peaks include loading."
