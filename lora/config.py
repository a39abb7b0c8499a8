"""The settings of an adapter. Field names are those of PEFT's LoraConfig and its adapter_config.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class LoraConfig:
    """Which layers to adapt and how strongly: ΔW = scaling·B·A on each Linear that `target_modules` matches.

    r: rank of ΔW, at least 1.
    lora_alpha: scaling = lora_alpha / r (arXiv 2106.09685, section 4.1). VeRA ignores it.
    lora_dropout: probability, in [0, 1), of zeroing an element of the adapter's input in training.
    target_modules: patterns. A pattern matches a module whose dotted name equals it or ends with it after
        a dot ("query", "attention.self.query"). A single string is a regular expression for whole names,
        or "all-linear": every layer that can be adapted, except the output layer of a language model.
    modules_to_save: names, matched the same way, of newly initialised modules. They are trained in full,
        saved with the adapter, and not adapted themselves.
    use_rslora: scaling = lora_alpha / sqrt(r) instead (arXiv 2312.03732, equation 3).
    rank_pattern, alpha_pattern: a different r or lora_alpha for modules whose name ends with the key, a
        regular expression as in PEFT.

    The other fields choose a variant of LoRA and its settings: lora/variants/README.md describes them.

    Raises TypeError or ValueError if a value is out of range; the message names the field.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ("query", "value")
    modules_to_save: tuple[str, ...] = ()
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_dora: bool = False
    use_lora_fa: bool = False
    init_lora_weights: bool | str = True
    peft_type: str = "LORA"
    projection_prng_key: int = 0
    d_initial: float = 0.1
    save_projection: bool = True

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen
        if not isinstance(self.target_modules, str):
            set_field(self, "target_modules", _names("target_modules", self.target_modules))
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save: a sequence of names, not the string {self.modules_to_save!r}")
        set_field(self, "modules_to_save", _names("modules_to_save", self.modules_to_save))
        set_field(self, "rank_pattern", dict(self.rank_pattern))
        set_field(self, "alpha_pattern", dict(self.alpha_pattern))

        for check in CHECKS:
            check(self)

    def for_layer(self, name: str) -> dict[str, Any]:
        """The keyword arguments of LoRALinear for the module called `name`."""
        return {
            "r": _first_match(self.rank_pattern, name, self.r),
            "lora_alpha": _first_match(self.alpha_pattern, name, self.lora_alpha),
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
        }


CHECKS: list[Callable[[LoraConfig], None]] = []  # raise if a value is out of range (lora/validation.py)


def _names(field_name: str, names: Any) -> tuple[str, ...]:
    found: tuple[str, ...] = tuple(names)
    for name in found:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{field_name}: {name!r} is not a module name")
    return found


def matches_end(pattern: str, name: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern is for the module `name`."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _first_match(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    return next((value for pattern, value in patterns.items() if matches_end(pattern, name)), default)
