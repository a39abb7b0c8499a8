"""python -m train.evaluate: the scores of one or more runs on a test split."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.command import CommandParser, run_command
from train.config import Recipe
from train.data import DATA_HELP
from train.inference import TestSplit
from train.metrics import Scores
from train.runs import CONFIG, RunError, check_finished, run_recipe
from train.trained import load_trained


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 success, 2 an error that the message explains."""
    parser = CommandParser(
        "train.evaluate",
        "Scores runs, or adapters' folders, on the test split of their own data or of D. "
        "Prints a table by class for one RUN, and a row per RUN for several.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--data", metavar="D", help=DATA_HELP)
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object per RUN, one per line, instead of the table"
    )
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda: _print_scores(options.runs, options.data, options.json))


def _print_scores(folders: Sequence[Path], data: str | None, as_json: bool) -> None:
    for folder in folders:
        _data_of(folder, data)  # reports a wrong folder before minutes are spent on the others
    width = max(len(str(folder)) for folder in folders)
    if len(folders) > 1 and not as_json:
        print(f"{'':<{width}}  accuracy    95% interval  macro F1     rows  data")
    for folder in folders:
        result = evaluate(folder, data)
        if as_json:
            print(
                json.dumps(({"run": str(folder)} if len(folders) > 1 else {}) | _fields(result)), flush=True
            )
        elif len(folders) > 1:
            print(f"{folder!s:<{width}}  {_row(result)}", flush=True)
        else:
            scores: Scores = result["scores"]
            print(f"{folder} on the {scores.confusion.sum():,} test texts of {result['data']}")
            print(f"accuracy {scores.accuracy:.4f}  macro F1 {scores.macro_f1:.4f}\n")
            print(scores.table(result["labels"]))


def _fields(result: dict[str, Any]) -> dict[str, Any]:
    scores: Scores = result["scores"]
    return {
        "data": result["data"],
        "rows": int(scores.confusion.sum()),
        "accuracy": scores.accuracy,
        "macro_f1": scores.macro_f1,
        "confusion_matrix": scores.confusion.tolist(),
        "report": scores.report(result["labels"]),
    }


def _row(result: dict[str, Any]) -> str:
    scores: Scores = result["scores"]
    low, high = scores.interval
    return (
        f"{scores.accuracy:>8.4f}   {low:.4f}-{high:.4f}  {scores.macro_f1:>8.4f}"
        f"  {scores.confusion.sum():>7,}  {result['data']}"
    )


def _data_of(folder: Path, data: str | None) -> tuple[Recipe, str]:
    """The recipe of the run in `folder`, and the name of the data to test it on. Raises RunError."""
    is_run = (folder / CONFIG).is_file()
    if is_run:
        check_finished(folder)
    elif not folder.is_dir():
        raise RunError(f"{folder}: there is no such folder")
    elif data is None:
        raise RunError(f"{folder}: an adapter's folder does not name the data to test it on; give --data")
    recipe = run_recipe(folder) if is_run else Recipe()
    return recipe, data or recipe.data


def evaluate(folder: Path, data: str | None) -> dict[str, Any]:
    """The name of the data, its labels and the `scores` of the run in `folder` on the test split.

    data: other data than the run's own. Raises RunError if its classes differ from the model's, and what
    loading raises.
    """
    recipe, name = _data_of(folder, data)
    trained = load_trained(folder, text=True)
    test_set = TestSplit.of(trained, recipe, name)
    test_set.prepare(trained.model)
    predicted = test_set.logits(trained.model).argmax(1).numpy()
    scores = Scores.of(test_set.rows.labels, predicted, len(trained.labels))
    return {"data": name, "labels": trained.labels, "scores": scores}


if __name__ == "__main__":
    sys.exit(main())
