"""The adapted layers of a model, and the config that they were injected with."""

from __future__ import annotations

from typing import TypeGuard

from torch import nn

from lora.config import LoraConfig
from lora.linear import LoRALinear
from lora.mergeable import MergeableLinear
from lora.modules import unique_modules, unwrap


def lora_layers(model: nn.Module) -> dict[str, MergeableLinear]:
    """Every adapted layer by its dotted name, a shared layer once.

    Raises RuntimeError if there is none.
    """
    layers = {name: m for name, m in unique_modules(model).items() if isinstance(m, MergeableLinear)}
    if not layers:
        raise RuntimeError("the model has no adapter; inject one or load one first")
    return layers


def product_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """`lora_layers` of an adapter whose ΔW is scaling·B·A. Raises RuntimeError if it is another variant's."""
    layers: dict[str, LoRALinear] = {}
    for name, layer in lora_layers(model).items():
        if not is_product(layer):
            raise RuntimeError(f"{name} is a {type(layer).__name__}, whose ΔW is not scaling·B·A")
        layers[name] = layer
    return layers


def is_product(layer: MergeableLinear) -> TypeGuard[LoRALinear]:
    """Whether ΔW is scaling·B·A: the class overrides neither formula of LoRALinear."""
    kind, formulas = type(layer), ("delta_weight", "merged_weight")
    return all(getattr(kind, name, None) is getattr(LoRALinear, name) for name in formulas)


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
