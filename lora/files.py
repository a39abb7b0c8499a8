"""An adapter's folder in PEFT's format: adapter_config.json and adapter_model.safetensors.

The note of the safetensors file (lora/storage.py), which PEFT ignores, stores the config, a fingerprint of
the base (lora/fingerprint.py), and metadata of the caller, such as labels.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora.adapted import has_adapter, lora_config, lora_layers
from lora.config import LoraConfig
from lora.errors import UserError
from lora.fingerprint import FLOATS, difference, fingerprint
from lora.inject import (
    CONVERSIONS,
    build_layers,
    find_targets,
    layer_class,
    swap_in,
    unchanged_on_error,
)
from lora.interrupts import uninterrupted
from lora.mergeable import MergeableLinear
from lora.modules import WRAPPERS, modules_named, modules_once, unwrap
from lora.peft_format import from_peft, to_peft
from lora.storage import (
    DamagedFileError,
    read_tensors,
    sync_folder,
    whole,
    write_atomically,
    write_tensors,
)

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
_NEXT_CONFIG_FILE = f".{CONFIG_FILE}.next"
_PREFIX = "base_model.model."  # PEFT's wrappers around the model
_SHARED_PREFIX = "base_model."
_ENTRY = "lora"
_FINGERPRINT = ("adapted", "rest", "config")


class AdapterError(UserError, ValueError):
    """An adapter's folder that cannot be used. The message names the file and the problem."""


