"""Ablation experiments: scores on the test split with parts of the adapter changed. For analysis only.

Nothing is selected by these scores. Every change is a context that restores each bit (lora/ablate.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora.ablate import enable_only, scaled, truncated
from lora.adapted import product_layers
from lora.anatomy import svd
from lora.modules import ends_with
from model import HEAD
from train.anatomy.run import Run, position
from train.hardware import autocast, one_thread
from train.inference import Score, TestSplit
from train.tables import duration, excerpt

FACTORS = (-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
FULL_RANKS = (0, 1, 2, 4, 8, 16, 64)
_EXCERPT = 420  # characters of a text that the page shows

Report = Callable[[str], None]  # prints a line of progress


def run_experiments(model: nn.Module, test_set: TestSplit, whole: Score, report: Report) -> dict[str, Any]:
    """Scores with the adapter off, without or with only one block or projection, truncated, and scaled.

    whole: the score of the unchanged adapter.
    """
    names = list(product_layers(model))
    blocks = _grouped(names, lambda name: str(position(name).block))
    projections = _grouped(names, lambda name: position(name).projection)

    r = max(len(layer.factors()[0]) for layer in product_layers(model).values())
    changes: dict[str, dict[Any, AbstractContextManager[None]]] = {}
    for kind, groups in (("block", blocks), ("projection", projections)):
        if len(groups) > 1:
            changes[f"without_{kind}"] = {
                key: enable_only(model, set(names) - set(group)) for key, group in groups.items()
            }
            if kind == "block" or len(groups) > 2:  # of two groups, one off means the other alone
                changes[f"only_{kind}"] = {key: enable_only(model, group) for key, group in groups.items()}
    changes["truncated"] = {k: truncated(model, k) for k in _ranks(r) if 0 < k < r}
    changes["scaled"] = {factor: scaled(model, factor) for factor in FACTORS if factor not in (0, 1)}

    passes = sum(map(len, changes.values()))
    started = time.perf_counter()
    with enable_only(model, ()):
        off = test_set.score(model)
    seconds = passes * (time.perf_counter() - started)
    report(f"scoring {passes} changes of the adapter, which takes about {duration(seconds)}")
    scores: dict[str, dict[Any, Score]] = {kind: {} for kind in changes}
    with tqdm(total=passes, desc="scoring", unit=" passes", disable=None, leave=False) as bar:
        for kind, by_key in changes.items():
            for key, change in by_key.items():
                with change:
                    scores[kind][key] = test_set.score(model)
                bar.update()
    by_rank = {0: off, r: whole} | scores.pop("truncated")
    by_factor = {0.0: off, 1.0: whole} | scores.pop("scaled")
    return {
        "whole": whole,
        "off": off,
        **scores,
        "truncated": [{"rank": k, **by_rank[k]} for k in _ranks(r)],
        "scaled": [{"factor": factor, **by_factor[factor]} for factor in FACTORS],
    }


def truncate_full(run: Run, full: Run, test_set: TestSplit) -> list[dict[str, Any]]:
    """Scores of the full run with its update to every Linear of the encoder truncated to some ranks.

    Head, embeddings, biases and norms keep their tuned values. Rank None is the unchanged run.
    """
    model = full.trained.model
    before = dict(run.trained.model.named_parameters())
    weights = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2
        and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear)
        and not any(ends_with(part, head) for head in HEAD for part in _parents(name))
    }
    starts = {name: before[name].detach().cpu().double() for name in weights}
    with one_thread():
        updates = {
            name: svd(weight.detach().cpu().double() - starts[name])
            for name, weight in tqdm(weights.items(), "decomposing updates", disable=None, leave=False)
        }
    test_set.prepare(model)
    found: list[dict[str, Any]] = [{"rank": None, **test_set.score(model)}]
    with _restored({name: model.get_parameter(name) for name in weights}):
        for rank in tqdm(FULL_RANKS, "scoring", unit=" passes", disable=None, leave=False):
            for name in weights:
                with torch.no_grad():
                    model.get_parameter(name).copy_(starts[name] + updates[name].truncated(rank))
            found.insert(-1, {"rank": rank, **test_set.score(model)})
    return found


def mistakes(
    test_set: TestSplit, logits: Tensor, labels: tuple[str, ...], most: int = 6
) -> list[dict[str, Any]]:
    """The misclassified test texts with the highest predicted probability, highest first."""
    probabilities = torch.softmax(logits.double(), dim=1)
    predicted = probabilities.argmax(1)
    wrong = np.flatnonzero(predicted.numpy() != test_set.rows.labels)
    most_certain = sorted(wrong.tolist(), key=lambda row: -float(probabilities[row].max()))[:most]
    return [
        {
            "row": row,
            "text": excerpt(test_set.split[row]["text"], _EXCERPT),
            "true": labels[int(test_set.rows.labels[row])],
            "predicted": labels[int(predicted[row])],
            "probability": float(probabilities[row].max()),
            "probability_of_true": float(probabilities[row, int(test_set.rows.labels[row])]),
        }
        for row in most_certain
    ]


@torch.inference_mode()
def trace(model: nn.Module, test_set: TestSplit, text: str, labels: tuple[str, ...]) -> dict[str, Any]:
    """The logits of one text with the adapter enabled in no block, the first, the first two, …, all."""
    names = list(product_layers(model))
    blocks = _grouped(names, lambda name: str(position(name).block))
    encoded = test_set.tokenizer(
        [text], truncation=True, max_length=test_set.max_length_tokens, return_tensors="pt"
    ).to(test_set.device)
    steps: list[dict[str, Any]] = []
    on: list[str] = []
    for key in (None, *blocks):
        on += blocks[key] if key is not None else []
        with enable_only(model, on), autocast(test_set.device, test_set.precision):
            logits = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
        steps.append({"block": key, "logits": logits[0].float().tolist()})
    return {"text": excerpt(text, _EXCERPT), "labels": list(labels), "steps": steps}


def _ranks(r: int) -> list[int]:
    """0, 1, 2, …, r; powers of two for r > 8, because each rank costs a pass over the test split."""
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
