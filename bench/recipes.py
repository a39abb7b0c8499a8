"""The accuracy of the recipes on three seeds: the quickstart and, if AG News is given, minilm-agnews.

minilm-agnews is compared with full fine-tuning on the first seed. It has the same steps, and the learning
rate that `bench variants` has selected. The runs are ordinary ones in runs/. A finished run is not repeated.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.paired import difference, paired_difference
from bench.tables import prose
from bench.training import QUICK, finish_run
from train.predictions import read_predictions
from train.tables import markdown

RUNS = Path("runs")
SEEDS = (0, 1, 2)
AG_NEWS = "minilm-agnews"
FULL = {"method": "full", "learning_rate": 1e-4}
_KEPT = (
    "method", "test_accuracy", "test_macro_f1", "val_accuracy", "val_loss", "best_epoch", "train_seconds",
    "examples_per_second", "adapter_bytes", "lora_parameters", "trainable_parameters", "total_parameters",
    "peak_memory_bytes", "precision",
)  # fmt: skip


def run(quick: bool, data: str | None = None) -> dict[str, Any]:
    """One row per run. A run takes minutes, and on AG News from `data` up to 40."""
    planned: list[tuple[str, dict[str, Any], str]] = []  # recipe, settings, name of the run
    planned += [("quickstart", {"seed": seed}, f"seed{seed}" if seed else "quickstart") for seed in SEEDS]
    if data is not None:
        planned += [
            (AG_NEWS, {"seed": seed, "data": data}, f"{AG_NEWS}-seed{seed}" if seed else AG_NEWS)
            for seed in SEEDS
        ]
        planned.append((AG_NEWS, {**FULL, "seed": 0, "data": data}, f"{AG_NEWS}-full"))
    planned = [each for each in planned if not (quick and each[1]["seed"])]
    rows = []
    right: dict[str, list[bool]] = {}  # by method of AG_NEWS with seed 0: which texts
    for recipe, settings, name in tqdm(planned, desc="recipes", unit=" runs"):
        folder = (RUNS / "quick" if quick else RUNS) / name
        summary = finish_run(recipe, {**settings, **(QUICK if quick else {})}, folder)
        correct = [each.correct for each in read_predictions(folder)]
        if recipe == AG_NEWS and settings["seed"] == 0:
            right[summary["method"]] = correct
        rows.append(
            {
                "recipe": recipe, "seed": settings["seed"], "command": _command(recipe, settings, folder),
                "device": summary["device"], "test_articles": len(correct),
                **{key: summary[key] for key in _KEPT},
            }
        )  # fmt: skip
    return {
        "seeds": list(SEEDS),
        "precision": rows[0]["precision"],
        "rows": rows,
        **({"against_full": paired_difference(right["lora"], right["full"], 1)} if right else {}),
    }


def _command(recipe: str, settings: dict[str, Any], folder: Path) -> str:
    """The command of a run: `make train`, with ARGS where it has other settings or another folder."""
    flags = ["--data FOLDER"] if "data" in settings else []
    flags += [f"--set {key}={value}" for key, value in settings.items() if key != "data" and value]
    flags += [f"--output {folder}"] if folder.name != recipe else []
    chosen = f" RECIPE={recipe}" if recipe != "quickstart" else ""
    return f"make train{chosen}" + (f' ARGS="{" ".join(flags)}"' if flags else "")


def table(result: dict[str, Any]) -> str:
    """One row per run: command, accuracy, time."""
    lines = [["recipe", "command", "test accuracy", "macro F1", "test articles", "training, min"]]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        name = f"{row['recipe']}{', full fine-tuning' if row['method'] == 'full' else ''}"
        groups.setdefault(name, []).append(row)
        lines.append(
            [
                f"{name}, seed {row['seed']}",
                f"`{row['command']}`",
                f"{row['test_accuracy']:.4f}",
                f"{row['test_macro_f1']:.4f}",
                f"{row['test_articles']:,}",
                f"{row['train_seconds'] / 60:.1f}",
            ]
        )
    words = f"{result['precision']}. Mean test accuracy over the seeds:"
    for name, rows in groups.items():
        devices = " and ".join(dict.fromkeys(row["device"] for row in rows))
        mean = statistics.fmean(row["test_accuracy"] for row in rows)
        words += f" {name} {mean:.4f} ({devices});"
    words = f"{words.removesuffix(';')}."
    if "against_full" in result:
        pair = result["against_full"]
        words += (
            f" {AG_NEWS} minus full fine-tuning with the same steps, with seed 0, in points, paired by test"
            f" article: {difference(pair)}."
        )
    return "\n\n".join([markdown(lines), prose(words)])
