"""python -m train.predict: labels for texts, by a run or a bare adapter's folder."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch

from lora import AdapterError
from model import ModelError, speed_up
from model.minilm import DataPackageMissingError
from train.hardware import autocast, resolve_device, resolve_precision
from train.runs import RunError, Trained, load_trained

_BATCH = 32


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 an error that the message explains."""
    parser = argparse.ArgumentParser(
        prog="python -m train.predict",
        description="Prints a label and its probability for each TEXT, or for each line of stdin.",
        epilog="A blank line of stdin gives a blank line, so that lines in and out stay side by side.",
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a run's folder, or an adapter's from here or PEFT"
    )
    parser.add_argument("texts", nargs="*", metavar="TEXT")
    parser.add_argument(
        "--json", action="store_true", help="a JSON object a line, with every class's probability"
    )
    options = parser.parse_intermixed_args(arguments)  # flags may stand between RUN and TEXT
    if any(not text.strip() for text in options.texts):
        print("error: an empty TEXT has no topic", file=sys.stderr)
        return 2
    try:
        trained = load_trained(options.run)
        if trained.tokenizer is None:
            raise RunError(f"{options.run}: its base model comes with no tokenizer")
        texts = options.texts or (line.rstrip("\n") for line in sys.stdin)
        # Someone who types wants an answer a line; a pipe wants speed.
        batch_size = 1 if not options.texts and sys.stdin.isatty() else _BATCH
        for line in predict_lines(trained, texts, batch_size, options.json):
            print(line, flush=batch_size == 1)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read has gone, which is no error
    except KeyboardInterrupt:
        return 130
    except UnicodeDecodeError as error:
        print(f"error: stdin is not UTF-8: {error}", file=sys.stderr)
        return 2
    except (AdapterError, DataPackageMissingError, ModelError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def predict_lines(trained: Trained, texts: Iterable[str], batch_size: int, as_json: bool) -> Iterator[str]:
    """A line for each text, in order, read and answered in batches."""
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
                    ensure_ascii=False,
                )  # fmt: skip
            else:
                yield f"{trained.labels[best]}\t{float(row[best]):.4f}"


@torch.inference_mode()
def _probabilities(trained: Trained, texts: list[str], device: torch.device, precision: str) -> torch.Tensor:
    """(texts, classes) float32."""
    if not texts:
        return torch.empty(0, len(trained.labels))
    encoded = trained.tokenizer(
        texts, truncation=True, max_length=trained.max_length_tokens, padding=True, return_tensors="pt"
    ).to(device)
    with autocast(device, precision):
        logits = trained.model(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]
        ).logits
    return torch.softmax(logits.float(), dim=1).cpu()


if __name__ == "__main__":
    sys.exit(main())
