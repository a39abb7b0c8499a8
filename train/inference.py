"""The model's logits for the rows of a split."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from train.batches import Encoded, batches_by_length, collate
from train.distributed import SINGLE_PROCESS, World
from train.hardware import autocast


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
