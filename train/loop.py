"""The training loop, in plain PyTorch: one for LoRA, for full fine-tuning and for the head alone."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
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

from lora.tree import has_adapter
from train.batches import Batch, Encoded, batches_by_length, collate, epoch_batches
from train.config import Recipe
from train.distributed import ALONE, World
from train.hardware import autocast
from train.metrics import Scores
from train.telemetry import Telemetry

_MOST_GRAPHS = 128  # 16 lengths up to 512 tokens, padded or not; an epoch's short last batch, eval modes
_COMPILED_LENGTHS = 32  # rows are padded to a multiple of so many tokens where a model is compiled


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which steps, and why."""


@dataclass
class State:
    """Where a run stands, but for its tensors. What is not timing is the same however often it stopped."""

    epoch: int = 0  # epochs finished
    step_in_epoch: int = 0  # optimizer steps since
    step: int = 0
    best_epoch: int = 0  # counted from 1; 0: none yet
    best_accuracy: float = -1.0
    best_loss: float = math.inf
    examples: int = 0  # rows trained on
    tokens: int = 0  # of those rows, without padding
    padded_tokens: int = 0  # with padding: what was computed
    skipped_steps: int = 0  # by float16's scaler, because a scaled gradient overflowed
    seconds: float = 0.0  # of training steps and validation, over all sittings
    log_lines: int = 0
    history: list[dict[str, float]] = field(default_factory=list)  # a row an epoch

    @property
    def epochs_since_best(self) -> int:
        return self.epoch - self.best_epoch


