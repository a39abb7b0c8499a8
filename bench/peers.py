"""One LoRA step here and in PEFT, side by side: time, memory, and that both compute the same."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from typing import Any

import torch

from bench.steps import Contestant, contestant, matrix_products, memory_bytes, ratio, time_in_turn
from lora.tree import lora_layers
from train.hardware import resolve_device

SHAPES = (("random:roberta-base", 16, 64), ("minilm", 32, 56))
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def run(quick: bool) -> dict[str, Any]:
    """A row a shape and precision. Without PEFT its columns are left out, and said to be."""
    device = resolve_device("auto")
    rounds = 2 if quick else 7
    has_peft = importlib.util.find_spec("peft") is not None
    if not has_peft:
        print("peers: PEFT is not installed, so its columns are left out", file=sys.stderr)
    rows = []
    for model_name, batch, length in SHAPES:
        for precision in ("bf16", "fp32"):
            print(f"peers: {model_name} {batch}x{length} {precision}", file=sys.stderr)
            kinds = ["lora", "full", *(["peft"] if has_peft else [])]
            entrants = {
                kind: contestant(kind, model_name, batch, length, precision, device) for kind in kinds
            }
            products = matrix_products(entrants["lora"].model, batch, length, _DTYPES[precision], device)
            seconds = time_in_turn(
                {**{kind: entrant.step for kind, entrant in entrants.items()}, "products": products},
                rounds,
                device,
            )
            row: dict[str, Any] = {
                "model": model_name, "rows": batch, "length": length, "precision": precision,
                "milliseconds": {k: round(1e3 * statistics.median(v), 1) for k, v in seconds.items()},
                "least_milliseconds": {k: round(1e3 * min(v), 1) for k, v in seconds.items()},
                "most_milliseconds": {k: round(1e3 * max(v), 1) for k, v in seconds.items()},
                "step_over_products": ratio(seconds["lora"], seconds["products"]),
                "full_over_lora": ratio(seconds["full"], seconds["lora"]),
                "memory_bytes": {kind: memory_bytes(entrant) for kind, entrant in entrants.items()},
            }  # fmt: skip
            if has_peft:
                row["peft_over_lora"] = ratio(seconds["peft"], seconds["lora"])
                row["parity"] = _parity(entrants["lora"], entrants["peft"])
            rows.append(row)
    return {"seed": 0, "rounds": rounds, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The rows to read."""
    lines = []
    for row in result["rows"]:
        ms, memory = row["milliseconds"], row["memory_bytes"]
        lines.append(f"{row['model']} {row['rows']}x{row['length']} {row['precision']}")
        lines.append(
            f"  step: LoRA {ms['lora']:.0f} ms, full fine-tuning {ms['full']:.0f} ms"
            f" ({row['full_over_lora']:.2f} times), matrix products alone {ms['products']:.0f} ms"
            f" (LoRA is {row['step_over_products']:.2f} times)"
        )
        if "peft" in ms:
            kept = memory["lora"]["activations"] / memory["peft"]["activations"]
            total = sum(memory["lora"].values()) / sum(memory["peft"].values())
            parity = row["parity"]
            lines.append(
                f"  PEFT {ms['peft']:.0f} ms ({row['peft_over_lora']:.2f} times); kept for backward here"
                f" {kept:.3f} of PEFT's, weights and everything {total:.3f}"
            )
            lines.append(
                f"  same adapter in eval mode, float32: logits differ by {parity['logits']:.1e}"
                f" of the largest, gradients by {parity['gradients']:.1e}"
            )
        for kind, parts in memory.items():
            words = ", ".join(f"{name.replace('_', ' ')} {size / 2**20:,.1f}" for name, size in parts.items())
            lines.append(f"  {kind}: {words} MiB")
    return "\n".join(lines)


def _parity(ours: Contestant, theirs: Contestant) -> dict[str, float]:
    """The same base, adapter and batch: the largest difference of logits and of adapter gradients.

    In float32 and eval mode, relative to the largest value of its kind.
    """
    base = theirs.model.base_model.model
    pairs: dict[str, Any] = {}
    with torch.no_grad():
        for name, layer in lora_layers(ours.model).items():
            peer = base.get_submodule(name)
            for part in ("lora_A", "lora_B"):
                mine, other = getattr(layer, part), getattr(peer, part)["default"].weight
                if part == "lora_B":
                    mine.normal_(std=0.02, generator=torch.Generator(mine.device).manual_seed(len(pairs)))
                other.copy_(mine)
                pairs[f"{name}.{part}"] = (mine, other)
            peer.get_base_layer().weight.copy_(layer.weight)
        heads = base.classifier.modules_to_save["default"]
        heads.load_state_dict(ours.model.classifier.state_dict())
    logits = []
    for entrant in (ours, theirs):
        entrant.model.eval()
        entrant.optimizer.zero_grad()
        out = entrant.model(
            input_ids=entrant.input_ids, attention_mask=torch.ones_like(entrant.input_ids)
        ).logits
        torch.nn.functional.cross_entropy(out, entrant.labels).backward()  # type: ignore[no-untyped-call]
        logits.append(out.detach())
    gradients = [(mine.grad, other.grad) for mine, other in pairs.values()]
    largest = max(float(other.abs().max()) for _, other in gradients)
    return {
        "logits": float((logits[0] - logits[1]).abs().max() / logits[1].abs().max()),
        "gradients": max(float((mine - other).abs().max()) for mine, other in gradients) / largest,
    }
