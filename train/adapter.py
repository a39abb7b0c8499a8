"""Prepares a model as a recipe describes: how its base is stored, and its adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from lora import inject
from lora.inject import derived_seed, layer_class
from lora.quantised import quantise
from model import HEAD
from train.batches import batches_by_length, collate, encode
from train.config import Recipe, RecipeError
from train.hardware import return_freed_memory
from train.layers import load_layer

START_BATCHES = 8  # of the training rows, for a start that depends on them


def quantise_base(model: nn.Module, precision: str) -> None:
    """Stores the weights of the base, not of the head, in `precision`. Raises RecipeError if it cannot be."""
    try:
        quantise(model, precision, keep=HEAD)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"base_precision: {error}") from error
    if precision != "fp32":
        return_freed_memory()  # of the float32 weights


def inject_adapter(
    model: nn.Module, recipe: Recipe, tokenizer: Any, train_split: Callable[[], Dataset]
) -> None:
    """Injects the recipe's adapter into a base model, in place.

    train_split: returns the training rows; called only if the start depends on them.

    Raises RecipeError if the settings do not fit the model.
    """
    config = recipe.lora_config()
    layer = load_layer(recipe.layer) or layer_class(config)
    try:
        if hasattr(layer, "inject_from_batches"):
            batches = _start_batches(recipe, tokenizer, train_split(), next(model.parameters()).device)
            layer.inject_from_batches(model, config, batches, recipe.seed)
        else:
            inject(model, config, seed=recipe.seed, layer=layer)
    except (TypeError, ValueError, RuntimeError) as error:  # a pattern, or a rank too large for memory
        raise RecipeError(str(error)) from error


def _start_batches(
    recipe: Recipe, tokenizer: Any, split: Dataset, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Random training rows as keyword arguments of the model; they depend on the seed alone."""
    rng = np.random.default_rng(derived_seed(recipe.seed, "start"))
    rows = rng.permutation(len(split))[: START_BATCHES * recipe.batch_size]
    encoded = encode(split.select(rows), tokenizer, recipe.max_length_tokens)
    for numbers in batches_by_length(encoded.lengths, recipe.batch_size):
        batch = collate(encoded, numbers, tokenizer.pad_token_id).to(device)
        yield {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
