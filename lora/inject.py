"""Finds the layers to adapt, replaces each with a LoRALinear, and removes the adapters again."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import torch
from torch import nn

from lora.config import LoraConfig
from lora.linear import LoRALinear
from lora.merge import merge as merge_model
from lora.modules import ends_with, has_adapter, lora_config, lora_layers, modules_once, train_only


@dataclass(frozen=True)
class Injection:
    """The full names of the modules that each pattern matched.

    adapted: by pattern of target_modules. saved: by name in modules_to_save.
    """

    adapted: dict[str, tuple[str, ...]]
    saved: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        lines = [f"LoRA on {pattern!r}: {_summary(names)}" for pattern, names in self.adapted.items()]
        lines += [f"trained in full, {pattern!r}: {_summary(names)}" for pattern, names in self.saved.items()]
        return "\n".join(lines)


def inject(
    model: nn.Module, config: LoraConfig, seed: int = 0, layer: type[LoRALinear] = LoRALinear
) -> Injection:
    """Replaces every nn.Linear that `config.target_modules` matches by a `layer`, in place.

    Freezes every parameter except the adapters and the modules in `config.modules_to_save`. Outputs in
    eval mode stay the same bit for bit, because lora_B starts at zero. Each lora_A is drawn from `seed` and
    the module's name alone. Device, dtype and training mode of each layer stay. The model keeps the config
    as `model.lora_config`, for `save_adapter`.

    layer: the class of the adapted layers, LoRALinear or a subclass of it.

    Raises RuntimeError if the model has an adapter, ValueError if a pattern matches nothing, TypeError if
    it matches a module that is not an nn.Linear. The model is then unchanged.
    """
    if has_adapter(model):
        raise RuntimeError("the model has an adapter already; eject it first")
    injection = find_targets(model, config)
    _refuse_unmatched(model, "target_modules", injection.adapted)
    _refuse_unmatched(model, "modules_to_save", injection.saved)
    swap_in(model, config, injection, build_layers(model, config, injection, layer, seed))
    return injection


def find_targets(model: nn.Module, config: LoraConfig) -> Injection:
    """The modules that each pattern of `config` matches.

    Modules inside modules_to_save are excluded, as in PEFT, because they are trained in full.

    Raises TypeError if a pattern of target_modules matches a module that is not an nn.Linear.
    """
    targets = config.target_modules
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    saved = {p: tuple(name for name in modules if ends_with(name, p)) for p in config.modules_to_save}
    inside_saved = tuple(f"{name}." for matched in saved.values() for name in matched)

    adapted: dict[str, tuple[str, ...]] = {}
    for pattern in (targets,) if isinstance(targets, str) else targets:
        if isinstance(targets, str):
            matched = [name for name in modules if re.fullmatch(targets, name)]
        else:
            matched = [name for name in modules if ends_with(name, pattern)]
        adapted[pattern] = tuple(name for name in matched if not f"{name}.".startswith(inside_saved))
        for name in adapted[pattern]:
            kind, where = type(modules[name]), f"target_modules: {pattern!r} matches {name}"
            # Other subclasses may never be called, or compute something else than W·x + b.
            if kind is not nn.Linear and not (issubclass(kind, nn.Linear) and hasattr(kind, "on_inject")):
                raise TypeError(f"{where}, which is a {kind.__name__}, not a Linear")
            if not isinstance(modules[name].weight, nn.Parameter):
                raise TypeError(f"{where}, whose weight is not a Parameter (pruned?)")
    return Injection(adapted, saved)


def build_layers(
    model: nn.Module, config: LoraConfig, injection: Injection, layer: type[LoRALinear], seed: int
) -> dict[nn.Module, LoRALinear]:
    """The adapted layer of each Linear in `injection.adapted`.

    The model is unchanged, except that these Linears are frozen; on an exception they are not.
    """
    names = [name for matched in injection.adapted.values() for name in matched]
    layers: dict[nn.Module, LoRALinear] = {}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for name, linear in modules_once(model, names).items():
            generator = torch.Generator().manual_seed(derived_seed(seed, name))
            layers[linear] = layer(linear, **config.for_layer(name), generator=generator)  # type: ignore[arg-type]
            if hasattr(linear, "on_inject"):  # a Linear that was changed in place passes the change on
                linear.on_inject(layers[linear])  # type: ignore[operator]
    except BaseException:
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    return layers


def swap_in(
    model: nn.Module, config: LoraConfig, injection: Injection, layers: dict[nn.Module, LoRALinear]
) -> None:
    """Replaces the Linears by their layers and sets which parameters train, as `inject` describes."""
    names = [name for matched in injection.adapted.values() for name in matched]
    for name, layer in {name: layers[model.get_submodule(name)] for name in names}.items():
        _swap(model, name, layer)
    train_only(model, config.modules_to_save)
    for layer in layers.values():
        for tensor_name in layer.trained_tensors:
            getattr(layer, tensor_name).requires_grad_(True)
    model.lora_config = config  # type: ignore[assignment]


def eject(model: nn.Module, merge: bool = False) -> None:
    """Replaces every adapted layer by a plain nn.Linear, in place.

    merge=False leaves the base weights as they were before `inject`, bit for bit. merge=True merges the
    adapter into them first. Modules named in modules_to_save stay as trained.

    Raises RuntimeError if the model has no adapter, is merged or is inside `disabled`, or as `merge` does.
    A merged model is refused because it is ambiguous whether the adapter is to stay in the weights.
    """
    lora_config(model)  # raises if there is none
    for name, layer in lora_layers(model).items():
        if layer.merged:
            raise RuntimeError(
                f"{name} is merged; unmerge first, then eject the model, with merge=True or not"
            )
        if not layer.enabled:
            raise RuntimeError("eject inside disabled(); leave the context first")
    if merge:
        merge_model(model)
    linears = {layer: layer.to_linear() for layer in lora_layers(model).values()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in linears:
            _swap(model, name, linears[module])
    del model.lora_config


def _refuse_unmatched(model: nn.Module, field: str, matches: dict[str, tuple[str, ...]]) -> None:
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    known = sorted({name.rpartition(".")[2] for name in linears})
    if field == "modules_to_save":
        known = [name for name, _ in model.named_children()]
    for pattern, names in matches.items():
        if not names:
            raise ValueError(
                f"{field}: {pattern!r} matches no module; there are {', '.join(known) or 'none'}"
            )


def derived_seed(*parts: object) -> int:
    """A seed that depends on the parts alone: 63 bits of the SHA-256 of their text."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _swap(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _summary(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} layers, {names[0]} to {names[-1]}"
