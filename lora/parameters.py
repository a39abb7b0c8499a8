"""Counts a model's parameters by role."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lora.adapted import has_adapter, lora_config, lora_layers
from lora.modules import modules_named


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters by role: lora + head + base + frozen = total. Each Parameter counts once.

    lora: trained parameters of the adapters. head: trained parameters of newly initialised modules.
    base: pretrained parameters that train, 0 with LoRA. frozen: parameters that do not train.
    """

    lora: int
    head: int
    base: int
    frozen: int

    @property
    def trainable(self) -> int:
        return self.lora + self.head + self.base

    @property
    def total(self) -> int:
        return self.trainable + self.frozen

    def __str__(self) -> str:
        rows = [("LoRA", self.lora), ("head", self.head), ("base", self.base)]
        rows = [row for row in rows if row[1] or row[0] != "base"]
        rows += [("trainable", self.trainable), ("frozen", self.frozen), ("total", self.total)]
        return "\n".join(
            f"{role:<10}{count:>13,}  {count / max(self.total, 1):>8.3%}" for role, count in rows
        )


def count_parameters(model: nn.Module, head: Sequence[str] = ()) -> ParameterCount:
    """Counts the model's parameters by role.

    head: names of the newly initialised modules, matched as modules_to_save is. For a model with an
    adapter the default is its config's modules_to_save.
    """
    lora: set[Tensor] = set()
    if has_adapter(model):
        for layer in lora_layers(model).values():
            lora |= {tensor for key, tensor in layer.adapter_state().items() if key in layer.trained_tensors}
        head = head or lora_config(model).modules_to_save
    heads = {p for name in head for _, module in modules_named(model, name) for p in module.parameters()}
    counts = dict.fromkeys(("lora", "head", "base", "frozen"), 0)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            role = "frozen"
        elif parameter in lora:
            role = "lora"
        else:
            role = "head" if parameter in heads else "base"
        counts[role] += parameter.numel()
    return ParameterCount(**counts)
