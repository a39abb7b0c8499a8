"""Saves what a run trained, and loads it for use: an adapter's folder, or the trained weights."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora import Adapter, AdapterError, Adapters, MergeableLinear, load_adapter, read_adapter, save_adapter
from lora.files import CONFIG_FILE, TENSOR_FILE
from lora.fingerprint import config_fields
from lora.quantised import PRECISIONS
from lora.storage import DamagedFileError, digest, read_tensors, write_tensors
from model import load_base, longest_text
from train.adapter import quantise_base
from train.batches import tokenizer_digest
from train.config import Recipe
from train.data import News, load_news
from train.layers import layer_digest, load_layer
from train.runs import ADAPTER, CONFIG, WEIGHTS, RunError, check_finished, run_recipe

_ENTRY = "run"


@dataclass(frozen=True)
class Trained:
    """A trained model in eval mode, its tokenizer, class labels and maximal length in tokens."""

    model: PreTrainedModel
    tokenizer: Any
    labels: tuple[str, ...]
    max_length_tokens: int


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter's folder, read and checked, not loaded. layer: its own layer class, if it has one."""

    content: Adapter
    labels: tuple[str, ...]
    layer: type[MergeableLinear] | None

    @property
    def folder(self) -> Path:
        """The adapter's folder."""
        return self.content.folder

    @property
    def note(self) -> dict[str, Any]:
        """What training noted: labels, max_length_tokens, seed and others. Empty if PEFT wrote the folder."""
        return self.content.metadata

    @property
    def base(self) -> str:
        """The base model, for messages and to compare: its name, seed of random weights, and precision."""
        seed = f", seed {self._seed}" if str(self.content.base).startswith("random:") else ""
        stored = f" in {self._precision}" if self._precision != "fp32" else ""
        return f"{self.content.base}{seed}{stored}"

    @property
    def _seed(self) -> int:
        return int(self.note.get("seed", 0))  # only a random base depends on it

    @property
    def _precision(self) -> str:
        return str(self.note.get("base_precision", "fp32"))

    def load_base(self) -> tuple[PreTrainedModel, Any]:
        """The base model as in training, with the adapter's labels; its tokenizer. Raises ModelError."""
        name, labels = str(self.content.base), self.labels
        model, tokenizer = load_base(name, num_labels=len(labels), labels=labels, seed=self._seed)
        quantise_base(model, self._precision)
        return model, tokenizer


def save_trained(
    model: nn.Module, folder: Path, recipe: Recipe, labels: tuple[str, ...], tokenizer: Any = None
) -> int:
    """Saves an adapter's folder for LoRA, otherwise the trained weights. Returns the size in bytes.

    tokenizer: recorded, so that another one is not used with the weights; None records nothing.
    """
    metadata: dict[str, Any] = {
        "labels": list(labels), "max_length_tokens": recipe.max_length_tokens, "seed": recipe.seed
    }  # fmt: skip
    if recipe.base_precision != "fp32":
        metadata["base_precision"] = recipe.base_precision
    if recipe.layer:
        metadata["layer"] = layer_digest(recipe.layer)
    if tokenizer is not None:
        metadata["tokenizer"] = tokenizer_digest(tokenizer)
    if recipe.method == "lora":
        save_adapter(model, folder / ADAPTER, base=recipe.model, task_type="SEQ_CLS", metadata=metadata)
        return adapter_size(folder / ADAPTER)
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    note = {
        **metadata,
        "model": recipe.model,
        "frozen": _frozen_digest(model, tensors),
        "config": config_fields(model),
    }
    write_tensors(folder / WEIGHTS, tensors, _ENTRY, note)
    return (folder / WEIGHTS).stat().st_size


def load_trained(folder: Path, text: bool = False) -> Trained:
    """Loads the model of a finished run, or of an adapter's folder written here or by PEFT.

    text: require a tokenizer. Raises RunError, AdapterError, ModelError, FileNotFoundError.
    """
    if (folder / WEIGHTS).is_file():
        check_finished(folder)
        trained = _load_weights(folder / WEIGHTS)
    else:
        adapter = read_trained_adapter(folder)
        model, tokenizer = adapter.load_base()
        load_adapter(model, adapter.content, layer=adapter.layer)
        trained = _trained(adapter, model, tokenizer)
    if text:
        _require_tokenizer(trained, folder)
    return trained


def load_adapters(
    adapters: Mapping[str, TrainedAdapter], text: bool = False
) -> tuple[Adapters, dict[str, Trained]]:
    """Loads adapters with these names on one base model, and leaves the base active.

    All `Trained` have this model, and each the labels and the length of its adapter.

    text: require a tokenizer. Raises RunError, AdapterError, ModelError, FileNotFoundError.
    """
    first, *others = adapters.values()
    for other in others:
        if other.base != first.base:
            raise RunError(
                f"{other.folder}: its base is {other.base}, and that of {first.folder} is {first.base}; "
                "adapters are used together on one base"
            )
    model, tokenizer = first.load_base()
    loaded, trained = Adapters(model), {}
    for name, adapter in adapters.items():
        loaded.load(name, adapter.content, layer=adapter.layer)
        trained[name] = _trained(adapter, model, tokenizer)
    if text:
        _require_tokenizer(trained[next(iter(trained))], first.folder)
    return loaded, trained


