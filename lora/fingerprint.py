"""The fingerprint of a base model, by which loading an adapter recognises the model it was trained on.

It is JSON: by dtype the SHA-256 of the adapted layers' weights and biases; under "rest" the same of about 16
rows of every other tensor of the base, which takes a few milliseconds where all rows would take many; under
"config" those fields of the model's config that change what it computes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora.mergeable import MergeableLinear
from lora.modules import unique_modules, unwrap
from lora.storage import tensor_bytes, whole

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Fields of a transformers config that do not change the outputs in eval mode, or differ between versions.
_OTHER_FIELDS = {
    "architectures", "chunk_size_feed_forward", "dtype", "finetuning_task", "gradient_checkpointing",
    "model_type", "name_or_path", "num_labels", "output_attentions", "output_hidden_states", "problem_type",
    "return_dict", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_cache",
}  # fmt: skip


def fingerprint(
    model: nn.Module, layers: Mapping[str, Any], saved: Mapping[str, nn.Module]
) -> dict[str, Any]:
    """The fingerprint of the model's base: everything but the adapters and the `saved` modules."""
    return {
        **{_short(dtype): _hash_weights(layers, dtype) for dtype in FLOATS},
        "rest": {_short(dtype): _hash_rest(model, layers, saved, dtype) for dtype in FLOATS},
        "config": config_fields(model),
    }


def difference(
    expected: Mapping[str, Any],
    model: nn.Module,
    layers: Mapping[str, Any],
    saved: Mapping[str, nn.Module],
) -> str:
    """How the model differs from the base with the fingerprint `expected`; empty if it does not."""
    fields = config_fields(model)
    for key, value in expected.get("config", {}).items():
        if key in fields and fields[key] != value:
            return f"with {key} = {value!r} in its config, and this model has {fields[key]!r}"
    dtype = next(iter(layers.values())).weight.dtype
    dtype = dtype if dtype in FLOATS else torch.float32
    if _hash_weights(layers, dtype) != expected.get(_short(dtype)):
        return f"with other weights than this model's in {next(iter(layers))} and the other adapted layers"
    rest = expected.get("rest")
    if rest and _hash_rest(model, layers, saved, dtype) != rest.get(_short(dtype)):
        return "with other weights than this model's outside the adapted layers"
    return ""


def config_fields(model: nn.Module) -> dict[str, Any]:
    """The fields of a transformers model's config that change its outputs; empty for other models."""
    to_dict = getattr(getattr(unwrap(model), "config", None), "to_dict", None)
    fields = to_dict() if callable(to_dict) else {}
    return {
        key: value
        for key, value in fields.items()
        if isinstance(value, int | float | str | None)
        and key not in _OTHER_FIELDS
        and not key.startswith("_")
        and "dropout" not in key
    }


def _hash_weights(layers: Mapping[str, Any], dtype: torch.dtype) -> str:
    sha = hashlib.sha256()
    for name in sorted(layers):
        layer = layers[name]
        sha.update(name.encode())
        weight = layer.stored_weight if isinstance(layer, MergeableLinear) else layer.weight
        for tensor in (weight, layer.bias):
            if tensor is not None:
                sha.update(tensor_bytes(tensor.detach().to(dtype)))
    return sha.hexdigest()


def _hash_rest(
    model: nn.Module, layers: Mapping[str, Any], saved: Mapping[str, nn.Module], dtype: torch.dtype
) -> str:
    elsewhere = {id(module) for other in (*layers.values(), *saved.values()) for module in other.modules()}
    sha = hashlib.sha256()
    for name, module in unique_modules(model).items():
        if id(module) in elsewhere:
            continue
        for key, tensor in module.named_parameters(recurse=False):
            rows = sample_rows(tensor)
            sha.update(f"{name}.{key} {tuple(tensor.shape)}".encode())
            sha.update(tensor_bytes(rows.to(dtype) if rows.is_floating_point() else rows))
    return sha.hexdigest()


def sample_rows(tensor: Tensor) -> Tensor:
    """About 16 rows of a matrix, or all of a vector, (k, columns)."""
    tensor = whole(tensor).detach()
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.reshape(1, 1)
    return rows[:: max(1, len(rows) // 16)]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
