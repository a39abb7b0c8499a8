"""Accuracy by method: full fine-tuning, LoRA by rank, the head alone.

Every cell is a run of `python -m train` in its own process and in runs/accuracy. A finished run is not
repeated, and a stopped one is resumed. On the CPU one run per core, with one thread each, runs at a time,
which is faster than one run after another on all cores.

Each method has the same number of candidate learning rates. The rate with the lowest validation loss on
seed 0 is used. LoRA's rate is selected at r = 8 and used for the other ranks with the same alpha (arXiv
2106.09685, section 4.1). AG News is much larger than bbc: there, rates are tried on a part of the training
split, and the two best of each method on all of it (successive halving, arXiv 1502.07943). Nothing is
selected by the test split.
"""

from __future__ import annotations

import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import plotting
from bench.steps import ALL_LINEAR, QUERY_VALUE
from bench.tables import prose
from bench.training import QUICK, finish_run
from train.hardware import resolve_device
from train.predictions import read_predictions
from train.significance import mcnemar, mean_and_interval
from train.tables import markdown, mebibytes

RUNS = Path("runs/accuracy")
SEEDS = (0, 1, 2)
SETTINGS: dict[str, Any] = {
    "model": "minilm",
    "batch_size": 32,
    "max_length_tokens": 64,
    "lora_alpha": 16,
    "telemetry": False,
}
# By dataset, bbc or another: enough to see differences, and to train all cells in an afternoon.
BBC: dict[str, Any] = {"epochs": 3}  # which has its own validation split
LARGE: dict[str, Any] = {"epochs": 2, "validation_fraction": 0.05}
TRIED_ON: dict[str, Any] = {"max_train_examples": 4500}  # the part of a large dataset for trying rates
RATES = {
    "full": (3e-5, 6e-5, 1.2e-4, 2.4e-4),
    "lora": (1e-3, 2e-3, 4e-3, 8e-3),
    "head": (2e-3, 4e-3, 8e-3, 1.6e-2),
}
TUNED_RANK = 8
FINALISTS = 2


@dataclass(frozen=True)
class Mode:
    """A method that is compared and has its own learning rate. Rank and targets are for LoRA only."""

    method: str  # full | lora | head
    r: int = 0
    targets: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = "query, value" if self.targets == QUERY_VALUE else "all linear layers"
        return (
            f"LoRA r={self.r}, {where}"
            if self.method == "lora"
            else {"full": "full", "head": "head only"}[self.method]
        )


@dataclass(frozen=True)
class Cell:
    """One training run on `data`. trial: tries a rate on a part of it. shrunk: with the fields of QUICK."""

    data: str
    mode: Mode
    learning_rate: float
    seed: int
    shrunk: bool = False
    trial: bool = False

    @property
    def folder(self) -> Path:
        what = (
            f"lora-r{self.mode.r}-{len(self.mode.targets)}targets"
            if self.mode.method == "lora"
            else self.mode.method
        )
        size = "quick" if self.shrunk else "whole"
        if self.trial:
            what = f"trial-{what}"
        return RUNS / size / Path(self.data).name / f"{what}-lr{self.learning_rate:g}-seed{self.seed}"

    def finish(self) -> dict[str, Any]:
        """The run's summary. Raises RunError as finish_run does."""
        return finish_run("quickstart", self.settings(), self.folder, threads=1)

    def settings(self) -> dict[str, Any]:
        """The recipe's fields."""
        fields: dict[str, Any] = {**SETTINGS, **(BBC if self.data == "bbc" else LARGE), "data": self.data}
        fields |= {"method": self.mode.method, "learning_rate": self.learning_rate, "seed": self.seed}
        if self.mode.method == "lora":
            fields |= {"r": self.mode.r, "target_modules": self.mode.targets}
        if self.trial:
            fields |= TRIED_ON
        return fields | (QUICK if self.shrunk else {})

    def correct(self) -> list[bool]:
        """Whether each test article was classified correctly."""
        return [row.correct for row in read_predictions(self.folder)]


Finished = tuple[Cell, dict[str, Any]]


def run(quick: bool, data: str | None = None) -> dict[str, Any]:
    """Trains all cells on bbc, and on AG News if `data` (a folder or a name on the hub) is given."""
    ranks = (1, 8) if quick else (1, 2, 4, 8, 16, 32, 64)
    sets = [_data_set("bbc", [Mode("lora", r, QUERY_VALUE) for r in ranks], quick)]
    if data is not None:
        modes = [Mode("lora", r, targets) for targets in (QUERY_VALUE, ALL_LINEAR) for r in (1, 8, 64)]
        sets.append(_data_set(data, modes, quick))
    return {
        "settings": SETTINGS,
        "candidate_rates": RATES,
        "precision": sets[0]["precision"],
        "sets": sets,
    }


