"""LoRA+: plain LoRA in which B has a higher learning rate than A.

LoRA+ (Hayou et al. 2024, arXiv 2402.12354, section 4) trains LoRA's A (r, in) with the learning rate η and
B (out, r) with λ·η. For wide layers one common rate is too low for B or too high for A; the authors recommend
λ of about 16. It is a setting of the optimizer: layers, forward pass and files are those of LoRA, and it
costs nothing. Everything else that trains, such as a head, has the rate η.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def parameter_groups(
    parameters: Mapping[str, nn.Parameter],
    learning_rate: float,
    weight_decay: float = 0.0,
    loraplus_lr_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """The optimizer's groups of the trained parameters, which are given by their dotted names.

    Each lora_B has the rate loraplus_lr_ratio·learning_rate. Vectors, such as biases, have no weight decay.
    Groups with the lowest rate come first.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}  # by learning rate and weight decay
    for name, parameter in parameters.items():
        ratio = loraplus_lr_ratio if name.endswith("lora_B") else 1.0
        key = (ratio * learning_rate, weight_decay if parameter.ndim >= 2 else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [{"params": groups[key], "lr": key[0], "weight_decay": key[1]} for key in sorted(groups)]
