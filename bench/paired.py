"""From the results of `bench.grid` to rows: accuracy, intervals, and paired differences from the references.

Intervals and tests are over test articles. All methods classify the same ones, so differences are paired.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.grid import Trained, parts_of, rate, used_to_select
from train.significance import holm, normal_interval, paired_interval, sign_flip, wilson

LORA, FULL = "LoRA r=8", "full fine-tuning"
REFERENCES = (LORA, FULL)  # with which every method is compared


def compare(data: str, finished: Sequence[Trained], references: Sequence[str]) -> dict[str, Any]:
    """One row per trained method, and its differences from the references by name."""
    folds = data == "bbc"
    used = used_to_select() if folds else []
    runs = 1 if folds else len(parts_of(data))  # that classify an article
    correct = {trained.method.name: trained.correct() for trained in finished}
    rows = [_row(trained, runs, used) for trained in finished]
    tested: dict[frozenset[str], float] = {}  # two references are one comparison, although two rows have it
    for row in rows:
        for reference in references:
            if row["name"] != reference and reference in correct:
                pair = paired_difference(correct[row["name"]], correct[reference], runs)
                row["against"][reference] = pair
                tested[frozenset((row["name"], reference))] = pair["p"]
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    for row in rows:
        for reference, pair in row["against"].items():
            pair["p_corrected"] = corrected[frozenset((row["name"], reference))]
    results = [result for trained in finished for result in (trained.sweep | trained.chosen).values()]
    (first, result), *_ = finished[0].chosen.items()
    settings = first.settings()
    return {
        "data": Path(data).name,
        "folds": folds,
        "parts": len(parts_of(data)),
        "test_articles": len(next(iter(correct.values()))),
        "used_to_select": sum(used),
        **{key: result[key] for key in ("train_articles", "precision")},
        "device": " or ".join(sorted({each["device"] for each in results if "device" in each})),
        **{key: settings[key] for key in ("model", "epochs", "batch_size", "max_length_tokens")},
        "runs": len(results),
        "hours": sum(result.get("train_seconds", 0) for result in results) / 3600,
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
            {
                "learning_rate": rate(cell.quarter),
                "loss": result.get("val_loss"),  # None if it diverged
                "accuracy": result.get("val_accuracy"),
            }
            for cell, result in trained.sweep.items()
        ],
        "against": {},
    }  # fmt: skip


def paired_difference(first: Sequence[int], second: Sequence[int], runs: int) -> dict[str, float]:
    """The mean paired difference of accuracy, its 95% interval, and the p-value of no difference.

    first, second: for each article, in how many of `runs` runs each of two methods classified it correctly.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    shares = [difference / runs for difference in differences]
    low, high = paired_interval(shares)
    return {"difference": statistics.fmean(shares), "low": low, "high": high, "p": sign_flip(differences)}


def accuracy(row: Mapping[str, Any]) -> str:
    """A row's accuracy in percent with its interval: 98.04 (97.35-98.56)."""
    return f"{100 * row['accuracy']:.2f} ({100 * row['low']:.2f}-{100 * row['high']:.2f})"


def difference(pair: Mapping[str, float]) -> str:
    """A difference from a reference in points with its interval: +0.24 (-0.31 to +0.78)."""
    middle, low, high = (points(pair[key]) for key in ("difference", "low", "high"))
    return f"{middle} ({low} to {high})"


def points(share: float) -> str:
    """A difference of shares in points: +0.24. Zero and what rounds to it is +0.00."""
    return f"{round(100 * share, 2) + 0.0:+.2f}"


def corrected_p(pair: Mapping[str, float]) -> str:
    """Its p-value after correction: 0.412, or <0.001."""
    return f"{pair['p_corrected']:.3f}" if pair["p_corrected"] >= 0.001 else "<0.001"
