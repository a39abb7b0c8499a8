"""Variants of LoRA, one file each. A variant is a class of layers, and one line in the table below.

README.md in this folder describes them, and how to add one.
"""

from __future__ import annotations

import dataclasses

from lora.config import CHECKS, LoraConfig
from lora.inject import LAYER_CLASS
from lora.linear import LoRALinear
from lora.mergeable import MergeableLinear
from lora.variants.dora import DoRALinear
from lora.variants.eva import EVALinear
from lora.variants.lora_fa import LoRAFALinear
from lora.variants.pissa import MiLoRALinear, PiSSALinear
from lora.variants.vera import VeRALinear, check_vera

# A field of LoraConfig, the value that chooses the variant, and the class of its layers
VARIANTS: list[tuple[str, object, type[LoRALinear]]] = [
    ("use_dora", True, DoRALinear),
    ("use_lora_fa", True, LoRAFALinear),
    ("init_lora_weights", "pissa", PiSSALinear),
    ("init_lora_weights", "milora", MiLoRALinear),
    ("init_lora_weights", "eva", EVALinear),
    ("peft_type", "VERA", VeRALinear),
]


def check_variant(config: LoraConfig) -> None:
    """Raises TypeError or ValueError if a field has an unknown value, or if two fields choose a variant."""
    defaults = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    chosen: list[str] = []
    for name in dict.fromkeys(name for name, _, _ in VARIANTS):
        value, default = getattr(config, name), defaults[name]
        known = [default, *(value for field, value, _ in VARIANTS if field == name)]
        if not any(type(value) is type(each) and value == each for each in known):
            raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(repr, known))}")
        if value != default:
            chosen.append(name)
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)}: each chooses a variant of LoRA; choose one")


def layer_class(config: LoraConfig, layer: type[MergeableLinear] | None) -> type[MergeableLinear]:
    """`layer`, or without one the class of layers that `config` asks for.

    Raises ValueError if `layer` is of another variant than the config: a folder has the config alone.
    """
    chosen = (kind for name, value, kind in VARIANTS if getattr(config, name) == value)
    asked = next(chosen, LoRALinear)
    layer = layer or asked
    if asked is not LoRALinear and not issubclass(layer, asked):
        raise ValueError(f"layer: {layer.__name__} is no {asked.__name__}, which the config asks for")
    settings = {kind: f"{name}={value!r}" for name, value, kind in VARIANTS}
    for kind in layer.__mro__:
        if kind in settings and not issubclass(asked, kind):
            raise ValueError(f"layer: {layer.__name__} needs a config with {settings[kind]}")
    return layer


CHECKS += [check_variant, check_vera]
LAYER_CLASS.append(layer_class)
