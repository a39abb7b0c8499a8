"""The model's logits for the rows of a split, and the scores of a trained model on a test split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

from model import speed_up
from train.batches import Encoded, batches_by_length, collate, encode
from train.config import Recipe
from train.data import load_test
from train.distributed import SINGLE_PROCESS, World
from train.hardware import autocast, resolve_device, resolve_precision
from train.metrics import Scores
from train.runs import RunError
from train.trained import Trained

Score = dict[str, float]


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    rows: Encoded,
    batch_size: int,
    pad_token_id: int,
    device: torch.device,
    precision: str,
    world: World = SINGLE_PROCESS,
) -> Tensor:
    """The model's logits in eval mode, (rows, classes) float32 on the CPU, in the order of the rows.

    Each process of `world` computes some of the batches, and all return all logits.
    """
    was_training = model.training
    model.eval()
    classes = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
    logits = torch.zeros(len(rows), classes, device=device)
    for members in batches_by_length(rows.lengths, batch_size)[world.rank :: world.size]:
        output = batch_logits(model, rows, members, pad_token_id, device, precision)
        logits[torch.from_numpy(members).to(device)] = output
    model.train(was_training)
    return world.sum_over_processes_(logits).cpu()  # one process has each row, the others have zeros


@torch.inference_mode()
def batch_logits(
    model: nn.Module,
    rows: Encoded,
    members: np.ndarray,
    pad_token_id: int,
    device: torch.device,
    precision: str,
) -> Tensor:
    """The logits of the rows with the numbers `members`, (members, classes) float32 on the device."""
    batch = collate(rows, members, pad_token_id).to(device)
    with autocast(device, precision):
        output: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return output.float()


@dataclass(frozen=True)
class TestSplit:
    """The test split, encoded for a run's model, and the device and precision to score it with."""

    split: Dataset
    rows: Encoded
    tokenizer: Any
    batch_size: int
    max_length_tokens: int
    device: torch.device
    precision: str

    @classmethod
    def of(cls, trained: Trained, recipe: Recipe, data: str | None = None) -> TestSplit:
        """The test split of a run's data, or of other `data`. Raises DataError, RunError."""
        if trained.tokenizer is None:
            raise RunError("the base model comes without a tokenizer, so it cannot read texts")
        test = load_test(data or recipe.data, trained.labels)
        device = resolve_device("auto")  # not the run's, which may be on another machine
        return cls(
            split=test,
            rows=encode(test, trained.tokenizer, trained.max_length_tokens),
            tokenizer=trained.tokenizer,
            batch_size=2 * recipe.batch_size,
            max_length_tokens=trained.max_length_tokens,
            device=device,
            precision=resolve_precision(recipe.precision, device),
        )

    def prepare(self, model: Any) -> None:
        """Moves a model to the device and speeds it up in the precision."""
        speed_up(model.to(self.device), self.precision)

    def logits(self, model: nn.Module) -> Tensor:
        """(rows, classes) float32."""
        pad = self.tokenizer.pad_token_id
        return predict_logits(model, self.rows, self.batch_size, pad, self.device, self.precision)

    def score(self, model: nn.Module) -> Score:
        """Accuracy, and mean cross-entropy in nats, which changes before any prediction does."""
        return score(self.logits(model), self.rows.labels)


def score(logits: Tensor, labels: np.ndarray) -> Score:
    """Accuracy and mean cross-entropy of logits (rows, classes)."""
    accuracy = Scores.of(labels, logits.argmax(1).numpy(), logits.shape[1]).accuracy
    return {"accuracy": accuracy, "loss": float(F.cross_entropy(logits.double(), torch.from_numpy(labels)))}
