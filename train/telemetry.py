"""What an adapter does while it trains: a few numbers a layer, on logged steps, from thin matrices alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora.anatomy import effective_rank, singular_values_from_grams
from lora.tree import lora_layers
from train.hardware import one_thread


class Telemetry:
    """Watches the adapted layers of a model, in the order of `lora_layers`; it changes nothing.

    Nothing of the size of W is touched after the start, and a line makes the CPU wait for the device
    once. Gradients are to be noted after float16's unscaling and before clipping: then they are the
    gradients of the step's mean loss, over all of its rows and all processes.
    """

    def __init__(self, model: nn.Module):
        self.layers = list(lora_layers(model).values())
        self._weight_norms = [float(layer.base_weight.double().norm()) for layer in self.layers]
        self._gradients = torch.zeros(2 * len(self.layers))

    @torch.no_grad()
    def note_gradients(self) -> None:
        """Keeps the norms of A's and B's gradients as they are now. Does not wait for the device."""
        thin = [p for layer in self.layers for p in (layer.lora_A, layer.lora_B)]
        self._gradients = torch.stack(
            [torch.zeros_like(p[0, 0]) if p.grad is None else p.grad.norm() for p in thin]
        )

    @torch.no_grad()
    def line(self) -> dict[str, list[float]]:
        """A value a layer of: ‖ΔW‖/‖W‖, ΔW's effective rank, ‖∂L/∂A‖ and ‖∂L/∂B‖. Waits for the device.

        ΔW is the one after the step, the gradients are those that the step was made of. A's are zero until
        B has moved: in the first step, and under a warm-up, which starts from a rate of 0, in the second.
        Nothing of a step whose numbers are not all finite, as float16's scaler finds some.
        """
        parts = [self._gradients.double()]
        for layer in self.layers:
            A, B = layer.lora_A.double(), layer.lora_B.double()
            parts += [(A @ A.T).flatten(), (B.T @ B).flatten()]
        values = torch.cat(parts).cpu()  # one wait for all of them
        if not values.isfinite().all():
            return {}
        gradients, rest = values[: 2 * len(self.layers)], values[2 * len(self.layers) :]
        sizes, ranks = [], []
        with one_thread():
            for layer, weight_norm in zip(self.layers, self._weight_norms, strict=True):
                grams, rest = rest[: 2 * layer.r**2].view(2, layer.r, layer.r), rest[2 * layer.r**2 :]
                singular_values = layer.scaling * singular_values_from_grams(grams[0], grams[1])
                sizes.append(float(singular_values.norm()) / weight_norm)
                ranks.append(effective_rank(singular_values))
        return {
            "delta_over_weight": sizes,
            "effective_rank": ranks,
            "gradient_norm_A": _floats(gradients[0::2]),
            "gradient_norm_B": _floats(gradients[1::2]),
        }


def watched_lines(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a log that have these numbers."""
    return [line for line in lines if "delta_over_weight" in line]


def _floats(values: Tensor) -> list[float]:
    return [float(value) for value in values]
