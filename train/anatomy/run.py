"""Loads the runs to analyse, checks that they can be compared, and takes their adapters as plain tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor

from lora import eject, load_adapter
from lora.adapted import product_layers
from train.adapter import inject_adapter
from train.config import Recipe
from train.data import load_news
from train.layers import load_layer
from train.runs import ADAPTER, RunError, check_finished, read_summary, run_recipe
from train.trained import Trained, load_trained


@dataclass(frozen=True)
class AdaptedLayer:
    """One layer's adapter on the CPU: lora_A (r, in), lora_B (out, r), and lora_A before training.

    ΔW = scaling·lora_B·lora_A: for a variant of LoRA these are its `factors()`. weight (out, in): the
    pretrained W.
    """

    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815
    scaling: float
    start_A: Tensor  # noqa: N815
    weight: Tensor


@dataclass(frozen=True)
class Run:
    """A finished run and its trained model. `layers` is by name, and empty if the method is not LoRA."""

    folder: Path
    recipe: Recipe
    summary: dict[str, Any]
    trained: Trained
    layers: dict[str, AdaptedLayer]

    @property
    def name(self) -> str:
        """The folder's name, by which the page refers to the run."""
        return self.folder.resolve().name


@dataclass(frozen=True)
class Position:
    """A layer's position in the encoder: the index of its block, -1 if it has none, and its projection."""

    block: int
    projection: str


def load_run(folder: Path, method: str = "lora") -> Run:
    """Loads a finished run of that method. Raises RunError, and what loading raises."""
    check_finished(folder)
    recipe = run_recipe(folder).with_absolute_paths()
    if recipe.method != method:
        instead = {
            "lora": "only a LoRA run has an adapter to analyse; use --full for a full fine-tuning run",
            "full": "--full takes a run with method=full",
        }[method]
        raise RunError(f"{folder}: its method is {recipe.method}; {instead}")
    trained = load_trained(folder)
    return Run(folder, recipe, read_summary(folder), trained, _layers(folder, recipe, trained))


def check_same_start(run: Run, other: Run, flag: str) -> None:
    """Raises RunError unless both runs started from one base model and trained on one dataset.

    flag: the flag that named `other`, for the message.
    """
    if other.folder.resolve() == run.folder.resolve():
        raise RunError(f"{flag} {other.folder}: this is the run itself")
    weights = ("seed",) if run.recipe.model.startswith("random:") else ()
    for field in ("model", "data", "base_precision", *weights):
        ours, theirs = getattr(run.recipe, field), getattr(other.recipe, field)
        if ours != theirs:
            raise RunError(
                f"{flag} {other.folder}: its {field} is {theirs} and that of {run.folder} is {ours}; "
                "only runs from the same start can be compared"
            )
    if run.trained.labels != other.trained.labels:
        raise RunError(f"{flag} {other.folder}: its classes are {', '.join(other.trained.labels)}")
    for name, layer in run.layers.items():
        weight = other.trained.model.get_parameter(f"{name}.weight")
        if weight.shape != layer.weight.shape:
            shape, expected = tuple(weight.shape), tuple(layer.weight.shape)
            raise RunError(f"{flag} {other.folder}: {name} is {shape} there and {expected} in {run.folder}")


def position(name: str) -> Position:
    """The position of a layer: `roberta.encoder.layer.3.attention.self.query` is "query" of block 3."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    block, rest = (int(match[1]), match[2]) if match else (-1, name)
    short = rest.removeprefix("attention.self.").removesuffix(".dense").replace(".", " ")
    return Position(block, short)


def middle_layers(names: Iterable[str]) -> list[str]:
    """The layers of the middle block, the example that figures and tables show."""
    names = list(names)
    blocks = sorted({position(name).block for name in names})
    middle = blocks[(len(blocks) - 1) // 2]
    return [name for name in names if position(name).block == middle]


def short_name(name: str) -> str:
    """A layer's name for a table: "3 query"."""
    at = position(name)
    return f"{at.block} {at.projection}" if at.block >= 0 else at.projection


def _layers(folder: Path, recipe: Recipe, trained: Trained) -> dict[str, AdaptedLayer]:
    if recipe.method != "lora":
        return {}
    model = trained.model
    try:
        product_layers(model)
    except RuntimeError as error:
        raise RunError(f"{folder}: {error}, so it has no low rank to analyse") from error
    # A start depends on the recipe, the weights and the data alone, so a fresh adapter has the initial A.
    eject(model)
    inject_adapter(model, recipe, trained.tokenizer, partial(_train_split, recipe))
    starts = {name: layer.factors()[0].detach().clone() for name, layer in product_layers(model).items()}
    eject(model)
    load_adapter(model, folder / ADAPTER, layer=load_layer(recipe.layer))
    factors = {name: layer.factors() for name, layer in product_layers(model).items()}
    return {
        name: AdaptedLayer(
            factors[name][0].detach().clone(),
            factors[name][1].detach().clone(),
            layer.scaling,
            starts[name],
            layer.weight.detach(),
        )
        for name, layer in product_layers(model).items()
    }


def _train_split(recipe: Recipe) -> Dataset:
    return load_news(recipe.data, recipe.validation_fraction, recipe.seed, recipe.max_train_examples).train
