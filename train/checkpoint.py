"""Checkpoints to resume from: one verified file each, written atomically. The last two are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lora.errors import UserError
from lora.storage import DamagedFileError, read_tensors, write_tensors

_ENTRY = "checkpoint"
_KEEP = 2


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be used. The message names the file and the problem."""


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes the checkpoint of `step` and deletes all but the last two. `state` is JSON. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / f"{step:08d}.safetensors", tensors, _ENTRY, {"step": step, "state": state})
    for old in list_checkpoints(folder)[:-_KEEP]:
        old.unlink()
    for unfinished in folder.glob(".*.safetensors.*"):  # left by a write that was killed
        unfinished.unlink()


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files, oldest first."""
    return sorted(folder.glob("[0-9]*.safetensors"))


def load_last_checkpoint(
    folder: Path, identity: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and the state of the last checkpoint in `folder`, None if there is none.

    identity: what must be the same as in `state["identity"]` for the run to continue.

    Raises CheckpointError if the file is damaged or the identity differs.
    """
    paths = list_checkpoints(folder)
    if not paths:
        return None
    path = paths[-1]
    try:
        tensors, note = read_tensors(path, _ENTRY)
        if note.get("step") != int(path.stem):
            raise DamagedFileError(f"{path}: damaged: not the checkpoint of that step")
    except (DamagedFileError, OSError) as error:
        older = f"; remove it to resume from {paths[-2].name}" if len(paths) > 1 else ""
        raise CheckpointError(f"{error}{older}") from error
    state: dict[str, Any] = note["state"]
    for name, value in identity.items():
        if state["identity"].get(name) != value:
            raise CheckpointError(f"{path}: cannot resume: the {name} is not the one that it was taken with")
    return tensors, state
