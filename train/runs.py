"""A run's folder: what lies where, and loading what was trained."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora import AdapterError, load_adapter, read_adapter, save_adapter
from lora.files import CONFIG_FILE, TENSOR_FILE, digest, write_atomically
from model import load_base
from train.config import Recipe, make_recipe

ADAPTER = "adapter"
WEIGHTS = "weights.safetensors"  # what trained, of a run that is not LoRA
CONFIG = "config.toml"
SUMMARY = "summary.json"
_ENTRY = "run"


class RunError(RuntimeError):
    """A folder that is no finished run; the message says what is missing."""


@dataclass(frozen=True)
class Trained:
    """A model as a run left it, in eval mode, with what is needed to use it."""

    model: PreTrainedModel
    tokenizer: Any
    labels: tuple[str, ...]
    max_length_tokens: int


def save_trained(model: nn.Module, folder: Path, recipe: Recipe, labels: tuple[str, ...]) -> int:
    """Saves what trained: an adapter's folder for LoRA, else the trained weights. Returns its bytes."""
    metadata = {"labels": list(labels), "max_length_tokens": recipe.max_length_tokens, "seed": recipe.seed}
    if recipe.method == "lora":
        save_adapter(model, folder / ADAPTER, base=recipe.model, task_type="SEQ_CLS", metadata=metadata)
        return sum((folder / ADAPTER / name).stat().st_size for name in (CONFIG_FILE, TENSOR_FILE))
    tensors = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    note = {**metadata, "model": recipe.model, "frozen": _frozen(model, tensors)}
    note["digest"] = digest(tensors, note)
    data = safetensors.torch.save(tensors, {_ENTRY: json.dumps(note, sort_keys=True)})
    write_atomically(folder / WEIGHTS, data)
    return (folder / WEIGHTS).stat().st_size


def load_trained(folder: Path) -> Trained:
    """A run's model, or that of a bare adapter's folder, from here or from PEFT.

    Raises RunError, FileNotFoundError, AdapterError, ModelError.
    """
    if (folder / CONFIG_FILE).is_file():
        return _load_adapter_folder(folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no such folder")
    if (folder / CONFIG).is_file() and not (folder / SUMMARY).is_file():
        raise RunError(
            f"{folder}: the run is not finished; `python -m train --resume --output {folder}` goes on"
        )
    if (folder / ADAPTER).is_dir():
        return _load_adapter_folder(folder / ADAPTER)
    if (folder / WEIGHTS).is_file():
        return _load_weights(folder / WEIGHTS)
    raise RunError(f"{folder}: neither a run (no {CONFIG}) nor an adapter (no {CONFIG_FILE})")


def run_recipe(folder: Path) -> Recipe:
    """The recipe that was run in `folder`. Raises RunError."""
    try:
        return make_recipe(tomllib.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise RunError(f"{folder}: not a run (no {CONFIG})") from None
    except ValueError as error:
        raise RunError(f"{folder / CONFIG}: {error}") from error


def _load_adapter_folder(folder: Path) -> Trained:
    adapter = read_adapter(folder)
    if not adapter.base:
        raise AdapterError(
            f"{folder / CONFIG_FILE}: base_model_name_or_path is empty, so the base is unknown"
        )
    head = adapter.tensors.get("classifier.out_proj.weight")
    if head is None:
        raise AdapterError(f"{folder}: no classifier.out_proj.weight; this is no classifier's adapter")
    labels = tuple(adapter.metadata.get("labels") or (f"LABEL_{i}" for i in range(len(head))))
    seed = adapter.metadata.get("seed", 0)  # of a random base; others do not depend on it
    model, tokenizer = load_base(adapter.base, num_labels=len(labels), labels=labels, seed=seed)
    load_adapter(model, folder)
    longest = model.config.max_position_embeddings - model.config.pad_token_id - 1
    return Trained(model.eval(), tokenizer, labels, adapter.metadata.get("max_length_tokens", longest))


def _load_weights(path: Path) -> Trained:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {})[_ENTRY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if "digest" not in note:
                raise ValueError("there is no digest in it, as earlier versions left it; train it anew")
            if note["digest"] != digest(tensors, note):
                raise ValueError("the digest is not that of the contents")
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise RunError(f"{path}: damaged or of another version: {error}") from error
    labels = tuple(note["labels"])
    model, tokenizer = load_base(note["model"], num_labels=len(labels), labels=labels, seed=note["seed"])
    parameters = dict(model.named_parameters())
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != {name: parameters[name].shape for name in shapes if name in parameters}:
        raise RunError(f"{path}: not the tensors of {note['model']!r} as it is now")
    if note["frozen"] != _frozen(model, tensors):
        raise RunError(f"{path}: trained on {note['model']!r} with other weights than it has now")
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return Trained(model.eval(), tokenizer, labels, note["max_length_tokens"])


def _frozen(model: nn.Module, trained: Mapping[str, Tensor]) -> str:
    """The digest of the model's other parameters."""
    return digest({name: p.detach() for name, p in model.named_parameters() if name not in trained}, {})