@dataclass(frozen=True, repr=False)
class Adapter:
    """The contents of an adapter's folder, checked for damage but not against a model. It prints as a table.

    base: the name of the model that the adapter was trained on. tensors: by the model's own names
    (`….query.lora_A`, `classifier.dense.weight`). fingerprint: of the base (lora/fingerprint.py), empty if
    PEFT wrote the folder. metadata: what `save_adapter` was given. layer: the name of a class that is not the
    library's, which the tensors need. folder: what was read.
    """

    config: LoraConfig
    base: str | None
    tensors: dict[str, Tensor]
    fingerprint: dict[str, Any]
    metadata: dict[str, Any]
    layer: str = ""
    folder: Path = Path()

    def __repr__(self) -> str:
        """The settings, and one line for all blocks of the model: tensor, shape, how many."""
        same = Counter(
            (re.sub(r"\.\d+(?=\.)", ".*", name), tuple(t.shape)) for name, t in self.tensors.items()
        )
        rows = [f"{name}  {shape}  x {count}" for (name, shape), count in same.items()]
        config = self.config
        settings = f"r={config.r}, lora_alpha={config.lora_alpha}, target_modules={config.target_modules!r}"
        return "\n".join([f"LoRA adapter of {self.base!r}: {settings}", *rows])


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    base: str,
    task_type: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Saves the model's adapter and the modules in modules_to_save, for `load_adapter` and for PEFT.

    The files do not depend on whether the model is merged. A crash leaves the old adapter or the new one.

    base: the name of the base model. task_type: PEFT's, for instance "SEQ_CLS". metadata: JSON that
    `read_adapter` returns.

    Raises RuntimeError if the model has no adapter, ValueError if a tensor is not finite, OSError.
    """
    config, layers = lora_config(model), lora_layers(model)
    saved = saved_modules(model, config)
    tensors = _adapter_tensors(layers, saved)
    tensors = {name: whole(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite; such an adapter is not saved")
    note: dict[str, Any] = {
        "config": _as_json(dataclasses.asdict(config)),
        "fingerprint": fingerprint(model, layers, saved),
        "metadata": _as_json(dict(metadata or {})),
    }
    if own := _own_class(next(iter(layers.values()))):
        note["layer"] = own
    layer = layer_class(config)
    if hasattr(layer, "to_plain"):
        tensors = layer.to_plain(tensors)
    fields = to_peft(config, base, task_type)
    fields["fan_in_fan_out"] = any(layer.fan_in_fan_out for layer in layers.values())
    config_text = json.dumps(fields, indent=2, default=str) + "\n"  # unsorted: the first pattern wins

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Two files cannot be replaced at once. The tensors carry the config too, so replacing them is the
    # commit. If the process crashes right after it, the new config still exists under its temporary name.
    write_atomically(folder / _NEXT_CONFIG_FILE, config_text.encode())
    write_tensors(folder / TENSOR_FILE, tensors, _ENTRY, note, _to_peft_key)
    (folder / _NEXT_CONFIG_FILE).replace(folder / CONFIG_FILE)
    sync_folder(folder)


def read_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Reads and verifies an adapter's folder, written by `save_adapter` or by PEFT.

    Raises FileNotFoundError, or AdapterError if a file is damaged or unsupported, or if the files do not
    belong together.
    """
    folder = Path(folder)
    path = folder / TENSOR_FILE
    if not path.is_file():
        pickle = (folder / "adapter_model.bin").is_file()
        pickled = " (adapter_model.bin is a pickle, which can run code, so it is not read)" if pickle else ""
        raise FileNotFoundError(f"{folder}: there is no {TENSOR_FILE}{pickled}")
    try:
        tensors, note = read_tensors(path, _ENTRY, _from_peft_key)
    except DamagedFileError as error:
        raise AdapterError(str(error)) from error
    if note and not (
        all(isinstance(note.get(key), dict) for key in ("config", "fingerprint", "metadata"))
        and all(isinstance(note["fingerprint"].get(key, {}), dict) for key in _FINGERPRINT)
    ):
        raise AdapterError(f"{path}: damaged: its note is not of this format")
    config, base = _read_config(folder / CONFIG_FILE)
    if note:
        own, expected = _own_config(note["config"], path)
        following = folder / _NEXT_CONFIG_FILE
        if config != expected and following.is_file():
            config, base = _read_config(following)
        if config != expected:
            raise AdapterError(
                f"{folder / CONFIG_FILE}: not the config that is stored in {TENSOR_FILE}; the files come from"
                " different adapters"
            )
        # The note is sorted, and the first pattern that matches wins.
        config = dataclasses.replace(
            own,
            rank_pattern={key: own.rank_pattern[key] for key in config.rank_pattern},
            alpha_pattern={key: own.alpha_pattern[key] for key in config.alpha_pattern},
        )
        layer = layer_class(config)
        if hasattr(layer, "from_plain"):
            try:
                tensors = layer.from_plain(tensors)
            except IndexError as error:  # a tensor of another shape, with a digest that matches it
                raise AdapterError(f"{path}: damaged: {error}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype not in (*FLOATS, torch.float64):
            raise AdapterError(f"{path}: {name} is {tensor.dtype}, which is not supported")
        if not tensor.isfinite().all():
            raise AdapterError(f"{path}: {name} is not finite")
    return Adapter(
        config,
        base,
        tensors,
        note.get("fingerprint", {}),
        note.get("metadata", {}),
        str(note.get("layer", "")),
        folder,
    )


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str] | Adapter,
    check_base: bool = True,
    layer: type[MergeableLinear] | None = None,
) -> Adapter:
    """Injects the folder's adapter into a base model, in place, and loads its tensors.

    The same parameters train afterwards as after `inject`. Names in modules_to_save that the model does not
    have are ignored, because PEFT writes some for sequence classification. The tensors must be exactly
    those that the config and the model require. Instead of a folder, what `read_adapter` returned will do.

    check_base: refuse another base model than the adapter was trained on, by its config and weights. An
    adapter saved by PEFT has no fingerprint; then only the names are compared, and a difference is a warning,
    because one model has several names. layer: another class of adapted layers than the one that the folder's
    config asks for.

    Raises RuntimeError if the model has an adapter, FileNotFoundError, AdapterError (it names the tensor).
    The model is then unchanged.
    """
    adapter = folder if isinstance(folder, Adapter) else read_adapter(folder)
    config, folder = adapter.config, adapter.folder
    if has_adapter(model):
        raise RuntimeError("the model has an adapter already; eject it first")
    try:
        layer = layer_class(config, layer)
        injection = find_targets(model, config)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{folder}: {error}") from error
    linears: dict[str, Any] = modules_once(model, injection.names)  # each an nn.Linear or a Conv1D
    if not linears:
        raise AdapterError(f"{folder}: target_modules {config.target_modules!r} match nothing in this model")
    saved = saved_modules(model, config)
    _check_tensors(adapter.tensors, _expected_tensors(linears, saved, config, layer), folder)
    if adapter.layer not in ("", layer.__name__):
        raise AdapterError(f"{folder}: trained with the class {adapter.layer}; pass it as layer=")
    _check_tied(saved, adapter.tensors, folder)
    if check_base:
        _check_base(model, adapter, linears, saved, folder)

    with uninterrupted(), unchanged_on_error(model), torch.no_grad():
        layers = build_layers(model, config, injection, layer, 0, **_without_start(layer))
        named = {name: layers[linear] for name, linear in linears.items()}
        for name, tensor in _adapter_tensors(named, saved).items():
            tensor.copy_(adapter.tensors[name])
        swap_in(model, config, injection, layers)
    return adapter


