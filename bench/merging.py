"""What merging costs in exactness: roundings, drift over cycles, logits; and PEFT's beside it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora import LoraConfig, inject, merge, unmerge
from lora.tree import lora_layers
from model import load_base

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TARGETS = ("query", "value")


def run(quick: bool) -> dict[str, Any]:
    """Rows by implementation and dtype, on MiniLM with a random adapter, r = 8 on query and value."""
    cycles = 20 if quick else 1000
    peers: dict[str, Callable[[torch.dtype, int], dict[str, Any]]] = {"ours": _ours}
    if importlib.util.find_spec("peft"):
        peers["peft"] = _peft
    rows = []
    for dtype in _DTYPES:
        for name, measure in peers.items():
            print(f"merging: {name}, {dtype}, {cycles} cycles", file=sys.stderr)
            rows.append(
                {"implementation": name, "dtype": str(dtype).removeprefix("torch."), **measure(dtype, cycles)}
            )
    return {"model": "minilm", "r": 8, "cycles": cycles, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The rows to read."""
    cycles = f"{result['cycles']:,}"
    lines = [
        f"{'':5} {'dtype':>9}  {'rounding, ulps':>16}  {'weights changed after':>22}  {'largest change':>14}"
        f"  {'logits, merged':>15}",
        f"{'':5} {'':>9}  {'largest':>8}{'mean':>8}  {'1 cycle':>10}{cycles + ' cyc.':>12}  {'':>14}"
        f"  {'against apart':>15}",
    ]
    lines += [
        f"{row['implementation']:5} {row['dtype']:>9}"
        f"  {row['largest_ulps']:>8.3f}{row['mean_ulps']:>8.3f}"
        f"  {row['changed_after_one']:>10.2%}{row['changed_after_all']:>12.2%}"
        f"  {row['largest_change']:>14.2e}  {row['logits_difference']:>15.2e}"
        for row in result["rows"]
    ]
    return "\n".join(lines)


def _ours(dtype: torch.dtype, cycles: int) -> dict[str, Any]:
    model = _model(dtype)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=_TARGETS)
    inject(model, config)
    layers = lora_layers(model)
    _randomise({name: layer.lora_B for name, layer in layers.items()})
    weights = {name: layer.weight for name, layer in layers.items()}
    deltas = {name: layer.delta_weight() for name, layer in layers.items()}
    return _measure(model, weights, deltas, lambda: merge(model), lambda: unmerge(model), cycles)


def _peft(dtype: torch.dtype, cycles: int) -> dict[str, Any]:
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(_TARGETS))
    # As PEFT does by itself: adapters in float32 on a 16-bit base.
    model = peft.get_peft_model(_model(dtype), config).eval()
    ours = _model(dtype)  # the same starts, drawn by name
    inject(ours, LoraConfig(r=8, lora_alpha=16, target_modules=_TARGETS))
    layers = {name: model.base_model.model.get_submodule(name) for name in lora_layers(ours)}
    for name, layer in lora_layers(ours).items():
        layers[name].lora_A["default"].weight.data.copy_(layer.lora_A.data)
    _randomise({name: layer.lora_B["default"].weight for name, layer in layers.items()})
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    deltas = {
        name: 2.0
        * layer.lora_B["default"].weight.detach().double()
        @ layer.lora_A["default"].weight.detach().double()
        for name, layer in layers.items()
    }
    return _measure(model, weights, deltas, model.merge_adapter, model.unmerge_adapter, cycles)


def _model(dtype: torch.dtype) -> nn.Module:
    model: nn.Module = load_base("minilm")[0]
    return model.to(dtype)


@torch.no_grad()
def _randomise(lora_B: dict[str, Tensor]) -> None:
    """As large as training makes them: ΔW some percent of W."""
    generator = torch.Generator().manual_seed(0)
    for name in sorted(lora_B):
        lora_B[name].copy_(0.02 * torch.randn(lora_B[name].shape, generator=generator))


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
    apart = model(input_ids=input_ids).logits.double()
    merge_all()
    folded = model(input_ids=input_ids).logits.double()
    ulps = torch.cat(
        [_ulps(weights[name], before[name].double() + deltas[name]).view(-1) for name in weights]
    )
    unmerge_all()
    changed_after_one = _changed(weights, before)
    for _ in range(cycles - 1):
        merge_all()
        unmerge_all()
    return {
        "largest_ulps": float(ulps.max()),
        "mean_ulps": float(ulps.mean()),
        "changed_after_one": changed_after_one,
        "changed_after_all": _changed(weights, before),
        "largest_change": max(float((weights[n].double() - before[n].double()).abs().max()) for n in weights),
        "logits_difference": float((folded - apart).abs().max()),
    }


def _ulps(merged: Tensor, exact: Tensor) -> Tensor:
    """|merged - exact| in units of the last place at the merged value."""
    info = torch.finfo(merged.dtype)
    _, exponent = torch.frexp(merged.double())
    ulp = torch.ldexp(torch.full_like(exact, info.eps), exponent - 1).clamp_min(
        info.smallest_normal * info.eps
    )
    return (merged.double() - exact).abs() / ulp


def _changed(weights: dict[str, Tensor], before: dict[str, Tensor]) -> float:
    """The share of weights whose bits are others than before."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    differ = total = 0
    for name, weight in weights.items():
        kind = integer[weight.element_size()]
        differ += int((weight.detach().view(kind) != before[name].view(kind)).sum())
        total += weight.numel()
    return differ / total
