"""Finds the layers to adapt, and replaces each with a LoRALinear."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from lora.config import LoraConfig
from lora.interrupts import uninterrupted
from lora.linear import LoRALinear
from lora.mergeable import MergeableLinear
from lora.modules import ends_with, modules_once, named_modules, train_only, unwrap


@dataclass(frozen=True, repr=False)
class Injection:
    """The full names matched: adapted by pattern of target_modules, saved by name in modules_to_save."""

    adapted: dict[str, tuple[str, ...]]
    saved: dict[str, tuple[str, ...]]

    @property
    def names(self) -> list[str]:
        """The names of all modules to adapt."""
        return [name for names in self.adapted.values() for name in names]

    def __repr__(self) -> str:
        lines = [f"LoRA on {pattern!r}: {_summary(names)}" for pattern, names in self.adapted.items()]
        lines += [f"trained in full, {pattern!r}: {_summary(names)}" for pattern, names in self.saved.items()]
        return "\n".join(lines)


# Filled by lora/targets.py and lora/conv1d.py, which know torch's and transformers' modules:
SPECIAL_TARGETS: dict[str, Callable[[nn.Module], list[str]]] = {}  # "all-linear": the names to adapt
CHECKS: list[Callable[[nn.Module, Injection], None]] = []  # raise if a module cannot be adapted
INJECT_CHECKS: list[Callable[[nn.Module, Injection, LoraConfig], None]] = []  # of `inject`, not of loading
# By the name of a class that is no nn.Linear but computes W·x + b: makes a layer class one that adapts it.
CONVERSIONS: dict[str, Callable[[type[MergeableLinear]], type[MergeableLinear]]] = {}
AFTER_SWAP: list[Callable[[nn.Module], None]] = []  # change modules around the adapted ones
# The last one counts: `layer_class`, which lora/variants sets.
LAYER_CLASS: list[Callable[[LoraConfig, Any], type[MergeableLinear]]] = [lambda _, layer: layer or LoRALinear]


def layer_class(config: LoraConfig, layer: type[MergeableLinear] | None = None) -> type[MergeableLinear]:
    """`layer`, or the class that `config` asks for. Raises ValueError if `layer` is of another variant."""
    return LAYER_CLASS[-1](config, layer)


def inject(
    model: nn.Module, config: LoraConfig, seed: int = 0, layer: type[MergeableLinear] | None = None
) -> Injection:
    """Replaces every nn.Linear that `config.target_modules` matches by a LoRALinear, in place.

    Freezes every parameter except the adapters and the modules in `config.modules_to_save`. Each lora_A is
    drawn from `seed` and the module's name alone. Device, dtype, mode and hooks of a layer are preserved.
    The model keeps the config as `model.lora_config`, for `save_adapter`.

    Outputs in eval mode stay the same bit for bit, because lora_B starts at zero. Two exceptions: adding
    zero turns -0.0 into 0.0, and an A·x that overflows gives NaN. layer: another class than the one that the
    config asks for, a subclass of MergeableLinear with LoRALinear's constructor; `check_layer` tests one.

    Raises RuntimeError if the model has an adapter, ValueError if a pattern matches nothing, an A would have
    more than min(in, out) rows or `layer` is of another variant, TypeError if a module cannot be adapted or
    cannot train. The model is then unchanged. A signal, such as Ctrl-C, waits until the change is made.
    """
    if any(isinstance(module, MergeableLinear) for module in model.modules()):
        raise RuntimeError("the model has an adapter already; eject it first")
    injection = find_targets(model, config)
    for check in INJECT_CHECKS:
        check(model, injection, config)
    kind = layer_class(config, layer)
    for name, linear in modules_once(model, injection.names).items():
        r, rank = config.for_layer(name)["r"], min(linear._parameters["weight"].shape)  # type: ignore[union-attr]
        if r > rank and "lora_A" in kind.adapter_tensors:
            raise ValueError(f"r: {r:,} is more than {rank:,}, the largest rank of the weight of {name}")
    with uninterrupted(), unchanged_on_error(model):
        layers = build_layers(model, config, injection, kind, seed)
        swap_in(model, config, injection, layers)
    return injection


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Context that on an exception restores the module tree and which parameters train."""
    children = [(module._modules, dict(module._modules)) for module in model.modules()]
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for now, before in children:
            now.clear()
            now.update(before)
        for parameter, requires_grad in trains:
            parameter.requires_grad_(requires_grad)
        vars(unwrap(model)).pop("lora_config", None)
        raise


def find_targets(model: nn.Module, config: LoraConfig) -> Injection:
    """The modules that each pattern of `config` matches.

    Modules inside modules_to_save are excluded, as in PEFT, because they are trained in full.

    Raises TypeError or ValueError if a module cannot be adapted, or if one in modules_to_save cannot train.
    """
    targets = config.target_modules
    modules = {name: module for name, module in named_modules(model) if name}
    saved = {p: tuple(name for name in modules if ends_with(name, p)) for p in config.modules_to_save}
    inside_saved = tuple(f"{name}." for matched in saved.values() for name in matched)

    adapted: dict[str, tuple[str, ...]] = {}
    for pattern in (targets,) if isinstance(targets, str) else targets:
        if pattern in SPECIAL_TARGETS:
            matched = SPECIAL_TARGETS[pattern](model)
        elif isinstance(targets, str):
            matched = [name for name in modules if re.fullmatch(targets, name)]
        else:
            matched = [name for name in modules if ends_with(name, pattern)]
        adapted[pattern] = tuple(name for name in matched if not f"{name}.".startswith(inside_saved))
    injection = Injection(adapted, saved)
    for check in CHECKS:
        check(model, injection)
    return injection


def build_layers(
    model: nn.Module, config: LoraConfig, injection: Injection, layer: Any, seed: int, **settings: Any
) -> dict[nn.Module, MergeableLinear]:
    """The layer of each Linear in `injection.adapted`, which is frozen. settings: for the constructor too."""
    layers: dict[nn.Module, MergeableLinear] = {}
    for name, linear in modules_once(model, injection.names).items():
        generator = torch.Generator().manual_seed(derived_seed(seed, name))
        convert = CONVERSIONS.get(type(linear).__name__)
        kind: Any = convert(layer) if convert else layer
        try:
            layers[linear] = kind(linear, **config.for_layer(name), **settings, generator=generator)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if hasattr(linear, "on_inject"):  # a Linear that was changed in place passes the change on
            linear.on_inject(layers[linear])  # type: ignore[operator]
    if hasattr(layer, "share"):  # a variant whose layers have tensors in common
        layer.share(list(layers.values()), config)
    return layers


def swap_in(
    model: nn.Module, config: LoraConfig, injection: Injection, layers: dict[nn.Module, MergeableLinear]
) -> None:
    """Replaces the Linears by their layers and sets which parameters train, as `inject` describes."""
    modules = dict(named_modules(model))
    for name in injection.names:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, layers[modules[name]])
    train_only(model, config.modules_to_save)
    for layer in layers.values():
        for name in layer.trained_tensors:
            attrgetter(name)(layer).requires_grad_(True)
    for change in AFTER_SWAP:
        change(model)
    if not SPECIAL_TARGETS.keys().isdisjoint(injection.adapted):  # a file names the layers
        config = dataclasses.replace(config, target_modules=tuple(injection.names))
    unwrap(model).lora_config = config  # type: ignore[assignment]


def derived_seed(*parts: object) -> int:
    """A seed that depends on the parts alone: 63 bits of the SHA-256 of their text."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _summary(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} layers, {names[0]} to {names[-1]}"
