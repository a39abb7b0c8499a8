"""Who trains: the parameters of a model by role, counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lora.frozen import FrozenLinear
from lora.tree import has_adapter, lora_config, lora_layers, modules_named


@dataclass(frozen=True)
class Ledger:
    """Numbers of parameters by role. lora + head + base + frozen = total; each Parameter counts once.

    lora: lora_A and lora_B. head: what trains of the freshly initialised parts. base: what trains of the
    pretrained weights, none of them under LoRA. frozen: what does not train. copy_bytes: memory taken by
    frozen weights' copies in the compute dtype, which are no parameters (lora/frozen.py).
    """

    lora: int
    head: int
    base: int
    frozen: int
    copy_bytes: int = 0

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
        lines = [f"{role:<10}{count:>13,}  {count / max(self.total, 1):>8.3%}" for role, count in rows]
        if self.copy_bytes:
            lines.append(f"copies of frozen weights in the compute dtype: {self.copy_bytes / 2**20:,.1f} MiB")
        return "\n".join(lines)


def count_parameters(model: nn.Module, head: Sequence[str] = ()) -> Ledger:
    """Counts the model's parameters by role.

    `head` names the freshly initialised parts, as modules_to_save does; where the model has an adapter
    they are known and need not be given.
    """
    lora: set[nn.Parameter] = set()
    if has_adapter(model):
        lora = {p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)}
        head = head or lora_config(model).modules_to_save
    heads = {p for name in head for _, module in modules_named(model, name) for p in module.parameters()}
    counts = dict.fromkeys(("lora", "head", "base", "frozen"), 0)
    for parameter in model.parameters():
        if parameter in lora:
            role = "lora"
        elif not parameter.requires_grad:
            role = "frozen"
        else:
            role = "head" if parameter in heads else "base"
        counts[role] += parameter.numel()
    copy_bytes = sum(module.copy_bytes() for module in model.modules() if isinstance(module, FrozenLinear))
    return Ledger(**counts, copy_bytes=copy_bytes)


def train_only(model: nn.Module, names: Sequence[str]) -> None:
    """Freezes every parameter but those of the modules whose dotted names end with one of `names`."""
    model.requires_grad_(False)
    for name in names:
        for _, module in modules_named(model, name):
            module.requires_grad_(True)
