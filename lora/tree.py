"""Walking a model's tree of modules: by name pattern, and to the adapted layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from lora.config import LoraConfig
from lora.linear import LoRALinear


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every adapted layer by its dotted name, each once.

    Raises RuntimeError if the model has none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise RuntimeError("the model has no adapter; inject one or load one first")
    return layers


def has_adapter(model: nn.Module) -> bool:
    """Whether any layer of the model is adapted."""
    return any(isinstance(module, LoRALinear) for module in model.modules())


def lora_config(model: nn.Module) -> LoraConfig:
    """The config that the model's adapter was injected with. Raises RuntimeError if there is none."""
    config = getattr(model, "lora_config", None)
    if not isinstance(config, LoraConfig):
        if has_adapter(model):
            raise RuntimeError("the adapter was injected into another part of this model, or into all of it")
        raise RuntimeError("the model has no adapter; inject one or load one first")
    return config


def ends_with(name: str, pattern: str) -> bool:
    """Whether `pattern` is `name` or whole trailing components of it, never part of a component."""
    return name == pattern or name.endswith(f".{pattern}")


def modules_once(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules of those names, in the model's order, each by the first name that leads to such a place."""
    modules = dict(model.named_modules(remove_duplicate=False))

    def place(name: str) -> tuple[nn.Module, str]:
        parent, _, child = name.rpartition(".")
        return modules[parent], child

    places = {place(name) for name in names}
    found: dict[nn.Module, str] = {}
    for name, module in modules.items():
        if name and place(name) in places:
            found.setdefault(module, name)
    return {name: module for module, name in found.items()}


def modules_named(model: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose dotted name ends with `pattern`, under every name that they go by."""
    for name, module in model.named_modules(remove_duplicate=False):
        if name and ends_with(name, pattern):
            yield name, module
