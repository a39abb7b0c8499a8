"""The exactness of merging: rounding errors, drift over cycles and logits, here and in the baselines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.baselines import BASELINES, adapted_layer, installed
from bench.steps import QUERY_VALUE, randomise
from bench.tables import prose
from lora import LoraConfig, inject, merge, unmerge
from lora.adapted import product_layers
from model import load_base

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_CONFIG = LoraConfig(r=8, lora_alpha=16, target_modules=QUERY_VALUE)


def run(quick: bool) -> dict[str, Any]:
    """Rows by implementation and dtype, on MiniLM with a random adapter, r = 8 on query and value."""
    cycles = 20 if quick else 1000
    measures: dict[str, Callable[[torch.dtype, int], dict[str, Any]]] = {"ours": _ours}
    measures |= {kind: partial(_baseline, kind) for kind in installed()}
    rows = []
    for dtype in _DTYPES:
        for name, measure in measures.items():
            print(f"merging: {name}, {dtype}, {cycles} cycles", file=sys.stderr)
            rows.append(
                {"implementation": name, "dtype": str(dtype).removeprefix("torch."), **measure(dtype, cycles)}
            )
    return {"model": "minilm", "r": 8, "cycles": cycles, "seed": 0, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The drift of weights here and in PEFT, as a sentence."""
    rows = {(row["implementation"], row["dtype"]): row for row in result["rows"]}
    if ("peft", "float32") not in rows:
        return (
            f"After {result['cycles']:,} cycles on MiniLM, {changed(result)} of the adapted weights differ."
        )
    single, half = rows["peft", "float32"], rows["peft", "bfloat16"]
    largest = f"{half['largest_change']:.1e}".replace("e-0", "e-")
    return prose(
        f"With PEFT {result['versions']['peft']} on MiniLM, {single['changed_after_one']:.1%} of the adapted"
        f" weights in float32 and {half['changed_after_one']:.1%} in bfloat16 differ after one cycle, and"
        f" {single['changed_after_all']:.1%} and {half['changed_after_all']:.1%} after {result['cycles']:,}"
        f" cycles, in bfloat16 by up to {largest}. Here, {changed(result)} differ in any dtype."
    )


def changed(drift: dict[str, Any]) -> str:
    """The share of weights that differ after all cycles of merging, in the dtype where it is largest."""
    changed = max(row["changed_after_all"] for row in drift["rows"] if row["implementation"] == "ours")
    return f"{changed:.1%}" if changed else "none"


def _ours(dtype: torch.dtype, cycles: int) -> dict[str, Any]:
    model = _model(dtype)
    inject(model, _CONFIG)
    layers = product_layers(model)
    randomise({name: layer.lora_B for name, layer in layers.items()})
    weights = {name: layer.weight for name, layer in layers.items()}
    deltas = {name: layer.delta_weight() for name, layer in layers.items()}
    return _measure(model, weights, deltas, lambda: merge(model), lambda: unmerge(model), cycles)


def _baseline(kind: str, dtype: torch.dtype, cycles: int) -> dict[str, Any]:
    """With the defaults: on a 16-bit base PEFT's adapters are float32, loralib's have its dtype."""
    model = BASELINES[kind](_model(dtype), _CONFIG).eval()
    ours = _model(dtype)  # for the same initial lora_A
    inject(ours, _CONFIG)
    layers = {name: adapted_layer(kind, model, name) for name in product_layers(ours)}
    with torch.no_grad():
        for name, layer in product_layers(ours).items():
            layers[name].A.copy_(layer.lora_A)
    randomise({name: layer.B for name, layer in layers.items()})
    weights = {name: layer.weight for name, layer in layers.items()}
    deltas = {
        name: 2.0 * layer.B.detach().double() @ layer.A.detach().double() for name, layer in layers.items()
    }
    if kind == "peft":
        return _measure(model, weights, deltas, model.merge_adapter, model.unmerge_adapter, cycles)
    linears = [model.get_submodule(name) for name in layers]

    def switch(training: bool) -> None:
        for linear in linears:  # loralib merges in eval()
            linear.merge_weights = True
            linear.train(training)

    return _measure(model, weights, deltas, lambda: switch(False), lambda: switch(True), cycles)


def _model(dtype: torch.dtype) -> nn.Module:
    model: nn.Module = load_base("minilm")[0]
    return model.to(dtype)


@torch.no_grad()
def _measure(
    model: nn.Module,
    weights: dict[str, Tensor],
    deltas: dict[str, Tensor],
    merge_all: Callable[[], object],
    unmerge_all: Callable[[], object],
    cycles: int,
) -> dict[str, Any]:
    input_ids = torch.arange(1000, 1000 + 4 * 32).view(4, 32)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    unmerged = model(input_ids=input_ids).logits.double()
    merge_all()
    merged = model(input_ids=input_ids).logits.double()
    ulps = torch.cat(
        [_ulps(weights[name], before[name].double() + deltas[name]).view(-1) for name in weights]
    )
    unmerge_all()
    changed = {1: _changed(weights, before)}
    for cycle in range(2, cycles + 1):
        merge_all()
        unmerge_all()
        if cycle in (10, cycles):
            changed[cycle] = _changed(weights, before)
    return {
        "largest_ulps": float(ulps.max()),
        "mean_ulps": float(ulps.mean()),
        "changed_after_one": changed[1],
        "changed_after_ten": changed[10],
        "changed_after_all": changed[cycles],
        "largest_change": max(float((weights[n].double() - before[n].double()).abs().max()) for n in weights),
        "logits_difference": float((merged - unmerged).abs().max()),
    }


def _ulps(merged: Tensor, exact: Tensor) -> Tensor:
    """|merged - exact| in units in the last place of the merged value."""
    info = torch.finfo(merged.dtype)
    _, exponent = torch.frexp(merged.double())
    ulp = torch.ldexp(torch.full_like(exact, info.eps), exponent - 1).clamp_min(
        info.smallest_normal * info.eps
    )
    return (merged.double() - exact).abs() / ulp


def _changed(weights: dict[str, Tensor], before: dict[str, Tensor]) -> float:
    """The share of weights whose bits differ from before."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    differ = total = 0
    for name, weight in weights.items():
        kind = integer[weight.element_size()]
        differ += int((weight.detach().view(kind) != before[name].view(kind)).sum())
        total += weight.numel()
    return differ / total
