"""The settings of an adapter. Field names and defaults are PEFT's, so this is the adapter's config file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class LoraConfig:
    """What to adapt and how strongly: ΔW = scaling·B·A on every Linear that `target_modules` matches.

    r: rank of ΔW, at least 1.
    lora_alpha: scaling = lora_alpha / r (arXiv 2106.09685, section 4.1).
    lora_dropout: probability, in [0, 1), with which an input element of the adapter is dropped.
    target_modules: patterns. Each matches a module whose dotted name ends with it at a dot ("query",
        "attention.self.query") or equals it. One string is a regular expression for whole names.
    modules_to_save: names, matched the same way, of freshly initialised parts. They are trained whole,
        saved with the adapter, and never get a LoRA of their own.
    use_rslora: scaling = lora_alpha / sqrt(r) instead (arXiv 2312.03732, equation 3).
    rank_pattern, alpha_pattern: another r or lora_alpha for modules whose name ends with the key
        (a regular expression, as in PEFT).

    Raises ValueError or TypeError on a value outside its range; the message names the field.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ("query", "value")
    modules_to_save: tuple[str, ...] = ()
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen; this is its constructor
        if not isinstance(self.target_modules, str):
            set_field(self, "target_modules", _names("target_modules", self.target_modules))
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save: a sequence of names, not the string {self.modules_to_save!r}")
        set_field(self, "modules_to_save", _names("modules_to_save", self.modules_to_save))
        set_field(self, "rank_pattern", dict(self.rank_pattern))
        set_field(self, "alpha_pattern", dict(self.alpha_pattern))

        check_rank("r", self.r)
        check_alpha("lora_alpha", self.lora_alpha)
        check_dropout("lora_dropout", self.lora_dropout)
        if not self.target_modules:
            raise ValueError("target_modules: empty, so there is nothing to adapt")
        if not isinstance(self.use_rslora, bool):
            raise TypeError(f"use_rslora: {self.use_rslora!r} is not true or false")
        for pattern, rank in self.rank_pattern.items():
            check_rank(f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in self.alpha_pattern.items():
            check_alpha(f"alpha_pattern[{pattern!r}]", alpha)
        expressions = [("rank_pattern", pattern) for pattern in self.rank_pattern]
        expressions += [("alpha_pattern", pattern) for pattern in self.alpha_pattern]
        if isinstance(self.target_modules, str):
            expressions.append(("target_modules", self.target_modules))
        for name, expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{name}: {expression!r} is not a regular expression: {error}") from error

    def rank(self, name: str) -> int:
        """The rank for the module called `name`."""
        return _first_match(self.rank_pattern, name, self.r)

    def alpha(self, name: str) -> float:
        """The lora_alpha for the module called `name`."""
        return _first_match(self.alpha_pattern, name, self.lora_alpha)


def check_rank(field_name: str, r: int) -> None:
    """Raises TypeError or ValueError unless `r` is a whole number of at least 1."""
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"{field_name}: a rank is a whole number, not {r!r}")
    if r < 1:
        raise ValueError(f"{field_name}: a rank is at least 1, not {r}")


def check_alpha(field_name: str, alpha: float) -> None:
    """Raises TypeError or ValueError unless `alpha` is a finite positive number."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise TypeError(f"{field_name}: alpha is a number, not {alpha!r}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"{field_name}: alpha is a finite number above 0, not {alpha}")


def check_dropout(field_name: str, p: float) -> None:
    """Raises TypeError or ValueError unless `p` is a probability below 1."""
    if isinstance(p, bool) or not isinstance(p, int | float):
        raise TypeError(f"{field_name}: a dropout is a number, not {p!r}")
    if not 0 <= p < 1:
        raise ValueError(f"{field_name}: a dropout is at least 0 and below 1, not {p}")


def _names(field_name: str, names: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(names)
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{field_name}: {name!r} is not a module name")
    return names


def _first_match(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
