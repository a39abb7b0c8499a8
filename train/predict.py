"""python -m train.predict: the class of each text, by a run or an adapter's folder, or by several at once."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora import Adapters
from model import speed_up
from train.command import CommandParser, print_error, run_command
from train.config import is_unicode
from train.data import DataError
from train.hardware import autocast, resolve_device, resolve_precision
from train.runs import RunError
from train.trained import Trained, load_adapters, load_trained, read_trained_adapter

_BATCH_SIZE = 32
_Request = tuple[str, Sequence[str]]  # a text, and the names of the adapters that answer it


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 success, 2 an error that the message explains."""
    parser = CommandParser(
        "train.predict",
        "Prints a label and its probability for each TEXT, or for each line of stdin. With --adapter, "
        "several adapters answer in one pass: a line for each text and adapter, which begins with NAME.",
        "A blank line of stdin gives a blank line, or one per adapter, so that input and output correspond.",
    )
    parser.usage = (
        "%(prog)s [--json] RUN [TEXT ...]\n"
        "       %(prog)s [--json] [--jsonl] --adapter NAME=RUN [--adapter NAME=RUN ...] [TEXT ...]"
    )
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="a run's folder, or an adapter's folder from here or from PEFT"
    )
    parser.add_argument("texts", nargs="*", default=[], metavar="TEXT")
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object per line, with the probability of each class"
    )
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=RUN",
        help="an adapter and a name for it; all adapters must have one base model",
    )  # fmt: skip
    parser.add_argument(
        "--jsonl", action="store_true",
        help='with --adapter, read stdin as JSON lines: {"text": "...", "adapter": "NAME"}; all adapters '
        'answer a line without "adapter"',
    )  # fmt: skip
    options = parser.parse_intermixed_args(arguments)  # flags are allowed between RUN and TEXT
    texts = options.texts
    if options.adapter and options.run is not None:
        texts = [options.run, *texts]
    elif not options.adapter and options.run is None:
        parser.error("the following arguments are required: RUN")
    if options.jsonl and (texts or not options.adapter):
        return print_error("--jsonl reads stdin for several adapters; give --adapter, and no TEXT")
    if any(not text.strip() for text in texts):
        return print_error("TEXT must not be empty")
    if not all(map(is_unicode, texts)):
        return print_error("a TEXT is not UTF-8")
    return run_command(
        lambda: _print_predictions(options.run, options.adapter, texts, options.json, options.jsonl)
    )


