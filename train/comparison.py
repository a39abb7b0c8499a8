"""Finished runs side by side, from what their folders record: nothing is trained or evaluated."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from lora import LoraConfig
from lora.errors import first_line
from model.packages import DataPackageMissingError
from train.config import Recipe
from train.metrics import Scores
from train.predictions import Key, Prediction, match, read_predictions, text_digest
from train.runs import (
    METRICS,
    PREDICTIONS,
    SUMMARY,
    RunError,
    check_finished,
    read_log,
    read_summary,
    resume_command,
    run_recipe,
)
from train.significance import mcnemar
from train.tables import excerpt, mebibytes, size


@dataclass(frozen=True)
class Run:
    """What the folder of a finished run records. `predictions` is empty if there is no such file."""

    name: str
    folder: Path
    recipe: Recipe
    summary: dict[str, Any]
    scores: Scores
    predictions: list[Prediction]
    log: list[dict[str, Any]]


@dataclass(frozen=True)
class Table:
    """Rows of text, the first of which is the header, with a title and sentences about them."""

    title: str
    rows: list[list[str]]
    notes: list[str]


@dataclass(frozen=True)
class Change:
    """A test text that runs predicted differently. predictions: by run, None where it was not tested.

    text: empty if the data could not be loaded.
    """

    label: str
    predictions: list[Prediction | None]
    text: str = ""

    @property
    def digest(self) -> str:
        """The text's digest, empty if no run recorded it."""
        return next((row.digest for row in self.predictions if row and row.digest), "")


@dataclass(frozen=True)
class Comparison:
    """changes: the largest change of the true class's probability first. notes: about them."""

    runs: list[Run]
    tables: list[Table]
    changes: list[Change]
    notes: list[str]


def compare(folders: Sequence[Path]) -> Comparison:
    """Compares the finished runs in `folders`.

    Raises RunError if there are fewer than two, one is given twice, or a run is not finished or damaged.
    """
    if len(folders) < 2:
        raise RunError(
            f"{folders[0]}: a comparison needs two or more runs; `python -m train.runs` lists those in runs/"
        )
    for folder, count in Counter(folder.resolve() for folder in folders).items():
        if count > 1:
            raise RunError(f"{folder}: given {count} times; a comparison needs different runs")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    matched, by_position = match([run.predictions for run in runs])
    changes = _changes(matched)
    texts, notes = _find_texts(runs, {change.digest for change in changes} - {""})
    changes = [dataclasses.replace(change, text=texts.get(change.digest, "")) for change in changes]
    tables = [_settings(runs), _accuracy(runs), _paired(runs, matched, by_position), _cost(runs)]
    return Comparison(runs, tables, changes, notes)


def _read_run(folder: Path, name: str) -> Run:
    check_finished(folder)
    recipe, summary = run_recipe(folder), read_summary(folder)
    try:
        confusion = np.asarray(summary["test_confusion_matrix"], dtype=np.int64)
        if confusion.shape != (len(summary["labels"]),) * 2:
            raise ValueError("it is not a square with a row per class")
    except (ValueError, TypeError, OverflowError) as error:
        raise RunError(f"{folder / SUMMARY}: damaged: test_confusion_matrix: {error}") from error
    predictions: list[Prediction] = []
    if (folder / PREDICTIONS).is_file():
        predictions = read_predictions(folder)
        correct, expected = sum(row.correct for row in predictions), int(np.trace(confusion))
        if (len(predictions), correct) != (confusion.sum(), expected):
            raise RunError(
                f"{folder}: {PREDICTIONS} and {SUMMARY} are not of one run: {correct} of {len(predictions)} "
                f"texts are correct in one, {expected} of {confusion.sum()} in the other"
            )
    log = read_log(folder / METRICS)
    return Run(excerpt(name, 255), folder, recipe, summary, Scores(confusion), predictions, log)


def _changes(matched: Sequence[dict[Key, Prediction]]) -> list[Change]:
    found = []
    for key in dict.fromkeys(key for rows in matched for key in rows):
        predictions = [rows.get(key) for rows in matched]
        tested = [row for row in predictions if row]
        if len({row.prediction for row in tested}) > 1:
            found.append(Change(tested[0].label, predictions))
    return sorted(found, key=_size_of_change, reverse=True)


def _size_of_change(change: Change) -> float:
    probabilities = [row.probabilities for row in change.predictions if row]
    values = [by_class[change.label] for by_class in probabilities if change.label in by_class]
    return max(values, default=0.0) - min(values, default=0.0)


def _find_texts(runs: Sequence[Run], digests: set[str]) -> tuple[dict[str, str], list[str]]:
    """The texts with these digests, from the test splits of the runs' data, and what could not be loaded."""
    if not digests:
        return {}, []
    from train.data import DataError, load_news  # here, because it imports datasets, which takes a second

    found: dict[str, str] = {}
    notes = []
    for name in dict.fromkeys(run.recipe.data for run in runs):
        recipe = next(run.recipe for run in runs if run.recipe.data == name)
        try:
            test = load_news(name, recipe.validation_fraction, recipe.seed).test
        except (DataError, DataPackageMissingError, OSError) as error:
            notes.append(f"The texts of {name} cannot be loaded ({first_line(error)}).")
            continue
        found |= {digest: text for text in test["text"] if (digest := text_digest(text)) in digests}
    if missing := len(digests - found.keys()):
        notes.append(f"Texts not found in the data, shown by their digest: {missing:,}.")
    return found, notes


