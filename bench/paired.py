"""From the results of `bench.grid` to rows: accuracy, intervals, and paired differences from the references.

Intervals and tests are over test articles. All methods classify the same ones, so differences are paired.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.grid import Method, Results, Trained, parts_of, rate, runs_at_once, train_method, used_to_select
from train.runs import RunError
from train.significance import holm, normal_interval, sign_flip, wilson

LORA, FULL = "LoRA r=8", "full fine-tuning"
REFERENCES = (LORA, FULL)  # with which every method is compared


def analyse(data: str, methods: Sequence[Method], results: Results, shrunk: bool = False) -> dict[str, Any]:
    """One row per method with a result for each of its cells, and its differences from REFERENCES.

    Raises RunError if there is no such method.
    """
    finished: list[Trained] = []
    missing = []
    for method in methods:
        try:
            finished.append(train_method(data, method, results.__getitem__, shrunk))
        except KeyError:
            missing.append(method.name)
    if not finished:
        raise RunError(f"{data}: no method has a result for each of its cells")
    return {**compare(data, finished, REFERENCES), "missing": missing}


def compare(data: str, finished: Sequence[Trained], references: Sequence[str]) -> dict[str, Any]:
    """One row per trained method, and its differences from the references by name."""
    folds = data == "bbc"
    used = used_to_select() if folds else []
    runs = 1 if folds else len(parts_of(data))  # that classify an article
    correct = {trained.method.name: trained.correct() for trained in finished}
    rows = [_row(trained, runs, used) for trained in finished]
    for reference in references:
        others = [row for row in rows if row["name"] != reference and reference in correct]
        pairs = [_difference(correct[row["name"]], correct[reference], runs) for row in others]
        corrected = holm([pair["p"] for pair in pairs])
        for row, pair, p in zip(others, pairs, corrected, strict=True):
            row["against"][reference] = {**pair, "p_corrected": p}
    cells = [cell for trained in finished for cell in (trained.sweep | trained.chosen).items()]
    settings, result = cells[0][0].settings(), cells[0][1]
    return {
        "data": Path(data).name,
        "folds": folds,
        "parts": len(parts_of(data)),
        "test_articles": len(next(iter(correct.values()))),
        "used_to_select": sum(used),
        **{key: result[key] for key in ("train_articles", "precision", "device")},
        **{key: settings[key] for key in ("model", "epochs", "batch_size", "max_length_tokens")},
        "runs": len(cells),
        "runs_at_once": runs_at_once(),
        "hours": sum(result["train_seconds"] for _, result in cells) / 3600,
        "rows": rows,
    }


def _row(trained: Trained, runs: int, used: list[bool]) -> dict[str, Any]:
    """One method. used: the test articles that were also used to select the rate."""
    results, correct = list(trained.chosen.values()), trained.correct()
    if runs == 1:
        low, high = wilson(sum(correct), len(correct))
    else:
        mean, half_width = normal_interval([count / runs for count in correct])
        low, high = mean - half_width, mean + half_width
    unused = [count for count, was_used in zip(correct, used, strict=True) if not was_used] if used else []
    return {
        "name": trained.method.name,
        **{key: results[0][key] for key in ("trainable_parameters", "lora_parameters", "adapter_bytes")},
        "learning_rate": rate(trained.quarter),
        "interior": trained.interior,
        "accuracy": statistics.fmean(correct) / runs,
        "low": low,
        "high": high,
        "by_part": [result["test_accuracy"] for result in results],
        **({"accuracy_unused": statistics.fmean(unused)} if used else {}),
        "sweep": [
            {"learning_rate": rate(cell.quarter), "loss": run["val_loss"], "accuracy": run["val_accuracy"]}
            for cell, run in trained.sweep.items()
        ],
        "against": {},
    }  # fmt: skip


def _difference(first: Sequence[int], second: Sequence[int], runs: int) -> dict[str, float]:
    """The mean paired difference of accuracy, its 95% interval, and the p-value of no difference."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean, half_width = normal_interval([difference / runs for difference in differences])
    return {
        "difference": mean,
        "low": mean - half_width,
        "high": mean + half_width,
        "p": sign_flip(differences),
    }