def _print_predictions(run: str, named: list[str], given: list[str], as_json: bool, jsonl: bool) -> int:
    adapters: Adapters | None = None
    if named:
        folders = _folders(named)
        read = {name: read_trained_adapter(folder) for name, folder in folders.items()}
        adapters, trained = load_adapters(read, text=True)
    else:
        trained = {"": load_trained(Path(run), text=True)}
    if not given and sys.stdin is None:
        return print_error("stdin is closed; give a TEXT")
    lines = given or _lines_of_stdin()
    names = tuple(trained)
    requests = _parse_json_lines(lines, names) if jsonl else ((line, names) for line in lines)
    # On a terminal each line is answered at once; a pipe is read in batches.
    interactive = not given and sys.stdin.isatty()
    batch_size = 1 if interactive else max(1, _BATCH_SIZE // len(names))
    if interactive:
        print("reading one text per line; Ctrl-D ends the input", file=sys.stderr)
    for line in predict_lines(trained, adapters, requests, batch_size, as_json):
        print(line, flush=interactive)
    return 0


def _lines_of_stdin() -> Iterator[str]:
    """The lines of stdin, in UTF-8 whatever the locale. Raises DataError, which names the line."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
    for number, line in enumerate(sys.stdin, 1):
        if not is_unicode(line):
            raise DataError(f"stdin:{number}: the line is not UTF-8")
        yield line.rstrip("\r\n")


def _folders(named: Iterable[str]) -> dict[str, Path]:
    """The folder of each name in NAME=RUN. Raises RunError."""
    folders: dict[str, Path] = {}
    for word in named:
        name, _, folder = word.partition("=")
        if not name or not folder:
            raise RunError(f"--adapter {word}: not of the form NAME=RUN, such as topics=runs/quickstart")
        if name in folders:
            raise RunError(f"--adapter {word}: the name {name!r} is given twice")
        folders[name] = Path(folder)
    return folders


def _parse_json_lines(lines: Iterable[str], names: Sequence[str]) -> Iterator[_Request]:
    """The text of each line and the adapters that answer it. Raises DataError, which names the line."""
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {"text": ""}
        except (ValueError, RecursionError) as error:
            raise DataError(f"stdin:{number}: not JSON: {error}") from error
        text, name = (row.get("text"), row.get("adapter")) if isinstance(row, dict) else (None, None)
        if not isinstance(text, str) or not is_unicode(text):
            raise DataError(f'stdin:{number}: not a JSON object with a "text" in UTF-8')
        if name is not None and name not in names:
            raise DataError(f"stdin:{number}: no adapter is called {name!r}; there are {', '.join(names)}")
        yield text, names if name is None else (name,)


def predict_lines(
    trained: Mapping[str, Trained],
    adapters: Adapters | None,
    requests: Iterable[_Request],
    batch_size: int,
    as_json: bool,
) -> Iterator[str]:
    """One line per text and adapter, in order. The texts are read and classified in batches.

    trained: by the adapter's name, all with the model of `adapters`; or one without a name, and no adapters.
    """
    device = resolve_device("auto")
    precision = resolve_precision("auto", device)
    speed_up(next(iter(trained.values())).model.to(device), precision)
    for batch in _batches(requests, batch_size):
        rows = [(name, text) for text, names in batch for name in names]
        given = [(name, text) for name, text in rows if text.strip()]
        probabilities = iter(_probabilities(trained, adapters, given, device, precision))
        for name, text in rows:
            if text.strip():
                yield _line(name, text, trained[name].labels, next(probabilities), as_json)
            else:
                yield ""


def _batches(requests: Iterable[_Request], size: int) -> Iterator[list[_Request]]:
    """The requests in lists of `size`. Those before one that cannot be read are yielded before its error."""
    batch: list[_Request] = []
    error = None
    try:
        for request in requests:
            batch.append(request)
            if len(batch) == size:
                yield batch
                batch = []
    except DataError as found:
        error = found
    if batch:
        yield batch
    if error:
        raise error


def _line(name: str, text: str, labels: Sequence[str], probabilities: Tensor, as_json: bool) -> str:
    best = int(probabilities.argmax())
    if not as_json:
        line = f"{labels[best]}\t{float(probabilities[best]):.4f}"
        return f"{name}\t{line}" if name else line
    by_label = {label: round(float(p), 6) for label, p in zip(labels, probabilities, strict=True)}
    return json.dumps(
        ({"adapter": name} if name else {})
        | {
            "label": labels[best],
            "probability": by_label[labels[best]],
            "probabilities": by_label,
            "text": text,
        },
        ensure_ascii=(sys.stdout.encoding or "").lower().replace("-", "") != "utf8",
    )


@torch.inference_mode()
def _probabilities(
    trained: Mapping[str, Trained],
    adapters: Adapters | None,
    rows: Sequence[tuple[str, str]],
    device: torch.device,
    precision: str,
) -> list[Tensor]:
    """The class probabilities of each row, an adapter's name and a text: (classes,) float32."""
    if not rows:
        return []
    tokens = [
        torch.tensor(
            trained[name]
            .tokenizer(text, truncation=True, max_length=trained[name].max_length_tokens)
            .input_ids
        )
        for name, text in rows
    ]
    model, tokenizer = trained[rows[0][0]].model, trained[rows[0][0]].tokenizer
    input_ids = pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad_token_id)
    attention_mask = pad_sequence(list(map(torch.ones_like, tokens)), batch_first=True)
    mixed = adapters.rows([name for name, _ in rows]) if adapters is not None else contextlib.nullcontext()
    with mixed, autocast(device, precision):
        logits = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device)).logits
    logits = logits.float().cpu()
    return [
        torch.softmax(row[: len(trained[name].labels)], dim=0)
        for (name, _), row in zip(rows, logits, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
