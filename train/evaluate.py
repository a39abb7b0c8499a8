"""python -m train.evaluate: a run's scores on a test split."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lora import AdapterError
from model import ModelError, speed_up
from model.minilm import DataPackageMissingError
from train.batches import encode
from train.config import Recipe, RecipeError
from train.data import DataError, load_news
from train.hardware import resolve_device, resolve_precision
from train.loop import predict_logits
from train.metrics import Scores
from train.runs import CONFIG, RunError, load_trained, run_recipe


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 an error that the message explains."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description="Scores a run, or a bare adapter's folder, on the test split of its data or of D.",
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument(
        "--data", metavar="D", help="bbc, ag_news, a data set of the hub, or a folder of CSVs"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args(arguments)
    try:
        result = evaluate(options.run, options.data)
    except (
        AdapterError, DataError, DataPackageMissingError, ModelError, RecipeError, RunError, OSError,
    ) as error:  # fmt: skip
        print(f"error: {error}", file=sys.stderr)
        return 2
    scores: Scores = result["scores"]
    labels = result["labels"]
    if options.json:
        print(
            json.dumps(
                {
                    "data": result["data"],
                    "rows": int(scores.confusion.sum()),
                    "accuracy": scores.accuracy,
                    "macro_f1": scores.macro_f1,
                    "confusion_matrix": scores.confusion.tolist(),
                    "report": scores.report(labels),
                }
            )
        )
    else:
        rows = int(scores.confusion.sum())
        print(f"{options.run} on the {rows:,} test articles of {result['data']}")
        print(f"accuracy {scores.accuracy:.4f}  macro F1 {scores.macro_f1:.4f}\n")
        print(scores.table(labels))
    return 0


def evaluate(folder: Path, data: str | None) -> dict[str, Any]:
    """data, labels and `scores` of what was trained in `folder`, on the test split of `data` or of its own.

    Raises RunError if the data's classes are not the model's, and what loading raises.
    """
    recipe = run_recipe(folder) if (folder / CONFIG).is_file() else Recipe()
    if data is None and not (folder / CONFIG).is_file():
        raise RunError(f"{folder}: a bare adapter does not say what to test it on; give --data")
    name = data or recipe.data
    trained = load_trained(folder)
    if trained.tokenizer is None:
        raise RunError(f"{folder}: its base model comes with no tokenizer")
    news = load_news(name, recipe.validation_fraction, recipe.seed)
    if news.labels != trained.labels:
        raise RunError(
            f"{name}: its classes are {', '.join(news.labels)}; the model knows {', '.join(trained.labels)}"
        )
    device = resolve_device("auto")  # which need not be where it was trained
    precision = resolve_precision(recipe.precision, device)
    speed_up(trained.model.to(device), precision)
    rows = encode(news.test, trained.tokenizer, trained.max_length_tokens)
    logits = predict_logits(
        trained.model,
        rows,
        2 * recipe.batch_size,
        trained.tokenizer.pad_token_id,
        device,
        precision,
    )
    scores = Scores.of(rows.labels, logits.argmax(1).numpy(), len(news.labels))
    return {"data": name, "labels": news.labels, "scores": scores}


if __name__ == "__main__":
    sys.exit(main())
