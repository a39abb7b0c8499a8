"""The frozen base stored in fp32, bf16, int8 and NF4: memory, time, error and accuracy of LoRA on it.

PEFT on a float32 base, and on one that bitsandbytes has stored in NF4, is measured beside it.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import plotting
from bench.baselines import installed
from bench.grid import METHODS, Method, open_results, train_all
from bench.memory import in_own_process, note_on_peaks, peak_above_bare, stack_components
from bench.paired import LORA, accuracy, compare, corrected_p, difference
from bench.steps import (
    CLASSES,
    CONFIG,
    QUICK_SHAPES,
    SHAPES,
    make_model,
    milliseconds,
    random_batch,
    ratio,
    time_in_turn,
    time_once,
)
from bench.tables import bullets, prose, spread
from lora import inject
from lora.quantised import PRECISIONS, quantise
from lora.quantised.tensor import QuantisedTensor
from model import HEAD, load_base, speed_up
from train.data import load_news
from train.hardware import autocast, resolve_device, resolve_precision
from train.tables import markdown, mebibytes, quantity

PEERS = {"peft": "PEFT, fp32", "peft-nf4": "PEFT + bitsandbytes, nf4"}
NAMES = {**{precision: precision for precision in PRECISIONS}, **PEERS}
FP32_PRODUCTS = "fp32 without autocast"
MODEL, TEXTS, LENGTH = "minilm", 32, 64  # whose layer outputs are compared, on how many articles and tokens


def run(quick: bool, data: str | None = None) -> dict[str, Any]:
    """Memory and time by shape, cost and error by storage, and accuracy on bbc and on `data` if it is given.

    Training runs that are finished are not repeated. Baselines that are not installed are left out.
    """
    device = resolve_device("auto")
    precision = resolve_precision("auto", device)
    peers = installed(PEERS)
    for missing in PEERS.keys() - set(peers):
        print(f"base: {NAMES[missing]} is not installed, so it is left out", file=sys.stderr)
    shapes = []
    for shape in QUICK_SHAPES if quick else SHAPES:
        print(f"base: steps of {shape[0]}", file=sys.stderr)
        shapes.append(_steps(*shape, precision, device, [*PRECISIONS, *peers], 2 if quick else 9))
    print("base: cost and error of the storages", file=sys.stderr)
    return {
        "seed": 0,
        "precision": precision,
        "shapes": shapes,
        "cost": _cost(*(QUICK_SHAPES if quick else SHAPES)[0], precision, device, 2 if quick else 9),
        "errors": _errors(precision, device),
        "sets": [_accuracy(name, quick) for name in (("bbc",) if data is None else ("bbc", data))],
    }


def _steps(
    model_name: str,
    rows: int,
    length: int,
    precision: str,
    device: torch.device,
    kinds: list[str],
    rounds: int,
) -> dict[str, Any]:
    """Memory of each kind in its own process, and milliseconds of a step in interleaved rounds in this one.

    A peer that fails has its error in place of its numbers.
    """
    memory: dict[str, Any] = {}
    steps: dict[str, Callable[[], object]] = {}
    failed: dict[str, str] = {}
    for kind in kinds:
        try:
            model = make_model(kind, model_name, rows, length, precision, device)
            model.step()
        except Exception as error:
            if kind not in PEERS:
                raise
            failed[kind] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        steps[kind] = model.step
        memory[kind] = in_own_process("bench.peak", kind, model_name, str(rows), str(length), precision)
    seconds = time_in_turn(steps, rounds, device)
    return {
        "model": model_name, "rows": rows, "length": length, "rounds": rounds, "failed": failed,
        "kinds": {
            kind: {
                **memory[kind],
                "milliseconds": milliseconds(seconds[kind]),
            }
            for kind in steps
        },
    }  # fmt: skip


@torch.no_grad()
def _cost(
    model_name: str, rows: int, length: int, precision: str, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Milliseconds to quantise the model, of its first forward, which makes copies, and of further ones."""
    input_ids, _ = random_batch(rows, length, device)
    found = {}
    for storage in PRECISIONS:
        model: Any = load_base(model_name, num_labels=CLASSES)[0].to(device)
        quantising = time_once(lambda model=model, storage=storage: quantise(model, storage, HEAD), device)  # type: ignore[misc]
        inject(model, CONFIG)
        speed_up(model, precision)

        def forward(model: Any = model) -> None:
            with autocast(device, precision):
                model(input_ids=input_ids)

        first, *others = (time_once(forward, device) for _ in range(1 + rounds))
        later = statistics.median(others)
        found[storage] = {"quantise": 1e3 * quantising, "first": 1e3 * first, "later": 1e3 * later}
    return {"model": model_name, "rows": rows, "length": length, "milliseconds": found}