def saved_modules(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The modules in modules_to_save, a shared one once by its first name."""
    return modules_once(
        model, (name for pattern in config.modules_to_save for name, _ in modules_named(model, pattern))
    )


def _adapter_tensors(
    layers: Mapping[str, MergeableLinear], saved: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """The tensors that a folder holds, not copies: those of each adapted layer, and of each saved module."""
    inner = {attribute for attribute in WRAPPERS.values() if attribute[0] == "_"}
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in layer.adapter_state().items()}
    first = next(iter(layers.values()))
    if hasattr(first, "shared_tensors"):
        tensors |= first.shared_tensors()  # type: ignore[operator]
    for name, module in saved.items():
        for key, tensor in module.state_dict().items():
            parts = [part for part in key.split(".") if part not in inner]
            tensors[".".join([name, *parts])] = tensor
    return tensors


def _expected_tensors(
    linears: Mapping[str, Any],
    saved: Mapping[str, nn.Module],
    config: LoraConfig,
    layer: type[MergeableLinear],
) -> dict[str, Tensor]:
    """The tensors that a folder must hold, with the shapes and dtypes that the model requires."""
    layers, by_kind = {}, {}
    # Without memory, however large a rank the config asks for. An interrupt must not leave the device set.
    with uninterrupted(), torch.device("meta"):
        for name, linear in linears.items():
            out_features, in_features = linear.weight.shape
            if type(linear).__name__ in CONVERSIONS:  # of GPT-2's Conv1D the weight is transposed
                out_features, in_features = in_features, out_features
            settings, dtype = config.for_layer(name), linear.weight.dtype
            shape = (in_features, out_features, linear.bias is not None)
            kind = (shape, dtype, tuple(settings.values()))
            if kind not in by_kind:  # one layer serves all of a kind, because only shapes are read
                make: Any = layer
                by_kind[kind] = make(nn.Linear(*shape, dtype=dtype), **settings, **_without_start(layer))
            layers[name] = by_kind[kind]
        if hasattr(layer, "share"):
            layer.share(list(layers.values()), config)
    return _adapter_tensors(layers, saved)


def _without_start(layer: type[MergeableLinear]) -> dict[str, Any]:
    """Arguments for a layer whose tensors are loaded next, so that their start need not be computed."""
    return getattr(layer, "without_start", {})


def _check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: str | os.PathLike[str]
) -> None:
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing:
        raise AdapterError(f"{folder}: {len(missing)} tensors are missing: {_some(missing)}")
    if extra:
        raise AdapterError(f"{folder}: {len(extra)} tensors have no place in this model: {_some(extra)}")
    for key, wanted in expected.items():
        tensor = tensors[key]
        if tensor.shape != wanted.shape:
            shapes = f"{tuple(tensor.shape)}, and the model requires {tuple(wanted.shape)}"
            raise AdapterError(f"{folder}: {key} is {shapes}")
        if tensor.dtype not in FLOATS and tensor.dtype != wanted.dtype:
            raise AdapterError(f"{folder}: {key} is {tensor.dtype}, and the model requires {wanted.dtype}")


def _check_tied(
    saved: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], folder: str | os.PathLike[str]
) -> None:
    """Raises AdapterError if names of one tensor, as of tied embeddings, have two in the folder."""
    first: dict[int, str] = {}
    for name, module in saved.items():
        for key, parameter in module.named_parameters(remove_duplicate=False):
            other = first.setdefault(id(parameter), f"{name}.{key}")
            if not torch.equal(tensors[other], tensors[f"{name}.{key}"]):
                raise AdapterError(
                    f"{folder}: {other} and {name}.{key} differ, and are one tensor in this model; untie them"
                )


def _check_base(
    model: nn.Module,
    adapter: Adapter,
    linears: Mapping[str, Any],
    saved: Mapping[str, nn.Module],
    folder: str | os.PathLike[str],
) -> None:
    if adapter.fingerprint.keys() >= set(_FINGERPRINT):  # version 0.1.0 wrote another one
        found = difference(adapter.fingerprint, model, linears, saved)
        if found:
            raise AdapterError(
                f"{folder}: the adapter was trained on {adapter.base!r} {found}; load that base (in Python, "
                "check_base=False skips this check)"
            )
        return
    own = getattr(getattr(unwrap(model), "config", None), "name_or_path", "")  # transformers' models have one
    if adapter.base and own and adapter.base != own:
        warnings.warn(
            f"{folder}: the adapter was trained on {adapter.base!r} and the model's name is {own!r}; the "
            "folder has no fingerprint, so make sure that the two have the same weights",
            stacklevel=3,
        )


def _to_peft_key(name: str) -> str:
    if "." not in name:  # shared by all layers
        return f"{_SHARED_PREFIX}{name}"
    return f"{_PREFIX}{name}.weight" if name.endswith((".lora_A", ".lora_B")) else f"{_PREFIX}{name}"


def _from_peft_key(key: str) -> str:
    name = key.removeprefix(_PREFIX if key.count(".") > 1 else _SHARED_PREFIX)
    return name.removesuffix(".weight") if name.endswith((".lora_A.weight", ".lora_B.weight")) else name


def _own_class(layer: MergeableLinear) -> str:
    """The name of the first class of a layer that is not the library's, or "" if all are."""
    own = (kind for kind in type(layer).__mro__ if issubclass(kind, MergeableLinear))
    kind = next(kind for kind in own if kind.__module__ not in ("lora.conv1d", "lora.fast.layers"))
    return "" if kind.__module__.startswith("lora.") else kind.__name__


def _as_json(value: dict[str, Any]) -> Any:
    """The value as JSON returns it: tuples as lists, keys as strings."""
    return json.loads(json.dumps(value))


def _read_config(path: Path) -> tuple[LoraConfig, str | None]:
    try:
        fields = json.loads(path.read_bytes(), object_pairs_hook=_without_repeats)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent}: there is no {path.name}") from None
    except (ValueError, RecursionError) as error:
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


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key is in it twice")
    return fields


def _own_config(fields: dict[str, Any], path: Path) -> tuple[LoraConfig, LoraConfig]:
    """The config in a note, and what adapter_config.json holds of it, which may lack some of its fields."""
    try:
        config = LoraConfig(**fields)
        return config, from_peft(to_peft(config, "", None))
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{path}: the config in its note: {error}") from error


def _some(keys: set[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
