"""The cost of a step by rank, batch and length, and where LoRA is no longer faster."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench import plotting
from bench.steps import (
    ALL_LINEAR,
    CONFIG,
    QUERY_VALUE,
    BenchModel,
    held_bytes,
    in_turn,
    make_model,
    memory_bytes,
    milliseconds,
    random_batch,
    ratio,
)
from bench.tables import prose
from lora import count_parameters
from model import HEAD
from train.hardware import resolve_device, resolve_precision
from train.tables import markdown, mebibytes, quantity

TARGETS = {"query, value": QUERY_VALUE, "all linear": ALL_LINEAR}


@dataclass(frozen=True)
class Range:
    """The values that vary. Batches have 56 tokens per row, lengths 4 rows, ranks `shape`."""

    ranks: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
    batches: tuple[tuple[int, int], ...] = ((1, 56), (4, 56), (16, 56), (64, 56))  # rows, tokens per row
    lengths: tuple[tuple[int, int], ...] = ((4, 32), (4, 64), (4, 128), (4, 256), (4, 512))
    shape: tuple[int, int] = (32, 56)  # for the ranks
    rounds: int = 9  # of the ranks
    shape_rounds: int = 31  # their steps are short, so a short disturbance could affect most of fewer rounds
    warm_up: int = 4  # the first steps of a new shape allocate memory and took up to twice as long


QUICK = Range((1, 64), ((1, 16),), ((2, 16), (2, 32)), (2, 16), rounds=2, shape_rounds=2, warm_up=1)


def run(quick: bool) -> dict[str, Any]:
    """One point per model of each comparison: step time, memory, and both relative to full fine-tuning.

    The points of one curve are timed in the same interleaved rounds.
    """
    device = resolve_device("auto")
    precision = resolve_precision("auto", device)
    over, model_name = (QUICK, "random:minilm") if quick else (Range(), "minilm")
    make = partial(make_model, model_name=model_name, precision=precision, device=device)
    points: list[dict[str, Any]] = []

    rows, length = over.shape
    print(f"growth: {model_name} {rows}x{length} {precision}, rank", file=sys.stderr)
    full = make("full", rows=rows, length=length)
    models = {("full", "", 0): full, ("head", "", 0): make("head", rows=rows, length=length)}
    for name, targets in TARGETS.items():
        for r in over.ranks:
            config = replace(CONFIG, r=r, lora_alpha=2 * r, target_modules=targets)
            models["lora", name, r] = make("lora", rows=rows, length=length, config=config)
    points += _compare("rank", models, over.rounds, over.warm_up)

    default = make("lora", rows=rows, length=length)
    for sweep, shapes in (("batch", over.batches), ("length", over.lengths)):
        for shape in shapes:
            print(f"growth: {model_name} {shape[0]}x{shape[1]} {precision}, {sweep}", file=sys.stderr)
            input_ids, labels = random_batch(*shape, device)
            pair = {
                key: replace(model, input_ids=input_ids, labels=labels)
                for key, model in {
                    ("full", "", 0): full,
                    ("lora", "query, value", CONFIG.r): default,
                }.items()
            }
            points += _compare(sweep, pair, over.shape_rounds, over.warm_up)
    return {
        "seed": 0, "precision": precision, "rounds": over.rounds, "shape_rounds": over.shape_rounds,
        "model": model_name, "points": points,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """A table by rank, one by batch and length, and where LoRA's step is no longer faster."""
    points = result["points"]
    ranks = sorted({point["r"] for point in points if point["sweep"] == "rank" and point["mode"] == "lora"})
    shape = next((point["rows"], point["length"]) for point in points if point["sweep"] == "rank")
    by_rank = [["trained", "parameters", "step, ms", "/ full", "memory held, MiB", "/ full"]]
    by_shape = [["rows x tokens", "full, ms", "LoRA, ms", "/ full", "LoRA holds, MiB", "/ full"]]
    for full, point in _with_full(points):
        if point["sweep"] == "rank":
            by_rank.append([_name(point), f"{point['trainable']:,}", *_cost(full, point)])
        elif point is not full:
            name = f"{full['rows']} x {full['length']}"
            by_shape.append([name, quantity(full["milliseconds"]["median"]), *_cost(full, point)])
    curves = [*(("rank", name) for name in TARGETS), ("batch", "query, value"), ("length", "query, value")]
    return "\n\n".join(
        [
            prose(
                f"{result['model']}, {result['precision']}; {result['device']}. Medians of {result['rounds']}"
                f" interleaved rounds by rank, {result['shape_rounds']} by shape. Rank {ranks[0]} to"
                f" {ranks[-1]} at {shape[0]} x {shape[1]} tokens;"
                " memory held is weights, copies, optimizer state and the larger of gradients and saved"
                " tensors (activations and casts of weights)."
            ),
            markdown(by_rank),
            "LoRA with r = 8 on query and value, by batch and by length:",
            markdown(by_shape),
            "\n".join(f"- {_verdict(points, *curve)}" for curve in curves),
        ]
    )


