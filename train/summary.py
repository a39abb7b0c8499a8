"""The words at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def summary_text(summary: dict[str, Any], folder: Path) -> str:
    """What was learnt, what it cost, where it lies and what to try next."""
    best, epochs = summary["best_epoch"], summary["epochs"]
    lora = f", {summary['lora_parameters']:,} of them LoRA's" if summary["lora_parameters"] else ""
    share = summary["trainable_parameters"] / summary["total_parameters"]
    rows = sum(map(sum, summary["test_confusion_matrix"]))
    worst = min(summary["test_report"], key=lambda row: row["f1"])
    lies = "adapter/" if summary["method"] == "lora" else "weights.safetensors"
    return "\n".join(
        [
            "",
            f"test accuracy {summary['test_accuracy']:.4f}, macro F1 {summary['test_macro_f1']:.4f}"
            f" on {rows:,} articles (epoch {best} of {epochs}, validation {summary['val_accuracy']:.4f})",
            f"  hardest class: {worst['label']}, F1 {worst['f1']:.4f}",
            f"trained {summary['trainable_parameters']:,} of {summary['total_parameters']:,} parameters"
            f" ({share:.2%}){lora}",
            f"cost {_duration(summary['train_seconds'])},"
            f" {summary['examples_per_second']:.1f} articles a second,"
            f" {summary['padding_fraction']:.1%} padding,"
            f" peak memory {summary['peak_memory_bytes'] / 2**20:,.0f} MiB",
            f"saved {folder}/: {lies} ({summary['adapter_bytes'] / 1e6:.2f} MB), summary.json, metrics.jsonl,"
            " figures/",
            "next",
            f'  python -m train.predict {folder} "Shares rose after the bank cut its rates."',
            f"  python -m train.evaluate {folder}",
            *([f"  python -m train.anatomy {folder}"] if summary["method"] == "lora" else []),
            f"  python -m train --recipe {summary['recipe']} --set r=1 --output {folder}-r1",
        ]
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
