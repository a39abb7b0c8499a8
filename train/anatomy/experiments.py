"""Cause: what the test split makes of an adapter with a part of it changed. For analysis only.

Nothing is chosen by these scores. Every change is a context that puts each bit back (lora/ablate.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

from lora.ablate import only, scaled, truncated
from lora.anatomy import svd
from lora.tree import ends_with, lora_layers
from model import HEAD, speed_up
from train.anatomy.subject import Subject, place
from train.batches import Encoded, encode
from train.data import load_news
from train.hardware import autocast, one_thread, resolve_device, resolve_precision
from train.loop import predict_logits
from train.metrics import Scores
from train.runs import RunError

FACTORS = (-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
FULL_RANKS = (0, 1, 2, 4, 8, 16, 64)
_EXCERPT = 420  # characters of an article that the page shows

Say = Callable[[str], None]
Score = dict[str, float]


@dataclass(frozen=True)
class Exam:
    """The test split, and how a run's model reads it: on its own device and in its own precision."""

    split: Dataset
    rows: Encoded
    tokenizer: Any
    batch_size: int
    max_length_tokens: int
    device: torch.device
    precision: str

    @classmethod
    def of(cls, subject: Subject) -> Exam:
        """Raises DataError if the run's data cannot be had, RunError if it cannot be read."""
        recipe, trained = subject.recipe, subject.trained
        if trained.tokenizer is None:
            raise RunError(f"{subject.folder}: its base model comes with no tokenizer")
        device = resolve_device("auto")  # not the run's own, which may be another machine's
        split = load_news(recipe.data, recipe.validation_fraction, recipe.seed).test
        rows = encode(split, trained.tokenizer, trained.max_length_tokens)
        return cls(
            split=split,
            rows=rows,
            tokenizer=trained.tokenizer,
            batch_size=2 * recipe.batch_size,
            max_length_tokens=trained.max_length_tokens,
            device=device,
            precision=resolve_precision(recipe.precision, device),
        )

    def prepare(self, model: Any) -> None:
        """Moves a model to where the exam is held."""
        speed_up(model.to(self.device), self.precision)

    def logits(self, model: nn.Module) -> Tensor:
        """(rows, classes) float32."""
        pad = self.tokenizer.pad_token_id
        return predict_logits(model, self.rows, self.batch_size, pad, self.device, self.precision)

    def score(self, model: nn.Module) -> Score:
        """Accuracy, and the mean cross-entropy in nats, which moves before any answer changes."""
        return score(self.logits(model), self.rows.labels)


def score(logits: Tensor, labels: np.ndarray) -> Score:
    """Accuracy and mean cross-entropy of logits (rows, classes)."""
    accuracy = Scores.of(labels, logits.argmax(1).numpy(), logits.shape[1]).accuracy
    return {"accuracy": accuracy, "loss": float(F.cross_entropy(logits.double(), torch.from_numpy(labels)))}


def run_experiments(model: nn.Module, exam: Exam, whole: Score, say: Say) -> dict[str, Any]:
    """The adapter off, without and with only one block or projection, truncated, and scaled.

    whole: the score of the adapter as it is.
    """
    names = list(lora_layers(model))
    blocks = _grouped(names, lambda name: str(place(name).block))
    projections = _grouped(names, lambda name: place(name).projection)

    def under(change: AbstractContextManager[None]) -> Score:
        with change:
            return exam.score(model)

    off = under(only(model, ()))
    say("scoring without each part of the adapter, and with it alone")
    parts = {}
    for kind, groups in (("block", blocks), ("projection", projections)):
        if len(groups) > 1:
            parts[f"without_{kind}"] = {
                key: under(only(model, set(names) - set(group))) for key, group in groups.items()
            }
            if kind == "block" or len(groups) > 2:  # of two, one off is the other alone
                parts[f"only_{kind}"] = {key: under(only(model, group)) for key, group in groups.items()}
    say("scoring ΔW truncated and scaled")
    r = max(layer.r for layer in lora_layers(model).values())
    by_rank = {k: under(truncated(model, k)) for k in _ranks(r) if 0 < k < r}
    by_factor = {f: under(scaled(model, f)) for f in FACTORS if f not in (0, 1)} | {0.0: off, 1.0: whole}
    return {
        "whole": whole,
        "off": off,
        **parts,
        "truncated": [{"rank": k, **({0: off, r: whole} | by_rank)[k]} for k in _ranks(r)],
        "scaled": [{"factor": factor, **by_factor[factor]} for factor in FACTORS],
    }


