"""The training loop, in plain PyTorch: the same for LoRA, full fine-tuning and the head alone.

`Trainer.epochs` is the loop and `Trainer._step` one optimizer step. Validation, logging and the check for
values that are not finite follow below. What a checkpoint holds is in checkpoint.py.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import get_cosine_schedule_with_warmup

from lora.adapted import has_adapter
from lora.errors import UserError
from lora.inject import derived_seed
from lora.variants.lora_plus import parameter_groups
from train.batches import Batch, Encoded, collate, epoch_batches
from train.config import Recipe
from train.distributed import SINGLE_PROCESS, World, data_parallel
from train.hardware import autocast
from train.inference import predict_logits
from train.metrics import Scores
from train.telemetry import Telemetry


@dataclass
class State:
    """The counters of a run. All but `seconds` are the same however often the run was stopped and resumed."""

    epoch: int = 0  # finished epochs
    step_in_epoch: int = 0  # optimizer steps in the current epoch
    step: int = 0
    best_epoch: int = 0  # counted from 1; 0: none yet
    best_accuracy: float = -1.0
    best_loss: float = math.inf
    examples: int = 0  # rows trained on
    tokens: int = 0  # of those rows, without padding
    padded_tokens: int = 0  # with padding, as computed
    skipped_steps: int = 0  # by float16's gradient scaler, after an overflow
    seconds: float = 0.0  # training steps and validation, over all resumed parts
    log_lines: int = 0
    log_digest: str = ""  # of these lines (train/runs.py)
    history: list[dict[str, float]] = field(default_factory=list)  # one row per epoch

    @property
    def epochs_since_best(self) -> int:
        return self.epoch - self.best_epoch


class TrainingError(UserError, RuntimeError):
    """Training cannot continue. The message names the step and the cause."""


class Trainer:
    """Trains `model` by `recipe`: iterate over `epochs()`, which yields after every step.

    All random numbers are derived from the seed, the step and the rank, so a resumed run draws the same
    numbers as an uninterrupted one. A batch is divided among the processes; gradients and losses are sums
    over rows divided by the number of all rows, so they do not depend on the number of processes.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        train: Encoded,
        validation: Encoded,
        pad_token_id: int,
        device: torch.device,
        precision: str,
        world: World = SINGLE_PROCESS,
    ):
        self.model, self.recipe, self.world = model, recipe, world
        self.forward = model if world.size == 1 else data_parallel(model)
        self.train_rows, self.validation_rows = train, validation
        self.pad_token_id, self.device, self.precision = pad_token_id, device, precision
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups = parameter_groups(
            self.trainable, recipe.learning_rate, recipe.weight_decay, recipe.loraplus_lr_ratio
        )
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        batches = math.ceil(len(train) / recipe.batch_size)
        self.steps_per_epoch = math.ceil(batches / recipe.accumulation_steps)
        total = recipe.epochs * self.steps_per_epoch
        self.scheduler = get_cosine_schedule_with_warmup(
            self.optimizer, round(recipe.warmup_fraction * total), total
        )
        # Gradients underflow in float16. The scaler keeps them in range, and skips steps that overflow.
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.telemetry = Telemetry(model) if recipe.telemetry and has_adapter(model) else None
        self.state = State()
        self.best: dict[str, Tensor] = {}  # the trainable parameters of the best epoch
        self.loss_sum = torch.zeros((), device=device)  # over the rows since the last logged step
        self.rows = 0  # since the last logged step
        self._rate = 0.0  # the learning rate of the last step
        self._unchecked: list[tuple[int, list[np.ndarray], Tensor]] = []  # step, its rows, whether finite

    def epochs(self) -> Iterator[dict[str, Any] | None]:
        """Trains to the end. Yields after each step: a line to log, or None."""
        state, recipe = self.state, self.recipe
        while state.epoch < recipe.epochs and not self._stops_early():
            batches = epoch_batches(self.train_rows.lengths, recipe.batch_size, recipe.seed, state.epoch)
            while state.step_in_epoch < self.steps_per_epoch:
                started = time.perf_counter()
                first = state.step_in_epoch * recipe.accumulation_steps
                norm = self._step(batches[first : first + recipe.accumulation_steps])
                state.step += 1
                state.step_in_epoch += 1
                line = self._line(norm) if self._is_logged(state.step) else None
                state.seconds += time.perf_counter() - started
                if state.step_in_epoch < self.steps_per_epoch:
                    yield line
            started = time.perf_counter()
            result = self._finish_epoch()
            state.seconds += time.perf_counter() - started
            yield {**(line or {}), **result}

    def _step(self, group: list[np.ndarray]) -> Tensor:
        """One optimizer step over a group of batches. Returns the gradient norm before clipping."""
        self.model.train()
        rows_in_group = sum(len(rows) for rows in group)
        step_loss = torch.zeros((), device=self.device)
        for part, rows in enumerate(group):
            torch.manual_seed(derived_seed(self.recipe.seed, self.state.step, part, self.world.rank))
            batch, weight = self._my_share(rows)
            with self._gradient_sync(last=part == len(group) - 1), self._out_of_memory_hint(batch):
                loss = self._loss(batch) * weight
                # Divided by the group's rows, so that a short last group has a mean over its own rows.
                # Multiplied by the processes, because DistributedDataParallel averages over them.
                self.scaler.scale(loss * (self.world.size / rows_in_group)).backward()  # type: ignore[no-untyped-call]
            step_loss += loss.detach()
        self.scaler.unscale_(self.optimizer)
        if self.telemetry and self._is_logged(self.state.step + 1):
            self.telemetry.note_gradients()
        norm = nn.utils.clip_grad_norm_(self.trainable.values(), self.recipe.max_gradient_norm or math.inf)
        self._rate = self.scheduler.get_last_lr()[0]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

        finite = (self.world.sum_over_processes_(step_loss) + norm).isfinite()
        self.loss_sum += torch.where(finite, step_loss, 0.0)
        self.rows += rows_in_group
        self._unchecked.append((self.state.step + 1, group, finite))
        return norm

    def _loss(self, batch: Batch) -> Tensor:
        """The cross-entropy, summed over the rows of a batch, in float32."""
        with autocast(self.device, self.precision):
            logits = self.forward(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return F.cross_entropy(
            logits.float(), batch.labels, reduction="sum", label_smoothing=self.recipe.label_smoothing
        )

    def _my_share(self, rows: np.ndarray) -> tuple[Batch, float]:
        """The rows of a batch that this process computes, and the weight of their loss. Counts all rows."""
        lengths = self.train_rows.lengths
        shares = [rows[rank :: self.world.size] for rank in range(self.world.size)]
        self.state.examples += len(rows)
        self.state.tokens += int(lengths[rows].sum())
        self.state.padded_tokens += sum(
            len(share) * int(lengths[share].max()) for share in shares if len(share)
        )
        mine = shares[self.world.rank]
        # DistributedDataParallel needs a forward of every process. One without rows computes the first row
        # with weight 0.
        batch = collate(self.train_rows, mine if len(mine) else rows[:1], self.pad_token_id)
        return batch.to(self.device), float(len(mine) > 0)

    def _gradient_sync(self, last: bool) -> AbstractContextManager[object]:
        """Gradients are summed over the processes only at the last batch of a group."""
        if isinstance(self.forward, DistributedDataParallel) and not last:
            return self.forward.no_sync()
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _out_of_memory_hint(self, batch: Batch) -> Iterator[None]:
        """Raises TrainingError, which says what to reduce, if forward or backward runs out of memory."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            rows, length = batch.input_ids.shape
            raise TrainingError(
                f"step {self.state.step + 1}: a batch of {rows} rows x {length} tokens does not fit into the "
                f"memory of {self.device}; lower batch_size (and raise accumulation_steps as much) or "
                "max_length_tokens, or set gradient_checkpointing = true"
            ) from error

    def _finish_epoch(self) -> dict[str, Any]:
        """Validates, and keeps the weights if they are the best so far.

        The best epoch has the lowest loss: in a few hundred validation rows, one more correct row is noise.
        Raises TrainingError if the loss is not finite.
        """
        self.check_finite()
        state, rows = self.state, self.validation_rows
        logits = predict_logits(
            self.model, rows, 2 * self.recipe.batch_size, self.pad_token_id, self.device, self.precision,
            self.world,
        )  # fmt: skip
        accuracy = Scores.of(rows.labels, logits.argmax(1).numpy(), logits.shape[1]).accuracy
        loss = float(F.cross_entropy(logits.double(), torch.from_numpy(rows.labels)))
        if not math.isfinite(loss):
            raise TrainingError(
                f"step {state.step}: the validation loss is not finite; a lower learning_rate or "
                'precision = "fp32" may help'
            )
        state.epoch += 1
        state.step_in_epoch = 0
        if loss < state.best_loss:
            state.best_accuracy, state.best_loss, state.best_epoch = accuracy, loss, state.epoch
            self.best = {name: p.detach().cpu().clone() for name, p in self.trainable.items()}
        result = {"val_accuracy": accuracy, "val_loss": loss}
        state.history.append({"epoch": state.epoch, **result})
        return {"step": state.step, "epoch": float(state.epoch), **result}

    def _stops_early(self) -> bool:
        patience = self.recipe.early_stopping_epochs
        return bool(patience) and self.state.epochs_since_best >= patience and self.state.epoch > 0

    @torch.no_grad()
    def restore_best(self) -> None:
        """Loads the weights of the best epoch into the model."""
        for name, parameter in self.trainable.items():
            parameter.copy_(self.best[name])

    def _is_logged(self, step: int) -> bool:
        """The first step is logged too: it shows that at first only B has a gradient that is not zero.

        So is the last one of an epoch, to which the validation belongs.
        """
        return step == 1 or step % self.recipe.log_every_steps == 0 or step % self.steps_per_epoch == 0

    def _line(self, gradient_norm: Tensor) -> dict[str, Any]:
        """The log line of the steps since the last one. Waits for the device."""
        self.check_finite()
        norm = float(gradient_norm)
        loss = float(self.loss_sum) / self.rows if self.rows else None  # None if float16 skipped every step
        self.loss_sum.zero_()
        self.rows = 0
        return {
            "step": self.state.step,
            "epoch": round(self.state.epoch + self.state.step_in_epoch / self.steps_per_epoch, 4),
            "loss": loss,
            "learning_rate": self._rate,
            "gradient_norm": norm if math.isfinite(norm) else None,  # None for a step that float16 skipped
            **(self.telemetry.line() if self.telemetry else {}),
        }

    def check_finite(self) -> None:
        """Checks that every loss and gradient since the last check was finite. Waits for the device.

        With float16 the scaler has skipped such a step; it is counted and left out of the logged loss.
        Otherwise the weights are unusable: raises TrainingError with the first such step and its rows,
        before anything is saved.
        """
        if not self._unchecked:
            return
        finite = torch.stack([flag for _, _, flag in self._unchecked]).cpu().tolist()
        bad = [(step, rows) for (step, rows, _), ok in zip(self._unchecked, finite, strict=True) if not ok]
        self._unchecked.clear()
        if not bad:
            return
        step, group = bad[0]
        rows = ", ".join(str(row) for row in sorted(np.concatenate(group).tolist()))
        if self.scaler.is_enabled():
            self.state.skipped_steps += len(bad)
            self.rows -= sum(len(rows) for _, skipped in bad for rows in skipped)
            if self.scaler.get_scale() >= 1:
                return
        raise TrainingError(
            f"step {step}: the loss or its gradient is not finite, among the rows {rows} of the shuffled"
            ' training split. A lower learning_rate, max_gradient_norm above 0 or precision = "fp32" may help'
        )
