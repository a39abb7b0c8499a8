"""Walks a model's module tree: modules by name, and which parameters train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

WRAPPERS: dict[str, str] = {}  # class of a wrapper: the attribute of its module (lora/targets.py fills it)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside wrappers such as DistributedDataParallel, or the module itself."""
    while attribute := WRAPPERS.get(type(module).__name__):
        module = getattr(module, attribute)
    return module


def named_modules(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """All modules by their dotted names without wrappers. A shared module comes once per name."""
    found = [(prefix, unwrap(model))]
    for name, child in found[0][1]._modules.items():
        if child is not None:
            found += named_modules(child, f"{prefix}.{name}" if prefix else name)
    return found


def unique_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by their names without wrappers, a shared module once by its first name."""
    names: dict[nn.Module, str] = {}
    for name, module in named_modules(model):
        names.setdefault(module, name)
    return {name: module for module, name in names.items()}


def ends_with(name: str, pattern: str) -> bool:
    """Whether `pattern` equals `name` or whole trailing components of it."""
    return name == pattern or name.endswith(f".{pattern}")


def modules_named(model: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose dotted name ends with `pattern`. A shared module comes once per name."""
    for name, module in named_modules(model):
        if name and ends_with(name, pattern):
            yield name, module


def modules_once(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules with these names, in the model's order, a shared module once by its first name."""
    modules = dict(named_modules(model))
    slots = {name: (modules[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in modules if name}
    wanted = {slots[name] for name in names}  # a parent and an attribute, which may have several names
    found: dict[nn.Module, str] = {}
    for name, slot in slots.items():
        if slot in wanted:
            found.setdefault(modules[name], name)
    return {name: module for module, name in found.items()}


def train_only(model: nn.Module, names: Iterable[str]) -> None:
    """Freezes every parameter except those of modules whose dotted names end with one of `names`."""
    model.requires_grad_(False)
    for name in names:
        for _, module in modules_named(model, name):
            module.requires_grad_(True)
