"""Files that are complete or absent: atomic writes, digests, and safetensors files with a verified note.

A note is a JSON object in one entry of the safetensors metadata. It holds a digest over the note and the
tensors, so that damage to either is detected. It is one entry because safetensors writes several entries
in random order, and its JSON is sorted, so that the same contents give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lora.errors import UserError


class DamagedFileError(UserError, ValueError):
    """A file whose contents are not what was written; the message names the file."""


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a crash leaves either the old or the new contents, and syncs it to disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Removes what writes to files in `folder` have left that were killed. No other write may be going on."""
    for path in folder.glob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}", path.name) and path.is_file():
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Syncs a folder's entries to disk, so that a rename in it survives a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    entry: str,
    note: Mapping[str, Any],
    to_key: Callable[[str], str] = str,
) -> None:
    """Writes tensors and a note with a digest as one safetensors file, atomically.

    entry: the metadata key of the note. note: JSON without the key "digest". to_key: maps a tensor's name
    to its key in the file; the digest is computed over the names. Raises OSError.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Tied tensors are saved under each of their names, but safetensors refuses tensors that share memory.
    first = {tensor.untyped_storage().data_ptr(): name for name, tensor in reversed(tensors.items())}
    tensors = {
        name: tensor if first[tensor.untyped_storage().data_ptr()] == name else tensor.clone()
        for name, tensor in tensors.items()
    }
    text = json.dumps({**note, "digest": digest(tensors, note)}, sort_keys=True)
    data = safetensors.torch.save({to_key(name): tensor for name, tensor in tensors.items()}, {entry: text})
    write_atomically(path, data)


def read_tensors(
    path: Path, entry: str, to_name: Callable[[str], str] = str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_tensors` wrote: the tensors on the CPU and the note, the latter empty if absent.

    to_name: the inverse of `to_key`. Raises DamagedFileError if the file cannot be parsed or its digest
    does not match, OSError.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(entry, "{}")
            keys = {key: to_name(key) for key in file.keys()}  # noqa: SIM118
            tensors = {name: file.get_tensor(key) for key, name in keys.items()}
        note = json.loads(text)
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: damaged: {error}") from error
    for key, name in keys.items():
        other = next(other for other, same in keys.items() if same == name)
        if other != key:
            raise DamagedFileError(f"{path}: {name} is in the file twice, as {other!r} and {key!r}")
    if not isinstance(note, dict):
        raise DamagedFileError(f"{path}: damaged: the metadata entry {entry!r} is not a JSON object")
    if note and note.get("digest") != digest(tensors, note):
        raise DamagedFileError(f"{path}: damaged: the digest does not match the contents")
    return tensors, note


def digest(tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> str:
    """The SHA-256 of a note, its own "digest" excluded, and of tensors: names, dtypes, shapes, values."""
    rest = {key: value for key, value in note.items() if key != "digest"}
    sha = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        sha.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        sha.update(tensor_bytes(tensors[name]))
    return sha.hexdigest()


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that FSDP has sharded; every process must then call this."""
    full = getattr(tensor, "full_tensor", None)
    return full() if full else tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor as bytes, copied to the CPU if necessary, for hashing."""
    return whole(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
