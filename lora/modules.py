"""Walks a model's module tree: modules by name pattern, adapted layers, and which parameters train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from lora.config import LoraConfig
from lora.linear import LoRALinear


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every adapted layer by its dotted name, a shared layer once.

    Raises RuntimeError if there is none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise RuntimeError("the model has no adapter; inject one or load one first")
    return layers


def has_adapter(model: nn.Module) -> bool:
    """Whether any layer of the model is adapted."""
    return any(isinstance(module, LoRALinear) for module in model.modules())


def lora_config(model: nn.Module) -> LoraConfig:
    """The config that `inject` was called with. Raises RuntimeError if the model has none."""
    config = getattr(model, "lora_config", None)
    if not isinstance(config, LoraConfig):
        if has_adapter(model):
            raise RuntimeError("no lora_config here; pass the module that was passed to inject()")
        raise RuntimeError("the model has no adapter; inject one or load one first")
    return config


def ends_with(name: str, pattern: str) -> bool:
    """Whether `pattern` equals `name` or whole trailing components of it."""
    return name == pattern or name.endswith(f".{pattern}")


def modules_named(model: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose dotted name ends with `pattern`. A shared module comes once per name."""
    for name, module in model.named_modules(remove_duplicate=False):
        if name and ends_with(name, pattern):
            yield name, module


def modules_once(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules with these names, in the model's order, a shared module once by its first name."""
    modules = dict(model.named_modules(remove_duplicate=False))

    def slot(name: str) -> tuple[nn.Module, str]:  # where the module is an attribute
        parent, _, child = name.rpartition(".")
        return modules[parent], child

    slots = {slot(name) for name in names}
    found: dict[nn.Module, str] = {}
    for name, module in modules.items():
        if name and slot(name) in slots:
            found.setdefault(module, name)
    return {name: module for module, name in found.items()}


def train_only(model: nn.Module, names: Iterable[str]) -> None:
    """Freezes every parameter except those of modules whose dotted names end with one of `names`."""
    model.requires_grad_(False)
    for name in names:
        for _, module in modules_named(model, name):
            module.requires_grad_(True)
