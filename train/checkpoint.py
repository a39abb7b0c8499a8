"""Checkpoints to resume from: one file each, written whole or not at all, checked before use.

A file holds tensors (safetensors) and, as one entry of sorted JSON in its metadata, the rest of the
state and a digest over both. The last two are kept.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from lora.files import hash_tensors, write_atomically

_ENTRY = "checkpoint"
_KEEP = 2


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message says which and why."""


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes the checkpoint of `step` and drops all but the last two. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    note = json.dumps({"state": state, "digest": _digest(tensors, state)}, sort_keys=True)
    write_atomically(folder / f"{step:08d}.safetensors", safetensors.torch.save(tensors, {_ENTRY: note}))
    for old in list_checkpoints(folder)[:-_KEEP]:
        old.unlink()
    for unfinished in folder.glob(".*.safetensors.*"):  # what a kill in the middle of a write left behind
        unfinished.unlink()


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files, oldest first."""
    return sorted(folder.glob("[0-9]*.safetensors"))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of one file. Raises CheckpointError if anything in it is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {})[_ENTRY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state, digest = note["state"], note["digest"]
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    if digest != _digest(tensors, state):
        raise CheckpointError(f"{path}: damaged: the digest is not that of the contents")
    if path.stem != f"{state['trainer']['state']['step']:08d}":
        raise CheckpointError(f"{path}: not the checkpoint that its name says")
    return tensors, state


def _digest(tensors: dict[str, Tensor], state: dict[str, Any]) -> str:
    sha = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    hash_tensors(sha, tensors)
    return sha.hexdigest()
