"""PEFT's adapter_config.json: which of its fields this project understands, ignores or refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora.config import LoraConfig

_OURS = {field.name for field in dataclasses.fields(LoraConfig)}

# They say where an adapter comes from, or how to start or spread its training; the outputs stay.
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "task_type",
}  # fmt: skip

# The values with which a field changes nothing. Any other field passes with a value that is off or empty.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "layers_to_transform": (None, []),  # 0 is the first layer
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the base weights
}
_OFF: tuple[Any, ...] = (None, False, 0, 0.0, "", [], {})


def to_peft(config: LoraConfig, base: str, task_type: str | None) -> dict[str, Any]:
    """What PEFT reads as an adapter of kind LORA on the model called `base`."""
    fields = dataclasses.asdict(config)
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()},
    }


def from_peft(fields: Mapping[str, Any]) -> LoraConfig:
    """The config in PEFT's fields.

    Raises ValueError naming the field that is not supported and would change the outputs, TypeError or
    ValueError on a value outside its range (LoraConfig).
    """
    for name, value in fields.items():
        if name in _OURS or name in _IGNORED:
            continue
        # `in` would take 0 for False and 1 for True
        if not any(value is allowed or (type(value) is type(allowed) and value == allowed)
                   for allowed in _HARMLESS.get(name, _OFF)):  # fmt: skip
            raise ValueError(
                f"{name}: {value!r} is not supported here, and ignoring it could change the outputs"
            )
    if fields.get("peft_type") != "LORA":
        raise ValueError("peft_type: missing; this is not the config of a LoRA adapter")
    given = {name: fields[name] for name in _OURS if fields.get(name) is not None}
    if "target_modules" not in given:
        raise ValueError("target_modules: missing")
    return LoraConfig(**given)
