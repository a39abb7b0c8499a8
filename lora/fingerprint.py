"""The fingerprint of a base model, by which loading an adapter recognises the model it was trained on.

It is JSON: "adapted" has by dtype a digest of the adapted layers' weights and biases, "rest" the same of
every other parameter of the base, "config" the fields of the model's config, without names and dropout,
"stored" how the adapted layers' weights are stored, such as "float32" or "nf4". Digests are of dequantised
weights.

A digest is the SHA-256 of small tensors and of the checksums of large ones, one for every 2 KiB, which takes
a fraction of the time of the SHA-256 of all bytes. A changed value changes its checksum. Values that are
exchanged within 2 KiB do not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora.adapted import quantised_as
from lora.mergeable import MergeableLinear
from lora.modules import unique_modules, unwrap
from lora.storage import tensor_bytes, whole

_BLOCK, _LARGE, _HUGE = 2**11, 2**16, 2**24  # bytes
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Fields of a transformers config that do not change the outputs in eval mode, or differ between versions.
_OTHER_FIELDS = {
    "architectures", "chunk_size_feed_forward", "dtype", "finetuning_task", "gradient_checkpointing",
    "id2label", "label2id", "model_type", "name_or_path", "num_labels", "output_attentions",
    "output_hidden_states", "problem_type", "quantization_config", "return_dict", "task_specific_params",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_cache",
}  # fmt: skip


def fingerprint(
    model: nn.Module, layers: Mapping[str, Any], saved: Mapping[str, nn.Module]
) -> dict[str, Any]:
    """The fingerprint of the model's base: everything but the adapters and the `saved` modules."""
    return {
        "adapted": {_short(dtype): _digest(_adapted(layers), dtype) for dtype in FLOATS},
        "rest": {_short(dtype): _digest(_rest(model, layers, saved), dtype) for dtype in FLOATS},
        "config": config_fields(model),
        "stored": _stored(layers),
    }


def difference(
    expected: Mapping[str, Any],
    model: nn.Module,
    layers: Mapping[str, Any],
    saved: Mapping[str, nn.Module],
) -> str:
    """How the model differs from the base with the fingerprint `expected`; empty if it does not."""
    fields = config_fields(model)
    for key, value in expected["config"].items():
        if key in fields and fields[key] != value:
            return f"with {key} = {value!r} in its config, and this model has {fields[key]!r}"
    dtype = next(iter(layers.values())).weight.dtype
    dtype = dtype if dtype in FLOATS else torch.float32
    if _digest(_adapted(layers), dtype) != expected["adapted"].get(_short(dtype)):
        stored = _stored(layers)
        wanted = expected.get("stored", "float32")  # older fingerprints are of weights that are not quantised
        # Casting the right base to another dtype is no difference, so the dtype of a dense one is no reason.
        if wanted != stored and not {wanted, stored} <= {_short(d) for d in (*FLOATS, torch.float64)}:
            return f"with weights stored as {wanted}, and those of this model are {stored}"
        return f"with other weights than this model's in {next(iter(layers))} and the other adapted layers"
    if _digest(_rest(model, layers, saved), dtype) != expected["rest"].get(_short(dtype)):
        return "with other weights than this model's outside the adapted layers"
    return ""


def config_fields(model: nn.Module) -> dict[str, Any]:
    """The fields of a transformers model's config that change its outputs; empty for other models.

    The names of nested fields are joined by dots.
    """
    to_dict = getattr(getattr(unwrap(model), "config", None), "to_dict", None)
    return dict(_flat(to_dict())) if callable(to_dict) else {}


def _flat(fields: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        key = str(name)
        if key in _OTHER_FIELDS or key.startswith("_") or "drop" in key:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float | str | None):
            yield prefix + key, value
        elif isinstance(value, list | tuple) and all(isinstance(x, int | float | str) for x in value):
            yield prefix + key, list(value)


def _stored(layers: Mapping[str, Any]) -> str:
    """How the weights of the adapted layers are stored: a dtype, or the name of a way to quantise them."""
    weights = [tensor for name, tensor in _adapted(layers) if name.endswith(".weight")]
    kinds = {quantised_as(w) or _short(w.dtype) for w in weights}
    return " and ".join(sorted(kinds))


def _adapted(layers: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, layer in layers.items():
        yield f"{name}.weight", layer.stored_weight if isinstance(layer, MergeableLinear) else layer.weight
        if layer.bias is not None:
            yield f"{name}.bias", layer.bias


def _rest(
    model: nn.Module, layers: Mapping[str, Any], saved: Mapping[str, nn.Module]
) -> Iterator[tuple[str, Tensor]]:
    elsewhere = {id(module) for other in (*layers.values(), *saved.values()) for module in other.modules()}
    for name, module in unique_modules(model).items():
        if id(module) not in elsewhere:
            for key, tensor in module.named_parameters(recurse=False):
                yield f"{name}.{key}", tensor


def _digest(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> str:
    """The digest of tensors, by name. Floating-point values are cast to `dtype`."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        values = whole(tensor).detach()
        values = values.to(dtype) if values.is_floating_point() else values
        data = values.contiguous().reshape(-1).view(torch.uint8)
        sha.update(f"{name} {tuple(tensor.shape)}".encode())
        if len(data) >= _LARGE:
            end = len(data) // _BLOCK * _BLOCK
            sha.update(tensor_bytes(_checksums(data[:end])))
            data = data[end:]
        sha.update(tensor_bytes(data))
    return sha.hexdigest()


def _checksums(data: Tensor) -> Tensor:
    """The sum of the 64-bit words of each block, modulo 2⁶⁴, (blocks,) int64."""
    data = data.clone() if data.storage_offset() % 8 else data  # views of words start at whole words
    words = data.view(torch.int64).view(-1, _BLOCK // 8)
    if words.device.type != "cpu" or len(data) >= _HUGE:
        return words.sum(1)
    # NumPy sums in one thread: on a busy machine torch's threads wait for each other at every tensor.
    return torch.from_numpy(words.numpy().sum(1))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
