"""The cost of an adapter in inference: the base model, with the adapter unmerged, and merged."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import plotting
from bench.steps import (
    CLASSES,
    CONFIG,
    in_turn,
    milliseconds,
    random_batch,
    randomise,
    ratio,
    time_in_turn,
    time_once,
)
from bench.tables import prose, spread, timing
from lora import eject, inject, load_adapter, merge, save_adapter, unmerge
from lora.adapted import product_layers
from model import load_base, speed_up
from train.hardware import autocast, resolve_device, resolve_precision
from train.tables import markdown, quantity

STATES = {"base": "base model", "unmerged": "adapter unmerged", "merged": "adapter merged"}
OPERATIONS = {
    "merge": "merge",
    "unmerge": "unmerge",
    "load": "load: check the files and the base, inject",
    "swap": "swap: eject, load another, speed up",
}
LENGTH = 56


def run(quick: bool) -> dict[str, Any]:
    """The times of a forward pass by state and batch, and of each operation on an adapter."""
    device = resolve_device("auto")
    precision = resolve_precision("auto", device)
    model_name = "random:minilm" if quick else "minilm"
    rounds = 3 if quick else 41
    models = {
        "base": _base(model_name, device),
        "unmerged": _adapted(model_name, device, seed=0),
        "merged": _adapted(model_name, device, seed=0),
    }
    merge(models["merged"])
    for model in models.values():
        speed_up(model, precision)
    batches = []
    for rows in (1, 4) if quick else (1, 32):
        print(f"inference: {model_name} {rows}x{LENGTH} {precision}", file=sys.stderr)
        tasks = {state: _forward(model, rows, device, precision) for state, model in models.items()}
        seconds = time_in_turn(tasks, rounds, device)
        batches.append(
            {
                "rows": rows,
                "milliseconds": {state: milliseconds(each) for state, each in seconds.items()},
            }
        )
    print(f"inference: {model_name}, merging, loading and swapping", file=sys.stderr)
    operation_rounds = 3 if quick else 15
    operations = _time_operations(model_name, device, precision, operation_rounds)
    return {
        "seed": 0, "precision": precision, "rounds": rounds, "model": model_name, "length": LENGTH,
        "batches": batches, "operation_rounds": operation_rounds, "operation_milliseconds": operations,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """One row per state, then one row per operation."""

    def cell(batch: dict[str, Any], state: str) -> str:
        time, base = batch["milliseconds"][state], batch["milliseconds"]["base"]
        return f"{timing(time)}, {ratio(time, base):.2f}"

    heads = [f"{batch['rows']} x {result['length']} tokens, ms" for batch in result["batches"]]
    states = [
        [words, *(cell(batch, state) for batch in result["batches"])] for state, words in STATES.items()
    ]
    times = result["operation_milliseconds"]
    operations = [
        [words, quantity(times[key]["median"]), spread(times[key])] for key, words in OPERATIONS.items()
    ]
    return "\n\n".join(
        [
            prose(
                f"{result['model']}, r = 8 on query and value; {result['precision']}; {result['device']}."
                f" Medians of {result['rounds']} interleaved rounds, quartiles in brackets, and the ratio to"
                f" the base model. Operations on the whole model: {result['operation_rounds']} rounds."
            ),
            markdown([["forward", *heads], *states]),
            markdown([["operation on the whole model", "ms", "quartiles"], *operations]),
        ]
    )


def figures(result: dict[str, Any], folder: Path) -> None:
    """inference.png: one bar per state for each batch, with its quartiles."""
    figure, axes = plotting.panels(1, len(result["batches"]), 3.8, 2.8)
    for batch, axis in zip(result["batches"], axes[0], strict=True):
        times = [batch["milliseconds"][state] for state in STATES]
        middle = [time["median"] for time in times]
        spread = [
            [time["median"] - time["low"] for time in times],
            [time["high"] - time["median"] for time in times],
        ]
        colors = (plotting.GREY, plotting.ORANGE, plotting.BLUE)
        axis.bar(range(len(times)), middle, yerr=spread, width=0.55, color=colors, capsize=4)
        axis.set_xticks(range(len(times)), STATES.values(), fontsize=8)
        axis.set(ylabel="ms per forward pass", title=f"{batch['rows']} x {result['length']} tokens")
    plotting.save(figure, folder / "inference.png")


def _base(model_name: str, device: torch.device) -> Any:
    # Frozen as under an adapter, so that speed_up keeps 16-bit copies of its weights too.
    return load_base(model_name, num_labels=CLASSES)[0].to(device).requires_grad_(False)


def _adapted(model_name: str, device: torch.device, seed: int) -> Any:
    """With a random adapter of the size that training reaches."""
    model = _base(model_name, device)
    inject(model, CONFIG, seed)
    randomise({name: layer.lora_B for name, layer in product_layers(model).items()}, seed)
    return model.eval()


def _forward(model: Any, rows: int, device: torch.device, precision: str) -> Callable[[], object]:
    input_ids, _ = random_batch(rows, LENGTH, device)

    def forward() -> object:
        with torch.inference_mode(), autocast(device, precision):
            return model(input_ids=input_ids).logits

    return forward


def _time_operations(model_name: str, device: torch.device, precision: str, rounds: int) -> dict[str, Any]:
    """Times operations on whole models in memory: loading into a base model, swapping an adapter."""
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder, name) for name in ("first", "second")]
        for seed, path in enumerate(folders):
            save_adapter(_adapted(model_name, device, seed), path, base=model_name)
        bare, served = _base(model_name, device), _base(model_name, device)
        load_adapter(served, folders[0])

        def load() -> float:
            seconds = time_once(lambda: load_adapter(bare, folders[0]), device)
            eject(bare)
            return seconds

        def swap() -> None:
            folders.reverse()
            eject(served)
            load_adapter(served, folders[0])
            speed_up(served, precision)

        model = _adapted(model_name, device, seed=0)
        seconds = in_turn(
            {
                "merge": lambda: time_once(lambda: merge(model), device),
                "unmerge": lambda: time_once(lambda: unmerge(model), device),
                "load": load,
                "swap": lambda: time_once(swap, device),
            },
            rounds,
        )
    return {act: milliseconds(each) for act, each in seconds.items()}
