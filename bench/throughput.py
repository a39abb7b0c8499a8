"""The speed of a training step by phase: full fine-tuning, LoRA and the head alone, side by side."""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import plotting
from bench.steps import (
    CLASSES,
    MODES,
    PHASES,
    QUICK_SHAPES,
    SHAPES,
    BenchModel,
    in_turn,
    make_model,
    matrix_products,
    milliseconds,
    ratio,
    time_once,
)
from bench.tables import prose, timing
from lora import count_parameters
from model import HEAD
from model.fast import DTYPES
from train.config import Recipe
from train.hardware import resolve_device, resolve_precision
from train.tables import markdown, quantity, size
from train.trained import save_trained


def run(quick: bool) -> dict[str, Any]:
    """One row per model: for each mode parameters, bytes on disk, and the times of a step by phase."""
    device = resolve_device("auto")
    precision = resolve_precision("auto", device)
    rounds = 3 if quick else 13
    rows = []
    for model_name, batch, length in QUICK_SHAPES if quick else SHAPES:
        print(f"throughput: {model_name} {batch}x{length} {precision}", file=sys.stderr)
        models = {kind: make_model(kind, model_name, batch, length, precision, device) for kind in MODES}
        products = {
            kind: matrix_products(model.module, batch, length, DTYPES[precision], device, kind)
            for kind, model in models.items()
        }
        tasks: dict[str, Callable[[], list[float]]] = {kind: models[kind].step for kind in MODES}
        tasks |= {f"{kind} products": partial(_alone, products[kind], device) for kind in MODES}
        laps = in_turn(tasks, rounds)
        seconds = {name: [sum(lap) for lap in each] for name, each in laps.items()}
        modes = {}
        for kind, model in models.items():
            by_phase = {phase: [lap[i] for lap in laps[kind]] for i, phase in enumerate(PHASES)}
            ceiling = seconds[f"{kind} products"]
            modes[kind] = {
                **_parameters(model, model_name),
                "milliseconds": {
                    "step": milliseconds(seconds[kind]),
                    **{phase: milliseconds(each) for phase, each in by_phase.items()},
                    "products": milliseconds(ceiling),
                },
                "products_gflops": round(products[kind].flops / statistics.median(ceiling) / 1e9, 1),
            }
        rows.append({"model": model_name, "rows": batch, "length": length, "modes": modes})
    return {"seed": 0, "precision": precision, "rounds": rounds, "models": rows}


def table(result: dict[str, Any]) -> str:
    """One column per model and mode."""
    columns = [(row, kind) for row in result["models"] for kind in MODES]
    cells = [row["modes"][kind] for row, kind in columns]

    def line(name: str, value: Any) -> list[str]:
        return [name, *(value(cell) for cell in cells)]

    def time(cell: dict[str, Any], phase: str) -> str:
        return quantity(cell["milliseconds"][phase]["median"])

    def over(cell: dict[str, Any], other: dict[str, Any], key: str) -> str:
        return f"{ratio(cell['milliseconds']['step'], other['milliseconds'][key]):.2f}"

    shapes = ", ".join(
        f"{row['model']} at {row['rows']} x {row['length']} tokens" for row in result["models"]
    )
    return "\n\n".join(
        [
            prose(
                f"{shapes}; LoRA r = 8 on query and value; {result['precision']}; {result['device']}."
                f" Medians of {result['rounds']} interleaved rounds, quartiles in brackets."
            ),
            markdown(
                [
                    ["", *(f"{_short(row['model'])}, {MODES[kind]}" for row, kind in columns)],
                    line("parameters, total", lambda cell: f"{cell['parameters']['total']:,}"),
                    line("trainable", lambda cell: f"{cell['parameters']['trainable']:,}"),
                    line("- share of total", _share),
                    line("- LoRA", lambda cell: f"{cell['parameters']['lora']:,}"),
                    line("- head", lambda cell: f"{cell['parameters']['head']:,}"),
                    line("saved on disk", lambda cell: size(cell["checkpoint_bytes"])),
                    line("step, ms", lambda cell: timing(cell["milliseconds"]["step"])),
                    *(line(f"- {phase}", lambda cell, phase=phase: time(cell, phase)) for phase in PHASES),
                    [
                        "step / full fine-tuning's",
                        *(over(row["modes"][kind], row["modes"]["full"], "step") for row, kind in columns),
                    ],
                    ["examples per second", *(_rate(row, kind, row["rows"]) for row, kind in columns)],
                    [
                        "tokens per second",
                        *(_rate(row, kind, row["rows"] * row["length"]) for row, kind in columns),
                    ],
                    line("its matrix products alone, ms", lambda cell: time(cell, "products")),
                    line("- GFLOP/s", lambda cell: quantity(cell["products_gflops"])),
                    line("step / its matrix products", lambda cell: over(cell, cell, "products")),
                ]
            ),
            *(prose(_saving(row)) for row in result["models"]),
        ]
    )


