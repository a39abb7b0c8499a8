"""Finds the layers to adapt, and replaces each with a LoRALinear."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora.config import LoraConfig
from lora.interrupts import uninterrupted
from lora.linear import LoRALinear
from lora.mergeable import MergeableLinear
from lora.modules import ends_with, has_adapter, modules_once, train_only


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


# A field of LoraConfig, a value of it, and the class of layers that this value asks for. lora/variants adds
# its classes, which this file does not know.
VARIANTS: list[tuple[str, object, type[LoRALinear]]] = []


def layer_class(config: LoraConfig) -> type[LoRALinear]:
    """The class of the layers that `config` describes: LoRALinear, or a variant of it."""
    asked = (layer for field, value, layer in VARIANTS if getattr(config, field) == value)
    return next(asked, LoRALinear)


def inject(
    model: nn.Module, config: LoraConfig, seed: int = 0, layer: type[LoRALinear] | None = None
) -> Injection:
    """Replaces every nn.Linear that `config.target_modules` matches by a LoRALinear, in place.

    Freezes every parameter except the adapters and the modules in `config.modules_to_save`. Each lora_A is
    drawn from `seed` and the module's name alone. Device, dtype, mode and hooks of a layer are preserved.
    The model keeps the config as `model.lora_config`, for `save_adapter`.

    Outputs in eval mode stay the same bit for bit, because lora_B starts at zero. Two exceptions: adding
    zero turns -0.0 into 0.0, and an A·x that overflows gives NaN. layer: another class, a subclass of
    LoRALinear, than the one that the config asks for.

    Raises RuntimeError if the model has an adapter, ValueError if a pattern matches nothing, TypeError if
    it matches a module that cannot be adapted, or if a module in modules_to_save cannot train. The model
    is then unchanged. A signal, such as Ctrl-C, takes effect before or after the change.
    """
    if has_adapter(model):
        raise RuntimeError("the model has an adapter already; eject it first")
    injection = find_targets(model, config)
    _refuse_unmatched(model, "target_modules", injection.adapted)
    _refuse_unmatched(model, "modules_to_save", injection.saved)
    with uninterrupted():
        layers = build_layers(model, config, injection, layer or layer_class(config), seed)
        swap_in(model, config, injection, layers)
    return injection


def find_targets(model: nn.Module, config: LoraConfig) -> Injection:
    """The modules that each pattern of `config` matches.

    Modules inside modules_to_save are excluded, as in PEFT, because they are trained in full.

    Raises TypeError if a module cannot be adapted, or if one in modules_to_save cannot train.
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
            if "forward" in vars(modules[name]):
                raise TypeError(f"{where}, whose forward is patched; the patch would be lost")
    for name in sorted({name for matched in saved.values() for name in matched}):
        for key, parameter in modules[name].named_parameters():
            fixed = parameter.is_inference() and not torch.is_inference_mode_enabled()
            if fixed or not (parameter.is_floating_point() or parameter.is_complex()):
                found = "a tensor of inference mode" if fixed else parameter.dtype
                raise TypeError(f"modules_to_save: {name}.{key} is {found}, which cannot train")
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
        if hasattr(layer, "share"):  # a variant whose layers have tensors in common
            layer.share(list(layers.values()), config)
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
        swap(model, name, layer)
    train_only(model, config.modules_to_save)
    for layer in layers.values():
        for tensor_name in layer.trained_tensors:
            getattr(layer, tensor_name).requires_grad_(True)
    parents = {".".join(name.split(".")[:depth]) for name in names for depth in range(name.count(".") + 2)}
    for module in {model.get_submodule(parent) for parent in parents}:
        module.register_load_state_dict_pre_hook(refuse_merged)  # type: ignore[no-untyped-call]
    model.lora_config = config  # type: ignore[assignment]


def refuse_merged(module: nn.Module, _state_dict: Any, prefix: str, *_: Any) -> None:
    """Hook of every module around an adapted layer, so that load_state_dict raises before it writes."""
    for name, child in module.named_modules(prefix=prefix.rstrip(".")):
        if isinstance(child, MergeableLinear) and child.merged:
            raise RuntimeError(f"{name or 'the layer'}: load_state_dict into a merged layer; unmerge first")


def _refuse_unmatched(model: nn.Module, field: str, matches: dict[str, tuple[str, ...]]) -> None:
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    known = sorted({name.rpartition(".")[2] for name in linears})
    if field == "modules_to_save":
        known = [name for name, _ in model.named_children()]
    for pattern, names in matches.items():
        if not names:
            raise ValueError(f"{field}: {pattern!r} matches no module; names end with {', '.join(known)}")


def derived_seed(*parts: object) -> int:
    """A seed that depends on the parts alone: 63 bits of the SHA-256 of their text."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the module called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _summary(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} layers, {names[0]} to {names[-1]}"
