"""Where a run is: its counters, and everything that a checkpoint holds of a Trainer."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from train.loop import Trainer


@dataclass
class State:
    """The counters of a run. All but `seconds` are the same however often the run was stopped and resumed."""

    epoch: int = 0  # finished epochs
    step_in_epoch: int = 0  # optimizer steps since
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
    history: list[dict[str, float]] = field(default_factory=list)  # one row per epoch

    @property
    def epochs_since_best(self) -> int:
        return self.epoch - self.best_epoch


def checkpoint_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor that the rest of the run depends on, by name."""
    found: dict[str, Tensor] = {f"model.{name}": p for name, p in trainer.trainable.items()}
    found |= {f"best.{name}": tensor for name, tensor in trainer.best.items()}
    for name, parameter in trainer.trainable.items():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            found[f"optimizer.{name}.{key}"] = value
    return {**found, "loss_sum": trainer.loss_sum}


def checkpoint_settings(trainer: Trainer) -> dict[str, Any]:
    """Everything else that the rest of the run depends on, as JSON."""
    return {
        "state": dataclasses.asdict(trainer.state),
        "rows": trainer.rows,
        "scaler": trainer.scaler.state_dict(),
        "learning_rates": trainer.scheduler.get_last_lr(),
    }


@torch.no_grad()
def restore(trainer: Trainer, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Sets a new Trainer to where `checkpoint_tensors` and `checkpoint_settings` were taken."""
    trainer.state = State(**settings["state"])
    trainer.rows = settings["rows"]
    trainer.loss_sum.copy_(tensors["loss_sum"])
    trainer.scaler.load_state_dict(settings["scaler"])
    trainer.scheduler.last_epoch = trainer.state.step
    trainer.scheduler._last_lr = settings["learning_rates"]
    for group, rate in zip(trainer.optimizer.param_groups, settings["learning_rates"], strict=True):
        group["lr"] = rate
    for name, parameter in trainer.trainable.items():
        parameter.copy_(tensors[f"model.{name}"])
        if f"best.{name}" in tensors:
            trainer.best[name] = tensors[f"best.{name}"]
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"optimizer.{name}.{key}" in tensors:
                value = tensors[f"optimizer.{name}.{key}"].to(trainer.device)
                trainer.optimizer.state[parameter][key] = value