class Trainer:
    """The model, its optimizer and where the run stands; `epochs` trains and yields after every step.

    Each random number follows from the seed, the step and the rank: a run that was stopped and resumed
    draws what it would have drawn. A batch is cut into the processes' shares; gradients and losses are
    sums over rows divided by all rows, so that they are the same at any number of processes.
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
        world: World = ALONE,
    ):
        self.model, self.recipe, self.world = model, recipe, world
        self.parallel = (
            model if world.size == 1 else DistributedDataParallel(model, forward_sync_buffers=False)
        )
        # One graph for each shape: shapes that vary freely make slower ones.
        self.forward = torch.compile(self.parallel, dynamic=False) if recipe.compile else self.parallel
        if recipe.compile:  # torch gives up after 8 graphs, without a word but a warning
            torch._dynamo.config.recompile_limit = _MOST_GRAPHS
        self.train_rows, self.validation_rows = train, validation
        self.pad_token_id, self.device, self.precision = pad_token_id, device, precision
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = [p for p in self.trainable.values() if p.ndim >= 2]
        others = [p for p in self.trainable.values() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            fused=True,
        )
        batches = math.ceil(len(train) / recipe.batch_size)
        self.steps_per_epoch = math.ceil(batches / recipe.accumulation_steps)
        total = recipe.epochs * self.steps_per_epoch
        self.scheduler = get_cosine_schedule_with_warmup(
            self.optimizer, round(recipe.warmup_fraction * total), total
        )
        # float16's gradients underflow; scaled losses keep them in range, and steps that overflow are skipped
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.telemetry = Telemetry(model) if recipe.telemetry and has_adapter(model) else None
        self.state = State()
        self.best: dict[str, Tensor] = {}
        self._loss_sum = torch.zeros((), device=device)  # over rows since the last logged step
        self._rows = 0
        self._unchecked: list[tuple[int, list[np.ndarray], Tensor]] = []  # step, its rows, whether finite

    def epochs(self) -> Iterator[dict[str, Any] | None]:
        """Trains to the end, yielding after each step: a line to log, or None."""
        state, recipe = self.state, self.recipe
        while state.epoch < recipe.epochs and not self._should_stop():
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

    def restore_best(self) -> None:
        """Puts the weights of the best validation epoch into the model."""
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(self.best[name])

    def _step(self, group: list[np.ndarray]) -> Tensor:
        """One optimizer step over the batches of a group; the gradient's norm before clipping."""
        recipe, state, world = self.recipe, self.state, self.world
        self.model.train()
        rows_in_group = sum(len(rows) for rows in group)
        step_loss = torch.zeros((), device=self.device)
        for part, rows in enumerate(group):
            torch.manual_seed(_step_seed(recipe.seed, state.step, part, world.rank))
            shares = [rows[rank :: world.size] for rank in range(world.size)]
            self._count(rows, shares)
            # DistributedDataParallel wants a forward from everyone: one without rows lends one, unweighed.
            mine = shares[world.rank]
            mine = mine if len(mine) else rows[:1]
            length = self._padded_length(mine)
            batch = collate(self.train_rows, mine, self.pad_token_id, length).to(self.device)
            with self._synchronised(part == len(group) - 1), self._fitting_into_memory(batch):
                loss_sum = self._loss(batch) * float(len(shares[world.rank]) > 0)
                # Divided by the group's rows, so that a short last group is still a mean over its rows;
                # times the processes, over which DistributedDataParallel takes the mean.
                scaled = self.scaler.scale(loss_sum * (world.size / rows_in_group))
                scaled.backward()  # type: ignore[no-untyped-call]
            step_loss += loss_sum.detach()
        self.scaler.unscale_(self.optimizer)
        if self.telemetry and self._is_logged(state.step + 1):
            self.telemetry.note_gradients()
        limit = recipe.max_gradient_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.trainable.values(), limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        finite = (world.sum_(step_loss) + norm).isfinite()
        self._loss_sum += torch.where(finite, step_loss, 0.0)
        self._rows += rows_in_group
        self._unchecked.append((state.step + 1, group, finite))
        return norm

    def _loss(self, batch: Batch) -> Tensor:
        """The cross-entropy summed over a batch's rows, in float32."""
        with autocast(self.device, self.precision):
            logits = self.forward(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return F.cross_entropy(
            logits.float(), batch.labels, reduction="sum", label_smoothing=self.recipe.label_smoothing
        )

    @contextlib.contextmanager
    def _fitting_into_memory(self, batch: Batch) -> Iterator[None]:
        """Raises TrainingError with what to lower where a batch's forward or backward does not fit."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            rows, length = batch.input_ids.shape
            raise TrainingError(
                f"step {self.state.step + 1}: a batch of {rows} rows x {length} tokens does not fit into the "
                f"memory of {self.device}; lower batch_size (and raise accumulation_steps as much) or "
                "max_length_tokens, or set gradient_checkpointing = true"
            ) from error

    def _synchronised(self, last: bool) -> AbstractContextManager[object]:
        """Gradients are added up over the processes at a group's last batch alone."""
        if isinstance(self.parallel, DistributedDataParallel) and not last:
            return self.parallel.no_sync()
        return contextlib.nullcontext()

    def _count(self, rows: np.ndarray, shares: list[np.ndarray]) -> None:
        lengths = self.train_rows.lengths
        self.state.examples += len(rows)
        self.state.tokens += int(lengths[rows].sum())
        self.state.padded_tokens += sum(
            len(share) * self._padded_length(share) for share in shares if len(share)
        )

    def _padded_length(self, rows: np.ndarray) -> int:
        """What these rows of the training part are padded to, in tokens."""
        longest = int(self.train_rows.lengths[rows].max())
        if not self.recipe.compile:
            return longest
        return min(-(-longest // _COMPILED_LENGTHS) * _COMPILED_LENGTHS, self.recipe.max_length_tokens)

    def check_finite(self) -> None:
        """Looks at the steps since the last look: was every loss and gradient finite? Waits for the device.

        With float16 the scaler has skipped such a step, which is counted and has no part in the logged
        loss. Otherwise the weights are spoilt: raises TrainingError with the first such step and its rows,
        before anything is saved.
        """
        if not self._unchecked:
            return
        finite = torch.stack([flag for _, _, flag in self._unchecked]).cpu().tolist()
        bad = [
            (step, rows) for (step, rows, _), fine in zip(self._unchecked, finite, strict=True) if not fine
        ]
        self._unchecked.clear()
        if not bad:
            return
        step, group = bad[0]
        rows = ", ".join(str(row) for row in sorted(np.concatenate(group).tolist()))
        if self.scaler.is_enabled():
            self.state.skipped_steps += len(bad)
            self._rows -= sum(len(rows) for _, skipped in bad for rows in skipped)
            if self.scaler.get_scale() >= 1:
                return
        raise TrainingError(
            f"step {step}: the loss or its gradient is not finite, among the training rows {rows}. "
            'A lower learning_rate, max_gradient_norm above 0 or precision = "fp32" may help'
        )

    def _is_logged(self, step: int) -> bool:
        """The first step too: there B has a gradient and A has none."""
        return step == 1 or step % self.recipe.log_every_steps == 0

    def _line(self, gradient_norm: Tensor) -> dict[str, Any]:
        """What is logged of the steps since the last line. Waits for the device."""
        self.check_finite()
        norm = float(gradient_norm)
        loss = float(self._loss_sum) / self._rows if self._rows else None  # None: float16 skipped them all
        self._loss_sum.zero_()
        self._rows = 0
        return {
            "step": self.state.step,
            "epoch": round(self.state.epoch + self.state.step_in_epoch / self.steps_per_epoch, 4),
            "loss": loss,
            "learning_rate": self.scheduler.get_last_lr()[0],
            "gradient_norm": norm if math.isfinite(norm) else None,  # of a step that float16 skipped
            **(self.telemetry.line() if self.telemetry else {}),
        }

    def _finish_epoch(self) -> dict[str, Any]:
        """Validates, and keeps the weights if they are the best yet.

        Best by loss: of a few hundred validation rows, one more that is right is noise. Raises
        TrainingError where that loss is not finite.
        """
        self.check_finite()
        state = self.state
        logits = predict_logits(
            self.model,
            self.validation_rows,
            2 * self.recipe.batch_size,
            self.pad_token_id,
            self.device,
            self.precision,
            self.world,
        )
        labels = self.validation_rows.labels
        accuracy = Scores.of(labels, logits.argmax(1).numpy(), logits.shape[1]).accuracy
        loss = float(F.cross_entropy(logits.double(), torch.from_numpy(labels)))
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

    def _should_stop(self) -> bool:
        patience = self.recipe.early_stopping_epochs
        return bool(patience) and self.state.epochs_since_best >= patience and self.state.epoch > 0

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the rest of the run depends on, by name, for a checkpoint."""
        found: dict[str, Tensor] = {f"model.{name}": p for name, p in self.trainable.items()}
        found |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.trainable.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{name}.{key}"] = value
        return {**found, "loss_sum": self._loss_sum}

    def settings(self) -> dict[str, Any]:
        """The rest of it, as JSON."""
        return {
            "state": dataclasses.asdict(self.state),
            "rows": self._rows,
            "scaler": self.scaler.state_dict(),
            "learning_rates": self.scheduler.get_last_lr(),
        }

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
        """Takes the run up where `tensors` and `settings` left it."""
        self.state = State(**settings["state"])
        self._rows = settings["rows"]
        self._loss_sum.copy_(tensors["loss_sum"])
        self.scaler.load_state_dict(settings["scaler"])
        self.scheduler.last_epoch = self.state.step
        self.scheduler._last_lr = settings["learning_rates"]
        for group, rate in zip(self.optimizer.param_groups, settings["learning_rates"], strict=True):
            group["lr"] = rate
        for name, parameter in self.trainable.items():
            parameter.copy_(tensors[f"model.{name}"])
            if f"best.{name}" in tensors:
                self.best[name] = tensors[f"best.{name}"]
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"optimizer.{name}.{key}" in tensors:
                    value = tensors[f"optimizer.{name}.{key}"].to(self.device)
                    self.optimizer.state[parameter][key] = value


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    rows: Encoded,
    batch_size: int,
    pad_token_id: int,
    device: torch.device,
    precision: str,
    world: World = ALONE,
) -> Tensor:
    """The model's logits in eval mode, (rows, classes) float32 on the CPU, in the rows' order.

    Each process of `world` computes some of the batches, and all get all of the logits.
    """
    was_training = model.training
    model.eval()
    classes = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
    logits = torch.zeros(len(rows), classes, device=device)
    for members in batches_by_length(rows.lengths, batch_size)[world.rank :: world.size]:
        batch = collate(rows, members, pad_token_id).to(device)
        with autocast(device, precision):
            output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        logits[torch.from_numpy(members).to(device)] = output.float()
    model.train(was_training)
    return world.sum_(logits).cpu()  # every row is somewhere, and zero elsewhere


def _step_seed(seed: int, step: int, part: int, rank: int) -> int:
    digest = hashlib.sha256(f"{seed}:{step}:{part}:{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
