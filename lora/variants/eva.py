"""EVA: LoRA that starts at the directions in which the inputs of each layer vary most.

EVA (Paischer et al. 2024, arXiv 2410.07170, section 3) runs the model on some training rows. X (n, in) are
the inputs of a layer, for every token that is not padding. Then

    A = the r right singular vectors of X with the largest singular values, (r, in)        B = 0, (out, r)

so that the start changes nothing and A·x explains as much of the inputs as any r directions can. The total
rank of the model is given to those directions of all layers that explain the largest share of their layer's
inputs, σᵢ²/Σσ² (section 3.3). lora_alpha follows r, so that each layer keeps its scaling.

The singular vectors are eigenvectors of XᵀX, (in, in), which is summed in float64. It costs one
forward of each batch, an eigendecomposition for each layer, and until the end one such matrix of each. Then
the adapter is plain LoRA with rank_pattern and alpha_pattern, in memory and in its folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora.adapted import has_adapter, layer_patterns, product_layers
from lora.config import LoraConfig
from lora.inject import Injection, find_targets, inject
from lora.interrupts import uninterrupted
from lora.linear import LoRALinear
from lora.modules import modules_once

_MOST = 2  # no layer gets more than twice the rank that it would have without redistribution


def inject_eva(
    model: nn.Module, config: LoraConfig, batches: Iterable[Mapping[str, Tensor]], seed: int = 0
) -> Injection:
    """`inject` for a config with init_lora_weights = "eva": the adapter starts as EVA does.

    batches: keyword arguments of the model, of training rows alone. Rows of a layer's input, (B, L, in) or
    (B·L, in), where the attention_mask of its batch (B, L) is 0 are left out. The model keeps the config with
    its new rank_pattern and alpha_pattern, and init_lora_weights = True.

    Raises ValueError if the config does not ask for EVA, or the inputs of a layer are none, all zero or not
    finite, and as `inject` does. The model is then unchanged.
    """
    if config.init_lora_weights != "eva":
        raise ValueError(f'init_lora_weights: {config.init_lora_weights!r}, and inject_eva starts "eva"')
    if has_adapter(model):
        raise RuntimeError("the model has an adapter already; eject it first")
    modules: dict[str, Any] = modules_once(model, find_targets(model, config).names)
    found = input_directions(model, modules, batches)
    settings = {name: config.for_layer(name) for name in found}
    ranks = distribute(
        {name: shares[: min(modules[name].weight.shape)] for name, (shares, _) in found.items()},
        {name: layer["r"] for name, layer in settings.items()},
    )
    alphas = {}
    for name, layer in settings.items():
        growth = ranks[name] / layer["r"]
        alphas[name] = layer["lora_alpha"] * (growth**0.5 if config.use_rslora else growth)
    config = dataclasses.replace(
        config,
        init_lora_weights=True,
        rank_pattern=layer_patterns(ranks),
        alpha_pattern=layer_patterns(alphas),
    )
    with uninterrupted(), torch.no_grad():
        injection = inject(model, config, seed)
        for name, adapted in product_layers(model).items():
            adapted.lora_A.copy_(found[name][1][: adapted.r])
    return injection


@torch.no_grad()
def input_directions(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each layer, the right singular vectors of all its inputs X, float64, strongest first.

    By name, σᵢ²/Σσ² (in,) and the vectors as rows (in, in). The model runs in eval mode.
    """
    grams: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def add(name: str, input: Tensor) -> None:
        rows = input.reshape(-1, input.shape[-1])
        if mask is not None and mask.numel() == len(rows):
            rows = rows[mask.reshape(-1).bool()]
        rows = rows.double()
        grams[name] = grams.get(name, 0) + rows.T @ rows

    modes = {module: module.training for module in model.modules()}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: add(name, *args, **kwargs), with_kwargs=True
        )
        for name, layer in layers.items()
    ]
    try:
        model.eval()
        for batch in batches:
            mask = batch.get("attention_mask")
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    found = {}
    for name in layers:
        if name not in grams:
            raise ValueError(f"{name}: no batch has reached this layer, so it has no inputs to start from")
        gram = grams.pop(name)
        if not gram.isfinite().all():
            raise ValueError(f"{name}: its inputs are not finite")
        if not gram.any():
            raise ValueError(f"{name}: its inputs are all zero or padding")
        squares, vectors = torch.linalg.eigh(gram)  # ascending, vectors as columns
        squares = squares.flip(0).clamp(min=0)
        found[name] = (squares / squares.sum().clamp(min=torch.finfo(squares.dtype).tiny), vectors.T.flip(0))
    return found


def distribute(shares: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, int]:
    """The rank of each layer, with the same sum as `ranks`, given to the directions with the largest shares.

    shares: of the inputs that each direction explains, descending. Each layer keeps one direction at least,
    and gets twice its rank at most. Raises ValueError if the layers have too few directions.
    """
    most = {name: min(_MOST * ranks[name], len(shares[name])) for name in ranks}
    wanted, room = sum(ranks.values()), sum(most.values())
    if wanted > room:
        raise ValueError(
            f"r: the ranks add up to {wanted:,}, and the layers have room for {room:,} directions"
        )
    candidates = [(-float(shares[name][i]), name) for name in ranks for i in range(1, most[name])]
    found = dict.fromkeys(ranks, 1)
    candidates.sort(key=lambda candidate: candidate[0])  # stable, so that ties keep the order of the layers
    for _, name in candidates[: wanted - len(ranks)]:
        found[name] += 1
    return found


class EVALinear(LoRALinear):
    """Takes the place of a class of layers in the table of variants: there is none, as layers are LoRALinear.

    Raises ValueError, because `inject` has no batches.
    """

    inject_from_batches = staticmethod(inject_eva)  # for callers that do not know the variant of a config

    def __init__(self, *_: Any, **__: Any):
        raise ValueError('init_lora_weights: "eva" needs batches; call inject_eva of lora.variants.eva')
