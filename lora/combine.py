"""Adds up adapters: one plain LoRA adapter whose ΔW is a weighted sum of others'.

    ΔW = Σ wᵢ·ΔWᵢ = Σ wᵢ·sᵢ·Bᵢ·Aᵢ = B·A

    A = [A₁; A₂; …] (Σrᵢ, in)        B = [w₁s₁·B₁, w₂s₂·B₂, …] (out, Σrᵢ)

Scaling is 1 in the new adapter. A sum of ranks is the price of exactness: averaging the Aᵢ and the Bᵢ
separately would also give products Bᵢ·Aⱼ of different adapters, which none of them has learned. The singular
value decomposition of B·A cuts it back to a lower rank, with the smallest possible error (Eckart-Young
theorem).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora.adapted import has_low_rank, layer_patterns
from lora.adapters import Adapters
from lora.anatomy import delta_svd
from lora.config import LoraConfig
from lora.interrupts import uninterrupted
from lora.linear import LoRALinear


@torch.no_grad()
def combine(
    adapters: Adapters, name: str, weights: Mapping[str, float], rank: int | None = None
) -> dict[str, float]:
    """Adds the adapter `name`, whose ΔW is Σ weights[k]·ΔW_k. One weight alone scales: -1 is the opposite.

    Modules in modules_to_save, such as heads, cannot be added up in the same way: they are copies of those of
    the first adapter in `weights`.

    In real arithmetic the sum is exact. A is copied, and B is rounded once to its dtype, float32 or float64,
    with u = 2⁻²⁴ or 2⁻⁵³: elementwise, the error of ΔW is at most u·Σ|weights[k]·s_k|·|B_k|·|A_k|.

    rank: the largest rank of a layer of the sum; None keeps the sum of all ranks. Returns by layer the share
    ‖ΔW - ΔW_rank‖_F / ‖ΔW‖_F that is lost, 0 without a cut.

    Raises ValueError if there is no weight, one is not finite, `name` is taken, a rank exceeds a layer's, or
    one adapter changes a layer in a module that the first replaces; RuntimeError if the ΔW of an adapter is
    not scaling·B·A. The adapters are then unchanged.
    """
    if not weights:
        raise ValueError("weights: empty; give a weight for each adapter")
    factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for each, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {each!r} is {weight}, which is not finite")
        for layer_name, layer in adapters[each].layers.items():
            if not has_low_rank(layer):
                kind = type(layer).__name__
                raise RuntimeError(f"{each!r} cannot be added up: ΔW of a {kind} is not scaling·B·A")
            A, B = _stored_factors(layer)
            scaled = (weight * layer.scaling * B.double(), A)
            factors.setdefault(layer_name, []).append(scaled)
    if rank is not None and rank < 1:
        raise ValueError(f"rank: {rank} is not at least 1")

    lost = dict.fromkeys(factors, 0.0)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for layer_name, parts in factors.items():
        B, A = torch.cat([B for B, _ in parts], dim=1), torch.cat([A for _, A in parts])
        if rank is not None and rank < len(A):
            (B, A), lost[layer_name] = _truncated(B, A, rank)
        found[layer_name] = B, A
    first = adapters[next(iter(weights))]
    for head in first.saved:
        if inside := [key for key in found if key.startswith(f"{head}.")]:
            raise ValueError(
                f"{inside[0]} is adapted, and {head} is replaced by that of {next(iter(weights))!r}"
            )
    config = _config(first.config, {key: len(A) for key, (_, A) in found.items()})
    with uninterrupted():
        adapters.add(name, config, modules={key: copy.deepcopy(head) for key, head in first.saved.items()})
        for layer_name, added in adapters[name].layers.items():
            B, A = found[layer_name]
            for tensor, value in zip(added.adapter_state().values(), (A, B), strict=True):
                tensor.copy_(value)
    return lost


def _stored_factors(layer: LoRALinear) -> tuple[Tensor, Tensor]:
    """A and B of ΔW = scaling·B·A as a folder holds them: without differences, which would be rounded."""
    to_plain: Any = getattr(layer, "to_plain", None)
    if to_plain is None:
        return layer.factors()
    plain = to_plain({f".{name}": tensor for name, tensor in layer.adapter_state().items()})
    return plain[".lora_A"], plain[".lora_B"]


def _truncated(B: Tensor, A: Tensor, rank: int) -> tuple[tuple[Tensor, Tensor], float]:
    """The best approximation of B·A of that rank, as B (out, rank) and A (rank, in), and the share lost."""
    parts = delta_svd(A, B, 1.0)
    root = parts.S[:rank].sqrt()
    share = float(parts.S[rank:].norm() / parts.S.norm()) if parts.S.any() else 0.0
    return (parts.U[:, :rank] * root, root[:, None] * parts.V[:, :rank].T), share


def _config(first: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """The config of plain LoRA with scaling 1 on the layers with these names and ranks."""
    r = max(ranks.values())
    patterns = layer_patterns(ranks) if set(ranks.values()) != {r} else {}
    return LoraConfig(
        r=r, lora_alpha=r, lora_dropout=first.lora_dropout, target_modules=tuple(ranks),
        modules_to_save=first.modules_to_save, rank_pattern=patterns, alpha_pattern=patterns,
    )  # fmt: skip
