"""The matrix parts: what can be said of an adapter from its tensors and the weights underneath alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora.anatomy import (
    Svd,
    amplification,
    captured_energy,
    delta_svd,
    effective_rank,
    energy,
    expected_projected_norm,
    expected_similarity,
    intruders,
    nearest_cosines,
    principal_angles,
    projected_norm,
    rank_holding,
    stable_rank,
    subspace_similarity,
    svd,
)
from train.anatomy.subject import Adapted, Subject

TOP = 10  # singular vectors of a tuned matrix that are searched for intruders, the paper's k
EPSILON = 0.5  # a nearest cosine below it makes an intruder


def measure(subject: Subject, bases: dict[str, Svd]) -> dict[str, dict[str, Any]]:
    """Size, shape, amplification and intruders of each adapted layer. `bases`: the decomposed weights."""
    return {name: _measure_layer(layer, bases[name]) for name, layer in subject.layers.items()}


def decompose_bases(subject: Subject) -> dict[str, Svd]:
    """The pretrained weight of each adapted layer, decomposed: slow, so done once."""
    return {name: svd(layer.weight) for name, layer in subject.layers.items()}


def _measure_layer(layer: Adapted, base: Svd) -> dict[str, Any]:
    delta = delta_svd(layer.lora_A, layer.lora_B, layer.scaling)
    weight, start = layer.weight.double(), layer.start_A.double()
    return {
        "r": layer.lora_A.shape[0],
        "scaling": layer.scaling,
        **_amplification(delta, weight, base),
        "delta_over_weight": float(delta.S.norm() / weight.norm()),
        "norm_A": float(layer.lora_A.double().norm()),
        "norm_B": float(layer.lora_B.double().norm()),
        "moved_A": float((layer.lora_A.double() - start).norm() / start.norm()),
        **_shape(delta.S),
        **_intruders(weight + delta.truncated(len(delta.S)), base),
    }


def measure_amplification(subject: Subject, bases: dict[str, Svd]) -> dict[str, dict[str, float]]:
    """The rows of the LoRA paper's table 7 for each adapted layer."""
    return {
        name: _amplification(
            delta_svd(layer.lora_A, layer.lora_B, layer.scaling), layer.weight.double(), bases[name]
        )
        for name, layer in subject.layers.items()
    }


def _amplification(delta: Svd, weight: Tensor, base: Svd) -> dict[str, float]:
    rank = len(delta.S)
    weight_norm = float(weight.norm())
    return {
        "delta_norm": float(delta.S.norm()),
        "weight_norm": weight_norm,
        "projected_on_delta": projected_norm(weight, delta.U, delta.V),
        "projected_on_weight": float(base.S[:rank].norm()),  # Uᵀ·W·V is diag(S) for W's own directions
        "projected_on_random": expected_projected_norm(weight_norm, (weight.shape[0], weight.shape[1]), rank),
        "amplification": amplification(delta, weight),
    }


def _shape(S: Tensor) -> dict[str, Any]:
    return {
        "singular_values": S.tolist(),
        "effective_rank": effective_rank(S),
        "stable_rank": stable_rank(S),
        **{f"rank_{percent}": rank_holding(S, percent / 100) for percent in (90, 95, 99)},
    }


def _intruders(tuned: Tensor, base: Svd) -> dict[str, Any]:
    cosines = nearest_cosines(svd(tuned).U[:, :TOP], base.U)
    return {"nearest_cosines": cosines.tolist(), "intruders": intruders(cosines, EPSILON)}


def compare_runs(subject: Subject, other: Subject) -> dict[str, dict[str, Any]]:
    """φ for each layer that both adapt (LoRA paper, equation 4), between their directions in input space.

    "phi": the right singular vectors of A, as in the paper. "phi_start": of both A before training, which
    is what the adapters had in common from the start. "phi_delta": the right singular vectors of ΔW, which
    weigh A's rows by what B makes of them. "random": what chance gives, for all three.
    """
    found = {}
    for name in subject.layers.keys() & other.layers.keys():
        mine, theirs = subject.layers[name], other.layers[name]
        phi = subspace_similarity(svd(mine.lora_A).V, svd(theirs.lora_A).V)
        deltas = [delta_svd(layer.lora_A, layer.lora_B, layer.scaling).V for layer in (mine, theirs)]
        found[name] = {
            "phi": phi.tolist(),
            "phi_start": subspace_similarity(svd(mine.start_A).V, svd(theirs.start_A).V).tolist(),
            "phi_delta": subspace_similarity(*deltas).tolist(),
            "random": expected_similarity(len(phi), len(phi[0]), mine.lora_A.shape[1]).tolist(),
        }
    return {name: found[name] for name in subject.layers if name in found}


@torch.no_grad()
def compare_full(subject: Subject, full: Subject, bases: dict[str, Svd]) -> dict[str, dict[str, Any]]:
    """Each adapted layer's ΔW beside the update that full fine-tuning made to the same weight."""
    found = {}
    for name, layer in subject.layers.items():
        tuned = full.trained.model.get_parameter(f"{name}.weight").double()
        weight = layer.weight.double()
        update = svd(tuned - weight)
        delta = delta_svd(layer.lora_A, layer.lora_B, layer.scaling)
        rank = len(delta.S)
        shape = _shape(update.S)
        found[name] = {
            "update_norm": float(update.S.norm()),
            "update_over_weight": float(update.S.norm() / weight.norm()),
            "lora_over_update": float(delta.S.norm() / update.S.norm()) if update.S.any() else None,
            **shape,
            "energy": energy(update.S).tolist(),
            "captured_by_lora": captured_energy(tuned - weight, delta.U, delta.V).tolist(),
            "captured_by_random": [k * k / weight.numel() for k in range(1, rank + 1)],
            "angles_outputs": principal_angles(delta.U, update.U[:, :rank]).tolist(),
            "angles_inputs": principal_angles(delta.V, update.V[:, :rank]).tolist(),
            **_intruders(tuned, bases[name]),
        }
    return found