def table(result: dict[str, Any]) -> str:
    """One table per dataset, followed by a summary."""
    return "\n\n".join(part for found in result["sets"] for part in _set_table(found, result))


def _set_table(found: dict[str, Any], result: dict[str, Any]) -> list[str]:
    heads = [
        "",
        "trained parameters",
        "rate",
        "test accuracy, %",
        "p against full, by seed",
        "minutes",
        "peak, MiB",
    ]
    lines = [heads]
    for row in found["rows"]:
        pairs = row.get("against_full", [])
        tests = ", ".join("<0.01" if pair["p"] < 0.005 else f"{pair['p']:.2f}" for pair in pairs)
        lines.append(
            [
                row["name"],
                f"{row['trainable_parameters']:,}",
                f"{row['learning_rate']:g}",
                f"{100 * row['mean']:.2f} ± {100 * row['half_width_95']:.2f}",
                tests or "-",
                f"{row['train_seconds'] / 60:.1f}",
                mebibytes(row["peak_memory_bytes"]),
            ]
        )
    settings, rates = result["settings"], result["candidate_rates"]
    trials = f" (rates tried on {found['tried_on']:,}, the two best on all)" if found["tried_on"] else ""
    words = (
        f"{found['data']}: {found['train_articles']:,} articles to train on{trials} and"
        f" {found['test_articles']:,} test articles; {settings['model']}, {settings['max_length_tokens']}"
        f" tokens an article, {found['epochs']} epochs, {found['precision']}, {found['device']}. Mean of"
        f" {len(SEEDS)} seeds with its 95% interval (Student's t), which covers the noise of seeds only: the"
        " test articles are the same for all. p: McNemar's exact test on these articles, one value per seed."
        " Minutes and peak are medians."
        f" LoRA's rate is selected at r = {TUNED_RANK} and used for the other ranks."
    )
    edges = [
        row["name"]
        for row in found["rows"]
        if row["learning_rate"] in (rates[row["method"]][0], rates[row["method"]][-1])
    ]
    if edges:
        words += " The selected rate is the smallest or largest candidate, so a better one may exist, for:"
        words += f" {'; '.join(edges)}."
    return [prose(words), markdown(lines), prose(_verdict(found))]


def _verdict(found: dict[str, Any]) -> str:
    """A summary of the rows: each method's mean against full fine-tuning's, and significant differences."""
    full, *others = found["rows"]
    worse = [row["name"] for row in others if _differs(row, "only_full", "only_this")]
    better = [row["name"] for row in others if _differs(row, "only_this", "only_full")]
    lora = [row for row in others if row["method"] == "lora"]
    best, least = max(lora, key=lambda row: row["mean"]), min(lora, key=lambda row: row["mean"])
    gaps = [f"{row['name']} {100 * (row['mean'] - full['mean']):+.2f}" for row in (best, least, others[0])]
    text = (
        f"Mean minus full fine-tuning's, in points: highest of the ranks, {gaps[0]}; lowest,"
        f" {gaps[1]}; {gaps[2]}."
    )
    test = "By McNemar's test at 5%, on at least two seeds,"
    for names, word in ((worse, "worse"), (better, "better")):
        if names:
            text += f" {test} {word}: {'; '.join(names)}."
    return text if worse or better else f"{text} {test} none differs significantly."


def _differs(row: dict[str, Any], more: str, less: str) -> bool:
    pairs = [pair for pair in row["against_full"] if pair["p"] < 0.05 and pair[more] > pair[less]]
    return len(pairs) >= 2


def figures(result: dict[str, Any], folder: Path) -> None:
    """accuracy.png: accuracy by number of trained parameters, one panel per dataset."""
    figure, axes = plotting.panels(1, len(result["sets"]), 5.2, 3.6)
    for axis, found in zip(axes[0], result["sets"], strict=True):
        styles = {"full": (plotting.BLUE, "s", "full fine-tuning"), "head": (plotting.GREY, "^", "head only")}
        for method, (color, marker, label) in styles.items():
            (row,) = (row for row in found["rows"] if row["method"] == method)
            _points(axis, [row], color=color, marker=marker, label=label)
        for targets, color in ((QUERY_VALUE, plotting.ORANGE), (ALL_LINEAR, plotting.GREEN)):
            rows = [row for row in found["rows"] if tuple(row["targets"]) == targets]
            if rows:
                where = "query, value" if targets == QUERY_VALUE else "all linear layers"
                _points(axis, rows, color=color, marker="o", label=f"LoRA on {where}, by rank")
                for row in rows:
                    at = (row["trainable_parameters"], 100 * row["mean"])
                    axis.annotate(str(row["r"]), at, (4, 3), textcoords="offset points", fontsize=7)
        axis.set_xscale("log")
        axis.set(xlabel="trained parameters", ylabel="test accuracy, %", title=found["data"])
    plotting.save(figure, folder / "accuracy.png")


