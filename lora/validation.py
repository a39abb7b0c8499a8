"""Checks of LoraConfig, which calls them when it is constructed."""

from __future__ import annotations

import re
import reprlib
from typing import Any

from lora.config import CHECKS, LoraConfig


def check_config(config: LoraConfig) -> None:
    """Raises TypeError or ValueError if a value is out of range; the message names the field."""
    check_rank("r", config.r)
    check_alpha("lora_alpha", config.lora_alpha)
    check_dropout("lora_dropout", config.lora_dropout)
    if not config.target_modules:
        raise ValueError("target_modules: empty, so there is nothing to adapt")
    if not isinstance(config.use_rslora, bool):
        raise TypeError(f"use_rslora: {config.use_rslora!r} is not true or false")
    if isinstance(config.target_modules, str):
        _check_regex("target_modules", config.target_modules)
    for pattern, rank in config.rank_pattern.items():
        _check_regex("rank_pattern", pattern)
        check_rank(f"rank_pattern[{pattern!r}]", rank)
    for pattern, alpha in config.alpha_pattern.items():
        _check_regex("alpha_pattern", pattern)
        check_alpha(f"alpha_pattern[{pattern!r}]", alpha)


def check_rank(field_name: str, r: Any) -> None:
    """Raises TypeError or ValueError unless `r` is an integer of at least 1 and below 2³¹."""
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"{field_name}: a rank is an integer, not {r!r}")
    if not 1 <= r < 2**31:
        raise ValueError(f"{field_name}: a rank is at least 1 and below 2³¹, not {reprlib.repr(r)}")


def check_alpha(field_name: str, alpha: Any) -> None:
    """Raises TypeError or ValueError unless `alpha` is a finite positive number."""
    if not 0 < check_number(field_name, alpha) < 3.4e38:
        shown = reprlib.repr(alpha)
        raise ValueError(f"{field_name}: alpha is a number above 0 and within float32, not {shown}")


def check_dropout(field_name: str, p: Any) -> None:
    """Raises TypeError or ValueError unless `p` is a probability below 1."""
    if not 0 <= check_number(field_name, p) < 1:
        shown = reprlib.repr(p)
        raise ValueError(f"{field_name}: a dropout probability is at least 0 and below 1, not {shown}")


def check_number(field_name: str, value: Any) -> Any:
    """The value. Raises TypeError unless it is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{field_name}: {value!r} is not a number")
    return value


def _check_regex(field_name: str, pattern: str) -> None:
    try:
        re.compile(rf"(.*\.)?({pattern})$" if field_name.endswith("_pattern") else pattern)  # as it is used
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{field_name}: {pattern!r} is not a regular expression: {error}") from error


CHECKS.append(check_config)
