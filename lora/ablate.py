"""Ablations: contexts that change parts of an adapter and restore every bit on leaving.

The model must be unmerged and enabled. It is restored on an exception too. The contexts are for analysis:
do not train or save inside them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora.adapted import lora_layers, product_layers, unmerged
from lora.anatomy import delta_svd
from lora.interrupts import uninterrupted
from lora.linear import LoRALinear
from lora.merge import restoring


@contextmanager
def enable_only(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Enables the adapter in the layers with these names alone; with no names, the base model remains.

    Raises RuntimeError if a layer is merged or disabled, ValueError if a name has no adapter.
    """
    layers = unmerged(lora_layers(model))
    for name in names:
        if name not in layers:
            raise ValueError(f"{name}: not an adapted layer of this model, which has {', '.join(layers)}")

    def restore() -> None:
        for layer in layers.values():
            layer.enabled = True

    with restoring(restore):
        with uninterrupted():
            for name, layer in layers.items():
                layer.enabled = name in names
        yield


@contextmanager
def scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """Multiplies ΔW by `factor` in every layer: 0 gives the base model, 1 the adapter, -1 its opposite.

    Raises RuntimeError if a layer is merged or disabled, or if its ΔW is not scaling·B·A.
    """
    layers = unmerged(product_layers(model))
    before = {name: layer.scaling for name, layer in layers.items()}

    def restore() -> None:
        for name, layer in layers.items():
            layer.scaling = before[name]

    with restoring(restore):
        with uninterrupted():
            for layer in layers.values():
                layer.scaling *= factor
        yield


@contextmanager
def truncated(model: nn.Module, rank: int) -> Iterator[None]:
    """Replaces every ΔW by its best approximation of that rank; a rank of r or more changes nothing.

    With the k strongest left singular vectors U_k of ΔW, U_k·U_kᵀ·ΔW = s·(U_k·U_kᵀ·B)·A. So only B is
    written to (and B₀ where ΔW is measured from a start). It is rounded once to its dtype.

    Raises RuntimeError if a layer is merged or disabled, or if its ΔW is not scaling·B·A, ValueError if the
    rank is negative.
    """
    if rank < 0:
        raise ValueError(f"rank: {rank} is negative")
    layers = [layer for layer in unmerged(product_layers(model)).values() if rank < len(layer.factors()[0])]
    before = {layer: {B: B.detach().clone() for B in _left_factors(layer)} for layer in layers}
    if other := next((type(layer).__name__ for layer, factors in before.items() if not factors), ""):
        raise RuntimeError(f"{other} has no tensor whose name ends in _B, so its rank cannot be lowered")

    def restore() -> None:
        with torch.no_grad():
            for tensors in before.values():
                for B, old in tensors.items():
                    B.copy_(old)

    with restoring(restore):
        with uninterrupted(), torch.no_grad():
            for layer in layers:
                U = delta_svd(*layer.factors(), layer.scaling).U[:, :rank]  # (out, k)
                for B in before[layer]:
                    B.copy_(U @ (U.T @ B.double()))
        yield


def _left_factors(layer: LoRALinear) -> list[Tensor]:
    return [getattr(layer, key) for key in layer.adapter_tensors if key.endswith("_B")]
