"""A LoRA step here and in PEFT and loralib, side by side: time, memory, and that all compute the same."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.rivals import RIVALS, adapted, head, installed
from bench.steps import (
    CLASSES,
    CONFIG,
    QUICK_SHAPES,
    SHAPES,
    Contestant,
    contestant,
    in_turn,
    matrix_products,
    memory_bytes,
    milliseconds,
    ratio,
    time_in_turn,
    time_once,
)
from bench.tables import markdown, mebibytes, prose, quantity, spread
from lora import LoRALinear, eject, inject, load_adapter, save_adapter
from lora.tree import lora_layers
from model import load_base
from train.hardware import DTYPES, resolve_device, resolve_precision

NAMES = {"lora": "here", "full": "full fine-tuning here", "peft": "PEFT", "loralib": "loralib"}


def run(quick: bool) -> dict[str, Any]:
    """A row a shape and precision. A rival that is not installed is left out, and said to be."""
    device = resolve_device("auto")
    rivals = installed()
    for missing in RIVALS.keys() - set(rivals):
        print(f"peers: {missing} is not installed, so it is left out", file=sys.stderr)
    rows = []
    for model_name, batch, length in QUICK_SHAPES if quick else SHAPES:
        for precision in dict.fromkeys((resolve_precision("auto", device), "fp32")):
            print(f"peers: {model_name} {batch}x{length} {precision}", file=sys.stderr)
            rows.append(_row(model_name, batch, length, precision, device, rivals, 2 if quick else 9))
    print("peers: loading an adapter", file=sys.stderr)
    model_name = "random:minilm" if quick else "minilm"
    loading = _loading(model_name, 3 if quick else 15, device) if "peft" in rivals else None
    return {"seed": 0, "rows": rows, "loading": loading}


def _row(
    model_name: str, batch: int, length: int, precision: str, device: torch.device, rivals: list[str],
    rounds: int,
) -> dict[str, Any]:  # fmt: skip
    entrants = {
        kind: contestant(kind, model_name, batch, length, precision, device)
        for kind in ("lora", "full", *rivals)
    }
    products = matrix_products(entrants["lora"].model, batch, length, DTYPES[precision], device)
    tasks: dict[str, Any] = {kind: entrant.step for kind, entrant in entrants.items()}
    seconds = time_in_turn({**tasks, "products": products}, rounds, device)
    memory = {kind: memory_bytes(entrant) for kind, entrant in entrants.items()}
    ours = memory["lora"]
    return {
        "model": model_name,
        "rows": batch,
        "length": length,
        "precision": precision,
        "rounds": rounds,
        "milliseconds": {kind: milliseconds(each) for kind, each in seconds.items()},
        "step_over_products": ratio(seconds["lora"], seconds["products"]),
        "over_ours": {kind: ratio(seconds[kind], seconds["lora"]) for kind in ("full", *rivals)},
        "memory_bytes": memory,
        "our_activations_over": {kind: ours["activations"] / memory[kind]["activations"] for kind in rivals},
        "our_total_over": {kind: sum(ours.values()) / sum(memory[kind].values()) for kind in rivals},
        "parity": {kind: _parity(entrants["lora"], entrants[kind]) for kind in rivals},
    }


def table(result: dict[str, Any]) -> str:
    """A table a shape and precision: a row each for us, full fine-tuning here and the rivals."""
    parts = []
    for row in result["rows"]:
        times, memory = row["milliseconds"], row["memory_bytes"]
        lines = [["", "ms a step", "quartiles", "times ours", "kept for backward, MiB", "all parts, MiB"]]
        for kind, words in NAMES.items():
            if kind in memory:
                lines.append(
                    [
                        words,
                        quantity(times[kind]["median"]),
                        spread(times[kind]),
                        f"{row['over_ours'].get(kind, 1):.2f}",
                        mebibytes(memory[kind]["activations"]),
                        mebibytes(sum(memory[kind].values())),
                    ]
                )
        text = f"{row['model']}, {row['rows']} x {row['length']} tokens, {row['precision']}, {row['rounds']}"
        text += (
            f" interleaved rounds. The step's own matrix products alone take"
            f" {quantity(times['products']['median'])} ms; ours {row['step_over_products']:.2f} times that."
        )
        for kind, differences in row["parity"].items():
            text += (
                f" {NAMES[kind]} with the same adapter, in float32 and training mode without dropout: logits"
                f" differ by {differences['logits']:.0e} of the largest, gradients by"
                f" {differences['gradients']:.0e}."
            )
        parts += [prose(text), markdown(lines)]
    if result["loading"]:
        load = result["loading"]["milliseconds"]
        parts.append(
            prose(
                f"Loading a saved adapter into {result['loading']['model']}, files checked:"
                f" {quantity(load['here']['median'])} ms here, and without hashing weights"
                f" (check_base=False) {quantity(load['here, base unchecked']['median'])} ms;"
                f" {quantity(load['peft']['median'])} ms by PEFT, which checks neither files nor base."
            )
        )
    return "\n\n".join([prose(f"{result['device']}."), *parts])


def _loading(model_name: str, rounds: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds to put one saved adapter into a base model that is there already."""
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


def _parity(ours: Contestant, theirs: Contestant) -> dict[str, float]:
    """The same base, adapter and batch: the largest difference of logits and of adapter gradients.

    In float32, in training without dropout, so by the way that is timed; relative to the largest value of
    its kind.
    """
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for name, layer in lora_layers(ours.model).items():
            peer = adapted(theirs.name, theirs.model, name)
            layer.lora_B.normal_(
                std=0.02, generator=torch.Generator(layer.lora_B.device).manual_seed(len(pairs))
            )
            for mine, other in ((layer.lora_A, peer.A), (layer.lora_B, peer.B)):
                other.copy_(mine)
                pairs.append((mine, other))
            peer.weight.copy_(layer.weight)
        head(theirs.name, theirs.model).load_state_dict(ours.model.classifier.state_dict())
    logits = []
    for entrant in (ours, theirs):
        entrant.model.train()
        for module in entrant.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif isinstance(module, LoRALinear):
                module.lora_dropout = 0.0
        entrant.optimizer.zero_grad()
        out = entrant.model(input_ids=entrant.input_ids).logits
        torch.nn.functional.cross_entropy(out, entrant.labels).backward()  # type: ignore[no-untyped-call]
        logits.append(out.detach())
    gradients: list[Any] = [(mine.grad, other.grad) for mine, other in pairs]
    largest = max(float(other.abs().max()) for _, other in gradients)
    return {
        "logits": float((logits[0] - logits[1]).abs().max() / logits[1].abs().max()),
        "gradients": max(float((mine - other).abs().max()) for mine, other in gradients) / largest,
    }
