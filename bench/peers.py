"""A LoRA step here and in PEFT and loralib, side by side: time, memory, and that all compute the same.

DoRA's step and LoRA-FA's as well, beside LoRA's and PEFT's DoRA.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.baselines import BASELINES, adapted_layer, head, installed
from bench.steps import (
    ALL_LINEAR,
    CLASSES,
    CONFIG,
    QUICK_SHAPES,
    SHAPES,
    BenchModel,
    in_turn,
    make_model,
    matrix_products,
    memory_bytes,
    milliseconds,
    ratio,
    time_in_turn,
    time_once,
)
from bench.tables import prose, spread, timing
from lora import LoRALinear, eject, inject, load_adapter, save_adapter
from lora.adapted import product_layers
from model import load_base
from model.fast import DTYPES
from train.hardware import resolve_device, resolve_precision
from train.tables import markdown, mebibytes, quantity

VARIANTS = {
    "LoRA": CONFIG,
    "DoRA": replace(CONFIG, use_dora=True),
    "LoRA-FA": replace(CONFIG, use_lora_fa=True),
    "LoRA on all linear": replace(CONFIG, target_modules=ALL_LINEAR),
    "LoRA-FA on all linear": replace(CONFIG, target_modules=ALL_LINEAR, use_lora_fa=True),
}
NAMES = {"lora": "here", "full": "full fine-tuning here", "peft": "PEFT", "loralib": "loralib"}


def run(quick: bool) -> dict[str, Any]:
    """One row per shape and precision. A baseline that is not installed is left out, with a message."""
    device = resolve_device("auto")
    baselines = installed()
    for missing in BASELINES.keys() - set(baselines):
        print(f"peers: {missing} is not installed, so it is left out", file=sys.stderr)
    rows = []
    shapes, rounds = (QUICK_SHAPES, 2) if quick else (SHAPES, 9)
    for model_name, batch, length in shapes:
        for precision in dict.fromkeys((resolve_precision("auto", device), "fp32")):
            print(f"peers: {model_name} {batch}x{length} {precision}", file=sys.stderr)
            rows.append(_row(model_name, batch, length, precision, device, baselines, rounds))
    print(f"peers: variants on {shapes[0][0]}", file=sys.stderr)
    variants = _variants(*shapes[0], resolve_precision("auto", device), device, "peft" in baselines, rounds)
    print("peers: loading an adapter", file=sys.stderr)
    model_name = "random:minilm" if quick else "minilm"
    loading = _loading(model_name, 3 if quick else 15, device) if "peft" in baselines else None
    return {"seed": 0, "rows": rows, "variants": variants, "loading": loading}


def _row(
    model_name: str, batch: int, length: int, precision: str, device: torch.device, baselines: list[str],
    rounds: int,
) -> dict[str, Any]:  # fmt: skip
    models = {
        kind: make_model(kind, model_name, batch, length, precision, device)
        for kind in ("lora", "full", *baselines)
    }
    products = matrix_products(models["lora"].module, batch, length, DTYPES[precision], device)
    tasks: dict[str, Any] = {kind: model.step for kind, model in models.items()}
    seconds = time_in_turn({**tasks, "products": products}, rounds, device)
    memory = {kind: memory_bytes(model) for kind, model in models.items()}
    return {
        "model": model_name,
        "rows": batch,
        "length": length,
        "precision": precision,
        "rounds": rounds,
        "milliseconds": {kind: milliseconds(each) for kind, each in seconds.items()},
        "memory_bytes": memory,
        "parity": {kind: _parity(models["lora"], models[kind]) for kind in baselines},
    }


def _variants(
    model_name: str, batch: int, length: int, precision: str, device: torch.device, with_peft: bool,
    rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """Steps of VARIANTS here, and of those in PEFT that are layers there: PEFT's LoRA-FA is an optimizer."""
    kinds = [("lora", name) for name in VARIANTS]
    kinds += [("peft", name) for name in ("LoRA", "DoRA")] if with_peft else []
    models = {}
    for kind, name in kinds:
        config = VARIANTS[name]
        models[f"{name}, {NAMES[kind]}"] = make_model(
            kind, model_name, batch, length, precision, device, config
        )
    seconds = time_in_turn({name: model.step for name, model in models.items()}, rounds, device)
    return {
        "model": model_name,
        "rows": batch,
        "length": length,
        "precision": precision,
        "rounds": rounds,
        "models": {
            name: {
                "milliseconds": milliseconds(seconds[name]),
                "activations": memory_bytes(model)["activations"],
            }
            for name, model in models.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """One table per shape and precision, with a row per model."""
    parts = []
    for row in result["rows"]:
        times, memory = row["milliseconds"], row["memory_bytes"]
        lines = [
            [
                "",
                "ms per step",
                "quartiles",
                "ratio to ours",
                "saved activations, MiB",
                "all components, MiB",
            ]
        ]
        for kind, words in NAMES.items():
            if kind in memory:
                lines.append(
                    [
                        words,
                        quantity(times[kind]["median"]),
                        spread(times[kind]),
                        f"{ratio(times[kind], times['lora']):.2f}",
                        mebibytes(memory[kind]["activations"]),
                        mebibytes(sum(memory[kind].values())),
                    ]
                )
        text = f"{row['model']}, {row['rows']} x {row['length']} tokens, {row['precision']}, {row['rounds']}"
        text += (
            f" interleaved rounds. The matrix products of the step alone take"
            f" {quantity(times['products']['median'])} ms; our step takes"
            f" {ratio(times['lora'], times['products']):.2f} times as long."
        )
        for kind, differences in row["parity"].items():
            text += (
                f" {NAMES[kind]} with the same adapter, in float32 and training mode without dropout: the"
                f" largest difference relative to the largest value is {differences['logits']:.0e} for logits"
                f" and {differences['gradients']:.0e} for gradients."
            )
        parts += [prose(text), markdown(lines)]
    if "variants" in result:
        parts += _variants_table(result["variants"])
    if result["loading"]:
        load = result["loading"]["milliseconds"]
        parts.append(
            prose(
                f"Loading a saved adapter into {result['loading']['model']}, with files and base checked:"
                f" {timing(load['here'])} ms here, and {timing(load['here, base unchecked'])} ms with"
                f" check_base=False; {timing(load['peft'])} ms by PEFT, which checks neither. Medians, and"
                " quartiles in brackets."
            )
        )
    return "\n\n".join([prose(f"{result['device']}."), *parts])


def _variants_table(found: dict[str, Any]) -> list[str]:
    lora = found["models"][f"LoRA, {NAMES['lora']}"]
    lines = [["", "ms per step", "quartiles", "/ our LoRA", "saved activations, MiB", "/ our LoRA"]]
    for name, row in found["models"].items():
        lines.append(
            [
                name,
                quantity(row["milliseconds"]["median"]),
                spread(row["milliseconds"]),
                f"{ratio(row['milliseconds'], lora['milliseconds']):.2f}",
                mebibytes(row["activations"]),
                f"{row['activations'] / lora['activations']:.2f}",
            ]
        )
    text = f"Variants of LoRA: {found['model']}, {found['rows']} x {found['length']} tokens,"
    text += f" {found['precision']}, {found['rounds']} interleaved rounds."
    fa, more, all_fa = (
        found["models"][f"{name}, {NAMES['lora']}"]["activations"]
        for name in ("LoRA-FA", "LoRA on all linear", "LoRA-FA on all linear")
    )
    text += (
        f" LoRA-FA's saved activations are {fa / lora['activations']:.2f} of LoRA's, where query and value"
        f" share one saved input, and {all_fa / more:.2f} on all linear layers."
    )
    if "DoRA, PEFT" in found["models"]:
        here, peft = (found["models"][f"DoRA, {NAMES[kind]}"] for kind in ("lora", "peft"))
        over = ratio(peft["milliseconds"], here["milliseconds"])
        text += f" PEFT's DoRA takes {over:.2f} times as long as DoRA here."
    return [prose(text), markdown(lines)]


def _loading(model_name: str, rounds: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds to load a saved adapter into a base model in memory."""
    import peft

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        model: Any = load_base(model_name, num_labels=CLASSES)[0].to(device)
        inject(model, CONFIG)
        save_adapter(model, folder, base=model_name, task_type="SEQ_CLS")
        eject(model)
        theirs: Any = load_base(model_name, num_labels=CLASSES)[0].to(device)

        def here(check_base: bool) -> float:
            seconds = time_once(lambda: load_adapter(model, folder, check_base=check_base), device)
            eject(model)
            return seconds

        def by_peft() -> float:
            nonlocal theirs
            wrapped: list[Any] = []
            seconds = time_once(
                lambda: wrapped.append(peft.PeftModel.from_pretrained(theirs, name + "/adapter")), device
            )
            theirs = wrapped[0].unload()
            return seconds

        tasks = {"here": lambda: here(True), "here, base unchecked": lambda: here(False), "peft": by_peft}
        seconds = in_turn(tasks, rounds)
    return {"model": model_name, "milliseconds": {kind: milliseconds(each) for kind, each in seconds.items()}}


def _parity(ours: BenchModel, theirs: BenchModel) -> dict[str, float]:
    """The largest difference of logits and of adapter gradients for the same base, adapter and batch.

    In float32 and in training mode without dropout, so that the timed code path runs. Relative to the
    largest value.
    """
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for name, layer in product_layers(ours.module).items():
            peer = adapted_layer(theirs.name, theirs.module, name)
            layer.lora_B.normal_(
                std=0.02, generator=torch.Generator(layer.lora_B.device).manual_seed(len(pairs))
            )
            for here, other in ((layer.lora_A, peer.A), (layer.lora_B, peer.B)):
                other.copy_(here)
                pairs.append((here, other))
            peer.weight.copy_(layer.weight)
        head(theirs.name, theirs.module).load_state_dict(ours.module.classifier.state_dict())
    logits = []
    for model in (ours, theirs):
        model.module.train()
        for module in model.module.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif isinstance(module, LoRALinear):
                module.lora_dropout = 0.0
        model.optimizer.zero_grad()
        out = model.module(input_ids=model.input_ids).logits
        torch.nn.functional.cross_entropy(out, model.labels).backward()  # type: ignore[no-untyped-call]
        logits.append(out.detach())
    gradients: list[Any] = [(here.grad, other.grad) for here, other in pairs]
    largest = max(float(other.abs().max()) for _, other in gradients)
    return {
        "logits": float((logits[0] - logits[1]).abs().max() / logits[1].abs().max()),
        "gradients": max(float((here - other).abs().max()) for here, other in gradients) / largest,
    }