@torch.no_grad()
def _errors(precision: str, device: torch.device) -> dict[str, Any]:
    """‖y - y₀‖ / ‖y₀‖ of the outputs y of each layer and of the encoder, on real texts.

    y₀ is of the float32 model in float32. A layer gets the inputs that it has there; the encoder its own.
    """
    reference: Any
    reference, tokenizer = load_base(MODEL, num_labels=CLASSES)
    reference.to(device).eval()
    texts = load_news("bbc", validation_fraction=0.1, seed=0).test["text"][:TEXTS]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt").to(device)  # type: ignore[misc]
    mask = batch["attention_mask"].bool()
    inputs: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        inputs[name] = x[mask]

    encoder: Any = reference.base_model
    linears = {name: m for name, m in encoder.encoder.named_modules() if isinstance(m, nn.Linear)}
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, name=name: note(name, *args))
        for name, linear in linears.items()
    ]
    exact = encoder(**batch).last_hidden_state[mask]
    for hook in hooks:
        hook.remove()
    outputs = {name: linear(inputs[name]) for name, linear in linears.items()}
    found = {}
    for storage in PRECISIONS:
        model: Any = load_base(MODEL, num_labels=CLASSES)[0].to(device).eval()
        quantise(model, storage, keep=HEAD)
        layers = dict(model.base_model.encoder.named_modules())
        with autocast(device, precision):
            errors = [_relative(layers[name](inputs[name]), y) for name, y in outputs.items()]
            hidden = model.base_model(**batch).last_hidden_state[mask]
        weights = [
            _relative(layers[name].weight.stored.dequantise(), linear.weight)
            for name, linear in linears.items()
            if isinstance(layers[name].weight, QuantisedTensor)
        ]
        found[storage] = {
            "weight": statistics.median(weights) if weights else 0.0,
            "layer": statistics.median(errors),
            "worst_layer": max(errors),
            "encoder": _relative(hidden, exact),
        }
    return {"model": MODEL, "texts": TEXTS, "layers": len(linears), "storages": found}


def _relative(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact.double()).norm() / exact.double().norm())


def _accuracy(data: str, quick: bool) -> dict[str, Any]:
    """LoRA r=8 on each storage, all at the rate that `bench.grid` selects on the float32 base.

    On bbc the last row has products in float32 too: how far autocast to bf16 alone changes the accuracy.
    """
    print(f"base: accuracy on {Path(data).name}", file=sys.stderr)
    lora = next(method for method in METHODS if method.name == LORA)
    stored = {p: {"base_precision": p} for p in PRECISIONS if p != "fp32"}
    changes = {**stored, FP32_PRODUCTS: {"precision": "fp32"}} if data == "bbc" else stored
    methods = [Method(name, {**lora.fields, **fields}, lora.quarter) for name, fields in changes.items()]
    results = open_results(quick)
    (reference,) = train_all(data, [lora], results, quick)
    others = train_all(data, methods, results, quick, reference.quarter)
    return compare(data, [reference, *others], (LORA,))


def table(result: dict[str, Any]) -> str:
    """Memory and time by shape, cost and error, accuracy by dataset, and what follows from them."""
    words = (
        f"LoRA with r = 8 on query and value, computing in {result['precision']}; {result['device']}. Frozen"
        " linear layers are stored as the first column says, and embeddings in bf16 for all but fp32. All"
        " components are weights, copies, gradients, optimizer state and saved tensors, each at its largest;"
        " the peak is of a process of its own, without what the libraries take."
    )
    words += note_on_peaks(row for shape in result["shapes"] for row in shape["kinds"].values())
    parts = [prose(words)]
    for shape in result["shapes"]:
        parts += _shape_table(shape)
    parts += _cost_table(result)
    for found in result["sets"]:
        parts += _set_table(found)
    return "\n\n".join([*parts, bullets(conclusions(result))])


def _shape_table(shape: dict[str, Any]) -> list[str]:
    lines = [["", "weights, MiB", "copies", "all components", "peak", "step, ms", "quartiles", "/ fp32"]]
    for kind, row in shape["kinds"].items():
        parts = row["components"]
        lines.append(
            [
                NAMES[kind],
                mebibytes(parts["weights"]),
                mebibytes(parts["weight_copies"] + parts["weight_casts"]),
                mebibytes(sum(parts.values())),
                mebibytes(peak_above_bare(row)),
                quantity(row["milliseconds"]["median"]),
                spread(row["milliseconds"]),
                f"{ratio(row['milliseconds'], shape['kinds']['fp32']['milliseconds']):.2f}",
            ]
        )
    for kind, error in shape["failed"].items():
        lines.append([NAMES[kind], f"does not run: {error}", *[""] * 6])
    words = (
        f"{shape['model']}, {shape['rows']} x {shape['length']} tokens, {shape['rounds']} interleaved rounds."
    )
    return [prose(words), markdown(lines)]


def _cost_table(result: dict[str, Any]) -> list[str]:
    cost, errors = result["cost"], result["errors"]
    lines = [
        ["", "quantise, ms", "first forward, ms", "later, ms", "weights", "a layer", "the worst", "encoder"]
    ]
    for storage, error in errors["storages"].items():
        times = cost["milliseconds"][storage]
        lines.append(
            [
                storage,
                *(quantity(times[key]) for key in ("quantise", "first", "later")),
                *(f"{error[key]:.2%}" for key in ("weight", "layer", "worst_layer", "encoder")),
            ]
        )
    words = (
        f"What a storage costs once ({cost['model']}, {cost['rows']} x {cost['length']} tokens), and its"
        f" error ‖y - y₀‖ / ‖y₀‖ on {errors['texts']} articles ({errors['model']}): of the weights and of the"
        f" outputs of {errors['layers']} layers that get the inputs of the float32 model (medians, and the"
        " largest), and of the encoder's output, where errors add up. y₀ is computed in float32, so that the"
        f" row of fp32 is the error of computing in {result['precision']}."
    )
    return [prose(words), markdown(lines)]


