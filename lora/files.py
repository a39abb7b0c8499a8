"""An adapter's folder, in PEFT's own format: adapter_config.json and adapter_model.safetensors.

What we add stands in the safetensors metadata, where PEFT does not look, as one entry of sorted JSON
(safetensors writes several in random order): the config, a fingerprint of the adapted base weights,
what the caller adds (label names, say), and a digest over all of it and the tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lora.config import LoraConfig
from lora.inject import find_targets, place_adapters
from lora.peft_format import from_peft, to_peft
from lora.tree import has_adapter, lora_config, lora_layers, modules_named, modules_once

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
_NEXT_CONFIG_FILE = f".{CONFIG_FILE}.next"
_PREFIX = "base_model.model."  # PEFT's wrappers around the model
_ENTRY = "lora"
_FINGERPRINT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class AdapterError(ValueError):
    """An adapter's folder that cannot be used; the message says which file, what is wrong and where."""


@dataclass(frozen=True)
class Adapter:
    """An adapter as read from a folder: checked in itself, not yet held against a model.

    base: the name of the model that it was trained on. tensors: by the model's own names
    (`….query.lora_A`, `classifier.dense.weight`). fingerprint: of the adapted base weights by dtype,
    empty if PEFT wrote the folder. metadata: what `save_adapter` was given.
    """

    config: LoraConfig
    base: str | None
    tensors: dict[str, Tensor]
    fingerprint: dict[str, str]
    metadata: dict[str, Any]


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    base: str,
    task_type: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Saves the model's adapter, and what modules_to_save names, for `load_adapter` and for PEFT.

    base: the name of the model underneath, for whoever loads it. task_type: PEFT's, "SEQ_CLS" say.
    metadata: further JSON, given back by `read_adapter`. What is saved is the same whether the model is
    merged or not. A crash leaves the folder's old adapter or the new one.

    Raises RuntimeError if the model has no adapter, ValueError if a tensor is not finite, OSError.
    """
    config = lora_config(model)
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in _adapter_tensors(model, config).items()
    }
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite; such an adapter is not saved")
    note: dict[str, Any] = {
        "config": _plain(config),
        "fingerprint": fingerprint(
            {name: (layer.base_weight, layer.bias) for name, layer in lora_layers(model).items()}
        ),
        "metadata": json.loads(json.dumps(dict(metadata or {}))),  # as it is read back: keys are strings
    }
    note["digest"] = digest(tensors, note)
    data = safetensors.torch.save(
        {_to_peft_key(name): tensor for name, tensor in tensors.items()},
        metadata={_ENTRY: json.dumps(note, sort_keys=True)},
    )
    fields = to_peft(config, base, task_type)
    config_text = json.dumps(fields, indent=2, default=str) + "\n"  # the first of two patterns wins

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Two files cannot be replaced at once. The tensors carry the config, so replacing them is the moment
    # that counts; a crash right after it leaves the new config under its other name.
    write_atomically(folder / _NEXT_CONFIG_FILE, config_text.encode())
    write_atomically(folder / TENSOR_FILE, data)
    (folder / _NEXT_CONFIG_FILE).replace(folder / CONFIG_FILE)
    _sync_folder(folder)


def read_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Reads and verifies an adapter's folder, saved here or by PEFT.

    Raises FileNotFoundError, or AdapterError for anything in the files that is damaged, unsupported or
    does not belong together.
    """
    folder = Path(folder)
    path = folder / TENSOR_FILE
    if not path.is_file():
        pickle = (folder / "adapter_model.bin").is_file()
        pickled = " (adapter_model.bin is a pickle, which can run code, so it is not read)" if pickle else ""
        raise FileNotFoundError(f"{folder}: there is no {TENSOR_FILE}{pickled}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {_from_peft_key(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        note = json.loads(header.get(_ENTRY, "{}"))
    except (safetensors.SafetensorError, ValueError) as error:
        raise AdapterError(f"{path}: damaged: {error}") from error
    if not isinstance(note, dict):
        raise AdapterError(f"{path}: damaged: its metadata {_ENTRY!r} is no JSON object")
    config, base = _read_config(folder / CONFIG_FILE)
    if note:
        if note.get("digest") != digest(tensors, note):
            raise AdapterError(f"{path}: damaged: the digest is not that of the contents")
        if note["config"] != _plain(config):
            following = folder / _NEXT_CONFIG_FILE
            if following.is_file():
                config, base = _read_config(following)
            if note["config"] != _plain(config):
                raise AdapterError(f"{folder / CONFIG_FILE}: not the config that the tensors were saved with")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise AdapterError(f"{path}: {name} is not finite")
    return Adapter(config, base, tensors, note.get("fingerprint", {}), note.get("metadata", {}))


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], check_base: bool = True) -> Adapter:
    """Injects the folder's adapter into a bare base model, in place, and loads its tensors.

    Freezes and trains the same parameters as `inject`. Names in modules_to_save that the model does not
    have are passed over, as PEFT's own sequence-classification adapters have some; the tensors must be
    exactly those that the config and the model ask for. check_base=False allows another base model.

    Raises RuntimeError if the model has an adapter, FileNotFoundError, AdapterError (it names the
    key); then the model is as it was. An adapter saved by PEFT carries no fingerprint: the base model's
    name is then all there is to compare, and a difference is a warning, as one model goes by several.
    """
    adapter = read_adapter(folder)
    config = adapter.config
    if has_adapter(model):
        raise RuntimeError("the model has an adapter already; eject it first")
    try:
        injection = find_targets(model, config)
    except TypeError as error:
        raise AdapterError(f"{folder}: {error}") from error
    linears = modules_once(model, (name for names in injection.adapted.values() for name in names))
    if not linears:
        raise AdapterError(f"{folder}: target_modules {config.target_modules!r} match nothing in this model")

    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, linear in linears.items():
        assert isinstance(linear, nn.Linear)  # find_targets saw to it
        r, dtype = config.rank(name), torch.promote_types(linear.weight.dtype, torch.float32)
        expected[f"{name}.lora_A"] = ((r, linear.in_features), dtype)
        expected[f"{name}.lora_B"] = ((linear.out_features, r), dtype)
    saved = modules_once(model, (name for names in injection.saved.values() for name in names))
    for name, module in saved.items():
        for key, tensor in module.state_dict().items():
            expected[f"{name}.{key}"] = (tuple(tensor.shape), tensor.dtype)

    missing, extra = expected.keys() - adapter.tensors.keys(), adapter.tensors.keys() - expected.keys()
    if missing:
        raise AdapterError(f"{folder}: {len(missing)} tensors are missing: {_some(missing)}")
    if extra:
        raise AdapterError(f"{folder}: {len(extra)} tensors have no place in this model: {_some(extra)}")
    for key, (shape, dtype) in expected.items():
        tensor = adapter.tensors[key]
        if tuple(tensor.shape) != shape:
            raise AdapterError(f"{folder}: {key} is {tuple(tensor.shape)}, and the model asks for {shape}")
        if tensor.dtype not in _FINGERPRINT_DTYPES and tensor.dtype != dtype:
            raise AdapterError(f"{folder}: {key} is {tensor.dtype}, and the model asks for {dtype}")
    if check_base:
        _check_base(model, adapter, linears, folder)

    place_adapters(model, config, injection, seed=0)
    with torch.no_grad():
        state = dict(_adapter_tensors(model, config))
        for key, tensor in adapter.tensors.items():
            state[key].copy_(tensor)
    return adapter