def _settings(runs: Sequence[Run]) -> Table:
    by_run = [_settings_of(run) for run in runs]
    differing = [key for key in by_run[0] if any(other[key] != by_run[0][key] for other in by_run)]
    rows = [["setting", *(run.name for run in runs)]]
    rows += [[key, *(_as_text(settings[key]) for settings in by_run)] for key in differing]
    note = "All other settings are equal." if differing else "All settings are equal."
    return Table("Settings that differ", rows if differing else [], [note])


def _settings_of(run: Run) -> dict[str, Any]:
    """The recipe's fields, with the precision and device that were used, and the classes."""
    found = dataclasses.asdict(run.recipe)
    found |= {key: run.summary[key] for key in ("precision", "device") if key in run.summary}
    if run.recipe.method != "lora":
        found |= {field.name: "-" for field in dataclasses.fields(LoraConfig) if field.name in found}
    return {**found, "classes": run.summary["labels"]}


def _as_text(value: object) -> str:
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return excerpt(str(value), 100) if not isinstance(value, float) else str(value).removesuffix(".0")


def _accuracy(runs: Sequence[Run]) -> Table:
    rows = [["run", "test accuracy", "95% interval", "macro F1", "test texts", "validation accuracy"]]
    for run in runs:
        low, high = run.scores.interval
        rows.append(
            [run.name, f"{run.scores.accuracy:.4f}", f"{low:.4f}-{high:.4f}", f"{run.scores.macro_f1:.4f}",
             f"{run.scores.confusion.sum():,}", f"{run.summary['val_accuracy']:.4f}"]
        )  # fmt: skip
    note = (
        "Wilson's interval, for each run alone. Overlapping intervals do not show that runs are equal: on the"
        " same texts the paired test detects smaller differences."
    )
    return Table("Accuracy", rows, [note])


def _paired(runs: Sequence[Run], matched: Sequence[dict[Key, Prediction]], by_position: bool) -> Table:
    rows = [["first run", "second run", "shared texts", "only first correct", "only second correct",
             "difference", "p"]]  # fmt: skip
    notes = [_unmatched(run, by_position) for run in runs if not all(row.digest for row in run.predictions)]
    notes += [f"{run.name} has no {PREDICTIONS}." for run in runs if not run.predictions]
    for (first, ours), (second, theirs) in combinations(zip(runs, matched, strict=True), 2):
        shared = sorted(ours.keys() & theirs.keys())
        if ours and theirs and not len(ours) == len(theirs) == len(shared):
            notes.append(_not_the_same(first, second, ours, theirs))
        if shared:
            only_first, only_second, p = mcnemar(
                [ours[key].correct for key in shared], [theirs[key].correct for key in shared]
            )
            difference = (only_second - only_first) / len(shared)
            rows.append(
                [first.name, second.name, f"{len(shared):,}", f"{only_first:,}", f"{only_second:,}",
                 f"{difference:+.4f}", f"{p:.4g}"]
            )  # fmt: skip
    if len(rows) == 1:
        return Table("McNemar's paired test", [], [*notes, "No runs can be compared in pairs."])
    notes.append(
        "p: if both runs were equally accurate, the probability that the texts on which only one of them is"
        " correct split at least as unevenly (exact binomial test, two-sided)."
    )
    if len(rows) > 2:
        notes.append(
            f"p is not corrected for the number of tests; Bonferroni's level is 0.05/{len(rows) - 1}."
        )
    return Table("McNemar's paired test", rows, notes)


def _not_the_same(first: Run, second: Run, ours: dict[Key, Prediction], theirs: dict[Key, Prediction]) -> str:
    """How far the test texts of two runs differ."""
    shared = ours.keys() & theirs.keys()
    digests = [{row.digest for row in rows.values()} for rows in (ours, theirs)]
    relabelled = len(digests[0] & digests[1] - {ours[key].digest for key in shared})
    note = (
        f"{first.name} and {second.name} were not tested on the same texts: {len(ours):,} and"
        f" {len(theirs):,}, of which {len(shared):,} are shared"
    )
    if relabelled:
        note += f"; {relabelled:,} others are in both, with different true classes"
    return note + (". The test uses the shared texts alone." if shared else ".")


def _unmatched(run: Run, by_position: bool) -> str:
    """How the texts of a run without digests were matched, and how to add digests."""
    how = (
        "texts are matched by their position, since the true classes of all runs are equal one by one"
        if by_position
        else "it is left out, because the texts or true classes of all runs are not equal one by one"
    )
    return (
        f"{run.name}: its {PREDICTIONS} has no digests of the texts; {how}. To add digests, remove its "
        f"{SUMMARY} and run `{resume_command(run.folder)}`."
    )


def _cost(runs: Sequence[Run]) -> Table:
    rows = [["run", "trained parameters", "saved", "training, s", "texts/s", "peak memory, MiB"]]
    for run in runs:
        summary = run.summary
        rows.append(
            [run.name, f"{summary['trainable_parameters']:,}",
             size(summary["adapter_bytes"]), f"{summary['train_seconds']:,.1f}",
             f"{summary['examples_per_second']:,.1f}", mebibytes(summary["peak_memory_bytes"])]
        )  # fmt: skip
    devices = {(run.summary.get("device"), run.summary.get("precision")) for run in runs}
    note = "The runs used different devices or precisions; compare time and memory with care."
    return Table("Cost", rows, [note] if len(devices) > 1 else [])
