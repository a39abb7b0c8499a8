"""The accuracy of the recipes on three seeds: the quickstart and, if AG News is given, minilm-agnews.

The runs are ordinary ones in runs/. A finished run is not repeated.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.tables import prose
from bench.training import QUICK, finish_run
from train.tables import markdown

RUNS = Path("runs")
SEEDS = (0, 1, 2)
_KEPT = (
    "test_accuracy", "test_macro_f1", "val_accuracy", "best_epoch", "train_seconds", "examples_per_second",
    "adapter_bytes", "lora_parameters", "trainable_parameters", "total_parameters", "peak_memory_bytes",
    "precision",
)  # fmt: skip


def run(quick: bool, data: str | None = None) -> dict[str, Any]:
    """One row per run. A run takes minutes, about ten for AG News from `data`."""
    shrunk = QUICK if quick else {}
    runs_folder = RUNS / "quick" if quick else RUNS
    planned: list[tuple[str, str, dict[str, Any], str]] = []
    seeds = SEEDS[: 1 if quick else None]
    for seed in seeds:
        name = f"seed{seed}" if seed else "quickstart"
        command = (
            f".venv/bin/python -m train --set seed={seed} --output runs/{name}" if seed else "make train"
        )
        planned.append(("quickstart", name, {"seed": seed}, command))
    for seed in seeds if data is not None else ():
        name = f"minilm-agnews-seed{seed}" if seed else "minilm-agnews"
        more = f" --set seed={seed} --output runs/{name}" if seed else ""
        command = f'make train RECIPE=minilm-agnews ARGS="--data FOLDER{more}"'
        planned.append(("minilm-agnews", name, {"seed": seed, "data": data}, command))
    rows = []
    for recipe, name, settings, command in tqdm(planned, desc="recipes", unit=" runs"):
        summary = finish_run(recipe, {**settings, **shrunk}, runs_folder / name)
        rows.append(
            {
                "recipe": recipe, "seed": settings["seed"], "command": command, "device": summary["device"],
                "test_articles": sum(map(sum, summary["test_confusion_matrix"])),
                **{key: summary[key] for key in _KEPT},
            }
        )  # fmt: skip
    return {"seeds": list(SEEDS), "precision": rows[0]["precision"], "rows": rows}


def table(result: dict[str, Any]) -> str:
    """One row per run: command, accuracy, time."""
    lines = [["recipe", "command", "test accuracy", "macro F1", "test articles", "training, min"]]
    for row in result["rows"]:
        lines.append(
            [
                f"{row['recipe']}, seed {row['seed']}",
                f"`{row['command']}`",
                f"{row['test_accuracy']:.4f}",
                f"{row['test_macro_f1']:.4f}",
                f"{row['test_articles']:,}",
                f"{row['train_seconds'] / 60:.1f}",
            ]
        )
    devices = " and ".join(dict.fromkeys(row["device"] for row in result["rows"]))
    means = []
    for recipe in dict.fromkeys(row["recipe"] for row in result["rows"]):
        reached = [row["test_accuracy"] for row in result["rows"] if row["recipe"] == recipe]
        means.append(f"{recipe} {statistics.mean(reached):.4f}")
    words = f"{result['precision']}; {devices}. Mean test accuracy over the seeds: {', '.join(means)}."
    return "\n\n".join([markdown(lines), prose(words)])
