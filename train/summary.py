"""A run's summary: summary.json, and the text at the end of a run."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora import ParameterCount
from lora.adapted import lora_layers
from train.bbc import is_bbc
from train.command import shell_command
from train.hardware import device_name, peak_memory_bytes
from train.loop import Trainer
from train.metrics import Scores
from train.runs import CONFIG, run_recipe
from train.tables import duration

_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy")


def make_summary(
    name: str,
    trainer: Trainer,
    counts: ParameterCount,
    scores: Scores,
    labels: tuple[str, ...],
    trained_bytes: int,
) -> dict[str, Any]:
    """The contents of summary.json. scores: on the test split. trained_bytes: size of what was saved."""
    recipe, state = trainer.recipe, trainer.state
    return {
        "recipe": name,
        "model": recipe.model,
        "data": recipe.data,
        "method": recipe.method,
        "seed": recipe.seed,
        "precision": trainer.precision,
        "device": device_name(trainer.device),
        "labels": list(labels),
        "test_accuracy": scores.accuracy,
        "test_macro_f1": scores.macro_f1,
        "test_confusion_matrix": scores.confusion.tolist(),
        "test_report": scores.report(labels),
        "val_accuracy": state.best_accuracy,
        "val_loss": state.best_loss,
        "best_epoch": state.best_epoch,
        "epochs": state.epoch,
        "steps": state.step,
        "skipped_steps": state.skipped_steps,
        "history": state.history,
        "lora_parameters": counts.lora,
        "head_parameters": counts.head,
        "trainable_parameters": counts.trainable,
        "total_parameters": counts.total,
        "adapted_layers": list(lora_layers(trainer.model)) if recipe.method == "lora" else [],
        "adapter_bytes": trained_bytes,
        "train_examples": state.examples,
        "train_seconds": state.seconds,
        "examples_per_second": state.examples / state.seconds,
        "tokens_per_second": state.tokens / state.seconds,
        "padding_fraction": 1 - state.tokens / state.padded_tokens,
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in _PACKAGES},
        },
    }


def summary_text(summary: dict[str, Any], folder: Path) -> str:
    """The end of a run's output: results, cost, files, and commands to continue with."""
    best, epochs = summary["best_epoch"], summary["epochs"]
    lora = f", {summary['lora_parameters']:,} of them LoRA" if summary["lora_parameters"] else ""
    share = summary["trainable_parameters"] / summary["total_parameters"]
    rows = sum(map(sum, summary["test_confusion_matrix"]))
    worst = min((row for row in summary["test_report"] if row["rows"]), key=lambda row: row["f1"])
    trained = "adapter/" if summary["method"] == "lora" else "weights.safetensors"
    is_news = is_bbc(summary["data"]) or summary["data"] == "ag_news"
    example = "Shares rose after the bank cut its rates." if is_news else "your text"
    next_commands = [
        shell_command("train.predict", folder, example),
        shell_command("train.evaluate", folder),
    ]
    if summary["method"] == "lora":
        r = 1 if run_recipe(folder).r > 1 else 8
        other = folder.absolute().with_name(f"{folder.resolve().name}-r{r}")
        next_commands += [
            shell_command("train.anatomy", folder),
            shell_command("train", "--recipe", folder / CONFIG, "--set", f"r={r}", "--output", other),
        ]
    return "\n".join(
        [
            "",
            f"test accuracy {summary['test_accuracy']:.4f}, macro F1 {summary['test_macro_f1']:.4f}"
            f" on {rows:,} texts (epoch {best} of {epochs}, validation {summary['val_accuracy']:.4f})",
            f"  hardest class: {worst['label']}, F1 {worst['f1']:.4f}",
            f"trained {summary['trainable_parameters']:,} of {summary['total_parameters']:,} parameters"
            f" ({share:.2%}){lora}",
            f"cost {duration(summary['train_seconds'])},"
            f" {summary['examples_per_second']:.1f} texts per second with validation,"
            f" {summary['padding_fraction']:.1%} padding,"
            f" peak memory {summary['peak_memory_bytes'] / 2**20:,.0f} MiB",
            f"saved {folder}/: {trained} ({summary['adapter_bytes'] / 1e6:.2f} MB), summary.json,"
            " metrics.jsonl, figures/",
            "next",
            *(f"  {command}" for command in next_commands),
        ]
    )