def truncate_full(subject: Subject, full: Subject, exam: Exam) -> list[dict[str, Any]]:
    """The full run scored with its update to every Linear of the encoder cut to its best rank.

    The head, embeddings, biases and norms stay as fully tuned; rank None is the run as it is.
    """
    model = full.trained.model
    before = dict(subject.trained.model.named_parameters())
    weights = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2
        and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear)
        and not any(ends_with(part, head) for head in HEAD for part in _parents(name))
    }
    starts = {name: before[name].detach().cpu().double() for name in weights}
    with one_thread():
        updates = {name: svd(weights[name].detach().cpu().double() - starts[name]) for name in weights}
    exam.prepare(model)
    found: list[dict[str, Any]] = [{"rank": None, **exam.score(model)}]
    with _restored({name: model.get_parameter(name) for name in weights}):
        for rank in FULL_RANKS:
            for name in weights:
                with torch.no_grad():
                    model.get_parameter(name).copy_(starts[name] + updates[name].truncated(rank))
            found.insert(-1, {"rank": rank, **exam.score(model)})
    return found


def mistakes(exam: Exam, logits: Tensor, labels: tuple[str, ...], most: int = 6) -> list[dict[str, Any]]:
    """The misclassified test articles of which the model was surest, the surest first."""
    probabilities = torch.softmax(logits.double(), dim=1)
    predicted = probabilities.argmax(1)
    wrong = np.flatnonzero(predicted.numpy() != exam.rows.labels)
    surest = sorted(wrong.tolist(), key=lambda row: -float(probabilities[row].max()))[:most]
    return [
        {
            "row": row,
            "text": _excerpt(exam.split[row]["text"]),
            "true": labels[int(exam.rows.labels[row])],
            "predicted": labels[int(predicted[row])],
            "probability": float(probabilities[row].max()),
            "probability_of_true": float(probabilities[row, int(exam.rows.labels[row])]),
        }
        for row in surest
    ]


@torch.inference_mode()
def trace(model: nn.Module, exam: Exam, text: str, labels: tuple[str, ...]) -> dict[str, Any]:
    """The logits of one text with no block's adapter on, then the first's, the first two's, … all."""
    names = list(lora_layers(model))
    blocks = _grouped(names, lambda name: str(place(name).block))
    encoded = exam.tokenizer(
        [text], truncation=True, max_length=exam.max_length_tokens, return_tensors="pt"
    ).to(exam.device)
    steps: list[dict[str, Any]] = []
    on: list[str] = []
    for key in (None, *blocks):
        on += blocks[key] if key is not None else []
        with only(model, on), autocast(exam.device, exam.precision):
            logits = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
        steps.append({"block": key, "logits": logits[0].float().tolist()})
    return {"text": _excerpt(text), "labels": list(labels), "steps": steps}


def _ranks(r: int) -> list[int]:
    """0, 1, 2, … r; from 9 on doubling, as each costs a pass over the test split."""
    if r <= 8:
        return list(range(r + 1))
    return [0, *(2**power for power in range(r.bit_length()) if 2**power < r), r]


def _grouped(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return groups


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


@contextmanager
def _restored(weights: dict[str, nn.Parameter]) -> Iterator[None]:
    before = {name: parameter.detach().clone() for name, parameter in weights.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(before[name])


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _EXCERPT else text[:_EXCERPT].rsplit(" ", 1)[0] + " …"