def figures(result: dict[str, Any], folder: Path) -> None:
    """growth.png: the time of a step above its memory, by rank, batch and length."""
    figure, axes = plotting.panels(2, 3, 4, 2.9)
    values: dict[str, Callable[[dict[str, Any]], float]] = {
        "ms per step": lambda point: point["milliseconds"]["median"],
        "MiB held": lambda point: point["held_bytes"] / 2**20,
    }
    for line, (label, value) in zip(axes, values.items(), strict=True):
        _draw_ranks(line[0], result["points"], value)
        for axis, sweep, field in ((line[1], "batch", "rows"), (line[2], "length", "length")):
            for mode, color, name in (
                ("full", plotting.BLUE, "full fine-tuning"),
                ("lora", plotting.ORANGE, "LoRA, query, value"),
            ):
                points = [p for p in result["points"] if p["sweep"] == sweep and p["mode"] == mode]
                x = [point[field] for point in points]
                axis.plot(x, [value(point) for point in points], marker="o", color=color, label=name)
        xlabels = (
            "rank, 32 rows of 56 tokens", "rows of 56 tokens, r = 8", "tokens of each of 4 rows, r = 8",
        )  # fmt: skip
        for axis, words in zip(line, xlabels, strict=True):
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.set(xlabel=words, ylabel=label, ylim=(0, None))
    plotting.save(figure, folder / "growth.png")


def _draw_ranks(axis: Any, points: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> None:
    points = [point for point in points if point["sweep"] == "rank"]
    for name, color in zip(TARGETS, (plotting.ORANGE, plotting.RED), strict=True):
        curve = [point for point in points if point["targets"] == name]
        x = [point["r"] for point in curve]
        axis.plot(x, [value(p) for p in curve], marker="o", color=color, label=f"LoRA, {name}")
    levels = (("full", plotting.BLUE, "full fine-tuning"), ("head", plotting.GREY, "head only"))
    for mode, color, name in levels:
        level = next(value(point) for point in points if point["mode"] == mode)
        axis.axhline(level, color=color, label=name)


def _compare(
    sweep: str, models: dict[tuple[str, str, int], BenchModel], rounds: int, warm_up: int
) -> list[dict[str, Any]]:
    laps = in_turn({key: model.step for key, model in models.items()}, rounds, warm_up)
    seconds = {key: [sum(lap) for lap in laps[key]] for key in models}
    held = {key: held_bytes(memory_bytes(model)) for key, model in models.items()}
    return [
        {
            "sweep": sweep, "mode": key[0], "targets": key[1], "r": key[2],
            "rows": len(model.input_ids), "length": model.input_ids.shape[1],
            "trainable": count_parameters(model.module, HEAD).trainable,
            "milliseconds": milliseconds(seconds[key]),
            "held_bytes": held[key],
        }
        for key, model in models.items()
    ]  # fmt: skip


def _with_full(points: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each point, after full fine-tuning's point of the same rounds, which is the first of them."""
    full = points[0]
    for point in points:
        full = point if point["mode"] == "full" else full
        yield full, point


def _verdict(points: list[dict[str, Any]], sweep: str, targets: str) -> str:
    """The first point of a curve at which LoRA's step is not faster than full fine-tuning's."""
    for full, point in _with_full(points):
        over = ratio(point["milliseconds"], full["milliseconds"])
        if (point["sweep"], point["targets"]) == (sweep, targets) and over >= 1:
            return (
                f"By {sweep}, on {targets}: LoRA's step takes {over:.2f} times as long as full"
                f" fine-tuning's at r = {point['r']} ({point['trainable']:,} trainable),"
                f" {point['rows']} x {point['length']} tokens."
            )
    return f"By {sweep}, on {targets}: LoRA's step is faster at every measured point."


def _name(point: dict[str, Any]) -> str:
    names = {"full": "full fine-tuning", "head": "head only"}
    return names.get(point["mode"]) or f"LoRA, {point['targets']}, r = {point['r']}"


def _cost(full: dict[str, Any], point: dict[str, Any]) -> list[str]:
    return [
        quantity(point["milliseconds"]["median"]),
        f"{ratio(point['milliseconds'], full['milliseconds']):.2f}",
        mebibytes(point["held_bytes"]),
        f"{point['held_bytes'] / full['held_bytes']:.2f}",
    ]
