"""The measurements that need only matrices: an adapter's tensors and the base weights, and no data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

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
from train.anatomy.run import AdaptedLayer, Run

TOP = 10  # the paper's k: how many singular vectors of a tuned matrix are checked for intruder dimensions
EPSILON = 0.5  # a singular vector whose nearest cosine is below it is an intruder dimension


def measure(run: Run, bases: dict[str, Svd]) -> dict[str, dict[str, Any]]:
    """Size, spectrum, amplification and intruder dimensions of ΔW in each adapted layer.

    bases: the result of `decompose_bases`.
    """
    layers = tqdm(run.layers.items(), "measuring weights", disable=None, leave=False)
    return {name: _measure_layer(layer, bases[name]) for name, layer in layers}


def decompose_bases(run: Run) -> dict[str, Svd]:
    """The SVD of the pretrained weight of each adapted layer. It is slow, so it is computed once."""
    layers = tqdm(run.layers.items(), "decomposing weights", disable=None, leave=False)
    return {name: svd(layer.weight) for name, layer in layers}


def _measure_layer(layer: AdaptedLayer, base: Svd) -> dict[str, Any]:
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
        **_spectrum(delta.S),
        **_intruders(weight + delta.truncated(len(delta.S)), base),
    }


def measure_amplification(run: Run, bases: dict[str, Svd]) -> dict[str, dict[str, float]]:
    """For each adapted layer, the rows of the LoRA paper's table 7."""
    return {
        name: _amplification(
            delta_svd(layer.lora_A, layer.lora_B, layer.scaling), layer.weight.double(), bases[name]
        )
        for name, layer in run.layers.items()
    }


def _amplification(delta: Svd, weight: Tensor, base: Svd) -> dict[str, float]:
    rank = len(delta.S)
    weight_norm = float(weight.norm())
    return {
        "delta_norm": float(delta.S.norm()),
        "weight_norm": weight_norm,
        "projected_on_delta": projected_norm(weight, delta.U, delta.V),
        "projected_on_weight": float(base.S[:rank].norm()),  # for W's own U and V, Uᵀ·W·V = diag(S)
        "projected_on_random": expected_projected_norm(weight_norm, (weight.shape[0], weight.shape[1]), rank),
        "amplification": amplification(delta, weight),
    }


def _spectrum(S: Tensor) -> dict[str, Any]:
    return {
        "singular_values": S.tolist(),
        "effective_rank": effective_rank(S),
        "stable_rank": stable_rank(S),
        **{f"rank_{percent}": rank_holding(S, percent / 100) for percent in (90, 95, 99)},
    }


def _intruders(tuned: Tensor, base: Svd) -> dict[str, Any]:
    cosines = nearest_cosines(svd(tuned).U[:, :TOP], base.U)
    return {"nearest_cosines": cosines.tolist(), "intruders": intruders(cosines, EPSILON)}


def compare_runs(run: Run, other: Run) -> dict[str, dict[str, Any]]:
    """For each layer that both runs adapt, φ between their input directions (LoRA paper, equation 4).

    "phi": between the right singular vectors of A, as in the paper. "phi_start": the same before training.
    "phi_delta": between the right singular vectors of ΔW, in which B weights the rows of A. "random": the
    mean over random directions, the baseline of all three.
    """
    found = {}
    for name, ours in run.layers.items():
        if name not in other.layers:
            continue
        theirs = other.layers[name]
        phi = subspace_similarity(svd(ours.lora_A).V, svd(theirs.lora_A).V)
        deltas = [delta_svd(layer.lora_A, layer.lora_B, layer.scaling).V for layer in (ours, theirs)]
        found[name] = {
            "phi": phi.tolist(),
            "phi_start": subspace_similarity(svd(ours.start_A).V, svd(theirs.start_A).V).tolist(),
            "phi_delta": subspace_similarity(*deltas).tolist(),
            "random": expected_similarity(len(phi), len(phi[0]), ours.lora_A.shape[1]).tolist(),
        }
    return found


@torch.no_grad()
def compare_full(run: Run, full: Run, bases: dict[str, Svd]) -> dict[str, dict[str, Any]]:
    """For each adapted layer, ΔW compared with the update that full fine-tuning made to the same weight."""
    found = {}
    for name, layer in tqdm(run.layers.items(), f"comparing with {full.name}", disable=None, leave=False):
        tuned = full.trained.model.get_parameter(f"{name}.weight").double()
        weight = layer.weight.double()
        update = svd(tuned - weight)
        delta = delta_svd(layer.lora_A, layer.lora_B, layer.scaling)
        rank = len(delta.S)
        found[name] = {
            "update_norm": float(update.S.norm()),
            "update_over_weight": float(update.S.norm() / weight.norm()),
            "lora_over_update": float(delta.S.norm() / update.S.norm()) if update.S.any() else None,
            **_spectrum(update.S),
            "energy": energy(update.S).tolist(),
            "captured_by_lora": captured_energy(tuned - weight, delta.U, delta.V).tolist(),
            "captured_by_random": [k * k / weight.numel() for k in range(1, rank + 1)],
            "angles_outputs": principal_angles(delta.U, update.U[:, :rank]).tolist(),
            "angles_inputs": principal_angles(delta.V, update.V[:, :rank]).tolist(),
            **_intruders(tuned, bases[name]),
        }
    return found
