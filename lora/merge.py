"""Merging for a whole model: every layer or none.

    state       merge           unmerge          merged()                  disabled()
    unmerged    merges          error            merges, then unmerges     disables, then enables
    merged      error           unmerges         no change                 unmerges and disables,
                                                                           then enables and merges
    disabled    error           error            error                     no change

On exit, also by an exception, a context restores the state of each layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora.linear import LoRALinear
from lora.modules import lora_layers


def merge(model: nn.Module) -> None:
    """Merges every layer in place (MergeableLinear.merge). If one fails, none is merged.

    Raises RuntimeError if there is no adapter, or if a layer is merged, disabled, or shares its weight
    with another module; ValueError if a merged weight is not finite. The message names the layer.
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
    """Restores the weight of every merged layer in place, bit for bit. Finishes an interrupted unmerge too.

    Raises RuntimeError if there is no adapter or no layer is merged.
    """
    layers = lora_layers(model)
    if not any(layer.merged for layer in layers.values()):
        raise RuntimeError(f"{next(iter(layers))} is not merged; merge the model first")
    for layer in layers.values():
        if layer.merged:
            layer.unmerge()


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Context in which the model is merged. Raises RuntimeError or ValueError as `merge` does."""
    layers = lora_layers(model)
    if not all(layer.enabled for layer in layers.values()):
        raise RuntimeError("merged() inside disabled(); leave the context first")
    _refuse_tied(model, layers)
    with _restored(layers):
        _merge_all({name: layer for name, layer in layers.items() if not layer.merged})
        yield model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Context in which the adapter is off. Modules named in modules_to_save stay as trained."""
    layers = lora_layers(model)
    with _restored(layers):
        for layer in layers.values():
            if layer.merged:
                layer.unmerge()
            layer.enabled = False
        yield model


def _refuse_tied(model: nn.Module, layers: dict[str, LoRALinear]) -> None:
    """Merging writes to the weight in place, so it would change every module that holds the weight."""
    holders: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            other = holders.setdefault(parameter, name)
            if other != name and any(layer.weight is parameter for layer in layers.values()):
                raise RuntimeError(f"{name} and {other} share one weight; merging would change both")


@contextmanager
def _restored(layers: dict[str, LoRALinear]) -> Iterator[None]:
    before = {name: (layer.merged, layer.enabled) for name, layer in layers.items()}
    try:
        yield
    finally:
        for name, layer in layers.items():
            was_merged, layer.enabled = before[name]
            if layer.merged and not was_merged:
                layer.unmerge()
        _merge_all({name: layer for name, layer in layers.items() if before[name][0] and not layer.merged})


def _merge_all(layers: dict[str, LoRALinear]) -> None:
    started: list[LoRALinear] = []
    try:
        for name, layer in layers.items():
            started.append(layer)  # before the merge, so that an interrupted merge is undone too
            try:
                layer.merge()
            except (ValueError, RuntimeError) as error:
                raise type(error)(f"{name}: {error}") from error
    except BaseException:
        for layer in started:
            if layer.merged:
                layer.unmerge()
        raise
