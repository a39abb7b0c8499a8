"""The checks of step 3."""

import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learn.oracle import CheckError, expect, expect_value


def _layer(step: ModuleType, in_: int = 6, out: int = 6, **settings: Any) -> Any:
    """The reader's layer on a float64 Linear, in eval mode, with a random B."""
    layer = step.MyLoRALinear(nn.Linear(in_, out).double(), **{"r": 2, "lora_alpha": 6, **settings}).eval()
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


def check_scaling(step: ModuleType) -> None:
    """layer.scaling is lora_alpha / r, for three pairs."""
    for r, alpha in ((2, 6), (8, 16), (4, 1)):
        mistakes = {
            "This is lora_alpha alone. Divide by r, so that another r needs no other learning rate.": alpha,
            "This is r / lora_alpha, upside down.": r / alpha,
            "This is lora_alpha / √r, which is rsLoRA's scaling.": alpha / math.sqrt(r),
        }
        layer = _layer(step, r=r, lora_alpha=alpha)
        expect_value(f"layer.scaling for r={r}, lora_alpha={alpha}", layer.scaling, alpha / r, mistakes)


def check_start(step: ModuleType) -> None:
    """With B = 0 the output is W·x + b, bit for bit, in eval mode and in training mode with dropout 0.5."""
    layer, x = _layer(step, lora_dropout=0.5), torch.randn(4, 6).double()
    with torch.no_grad():
        layer.lora_B.zero_()
    wanted = F.linear(x, layer.weight, layer.bias)
    mistakes = {
        "The bias is missing.": F.linear(x, layer.weight),
        "The scaling multiplies W·x + b too; it belongs to the adapter alone.": 3.0 * wanted,
    }
    expect("forward in eval mode, B = 0", layer(x), wanted, mistakes, tolerance=0)
    if not torch.equal(layer.train()(x), wanted):
        raise CheckError(
            "forward in training mode, B = 0, lora_dropout 0.5",
            expected="W·x + b, the same as in eval mode",
            got=f"other values, by up to {(layer(x) - wanted).abs().max():.3g}",
            why="Dropout has reached the frozen path: it belongs to the adapter's input alone.",
        )


def check_formula(step: ModuleType) -> None:
    """In eval mode the output is W·x + b + scaling·B·A·x, compared in float64, for x of three dimensions."""
    layer, x = _layer(step), torch.randn(2, 3, 6).double()
    h, thin = F.linear(x, layer.weight, layer.bias), F.linear(x, layer.lora_A)
    update, s = F.linear(thin, layer.lora_B), 3.0
    mistakes = {
        "The scaling is missing: this is W·x + b + B·A·x.": h + update,
        "The adapter is missing: this is W·x + b.": h,
        "This is the adapter's output alone: add W·x + b.": s * update,
        "The scaling is applied twice.": h + s * s * update,
        "The scaling is lora_alpha, not lora_alpha / r.": h + 6 * update,
        "The scaling multiplies W·x + b too; it belongs to the adapter alone.": s * (h + update),
        "The bias is missing.": h - layer.bias + s * update,
        "The bias is added twice.": h + layer.bias + s * update,
        "The bias is scaled too; it belongs to the frozen layer.": h + s * (update + layer.bias),
    }
    expect("forward in eval mode, r=2, lora_alpha=6", layer(x), h + s * update, mistakes)
    bare = step.MyLoRALinear(nn.Linear(6, 6, bias=False).double(), r=2, lora_alpha=6).eval()
    expect("forward of a layer without bias", bare(x), F.linear(x, bare.weight))


def check_eval_drops_nothing(step: ModuleType) -> None:
    """In eval mode nothing is dropped: two calls with lora_dropout 0.5 are equal, by the formula."""
    layer, x = _layer(step, lora_dropout=0.5), torch.randn(4, 6).double()
    h = F.linear(x, layer.weight, layer.bias)
    wanted = h + 3.0 * F.linear(F.linear(x, layer.lora_A), layer.lora_B)
    got = layer(x)
    if not torch.equal(got, layer(x)):
        raise CheckError(
            "forward in eval mode, twice, lora_dropout 0.5",
            expected="the same output",
            got="two outputs",
            why="Dropout is active in eval mode. F.dropout(x, p) drops by default: pass self.training.",
        )
    expect("forward in eval mode, lora_dropout 0.5", got, wanted)


