"""A run as the playground serves it: its data, its examples, and the measures of its ΔW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lora.adapted import has_low_rank
from lora.anatomy import delta_svd
from lora.mergeable import MergeableLinear
from train.batches import Encoded, encode
from train.config import Recipe
from train.hardware import one_thread
from train.predictions import read_predictions, text_digest
from train.runs import PREDICTIONS
from train.trained import Trained, news_of

_SAMPLE = 64  # validation articles at most, so that two cores classify them in less than three seconds


@dataclass(frozen=True)
class Example:
    """An article of the test part. wrong: what the run predicted instead, and with which probability."""

    text: str
    label: str
    wrong: str = ""
    probability: float = 0.0


@dataclass(frozen=True)
class ServedRun:
    """A run on the page. `trained` has the model that all runs share.

    spectra: the singular values of ΔW by layer. sizes: ‖ΔW‖/‖W‖ by layer (Frobenius norms). Both are empty
    if ΔW is not a product of low rank, and `off` then says why scale and rank cannot be changed.
    """

    name: str
    recipe: Recipe
    trained: Trained
    sample: Encoded
    test: Encoded
    examples: list[Example]
    layers: dict[str, MergeableLinear]
    spectra: dict[str, list[float]]
    sizes: dict[str, float]
    off: str

    @property
    def rank(self) -> int:
        """The largest rank of a layer's ΔW; 0 if it has no low rank."""
        return max(map(len, self.spectra.values()), default=0)


@torch.no_grad()
def make_served_run(
    folder: Path, recipe: Recipe, trained: Trained, layers: dict[str, MergeableLinear]
) -> ServedRun:
    """The run in `folder`. layers: its adapter's. Raises DataError, RunError.

    The measures are computed as in train/anatomy/measure.py.
    """
    news = news_of(trained, recipe)
    size = min(len(news.validation), _SAMPLE)
    sample = news.validation.select(np.linspace(0, len(news.validation) - 1, size).astype(int))
    spectra, sizes = {}, {}
    low_rank = {name: layer for name, layer in layers.items() if has_low_rank(layer)}
    off = ""
    if len(low_rank) < len(layers):
        other = next(layer for name, layer in layers.items() if name not in low_rank)
        kind = type(other).__name__.removeprefix("Fast")
        off = f"the update of a {kind} is not scaling·B·A, so it has no scale and no rank to change"
    else:
        with one_thread():
            for name, layer in low_rank.items():
                S = delta_svd(*layer.factors(), layer.scaling).S
                spectra[name] = S.tolist()
                sizes[name] = float(S.norm() / layer.weight.double().norm())
    return ServedRun(
        name=folder.resolve().name,
        recipe=recipe,
        trained=trained,
        sample=encode(sample, trained.tokenizer, trained.max_length_tokens),
        test=encode(news.test, trained.tokenizer, trained.max_length_tokens),
        examples=_examples(folder, list(news.test["text"]), news.test["label"], news.labels),
        layers=layers,
        spectra=spectra,
        sizes=sizes,
        off=off,
    )


def _examples(
    folder: Path, texts: list[str], labels: Sequence[int], names: tuple[str, ...], most: int = 6
) -> list[Example]:
    """The first test article of each class, and the mistakes of the run with the highest probability."""
    first = [Example(texts[list(labels).index(label)], names[label]) for label in sorted(set(labels))]
    by_digest = {text_digest(text): text for text in texts}
    rows = read_predictions(folder) if (folder / PREDICTIONS).is_file() else []
    wrong = [row for row in rows if not row.correct and row.digest in by_digest]
    wrong.sort(key=lambda row: -row.probabilities[row.prediction])
    return first + [
        Example(by_digest[row.digest], row.label, row.prediction, row.probabilities[row.prediction])
        for row in wrong[:most]
    ]
