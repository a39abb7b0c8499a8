"""python -m train.predict: the class of each text, by a run or an adapter's folder."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch

from model import speed_up
from train.command import CommandParser, print_error, run_command
from train.hardware import autocast, resolve_device, resolve_precision
from train.trained import Trained, load_trained

_BATCH_SIZE = 32


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 success, 2 an error that the message explains."""
    parser = CommandParser(
        "train.predict",
        "Prints a label and its probability for each TEXT, or for each line of stdin.",
        "A blank line of stdin gives a blank line, so that input and output lines correspond.",
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a run's folder, or an adapter's folder from here or from PEFT"
    )
    parser.add_argument("texts", nargs="*", default=[], metavar="TEXT")
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object per line, with the probability of each class"
    )
    options = parser.parse_intermixed_args(arguments)  # flags are allowed between RUN and TEXT
    if any(not text.strip() for text in options.texts):
        return print_error("TEXT must not be empty")
    if any("\ud800" <= character <= "\udfff" for text in options.texts for character in text):
        return print_error("a TEXT is not UTF-8")
    return run_command(lambda: _print_predictions(options.run, options.texts, options.json))


def _print_predictions(run: Path, given: list[str], as_json: bool) -> int:
    trained = load_trained(run, text=True)
    if not given and sys.stdin is None:
        return print_error("stdin is closed; give a TEXT")
    if not given and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # whatever the locale
    texts = given or (line.rstrip("\n") for line in sys.stdin)
    # On a terminal each line is answered at once; a pipe is read in batches.
    batch_size = 1 if not given and sys.stdin.isatty() else _BATCH_SIZE
    if batch_size == 1:
        print("reading one text per line; Ctrl-D ends the input", file=sys.stderr)
    try:
        for line in predict_lines(trained, texts, batch_size, as_json):
            print(line, flush=batch_size == 1)
    except UnicodeDecodeError as error:
        return print_error(f"stdin is not UTF-8: {error}")
    return 0


def predict_lines(trained: Trained, texts: Iterable[str], batch_size: int, as_json: bool) -> Iterator[str]:
    """One line per text, in order. The texts are read and classified in batches."""
    device = resolve_device("auto")
    precision = resolve_precision("auto", device)
    speed_up(trained.model.to(device), precision)
    remaining = iter(texts)
    while batch := list(islice(remaining, batch_size)):
        probabilities = iter(
            _probabilities(trained, [text for text in batch if text.strip()], device, precision)
        )
        for text in batch:
            if not text.strip():
                yield ""
                continue
            row = next(probabilities)
            best = int(row.argmax())
            if as_json:
                by_label = {label: round(float(p), 6) for label, p in zip(trained.labels, row, strict=True)}
                yield json.dumps(
                    {"label": trained.labels[best], "probability": by_label[trained.labels[best]],
                     "probabilities": by_label, "text": text},
                    ensure_ascii=(sys.stdout.encoding or "").lower().replace("-", "") != "utf8",
                )  # fmt: skip
            else:
                yield f"{trained.labels[best]}\t{float(row[best]):.4f}"


@torch.inference_mode()
def _probabilities(trained: Trained, texts: list[str], device: torch.device, precision: str) -> torch.Tensor:
    """The class probabilities, (texts, classes) float32."""
    if not texts:
        return torch.empty(0, len(trained.labels))
    encoded = trained.tokenizer(
        texts, truncation=True, max_length=trained.max_length_tokens, padding=True, padding_side="right",
        return_tensors="pt",
    ).to(device)  # fmt: skip
    with autocast(device, precision):
        logits = trained.model(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]
        ).logits
    return torch.softmax(logits.float(), dim=1).cpu()


if __name__ == "__main__":
    sys.exit(main())