def _points(axis: Any, rows: list[dict[str, Any]], **style: Any) -> None:
    axis.errorbar(
        [row["trainable_parameters"] for row in rows],
        [100 * row["mean"] for row in rows],
        yerr=[100 * row["half_width_95"] for row in rows],
        capsize=3, linewidth=1, **style,
    )  # fmt: skip


def _data_set(data: str, lora: list[Mode], quick: bool) -> dict[str, Any]:
    modes = [Mode("full"), Mode("head"), *lora]
    tuned = list(dict.fromkeys(replace(mode, r=TUNED_RANK) if mode.r else mode for mode in modes))
    candidates = [
        Cell(data, mode, rate, 0, quick, trial=data != "bbc")
        for mode in tuned
        for rate in (RATES[mode.method][1:2] if quick else RATES[mode.method])
    ]
    finalists = min(FINALISTS, len(candidates) // len(tuned))
    runs = len(candidates) + finalists * len(tuned) + len(SEEDS) * len(modes)
    side_by_side = (os.cpu_count() or 1) if resolve_device("auto").type == "cpu" else 1
    with (
        tqdm(total=runs, desc=Path(data).name, unit="run") as progress,
        ThreadPoolExecutor(side_by_side) as pool,
    ):

        def finish(cells: list[Cell]) -> list[Finished]:
            found = []
            for cell, summary in zip(cells, pool.map(Cell.finish, cells), strict=True):
                found.append((cell, summary))
                progress.update()
            return found

        trials = finish(candidates)
        best = {mode: sorted(_by_loss(trials, mode))[:finalists] for mode in tuned}
        finals = finish([Cell(data, mode, rate, 0, quick) for mode in tuned for _, rate in best[mode]])
        rates = {mode: min(_by_loss(finals, mode))[1] for mode in tuned}
        cells = {}
        for mode in modes:
            rate = rates[replace(mode, r=TUNED_RANK) if mode.r else mode]
            cells[mode] = [Cell(data, mode, rate, seed, quick) for seed in SEEDS]
        done = dict(finish([cell for row in cells.values() for cell in row]))
        summaries = {mode: [done[cell] for cell in row] for mode, row in cells.items()}
    full = [cell.correct() for cell in cells[Mode("full")]]
    settings, summary = cells[Mode("full")][0].settings(), summaries[Mode("full")][0]
    return {
        "data": Path(data).name,
        "precision": summary["precision"],
        "device": summary["device"],
        "epochs": settings["epochs"],
        "train_articles": summary["train_examples"] // settings["epochs"],
        "tried_on": candidates[0].settings().get("max_train_examples", 0),
        "test_articles": len(full[0]),
        "tuning": [
            {"mode": str(cell.mode), "learning_rate": cell.learning_rate, "trial": cell.trial,
             "val_loss": summary["val_loss"], "val_accuracy": summary["val_accuracy"],
             "chosen": cell.learning_rate == rates[cell.mode]}
            for cell, summary in trials + finals
        ],
        "rows": [
            _row(cells[mode], summaries[mode], full if mode.method != "full" else None) for mode in modes
        ],
    }  # fmt: skip


def _by_loss(finished: list[Finished], mode: Mode) -> list[tuple[float, float]]:
    return [(summary["val_loss"], cell.learning_rate) for cell, summary in finished if cell.mode == mode]


def _row(cells: list[Cell], summaries: list[dict[str, Any]], full: list[list[bool]] | None) -> dict[str, Any]:
    """One mode over the seeds. full: the correct predictions of full fine-tuning by seed, to pair with."""
    accuracies = [summary["test_accuracy"] for summary in summaries]
    mean, half_width = mean_and_interval(accuracies)
    row = {
        "name": str(cells[0].mode),
        **asdict(cells[0].mode),
        "learning_rate": cells[0].learning_rate,
        "seeds": [cell.seed for cell in cells],
        "trainable_parameters": summaries[0]["trainable_parameters"],
        "lora_parameters": summaries[0]["lora_parameters"],
        "test_accuracy": accuracies,
        "mean": mean,
        "half_width_95": half_width,
        "val_accuracy": [summary["val_accuracy"] for summary in summaries],
        "train_seconds": statistics.median(summary["train_seconds"] for summary in summaries),
        "peak_memory_bytes": statistics.median(summary["peak_memory_bytes"] for summary in summaries),
    }
    if full is not None:
        pairs = [mcnemar(cell.correct(), hits) for cell, hits in zip(cells, full, strict=True)]
        row["against_full"] = [{"only_this": a, "only_full": b, "p": p} for a, b, p in pairs]
    return row
