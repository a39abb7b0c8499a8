"""Merging for a whole model: every layer or none.

    state       merge           unmerge          merged()                  disabled()
    apart       merges          error            merges, then unmerges     switches off, then on
    merged      error           unmerges         nothing to do             unmerges and switches off,
                                                                           then on and merges
    disabled    error           error            error                     nothing to do

A context leaves each layer in the state in which it found it, on an exception too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora.linear import LoRALinear
from lora.tree import lora_layers


def merge(model: nn.Module) -> None:
    """Merges every layer, in place (LoRALinear.merge). If one fails, all are as before.

    Raises RuntimeError if there is no adapter, a layer is merged already or switched off, or its weight is
    another module's too, ValueError if a merged weight would not be finite; the message names the layer.
    """
    layers = lora_layers(model)
    _refuse_tied(model, layers)
    for name, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"{name} is merged already; unmerge the model first")
        if not layer.enabled:
            raise RuntimeError("merge inside disabled(); leave the context first")
    _merge_all(layers)


def unmerge(model: nn.Module) -> None:
    """Puts every merged layer's own weight back, bit for bit, in place: after a stop half way, the rest.

    Raises RuntimeError if there is no adapter, or if no layer is merged.
    """
    layers = lora_layers(model)
    if not any(layer.merged for layer in layers.values()):
        raise RuntimeError(f"{next(iter(layers))} is not merged; merge the model first")
    for layer in layers.values():
        if layer.merged:
            layer.unmerge()


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its adapter folded in, inside a `with`."""
    layers = lora_layers(model)
    if not all(layer.enabled for layer in layers.values()):
        raise RuntimeError("merged() inside disabled(); leave the context first")
    _refuse_tied(model, layers)
    before = {name: layer.merged for name, layer in layers.items()}
    _merge_all({name: layer for name, layer in layers.items() if not layer.merged})
    try:
        yield model
    finally:
        _restore(layers, before)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its LoRA switched off, inside a `with`. What modules_to_save names stays as trained."""
    layers = lora_layers(model)
    before = {name: layer.merged for name, layer in layers.items()}
    enabled = {name: layer.enabled for name, layer in layers.items()}
    try:
        for layer in layers.values():
            if layer.merged:
                layer.unmerge()
            layer.enabled = False
        yield model
    finally:
        for name, layer in layers.items():
            layer.enabled = enabled[name]
        _restore(layers, before)


def _refuse_tied(model: nn.Module, layers: dict[str, LoRALinear]) -> None:
    """A merge writes to the weight itself, and so to every module that holds it."""
    holders: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            other = holders.setdefault(parameter, name)
            if other != name and any(layer.weight is parameter for layer in layers.values()):
                raise RuntimeError(f"{name} and {other} share one weight; merging would change both")


def _restore(layers: dict[str, LoRALinear], merged_before: dict[str, bool]) -> None:
    for name, layer in layers.items():
        if layer.merged and not merged_before[name]:
            layer.unmerge()
    _merge_all({name: layer for name, layer in layers.items() if merged_before[name] and not layer.merged})


def _merge_all(layers: dict[str, LoRALinear]) -> None:
    done: list[LoRALinear] = []
    try:
        for name, layer in layers.items():
            done.append(layer)  # before the merge: a stop half way through it is undone as well
            try:
                layer.merge()
            except (ValueError, RuntimeError) as error:
                raise type(error)(f"{name}: {error}") from error
    except BaseException:
        for layer in done:
            if layer.merged:
                layer.unmerge()
        raise
