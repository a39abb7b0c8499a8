"""The runs to look at: loaded, checked to belong together, and their adapters as plain tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora import eject, inject, load_adapter
from lora.tree import lora_layers
from train.config import Recipe
from train.runs import ADAPTER, SUMMARY, RunError, Trained, load_trained, run_recipe


@dataclass(frozen=True)
class Adapted:
    """One layer's adapter, on the CPU: lora_A (r, in), lora_B (out, r), and what lora_A started from.

    weight (out, in): the pretrained W underneath.
    """

    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815
    scaling: float
    start_A: Tensor  # noqa: N815
    weight: Tensor


@dataclass(frozen=True)
class Subject:
    """A finished run with what it trained; `layers` by name, empty if the run is not LoRA."""

    folder: Path
    recipe: Recipe
    summary: dict[str, Any]
    trained: Trained
    layers: dict[str, Adapted]

    @property
    def name(self) -> str:
        """The folder's name: what the page calls the run."""
        return self.folder.resolve().name


@dataclass(frozen=True)
class Place:
    """Where a layer stands: the number of its block, or -1 outside of any, and which projection it is."""

    block: int
    projection: str


def load_subject(folder: Path, method: str = "lora") -> Subject:
    """A finished run of that method. Raises RunError, and what loading raises."""
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no such folder")
    recipe = run_recipe(folder)
    if not (folder / SUMMARY).is_file():
        raise RunError(
            f"{folder}: the run is not finished; `python -m train --resume --output {folder}` goes on"
        )
    if recipe.method != method:
        instead = {
            "lora": "only a LoRA run has an adapter to look at; a full one goes with --full",
            "full": "--full takes a run with method=full",
        }[method]
        raise RunError(f"{folder}: its method is {recipe.method}; {instead}")
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{folder / SUMMARY}: damaged: {error}") from error
    trained = load_trained(folder)
    return Subject(folder, recipe, summary, trained, _layers(folder, recipe, trained))


def check_same_start(subject: Subject, other: Subject, flag: str) -> None:
    """Raises RunError unless both runs set out from one base model on one data set."""
    if other.folder.resolve() == subject.folder.resolve():
        raise RunError(f"{flag} {other.folder}: that is the run itself")
    for field in ("model", "data"):
        mine, theirs = getattr(subject.recipe, field), getattr(other.recipe, field)
        if mine != theirs:
            raise RunError(
                f"{flag} {other.folder}: its {field} is {theirs} and that of {subject.folder} is {mine}; "
                "only runs from the same start can be compared"
            )
    if subject.trained.labels != other.trained.labels:
        raise RunError(f"{flag} {other.folder}: its classes are {', '.join(other.trained.labels)}")
    for name, layer in subject.layers.items():
        weight = other.trained.model.get_parameter(f"{name}.weight")
        if weight.shape != layer.weight.shape:
            shape, wanted = tuple(weight.shape), tuple(layer.weight.shape)
            raise RunError(f"{flag} {other.folder}: {name} is {shape} there and {wanted} in {subject.folder}")


def place(name: str) -> Place:
    """`roberta.encoder.layer.3.attention.self.query` is "query" of block 3."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    block, rest = (int(match[1]), match[2]) if match else (-1, name)
    short = rest.removeprefix("attention.self.").removesuffix(".dense").replace(".", " ")
    return Place(block, short)


def middle_layers(names: Iterable[str]) -> list[str]:
    """Those of the block in the middle, which stands for all of them in a figure."""
    names = list(names)
    blocks = sorted({place(name).block for name in names})
    middle = blocks[(len(blocks) - 1) // 2]
    return [name for name in names if place(name).block == middle]


def short_name(name: str) -> str:
    """A layer's name for a table: "3 query"."""
    where = place(name)
    return f"{where.block} {where.projection}" if where.block >= 0 else where.projection


def _layers(folder: Path, recipe: Recipe, trained: Trained) -> dict[str, Adapted]:
    if recipe.method != "lora":
        return {}
    model = trained.model
    # A fresh adapter of the same seed shows where lora_A started: it is drawn from seed and name alone.
    eject(model)
    inject(model, recipe.lora_config(), seed=recipe.seed)
    starts = {name: layer.lora_A.detach().clone() for name, layer in lora_layers(model).items()}
    eject(model)
    load_adapter(model, folder / ADAPTER)
    return {
        name: Adapted(
            layer.lora_A.detach().clone(),
            layer.lora_B.detach().clone(),
            layer.scaling,
            starts[name],
            layer.weight.detach(),
        )
        for name, layer in lora_layers(model).items()
    }
