"""Finds the layers to adapt, swaps a LoRALinear in for each, and takes them out again."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import torch
from torch import nn

from lora.config import LoraConfig
from lora.frozen import FrozenLinear
from lora.linear import LoRALinear
from lora.merge import merge as merge_model
from lora.parameters import train_only
from lora.tree import ends_with, has_adapter, lora_config, lora_layers, modules_named, modules_once


@dataclass(frozen=True)
class Injection:
    """What `inject` did: for each pattern the full names of the modules that it matched."""

    adapted: dict[str, tuple[str, ...]]
    saved: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        lines = [f"LoRA on {pattern!r}: {_summary(names)}" for pattern, names in self.adapted.items()]
        lines += [f"trained whole, {pattern!r}: {_summary(names)}" for pattern, names in self.saved.items()]
        return "\n".join(lines)


def inject(model: nn.Module, config: LoraConfig, seed: int = 0) -> Injection:
    """Puts an adapter beside every Linear that `config.target_modules` matches, in place.

    Freezes every parameter of the model, but for the adapters and what `config.modules_to_save` names.
    The model's outputs in eval mode stay the same bit for bit, since lora_B starts at zero. Each lora_A
    is drawn from `seed` and the module's name alone: nothing that was drawn before matters. Device,
    dtype and train or eval mode of each layer stay. The config stays with the model, for `save_adapter`.

    Raises RuntimeError if the model has an adapter, ValueError if a pattern matches nothing, TypeError
    if it matches something that is not an nn.Linear; then the model is as it was.
    """
    if has_adapter(model):
        raise RuntimeError("the model has an adapter already; eject it first")
    injection = find_targets(model, config)
    _refuse_unmatched(model, "target_modules", injection.adapted)
    _refuse_unmatched(model, "modules_to_save", injection.saved)
    place_adapters(model, config, injection, seed)
    return injection


def find_targets(model: nn.Module, config: LoraConfig) -> Injection:
    """The modules that each pattern of `config` matches; the model is left alone.

    Modules inside modules_to_save are left out, as in PEFT: they are trained whole.

    Raises TypeError if a pattern of target_modules matches something that is not an nn.Linear.
    """
    targets = config.target_modules
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [name for name in modules if name]
    saved = {
        pattern: tuple(name for name, _ in modules_named(model, pattern))
        for pattern in config.modules_to_save
    }
    inside_saved = tuple(f"{name}." for matched in saved.values() for name in matched)

    adapted: dict[str, tuple[str, ...]] = {}
    for pattern in (targets,) if isinstance(targets, str) else targets:
        if isinstance(targets, str):
            matched = [name for name in names if re.fullmatch(targets, name)]
        else:
            matched = [name for name in names if ends_with(name, pattern)]
        matched = [name for name in matched if not f"{name}.".startswith(inside_saved)]
        for name in matched:
            # Subclasses too: some are never called, others compute something else than W·x + b.
            if type(modules[name]) not in (nn.Linear, FrozenLinear):
                kind = type(modules[name]).__name__
                raise TypeError(
                    f"target_modules: {pattern!r} matches {name}, which is a {kind} and not a Linear"
                )
            if not isinstance(modules[name].weight, nn.Parameter):
                raise TypeError(
                    f"target_modules: {pattern!r} matches {name}, whose weight is no Parameter (pruned?)"
                )
        adapted[pattern] = tuple(matched)
    return Injection(adapted, saved)


def place_adapters(model: nn.Module, config: LoraConfig, injection: Injection, seed: int) -> None:
    """Swaps in the layers and freezes the rest, as `inject` describes; checks nothing."""
    names = [name for matched in injection.adapted.values() for name in matched]
    adapters: dict[nn.Module, LoRALinear] = {}  # a Linear that stands in two places gets one adapter
    for name, linear in modules_once(model, names).items():
        assert isinstance(linear, nn.Linear)
        adapters[linear] = LoRALinear(
            linear,
            r=config.rank(name),
            lora_alpha=config.alpha(name),
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            generator=_generator(seed, name),
        )
    # All are made before the first is swapped in: where one does not fit into memory, nothing has changed.
    for name, layer in {name: adapters[model.get_submodule(name)] for name in names}.items():
        _swap(model, name, layer)

    train_only(model, config.modules_to_save)
    for layer in adapters.values():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    model.lora_config = config  # type: ignore[assignment]


def eject(model: nn.Module, merge: bool = False) -> None:
    """Puts plain nn.Linears back, in place; nothing of the adapter is left in the model.

    merge=False leaves the base weights as they were before `inject`, bit for bit; merge=True leaves
    them with the adapter folded in. What modules_to_save names stays as trained.

    Raises RuntimeError if the model has no adapter or it was injected into another part of it, is merged
    (unmerge first: whether the adapter is to stay folded in should be said, not guessed), is inside
    `disabled`, or cannot be merged (`merge`).
    """
    lora_config(model)
    for name, layer in lora_layers(model).items():
        if layer.merged:
            raise RuntimeError(
                f"{name} is merged; unmerge first, then eject(model) or eject(model, merge=True)"
            )
        if not layer.enabled:
            raise RuntimeError("eject inside disabled(); leave the context first")
    if merge:
        merge_model(model)
    plain = {layer: _plain(layer) for layer in lora_layers(model).values()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in plain:
            _swap(model, name, plain[module])
    del model.lora_config


def _refuse_unmatched(model: nn.Module, field: str, matches: dict[str, tuple[str, ...]]) -> None:
    for pattern, names in matches.items():
        if not names:
            leaves = {
                name.rpartition(".")[2]
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear)
            }
            parts = (
                sorted(leaves) if field == "target_modules" else [name for name, _ in model.named_children()]
            )
            raise ValueError(
                f"{field}: {pattern!r} matches no module; there are {', '.join(parts) or 'none'}"
            )


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _plain(layer: LoRALinear) -> nn.Linear:
    """An nn.Linear with the layer's own Parameters."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight, linear.bias = layer.weight, layer.bias
    return linear.train(layer.training)


def _swap(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _summary(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} layers, {names[0]} to {names[-1]}"
