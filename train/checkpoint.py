"""Checkpoints to resume from: one verified file each, written atomically. The last two are kept.

A resumed run ends in the same bits as a run that never stopped, so a checkpoint holds everything that the
rest of the run depends on: trained and best weights, the frozen tensors of an adapter, optimizer, scaler,
learning rates and counters.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora.adapted import has_adapter, lora_layers
from lora.errors import UserError
from lora.storage import DamagedFileError, read_tensors, remove_unfinished, write_tensors
from train.config import parse_recipe
from train.loop import State, Trainer

_ENTRY = "checkpoint"
_KEEP = 2


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be used. The message names the file and the problem."""


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of the adapters by name; empty for a model without."""
    return {
        f"{name}.{key}": tensor
        for name, layer in (lora_layers(model) if has_adapter(model) else {}).items()
        for key, tensor in layer.adapter_state().items()
    }


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that are not of the adapters, by name."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    adapter = adapter_tensors(model)
    return {name: tensor for name, tensor in tensors.items() if name not in adapter}


def save_checkpoint(folder: Path, trainer: Trainer, identity: dict[str, str]) -> None:
    """Writes a checkpoint of the trainer and deletes all but the last two. Raises OSError.

    identity: what must be the same for a run to be resumed from it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{trainer.state.step:08d}.safetensors"
    note = {"step": trainer.state.step, "identity": identity, "trainer": _settings(trainer)}
    write_tensors(path, _tensors(trainer), _ENTRY, note)
    for old in list_checkpoints(folder)[:-_KEEP]:
        old.unlink()
    remove_unfinished(folder)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files, oldest first. Copies with other names are left alone."""
    return sorted(path for path in folder.glob("*.safetensors") if re.fullmatch("[0-9]{8,}", path.stem))


def load_last_checkpoint(folder: Path, trainer: Trainer, identity: dict[str, str]) -> bool:
    """Sets a new trainer to the last checkpoint in `folder`. Returns whether there is one.

    Raises CheckpointError if the file is damaged or was taken with another identity.
    """
    paths = list_checkpoints(folder)
    if not paths:
        return False
    path = paths[-1]
    try:
        tensors, note = read_tensors(path, _ENTRY)
        if note.get("step") != int(path.stem):
            raise DamagedFileError(f"{path}: damaged: the step in it differs from the step in its name")
    except (DamagedFileError, OSError) as error:
        older = f"; remove it to resume from {paths[-2].name}" if len(paths) > 1 else ""
        raise CheckpointError(f"{error}{older}") from error
    try:
        for name, value in identity.items():
            if not _same(name, note["identity"].get(name), value):
                raise CheckpointError(
                    f"{path}: cannot resume: the {name} differs from that of the checkpoint"
                )
        _restore(trainer, tensors, note["trainer"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of this version: {error!r}") from error
    return True


def _same(name: str, saved: Any, now: str) -> bool:
    """Whether a part of the identity is the same. A recipe of an earlier version may have fewer fields."""
    if saved == now or name != "recipe":
        return bool(saved == now)
    try:
        return parse_recipe(saved) == parse_recipe(now)
    except (TypeError, ValueError):
        return False


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    trained_or_adapter = {**trainer.trainable, **adapter_tensors(trainer.model)}
    found: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in trained_or_adapter.items()}
    found |= {f"best.{name}": tensor for name, tensor in trainer.best.items()}
    for name, parameter in trainer.trainable.items():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            found[f"optimizer.{name}.{key}"] = value
    return {**found, "loss_sum": trainer.loss_sum}


def _settings(trainer: Trainer) -> dict[str, Any]:
    return {
        "state": dataclasses.asdict(trainer.state),
        "rows": trainer.rows,
        "scaler": trainer.scaler.state_dict(),
        "learning_rates": trainer.scheduler.get_last_lr(),
    }


@torch.no_grad()
def _restore(trainer: Trainer, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    trainer.state = State(**settings["state"])
    trainer.rows = settings["rows"]
    trainer.loss_sum.copy_(tensors["loss_sum"])
    trainer.scaler.load_state_dict(settings["scaler"])
    trainer.scheduler.last_epoch = trainer.state.step
    trainer.scheduler._last_lr = settings["learning_rates"]
    for group, rate in zip(trainer.optimizer.param_groups, settings["learning_rates"], strict=True):
        group["lr"] = rate
    for name, tensor in adapter_tensors(trainer.model).items():
        saved = tensors[f"model.{name}"]
        if saved.shape != tensor.shape:  # EVA's ranks depend on the inputs, and `copy_` would broadcast
            shapes = f"{tuple(saved.shape)}, and that of the model {tuple(tensor.shape)}"
            raise TypeError(f"the shape of {name} is {shapes}")
        tensor.copy_(saved)
    for name, parameter in trainer.trainable.items():
        parameter.copy_(tensors[f"model.{name}"])
        if f"best.{name}" in tensors:
            trainer.best[name] = tensors[f"best.{name}"]
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"optimizer.{name}.{key}" in tensors:
                value = tensors[f"optimizer.{name}.{key}"].to(trainer.device)
                trainer.optimizer.state[parameter][key] = value
