"""Removes the adapters of a model again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora.adapted import lora_config, lora_layers, unmerged
from lora.fingerprint import FLOATS
from lora.interrupts import uninterrupted
from lora.merge import merge as merge_model
from lora.merge import naming, refuse_shared
from lora.mergeable import MergeableLinear
from lora.modules import unwrap
from lora.targets import remove_hooks


def eject(model: nn.Module, merge: bool = False, dtype: torch.dtype | None = None) -> None:
    """Replaces every adapted layer by the kind that it was before `inject`, in place.

    merge=False leaves the base weights as they were before `inject`, bit for bit. merge=True merges the
    adapter into them first. Modules named in modules_to_save stay as trained. The base stays frozen: call
    `model.requires_grad_(True)` to train it.

    dtype: with merge=True, the dtype of the merged weights, which are then new Parameters: W + ΔW is formed
    in float64 and rounded once. A quantised base needs it, because nothing can be merged into its weights.
    None keeps the dtype of W. Other parameters keep theirs, and layers without adapter stay quantised: call
    `lora.quantised.dequantise(model, dtype)`, and for a 16-bit model then `model.to(dtype)`.

    Raises ValueError for a dtype without merge=True, or if a merged weight is not finite; RuntimeError if the
    model has no adapter, is merged or is inside `disabled`, or as `merge` does. The model is then unchanged.
    A merged model is refused because it is ambiguous whether the adapter is to stay in the weights.
    """
    if dtype is not None and not merge:
        raise ValueError(f"dtype: {dtype} is for merge=True; the base weights stay as they are")
    if dtype not in (None, *FLOATS, torch.float64):
        raise ValueError(f"dtype: {dtype} is not float32, bfloat16, float16 or float64")
    lora_config(model)  # raises if there is none
    for name, layer in unmerged(lora_layers(model)).items():
        if "weight" not in layer._parameters:
            raise RuntimeError(
                f"{name}: the weight is not a Parameter; remove its pruning or parametrization"
            )
    with uninterrupted():
        weights = {} if dtype is None else _merged_weights(model, dtype)
        if merge and dtype is None:
            merge_model(model)
        linears = {layer: layer.to_linear() for layer in lora_layers(model).values()}
        for layer, weight in weights.items():
            linears[layer].weight = nn.Parameter(weight, requires_grad=False)
        for module in list(model.modules()):
            for name, child in module._modules.items():
                if child in linears:
                    setattr(module, name, linears[child])
            remove_hooks(module)
        del unwrap(model).lora_config


def _merged_weights(model: nn.Module, dtype: torch.dtype) -> dict[MergeableLinear, Tensor]:
    """W + ΔW of each layer in `dtype`, in the layout of its weight.

    Raises RuntimeError if another tensor shares a weight, which would differ then; ValueError as `eject`.
    """
    layers, weights = lora_layers(model), {}
    refuse_shared(model, layers)
    for name, layer in layers.items():
        with naming(name):
            weights[layer] = layer.rounded_weight(dtype)
    return weights
