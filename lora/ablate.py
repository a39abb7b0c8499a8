"""Taking an adapter apart to see which part does what: contexts that change it, and put every bit back.

They act on a model whose layers are apart (unmerged) and enabled, and leave it so, on an exception too.
Nothing is trained or saved inside: they are for looking.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lora.anatomy import delta_svd
from lora.linear import LoRALinear
from lora.modules import lora_layers


@contextmanager
def only(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """The adapter switched on in the layers of these names alone; with none, the bare base model.

    Raises RuntimeError if a layer is merged or switched off, ValueError on a name that has no adapter.
    """
    layers = _unmerged(model)
    for name in names:
        if name not in layers:
            raise ValueError(f"{name}: no adapted layer of this model; there are {', '.join(layers)}")
    try:
        for name, layer in layers.items():
            layer.enabled = name in names
        yield
    finally:
        for layer in layers.values():
            layer.enabled = True


@contextmanager
def scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """ΔW times `factor` in every layer: 0 is the base model, 1 the adapter as it is, -1 its opposite.

    Raises RuntimeError if a layer is merged or switched off.
    """
    layers = _unmerged(model)
    before = {name: layer.scaling for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.scaling *= factor
        yield
    finally:
        for name, layer in layers.items():
            layer.scaling = before[name]


@contextmanager
@torch.no_grad()
def truncated(model: nn.Module, rank: int) -> Iterator[None]:
    """Every ΔW replaced by its best approximation of that rank; a rank of r or more changes nothing.

    U_k·U_kᵀ·ΔW = s·(U_k·U_kᵀ·B)·A with ΔW's k strongest directions U_k, so B alone is written to, rounded
    once to its dtype.

    Raises RuntimeError if a layer is merged or switched off, ValueError on a negative rank.
    """
    if rank < 0:
        raise ValueError(f"rank: {rank} is negative")
    layers = {name: layer for name, layer in _unmerged(model).items() if rank < layer.r}
    before = {name: layer.lora_B.detach().clone() for name, layer in layers.items()}
    try:
        for layer in layers.values():
            U = delta_svd(layer.lora_A, layer.lora_B, layer.scaling).U[:, :rank]  # (out, k)
            layer.lora_B.copy_(U @ (U.T @ layer.lora_B.double()))
        yield
    finally:
        for name, layer in layers.items():
            layer.lora_B.copy_(before[name])


def _unmerged(model: nn.Module) -> dict[str, LoRALinear]:
    layers = lora_layers(model)
    for name, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"{name} is merged; unmerge the model first")
        if not layer.enabled:
            raise RuntimeError(f"{name} is switched off; leave the context that did it first")
    return layers
