"""python -m train.evaluate: a run's scores on a test split."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from model import speed_up
from train.batches import encode
from train.command import CommandParser, run_command
from train.config import Recipe
from train.data import load_news
from train.hardware import resolve_device, resolve_precision
from train.inference import predict_logits
from train.metrics import Scores
from train.runs import CONFIG, RunError, check_finished, run_recipe
from train.trained import load_trained


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 success, 2 an error that the message explains."""
    parser = CommandParser(
        "train.evaluate", "Scores a run, or an adapter's folder, on the test split of its own data or of D."
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument(
        "--data", metavar="D", help="bbc, ag_news, a dataset on the hub, or a folder of CSV files"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    return run_command(lambda: _print_scores(options.run, options.data, options.json))


def _print_scores(folder: Path, data: str | None, as_json: bool) -> None:
    result = evaluate(folder, data)
    scores: Scores = result["scores"]
    labels, rows = result["labels"], int(result["scores"].confusion.sum())
    if not as_json:
        print(f"{folder} on the {rows:,} test texts of {result['data']}")
        print(f"accuracy {scores.accuracy:.4f}  macro F1 {scores.macro_f1:.4f}\n")
        print(scores.table(labels))
        return
    fields = {
        "data": result["data"],
        "rows": rows,
        "accuracy": scores.accuracy,
        "macro_f1": scores.macro_f1,
        "confusion_matrix": scores.confusion.tolist(),
        "report": scores.report(labels),
    }
    print(json.dumps(fields))


def evaluate(folder: Path, data: str | None) -> dict[str, Any]:
    """The name of the data, its labels and the `scores` of the run in `folder` on the test split.

    data: other data than the run's own. Raises RunError if its classes differ from the model's, and what
    loading raises.
    """
    check_finished(folder)
    is_run = (folder / CONFIG).is_file()
    recipe = run_recipe(folder) if is_run else Recipe()
    if data is None and not is_run:
        raise RunError(f"{folder}: an adapter's folder does not name the data to test it on; give --data")
    name = data or recipe.data
    trained = load_trained(folder, text=True)
    news = load_news(name, recipe.validation_fraction, recipe.seed)
    if news.labels != trained.labels:
        raise RunError(
            f"{name}: its classes are {', '.join(news.labels)}; the model knows {', '.join(trained.labels)}"
        )
    device = resolve_device("auto")  # not the run's, which may be on another machine
    precision = resolve_precision(recipe.precision, device)
    speed_up(trained.model.to(device), precision)
    rows = encode(news.test, trained.tokenizer, trained.max_length_tokens)
    pad = trained.tokenizer.pad_token_id
    logits = predict_logits(trained.model, rows, 2 * recipe.batch_size, pad, device, precision)
    scores = Scores.of(rows.labels, logits.argmax(1).numpy(), len(news.labels))
    return {"data": name, "labels": news.labels, "scores": scores}


if __name__ == "__main__":
    sys.exit(main())