def read_trained_adapter(folder: Path) -> TrainedAdapter:
    """Reads the adapter of a finished run, or an adapter's folder written here or by PEFT.

    Raises RunError, also if the run trained no adapter, AdapterError, FileNotFoundError.
    """
    layer = ""  # its file is run only if it is the one that the adapter was trained with
    if not (folder / CONFIG_FILE).is_file():
        check_finished(folder)
        if (folder / WEIGHTS).is_file():
            raise RunError(f"{folder}: its method is full or head, so it has no adapter; give a LoRA run")
        if not (folder / ADAPTER).is_dir():
            raise RunError(f"{folder}: neither a run (no {CONFIG}) nor an adapter (no {CONFIG_FILE})")
        layer = run_recipe(folder).layer if (folder / CONFIG).is_file() else ""
        folder = folder / ADAPTER
    content = read_adapter(folder)
    if not content.base:
        raise AdapterError(
            f"{folder / CONFIG_FILE}: base_model_name_or_path is empty, so the base is unknown"
        )
    head = content.tensors.get("classifier.out_proj.weight")
    if head is None or head.ndim != 2:
        raise AdapterError(f"{folder}: the adapter has no classification head (classifier.out_proj.weight)")
    note = _checked(content.metadata, folder)
    if note.get("layer", "") != layer_digest(layer):
        hint = "its file has changed" if layer else "name the run's folder, whose config.toml has its file"
        raise RunError(f"{folder}: trained with a layer class of its own; {hint}")
    labels = tuple(note.get("labels") or (f"LABEL_{i}" for i in range(len(head))))
    if len(labels) != len(head):
        raise RunError(
            f"{folder}: damaged: {len(labels)} labels in its note, {len(head)} outputs of its head"
        )
    return TrainedAdapter(content, labels, load_layer(layer))


def adapter_size(folder: Path) -> int:
    """The size of an adapter's folder in bytes."""
    return sum((folder / name).stat().st_size for name in (CONFIG_FILE, TENSOR_FILE))


def _trained(adapter: TrainedAdapter, model: PreTrainedModel, tokenizer: Any) -> Trained:
    _check_tokenizer(tokenizer, adapter.note, adapter.folder)
    longest = longest_text(model.config)
    length = min(adapter.note.get("max_length_tokens", longest), longest)
    return Trained(model.eval(), tokenizer, adapter.labels, length)


def _require_tokenizer(trained: Trained, folder: Path) -> None:
    if trained.tokenizer is None:
        raise RunError(f"{folder}: its base model comes without a tokenizer, so it cannot read text")


def _load_weights(path: Path) -> Trained:
    try:
        tensors, note = read_tensors(path, _ENTRY)
    except DamagedFileError as error:
        raise RunError(str(error)) from error
    if not (_checked(note, path).keys() >= {"labels", "max_length_tokens", "seed", "model", "frozen"}):
        raise RunError(f"{path}: not written by this project (no metadata entry {_ENTRY!r})")
    labels = tuple(note["labels"])
    model, tokenizer = load_base(note["model"], num_labels=len(labels), labels=labels, seed=note["seed"])
    quantise_base(model, note.get("base_precision", "fp32"))
    parameters = dict(model.named_parameters())
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != {name: parameters[name].shape for name in shapes if name in parameters}:
        raise RunError(f"{path}: names or shapes of its tensors do not match the model {note['model']!r}")
    fields = config_fields(model)
    for key, value in note.get("config", {}).items():
        if key in fields and fields[key] != value:
            raise RunError(
                f"{path}: trained on {note['model']!r} with {key} = {value!r}, which is {fields[key]!r} now"
            )
    _check_tokenizer(tokenizer, note, path)
    if note["frozen"] != _frozen_digest(model, tensors):
        raise RunError(f"{path}: the weights of the base {note['model']!r} have changed since training")
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return Trained(model.eval(), tokenizer, labels, note["max_length_tokens"])


def _checked(note: dict[str, Any], path: Path) -> dict[str, Any]:
    """The note of a file. Raises RunError if a value has another type than this project writes."""
    kinds = {
        "labels": list, "max_length_tokens": int, "seed": int, "model": str, "config": dict,
        "tokenizer": str, "layer": str, "base_precision": str,
    }  # fmt: skip
    for key, kind in kinds.items():
        if key in note and not isinstance(note[key], kind):
            raise RunError(f"{path}: damaged: {key} in its note is {reprlib.repr(note[key])}")
    labels = note.get("labels", [])
    if len(set(map(str, labels))) != len(labels) or not all(isinstance(label, str) for label in labels):
        raise RunError(f"{path}: damaged: the labels in its note are not different names")
    if note.get("base_precision", "fp32") not in PRECISIONS:
        raise RunError(f"{path}: damaged: base_precision in its note is {note['base_precision']!r}")
    if note.get("max_length_tokens", 3) < 3 or not 0 <= note.get("seed", 0) < 2**32:
        raise RunError(f"{path}: damaged: max_length_tokens or seed in its note is out of range")
    return note


def _check_tokenizer(tokenizer: Any, note: dict[str, Any], path: Path) -> None:
    if tokenizer is not None and note.get("tokenizer", "") not in ("", tokenizer_digest(tokenizer)):
        raise RunError(f"{path}: trained with another tokenizer than the base model has now")


def _frozen_digest(model: nn.Module, trained: Mapping[str, Tensor]) -> str:
    return digest({name: p.detach() for name, p in model.named_parameters() if name not in trained}, {})


def news_of(trained: Trained, recipe: Recipe) -> News:
    """The data of a run. Raises DataError, RunError if its classes are not the model's."""
    news = load_news(recipe.data, recipe.validation_fraction, recipe.seed)
    if news.labels != trained.labels:
        raise RunError(
            f"{recipe.data}: its classes are {', '.join(news.labels)};"
            f" the model knows {', '.join(trained.labels)}"
        )
    return news
