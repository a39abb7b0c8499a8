"""test_predictions.csv: a run's prediction for each test text, from which runs are compared in pairs.

Columns: label (the true class), prediction, digest (the first 16 hexadecimal digits of the SHA-256 of the
text in UTF-8), and p(CLASS), the probability of each class. Older runs have the first two alone.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lora.storage import write_atomically
from train.runs import PREDICTIONS, SUMMARY, RunError, resume_command

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Prediction:
    """The true class and the predicted class of one text.

    digest: of the text, and probabilities: by class; both are empty for an older run.
    """

    label: str
    prediction: str
    digest: str = ""
    probabilities: dict[str, float] = field(default_factory=dict)

    @property
    def correct(self) -> bool:
        """Whether the predicted class is the true one."""
        return self.label == self.prediction


def text_digest(text: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_predictions(
    folder: Path, texts: Sequence[str], truth: Sequence[int], logits: Tensor, labels: tuple[str, ...]
) -> None:
    """Writes one row per text, in the order of the data. truth: class indices. logits: (texts, classes)."""
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(("label", "prediction", "digest", *(f"p({label})" for label in labels)))
    probabilities = torch.softmax(logits.float(), dim=1).tolist()
    predicted = logits.argmax(1).tolist()
    for text, i, j, row in zip(texts, truth, predicted, probabilities, strict=True):
        rows.writerow((labels[i], labels[j], text_digest(text), *(f"{p:.6f}" for p in row)))
    write_atomically(folder / PREDICTIONS, file.getvalue().encode())


def read_predictions(folder: Path) -> list[Prediction]:
    """The predictions of the run in `folder`, in the order of the file. Raises RunError, OSError."""
    path = folder / PREDICTIONS
    try:
        header, *rows = csv.reader(io.StringIO(path.read_bytes().decode(), newline=""), strict=True)
        if header != ["label", "prediction"] and header[:3] != ["label", "prediction", "digest"]:
            raise ValueError("its columns are not label, prediction, digest and probabilities")
        classes = [name[2:-1] for name in header[3:]]  # p(CLASS)
        return [_prediction(header, row, classes) for row in rows]
    except (ValueError, csv.Error) as error:
        raise RunError(
            f"{path}: damaged: {error}; remove it and {SUMMARY}, and `{resume_command(folder)}` writes them"
            " again"
        ) from error


def match(runs: Sequence[Sequence[Prediction]]) -> tuple[list[dict[Key, Prediction]], bool]:
    """Each run's predictions by keys that are equal for the same test text, and whether keys are positions.

    Texts are the same if their digests and their true classes are equal; a text that occurs n times in both
    runs is matched n times. If a run has no digests, texts are matched by position if the true classes of all
    runs are equal, one by one, and the digests of those that have some; otherwise nothing of it is matched.
    """
    tested = [rows for rows in runs if rows]
    truths = {tuple(row.label for row in rows) for rows in tested}
    digests = {tuple(row.digest for row in rows) for rows in tested}
    without = {digest for digest in digests if not all(digest)}
    if without and len(truths) == 1 and len(digests - without) <= 1:
        return [{(position,): row for position, row in enumerate(rows)} for rows in runs], True
    return [_by_text(rows) for rows in runs], False


def _by_text(rows: Sequence[Prediction]) -> dict[Key, Prediction]:
    found: dict[Key, Prediction] = {}
    seen: Counter[Key] = Counter()
    for row in rows:
        if row.digest:
            text = (row.digest, row.label)
            found[*text, seen[text]] = row
            seen[text] += 1
    return found


def _prediction(header: list[str], row: list[str], classes: list[str]) -> Prediction:
    if len(row) != len(header):
        raise ValueError(f"a row has {len(row)} columns, and the header has {len(header)}")
    label, prediction, *rest = row
    if not rest:
        return Prediction(label, prediction)
    digest, *probabilities = rest
    if not re.fullmatch("[0-9a-f]{16}", digest):
        raise ValueError(f"{digest!r} is not a digest")
    if prediction not in classes:
        raise ValueError(f"{prediction!r} is not one of the classes")
    return Prediction(label, prediction, digest, dict(zip(classes, map(float, probabilities), strict=True)))
