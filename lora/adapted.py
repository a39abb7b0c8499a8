"""The adapted layers of a model, and the config that they were injected with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeGuard, TypeVar

from torch import Tensor, nn

from lora.config import LoraConfig
from lora.linear import LoRALinear
from lora.mergeable import MergeableLinear
from lora.modules import unique_modules, unwrap

T = TypeVar("T")
Layer = TypeVar("Layer", bound=MergeableLinear)


def lora_layers(model: nn.Module) -> dict[str, MergeableLinear]:
    """Every adapted layer by its dotted name, a shared layer once.

    Raises RuntimeError if there is none.
    """
    layers = {name: m for name, m in unique_modules(model).items() if isinstance(m, MergeableLinear)}
    if not layers:
        raise RuntimeError("the model has no adapter; inject one or load one first")
    return layers


def unmerged(layers: dict[str, Layer]) -> dict[str, Layer]:
    """The layers themselves. Raises RuntimeError if one is merged or disabled."""
    for name, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"{name} is merged; unmerge the model first")
        if not layer.enabled:
            raise RuntimeError(f"{name} is disabled; leave the context that disabled it first")
    return layers


def product_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """`lora_layers` of an adapter whose ΔW is scaling·B·A. Raises RuntimeError if it is another variant's."""
    layers: dict[str, LoRALinear] = {}
    for name, layer in lora_layers(model).items():
        if not has_low_rank(layer):
            raise RuntimeError(f"{name}: the update of a {type(layer).__name__} is not scaling·B·A")
        layers[name] = layer
    return layers


def has_low_rank(layer: MergeableLinear) -> TypeGuard[LoRALinear]:
    """Whether the merged weight is W + ΔW with ΔW = scaling·B·A, where A and B are `layer.factors()`."""
    kind = type(layer)
    if not issubclass(kind, LoRALinear) or kind.merged_weight is not LoRALinear.merged_weight:
        return False
    return kind.delta_weight is LoRALinear.delta_weight or kind.factors is not LoRALinear.factors


def quantised_as(weight: Tensor) -> str:
    """How `lora.quantised` stores a weight, such as "nf4"; an empty string for an ordinary tensor."""
    stored = getattr(weight, "stored", None)
    return "" if stored is None else str(stored.name)


def layer_patterns(values: Mapping[str, T]) -> dict[str, T]:
    """A rank_pattern or alpha_pattern that gives each layer, by its full name, a value of its own."""
    # The longest names first, because a name also matches longer ones that end with it.
    return {re.escape(name): values[name] for name in sorted(values, key=len, reverse=True)}


def has_adapter(model: nn.Module) -> bool:
    """Whether any layer of the model is adapted."""
    return any(isinstance(module, MergeableLinear) for module in model.modules())


def lora_config(model: nn.Module) -> LoraConfig:
    """The config that `inject` was called with. Raises RuntimeError if the model has none."""
    config = getattr(unwrap(model), "lora_config", None)
    if not isinstance(config, LoraConfig):
        if has_adapter(model):
            raise RuntimeError("no lora_config here; pass the module that was passed to inject()")
        raise RuntimeError("the model has no adapter; inject one or load one first")
    return config