def _set_table(found: dict[str, Any]) -> list[str]:
    lines = [["", "accuracy, %", "by fold" if found["folds"] else "by seed", "- fp32, points", "p"]]
    for row in found["rows"]:
        pair = row["against"].get(LORA)
        lines.append(
            [
                _storage(row),
                accuracy(row),
                ", ".join(f"{100 * value:.2f}" for value in row["by_part"]),
                difference(pair) if pair else "-",
                corrected_p(pair) if pair else "-",
            ]
        )
    words = (
        f"{found['data']}: about {found['train_articles']:,} articles to train on, {found['test_articles']:,}"
        f" test articles, {found['parts']} {'folds' if found['folds'] else 'seeds'}; {found['model']},"
        f" {found['epochs']} epochs, {found['precision']} products, learning rate"
        f" {found['rows'][0]['learning_rate']:g}, selected on fp32."
        " In brackets, 95% intervals. Differences are paired by test article, p is from the exact sign-flip"
        " test, corrected by Holm's method."
    )
    return [prose(words), markdown(lines)]


def _storage(row: dict[str, Any]) -> str:
    return "fp32" if row["name"] == LORA else str(row["name"])


def conclusions(result: dict[str, Any]) -> list[str]:
    """Memory against PEFT's, time against bf16 and PEFT's, accuracy against fp32, as sentences."""
    lines = []
    for shape in result["shapes"]:
        kinds = shape["kinds"]
        held = {kind: sum(row["components"].values()) for kind, row in kinds.items()}
        step = {kind: row["milliseconds"]["median"] for kind, row in kinds.items()}
        if "peft" in kinds:
            shares = ", ".join(f"{kind} {held[kind] / held['peft']:.2f}" for kind in PRECISIONS)
            lines.append(f"{shape['model']}: all components over PEFT's on a float32 base: {shares}.")
        words = (
            f"{shape['model']}: a step on int8 is {step['bf16'] / step['int8']:.2f} times as fast as on bf16,"
            f" and one on nf4 takes {step['nf4'] / step['fp32']:.2f} times as long as on fp32"
        )
        if "peft-nf4" in kinds:
            words += f" and {step['nf4'] / step['peft-nf4']:.2f} times as long as with PEFT and bitsandbytes"
        lines.append(f"{words}.")
    for found in result["sets"]:
        pairs = {_storage(row): row["against"][LORA] for row in found["rows"] if row["against"]}
        words = ", ".join(f"{storage} {difference(pair)}" for storage, pair in pairs.items())
        lines.append(f"{found['data']}: accuracy minus that of fp32, in points: {words}.")
    return lines


def figures(result: dict[str, Any], folder: Path) -> None:
    """base.png: memory by component, time of a step, and difference of accuracy, by storage."""
    shape = result["shapes"][0]
    kinds = shape["kinds"]
    figure, ((memory, times, points),) = plotting.panels(1, 3, 5.2, 3.4)
    for at, row in enumerate(kinds.values()):
        stack_components(memory, at, row["components"], width=0.6)
        middle, low, high = (row["milliseconds"][key] for key in ("median", "low", "high"))
        color = plotting.GREY if row is kinds.get("peft") or row is kinds.get("peft-nf4") else plotting.BLUE
        times.bar(at, middle, yerr=[[middle - low], [high - middle]], width=0.6, color=color, capsize=3)
    labels = [NAMES[kind].replace(" + ", "\n+ ").replace(", ", ",\n") for kind in kinds]
    title = f"{shape['model']}, {shape['rows']} x {shape['length']} tokens"
    for axis, label in ((memory, "MiB, each component at its largest"), (times, "ms per step")):
        axis.set_xticks(range(len(kinds)), labels, fontsize=7)
        axis.set(ylabel=label, title=title)
    for number, found in enumerate(result["sets"]):
        color = (plotting.PURPLE, plotting.GREEN)[number]
        for at, row in enumerate(row for row in found["rows"] if row["against"]):
            low, middle, high = (100 * row["against"][LORA][key] for key in ("low", "difference", "high"))
            points.errorbar(
                at + 0.15 * number, middle, yerr=[[middle - low], [high - middle]], fmt="o", color=color,
                capsize=3, label=None if at else found["data"],
            )  # fmt: skip
    rows = [row for row in result["sets"][0]["rows"] if row["against"]]
    points.set_xticks(range(len(rows)), [row["name"].replace(" ", "\n", 1) for row in rows], fontsize=7)
    points.axhline(0, color="black", linewidth=0.8)
    points.set(ylabel="points", title="test accuracy minus that of fp32")
    plotting.save(figure, folder / "base.png")