def check_dropout(step: ModuleType) -> None:
    """In training mode single elements of the adapter's input are dropped, the others divided by 1 - p."""
    layer = _layer(step, in_=8, out=1, r=1, lora_alpha=1, lora_dropout=0.25).train()
    with torch.no_grad():
        for parameter, value in ((layer.weight, 0), (layer.bias, 0), (layer.lora_A, 1), (layer.lora_B, 1)):
            parameter.fill_(value)
        # The output is the sum of those powers of two that were kept, so it says which they are.
        sums: Tensor = layer((2.0 ** torch.arange(8)).double().repeat(64, 1)).flatten()
    kept = (sums * 0.75).round()
    what = "forward in training mode, lora_dropout 0.25, for an adapter that adds up its 8 inputs"
    if (sums - 255).abs().max() < 1e-9:
        raise CheckError(what, expected="some inputs dropped", got="no input is dropped")
    if set(kept.tolist()) <= {0.0, 255.0}:
        raise CheckError(
            what,
            expected="single inputs dropped",
            got="all inputs of a row are dropped, or none",
            why="Dropout is applied after A, or to the output. Apply it to x, before A.",
        )
    if (sums * 0.75 - kept).abs().max() > 1e-9:
        raise CheckError(
            what,
            expected="the kept inputs times 1 / (1 - 0.25) = 4/3",
            got=f"sums such as {sums[0]:g}, where multiples of 4/3 are possible",
            why="F.dropout divides what it keeps by 1 - p, so that the mean stays the same.",
        )
    if (kept == kept[0]).all():
        raise CheckError(what, expected="a mask of its own for each row", got="one mask for all rows")
    share = sum(((kept.long() >> bit) & 1).double().mean().item() for bit in range(8)) / 8
    if (kept > 255).any() or not 0.63 < share < 0.87:  # 512 draws stay within 0.75 ± 0.12 (6 sigma)
        raise CheckError(
            what,
            expected="three quarters of the inputs, times 4/3",
            got=f"{share:.0%} of the inputs, largest sum {sums.max():g}",
        )


def check_gradients(step: ModuleType) -> None:
    """Backward reaches A, B and x, x on both paths, and forward in training mode does not change x."""
    layer, upstream = _layer(step), torch.randn(4, 6).double()
    x = torch.randn(4, 6).double().requires_grad_()
    tensors = {"x": x, "lora_A": layer.lora_A, "lora_B": layer.lora_B}
    h = F.linear(x, layer.weight, layer.bias) + 3.0 * F.linear(F.linear(x, layer.lora_A), layer.lora_B)
    wanted = torch.autograd.grad(h, list(tensors.values()), upstream)
    frozen = upstream @ layer.weight.detach()
    mistakes = {
        "The frozen path passes no gradient to x. W is frozen, x is not: no no_grad(), no detach().": (
            wanted[0] - frozen
        ),
        "The adapter's path passes no gradient to x.": frozen,
    }
    found = torch.autograd.grad(layer(x), list(tensors.values()), upstream, allow_unused=True)
    for (name, tensor), got, expected in zip(tensors.items(), found, wanted, strict=True):
        got = torch.zeros_like(tensor) if got is None else got
        expect(f"the gradient of {name}", got, expected, mistakes if name == "x" else None)
    layer, x = _layer(step, lora_dropout=0.5).train(), torch.ones(4, 6).double()
    layer(x)
    if not (x == 1).all():
        raise CheckError(
            "x after forward in training mode",
            expected="unchanged: the query, key and value layers share it",
            got="changed: dropout wrote to it in place",
        )


CHECKS = (
    check_scaling, check_start, check_formula, check_eval_drops_nothing, check_dropout, check_gradients,
)  # fmt: skip
