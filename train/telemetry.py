"""Measures an adapter while it trains: a few numbers per layer, from the thin matrices alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lora.adapted import has_low_rank, lora_layers
from lora.anatomy import effective_rank, singular_values_from_grams
from train.hardware import one_thread


class Telemetry:
    """Measures the adapted layers of a model, in the order of `lora_layers`. It changes nothing.

    After construction, no tensor of the size of W is computed. `line` synchronises with the device once. Call
    `note_gradients` after float16's unscaling and before clipping: the gradients are then those of the
    step's mean loss over all rows and all processes.
    """

    def __init__(self, model: nn.Module):
        self.layers = list(lora_layers(model).values())
        self.trained = list(dict.fromkeys(key for layer in self.layers for key in layer.trained_tensors))
        self._weight_norms = [float(layer.base_weight.double().norm()) for layer in self.layers]
        self._gradients = torch.zeros(len(self.trained) * len(self.layers))

    @torch.no_grad()
    def note_gradients(self) -> None:
        """Keeps the gradient norms of the trained tensors. Does not wait for the device."""
        tensors = [layer.adapter_state()[key] for layer in self.layers for key in self.trained]
        self._gradients = torch.stack(
            [tensor.new_zeros(()) if tensor.grad is None else tensor.grad.norm() for tensor in tensors]
        )

    @torch.no_grad()
    def line(self) -> dict[str, list[float]]:
        """One value per layer of ‖ΔW‖/‖W‖, the effective rank of ΔW, and the gradient norm of A and of B.

        ΔW is measured after the step. The gradients are those of the step. If B starts at zero, the gradient
        of A is zero until B has changed: in the first step and, because a warm-up starts at rate 0, in the
        second. A variant of LoRA has the gradient norm of each tensor that it trains, and ΔW only if its ΔW
        is scaling·B·A.

        Empty if a value is not finite, as in a step that float16's scaler skips. Waits for the device.
        """
        products = [layer for layer in self.layers if has_low_rank(layer)]
        plain = len(products) == len(self.layers)
        parts = [self._gradients.double()]
        for layer in products if plain else ():
            A, B = (factor.double() for factor in layer.factors())
            parts += [(A @ A.T).flatten(), (B.T @ B).flatten()]
        values = torch.cat(parts).cpu()  # the only wait for the device
        if not values.isfinite().all():
            return {}
        gradients, rest = values[: len(self._gradients)], values[len(self._gradients) :]
        found: dict[str, list[float]] = {}
        if plain:
            found = {"delta_over_weight": [], "effective_rank": []}
            with one_thread():
                for layer, weight_norm in zip(products, self._weight_norms, strict=True):
                    rank = len(layer.factors()[0])
                    grams, rest = rest[: 2 * rank**2].view(2, rank, rank), rest[2 * rank**2 :]
                    singular_values = layer.scaling * singular_values_from_grams(grams[0], grams[1])
                    found["delta_over_weight"].append(float(singular_values.norm()) / weight_norm)
                    found["effective_rank"].append(effective_rank(singular_values))
        for at, key in enumerate(self.trained):
            found[f"gradient_norm_{key.removeprefix('lora_')}"] = gradients[at :: len(self.trained)].tolist()
        return found


def watched_lines(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a log that have the numbers of ΔW."""
    return [line for line in lines if "delta_over_weight" in line]