def figures(result: dict[str, Any], folder: Path) -> None:
    """throughput.png: one bar per mode, divided into phases, with a line for the mode's matrix products."""
    figure, axes = plotting.panels(1, len(result["models"]), 5, 2.6)
    for row, axis in zip(result["models"], axes[0], strict=True):
        for at, kind in enumerate(MODES):
            cell, left = row["modes"][kind], 0.0
            for phase, color in zip(PHASES, (plotting.BLUE, plotting.ORANGE, plotting.GREEN), strict=True):
                wide = cell["milliseconds"][phase]["median"]
                axis.barh(at, wide, left=left, height=0.6, color=color, label=None if at else phase)
                left += wide
            axis.annotate(
                f"{_rate(row, kind, row['rows'])} examples/s", (left, at), (4, -3),
                textcoords="offset points", fontsize=8,
            )  # fmt: skip
            products = cell["milliseconds"]["products"]["median"]
            label = None if at else "its matrix products alone"
            axis.plot([products, products], [at - 0.38, at + 0.38], color="black", label=label)
        axis.set_yticks(range(len(MODES)), MODES.values())
        axis.invert_yaxis()
        axis.margins(x=0.25)
        axis.set(xlabel="ms per step", title=f"{row['model']}, {row['rows']} x {row['length']} tokens")
    plotting.save(figure, folder / "throughput.png")


def _alone(task: Callable[[], object], device: torch.device) -> list[float]:
    return [time_once(task, device)]


def _parameters(model: BenchModel, model_name: str) -> dict[str, Any]:
    """Parameters by role, and the bytes that a run saves: an adapter's folder, or the trained weights."""
    counts = count_parameters(model.module, HEAD)
    recipe = Recipe(model=model_name, method=model.name)
    labels = tuple(f"LABEL_{i}" for i in range(CLASSES))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint_bytes = save_trained(model.module, Path(folder), recipe, labels)
    roles = ("lora", "head", "base", "frozen", "trainable", "total")
    return {
        "parameters": {role: getattr(counts, role) for role in roles},
        "checkpoint_bytes": checkpoint_bytes,
    }


def _share(cell: dict[str, Any]) -> str:
    return f"{cell['parameters']['trainable'] / cell['parameters']['total']:.2%}"


def _rate(row: dict[str, Any], kind: str, count: int) -> str:
    """`count` by the seconds of a step."""
    return quantity(1e3 * count / row["modes"][kind]["milliseconds"]["step"]["median"])


def _saving(row: dict[str, Any]) -> str:
    """What LoRA saves in each phase."""
    full, lora = (row["modes"][kind]["milliseconds"] for kind in ("full", "lora"))
    saved = {phase: full[phase]["median"] - lora[phase]["median"] for phase in PHASES}
    parts = [f"{ms:+,.0f} ms in {phase}" for phase, ms in saved.items()]
    return f"LoRA's saving per step of {_short(row['model'])}: {', '.join(parts)}."


def _short(model_name: str) -> str:
    return model_name.removeprefix("random:")
