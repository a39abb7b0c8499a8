"""PEFT's adapter_config.json: which of its fields this project supports, ignores or refuses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from lora.config import LoraConfig
from lora.inject import layer_class

# By PEFT's type of adapter: PEFT's names of the fields that it has, and ours.
_COMMON = {name: name for name in ("peft_type", "r", "target_modules", "modules_to_save")}
_FIELDS: dict[str, dict[str, str]] = {
    "LORA": {
        **_COMMON,
        **{name: name for name in (
            "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora"
        )},
    },
    "VERA": {
        **_COMMON,
        "vera_dropout": "lora_dropout",
        **{name: name for name in ("projection_prng_key", "d_initial", "save_projection")},
    },
}  # fmt: skip

# They describe an adapter's origin, initialisation or parallel training, and do not change its outputs.
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "task_type",
}  # fmt: skip

# The values with which a field changes nothing. Any field not listed may have a value that is off or empty.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "layers_to_transform": (None, []),  # 0 is the first layer
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # other values change the base
    "init_weights": (True, False),
}
_REPEATS = (_parser.MAX_REPEAT, _parser.MIN_REPEAT)  # a possessive repeat does not backtrack
_MOST_CHOICES = 4
_OFF: tuple[Any, ...] = (None, False, 0, 0.0, "", [], {})


def to_peft(config: LoraConfig, base: str, task_type: str | None) -> dict[str, Any]:
    """The fields of PEFT's config file for an adapter on the model called `base`."""
    layer = layer_class(config)
    if hasattr(layer, "plain_config"):
        config = layer.plain_config(config)
    fields = {name: getattr(config, ours) for name, ours in _FIELDS[config.peft_type].items()}
    return {
        "task_type": task_type,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights" if config.peft_type == "LORA" else "init_weights": True,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()},
    }


def from_peft(fields: Mapping[str, Any]) -> LoraConfig:
    """The LoraConfig in the fields of PEFT's config file.

    Raises ValueError if a field is not supported and would change the outputs, TypeError or ValueError if
    a value is out of range (LoraConfig). The message names the field.
    """
    kind = fields.get("peft_type")
    if kind not in [*_FIELDS]:
        what = "missing" if kind is None else f"{kind!r} is not supported here"
        raise ValueError(f"peft_type: {what}; the types of adapter are {' and '.join(_FIELDS)}")
    supported = _FIELDS[kind]
    for name, value in fields.items():
        if name in supported or name in _IGNORED:
            continue
        # `in` would take 0 for False and 1 for True
        if not any(value is allowed or (type(value) is type(allowed) and value == allowed)
                   for allowed in _HARMLESS.get(name, _OFF)):  # fmt: skip
            raise ValueError(
                f"{name}: {value!r} is not supported here, and ignoring it could change the outputs"
            )
    given = {ours: fields[name] for name, ours in supported.items() if fields.get(name) is not None}
    if "target_modules" not in given:
        raise ValueError("target_modules: missing")
    if isinstance(given["target_modules"], str):
        _check_cost("target_modules", given["target_modules"])
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in given.get(field, {}):
            _check_cost(field, pattern)
    return LoraConfig(**given)


def _check_cost(field: str, pattern: Any) -> None:
    """Raises ValueError if a regular expression from a file could take very long to match.

    A choice inside a repeat takes exponential time in the worst case, and n choices in sequence take the n-th
    power of a name's length. A choice is a repeat or an optional part, or a branch of which two alternatives
    can match at one place.
    """
    try:
        parsed = _parser.parse(pattern)
        whole = len(parsed) == 1 and parsed[0][0] is _parser.BRANCH  # nothing follows, so one after another
        alternatives = [_choices(each) for each in (parsed[0][1][1] if whole else [parsed])]
    except (re.error, OverflowError, RecursionError, TypeError):
        return  # LoraConfig reports it
    if any(nested or choices > _MOST_CHOICES for choices, nested in alternatives):
        raise ValueError(f"{field}: {pattern!r} could take very long to match, so it is not used")


def _choices(parsed: Any) -> tuple[int, bool]:
    """The number of choices in sequence, and whether one of them is inside a repeat."""
    count, nested = 0, False
    for operation, argument in parsed:
        if operation is _parser.BRANCH:
            parts = [_choices(alternative) for alternative in argument[1]]
            count += max(found for found, _ in parts) + _is_ambiguous(argument[1])
        else:
            inside = argument if isinstance(argument, list | tuple) else [argument]
            parts = [_choices(part) for part in inside if isinstance(part, _parser.SubPattern)]
            count += sum(found for found, _ in parts)
        nested |= any(bad for _, bad in parts)
        if operation in _REPEATS:
            nested |= argument[1] > 1 and (parts[0][0] > 0 or _has_branch(argument[2]))
            count += argument[0] != argument[1]
    return count, nested


def _is_ambiguous(alternatives: Any) -> bool:
    """Whether two alternatives of a branch may match at the same place: False for different words."""
    words = [
        [code for operation, code in alternative if operation is _parser.LITERAL]
        for alternative in alternatives
    ]
    plain = all(len(word) == len(each) for word, each in zip(words, alternatives, strict=True))
    prefixes = any(one is not other and other[: len(one)] == one for one in words for other in words)
    return not plain or prefixes


def _has_branch(parsed: Any) -> bool:
    for operation, argument in parsed:
        parts = argument if isinstance(argument, list | tuple) else [argument]
        if operation is _parser.BRANCH:
            return True
        if any(isinstance(part, _parser.SubPattern) and _has_branch(part) for part in parts):
            return True
    return False