def fingerprint(weights: Mapping[str, tuple[Tensor, Tensor | None]]) -> dict[str, str]:
    """sha256 of base weights and biases by layer name, as they are in each of three dtypes.

    One model is often loaded in several dtypes; what it is in the narrower ones follows from the wider.
    """
    return {_short(dtype): _hash_weights(weights, dtype) for dtype in _FINGERPRINT_DTYPES}


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a crash leaves the old one or the new one, whole, and it survives a power cut."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp gives 0600
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def hash_tensors(sha: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    """Feeds names, dtypes, shapes and values to `sha`, in the order of the names."""
    for name in sorted(tensors):
        sha.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        sha.update(tensor_bytes(tensors[name]))


def digest(tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> str:
    """sha256 of the tensors and of what the note says but for its own "digest"."""
    rest = {key: value for key, value in note.items() if key != "digest"}
    sha = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    hash_tensors(sha, tensors)
    return sha.hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _adapter_tensors(model: nn.Module, config: LoraConfig) -> dict[str, Tensor]:
    """The adapter's own tensors, not copies: lora_A and lora_B of each layer, and modules_to_save whole."""
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        tensors[f"{name}.lora_A"] = layer.lora_A
        tensors[f"{name}.lora_B"] = layer.lora_B
    names = (name for pattern in config.modules_to_save for name, _ in modules_named(model, pattern))
    for name, module in modules_once(model, names).items():
        tensors.update({f"{name}.{key}": tensor for key, tensor in module.state_dict().items()})
    return tensors


def _to_peft_key(name: str) -> str:
    return f"{_PREFIX}{name}.weight" if name.endswith((".lora_A", ".lora_B")) else f"{_PREFIX}{name}"


def _from_peft_key(key: str) -> str:
    name = key.removeprefix(_PREFIX)
    return name.removesuffix(".weight") if name.endswith((".lora_A.weight", ".lora_B.weight")) else name


def _plain(config: LoraConfig) -> dict[str, Any]:
    """The config as it comes back from JSON, where a tuple is a list."""
    fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return fields


def _read_config(path: Path) -> tuple[LoraConfig, str | None]:
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent}: there is no {path.name}") from None
    except ValueError as error:
        raise AdapterError(f"{path}: damaged: {error}") from error
    if not isinstance(fields, dict):
        raise AdapterError(f"{path}: damaged: not a JSON object")
    base = fields.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise AdapterError(f"{path}: base_model_name_or_path: {base!r} is not a name")
    try:
        return from_peft(fields), base
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{path}: {error}") from error


def _check_base(
    model: nn.Module, adapter: Adapter, linears: Mapping[str, Any], folder: str | os.PathLike[str]
) -> None:
    if not adapter.fingerprint:
        own = getattr(getattr(model, "config", None), "name_or_path", "")  # transformers' models have one
        if adapter.base and own and adapter.base != own:
            warnings.warn(
                f"{folder}: the adapter was trained on {adapter.base!r} and the model calls itself {own!r}; "
                "the folder carries no fingerprint, so it is for you to know whether they are the same",
                stacklevel=3,
            )
        return
    dtype = next(iter(linears.values())).weight.dtype
    dtype = dtype if dtype in _FINGERPRINT_DTYPES else torch.float32
    found = _hash_weights({name: (linear.weight, linear.bias) for name, linear in linears.items()}, dtype)
    if found != adapter.fingerprint.get(_short(dtype)):
        raise AdapterError(
            f"{folder}: the adapter was trained on {adapter.base!r} with other weights than this model's in "
            f"{next(iter(linears))} and the other adapted layers (check_base=False loads it all the same)"
        )


def _hash_weights(weights: Mapping[str, tuple[Tensor, Tensor | None]], dtype: torch.dtype) -> str:
    sha = hashlib.sha256()
    for name in sorted(weights):
        sha.update(name.encode())
        for tensor in weights[name]:
            if tensor is not None:
                sha.update(tensor_bytes(tensor.detach().to(dtype)))
    return sha.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values as they lie in memory, on the CPU, for hashing."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(keys: set[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
