"""The checks of step 7."""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learn.oracle import CheckError, expect, expect_error
from lora.rounding import round_to

SIZE, R, SCALING = 64, 4, 2.0


def make_layer(kind: Any, dtype: torch.dtype = torch.float32, lora_dropout: float = 0.0) -> Any:
    """The reader's layer with a random B, ΔW about as large as W in training, in eval mode."""
    linear = nn.Linear(SIZE, SIZE).to(dtype)
    layer = kind(linear, r=R, lora_alpha=R * SCALING, lora_dropout=lora_dropout).eval()
    with torch.no_grad():
        layer.lora_B.normal_(std=0.1)
    return layer


def _merged(layer: Any) -> Tensor:
    """W + scaling·B·A in float64."""
    W, A, B = (each.detach().double() for each in (layer.weight, layer.lora_A, layer.lora_B))
    merged: Tensor = W + SCALING * (B @ A)
    return merged


def check_float64(step: ModuleType) -> None:
    """merged_weight is W + scaling·B·A in float64, for weights of 64, 32 and 16 bits, and leaves W alone."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        W = torch.randn(SIZE, SIZE).to(dtype)
        A, B = torch.randn(R, SIZE).to(dtype), torch.randn(SIZE, R).to(dtype)
        wanted, before = W.double() + SCALING * (B.double() @ A.double()), W.clone()
        got = step.merged_weight(W, A, B, SCALING)
        what = f"merged_weight(W, A, B, {SCALING}) for {str(dtype).removeprefix('torch.')}"
        if not torch.equal(W, before):
            why = "double() of a float64 tensor is the tensor itself, so an operation in place changes W."
            raise CheckError(f"W after {what}", expected="unchanged", got="changed", why=why)
        if not (isinstance(got, Tensor) and got.dtype == torch.float64):
            expect(what, got, wanted, tolerance=0)
        mistakes = {
            "The scaling is missing.": W.double() + B.double() @ A.double(),
            "The product is transposed.": W.double() + SCALING * (B.double() @ A.double()).T,
            "This is ΔW alone.": wanted - W.double(),
            "B·A is computed in the dtype of the factors and cast afterwards: cast first, then multiply.": (
                W.double() + SCALING * (B @ A).double()
            ),
            "The sum is computed in the dtype of W and cast afterwards: cast first.": (
                W + SCALING * (B @ A)
            ).double(),
        }  # fmt: skip
        # Four products and their sum in float64 round by less than 1e-14; a product in float32 by 1e-8.
        expect(what, got, wanted, mistakes, tolerance=1e-12)


def check_one_rounding(step: ModuleType) -> str:
    """merge writes the float64 sum into the weight, rounded once, in float32, bfloat16 and float16."""
    notes = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = make_layer(step.MergeableLoRALinear, dtype)
        before, pointer = layer.weight.detach().clone(), layer.weight
        wanted, memory = _merged(layer), layer.weight.data_ptr()
        layer.merge()
        name = str(dtype).removeprefix("torch.")
        same = layer.weight is pointer and layer.weight.data_ptr() == memory
        if not same or layer.weight.dtype != dtype:
            raise CheckError(
                f"the weight after merge, {name}",
                expected="the same Parameter, written in place",
                got=f"another object or other memory, {layer.weight.dtype}",
                why="Hooks, optimizers and tied layers hold the Parameter: use self.weight.copy_(…).",
            )
        if torch.equal(layer.weight, before):
            raise CheckError(f"the weight after merge, {name}", expected="W + ΔW", got="W, unchanged")
        _expect_rounded(f"the weight after merge, {name}", layer, before, wanted)
        steps = before + (SCALING * (layer.lora_B @ layer.lora_A)).to(dtype)
        notes.append(f"{(steps != layer.weight).double().mean():.1%} in {name}")
    return f"Rounding ΔW before adding it would give other weights: {', '.join(notes)}."


def _expect_rounded(what: str, layer: Any, before: Tensor, wanted: Tensor) -> None:
    """Accepts torch's conversion to 16 bits too, which rounds some numbers beside a tie the wrong way."""
    got, dtype = layer.weight.detach(), layer.weight.dtype
    rounded = wanted.to(dtype)
    if torch.equal(got, rounded) or torch.equal(got, round_to(wanted, dtype)):
        return
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    delta = SCALING * (B @ A)
    mistakes = {
        "ΔW is missing its scaling.": (before.double() + B.double() @ A.double()).to(dtype),
        "ΔW was rounded before it was added: two roundings.": before + delta.to(dtype),
        "The sum was formed in float32, not in float64.": (before.float() + delta).to(dtype),
        "The scaling is applied twice.": (before.double() + SCALING**2 * (B.double() @ A.double())).to(dtype),
    }
    wrong = (got != rounded).double().mean()
    error = ((got.double() - wanted).abs() / (rounded.double() - wanted).abs().max()).max()
    why = next((why for why, each in mistakes.items() if torch.equal(got, each)), "")
    raise CheckError(
        what,
        expected="W + scaling·B·A, formed in float64 and rounded once",
        got=(
            f"{wrong:.1%} of the elements are other numbers; the largest error is {error:.2g} "
            "times that of one rounding"
        ),
        why=why,
    )


def check_dropout_stays_outside(step: ModuleType) -> None:
    """merge in training mode with dropout 0.5 gives the same weight as in eval mode: no mask is merged."""
    layer = make_layer(step.MergeableLoRALinear, lora_dropout=0.5).train()
    wanted = _merged(layer)
    layer.merge()
    if not torch.equal(layer.weight, wanted.float()):
        raise CheckError(
            "the weight after merge in training mode, lora_dropout 0.5",
            expected="W + scaling·B·A",
            got=f"other values, by up to {(layer.weight - wanted).abs().max():.3g}",
            why=(
                "Dropout is inside the merge: ΔW comes from the factors, not from a forward pass in "
                "training mode."
            ),
        )


def check_forward(step: ModuleType) -> None:
    """After merge, forward is one product with the merged weight, and close to the output before."""
    layer, x = make_layer(step.MergeableLoRALinear), torch.randn(5, SIZE)
    with torch.no_grad():
        before = layer(x)
        layer.merge()
        after, wanted = layer(x), F.linear(x, layer.weight, layer.bias)
    twice = wanted + SCALING * F.linear(F.linear(x, layer.lora_A), layer.lora_B)
    why = "The adapter is added again, though the weight holds it already: ΔW counts twice."
    expect("forward after merge", after, wanted, {why: twice.detach()}, tolerance=0)
    expect(
        "forward after merge, against before", after, before, tolerance=1e-5
    )  # float32 sums of 64 products


def check_second_merge(step: ModuleType) -> None:
    """A second merge raises RuntimeError, and changes nothing."""
    layer = make_layer(step.MergeableLoRALinear)
    layer.merge()
    weight = layer.weight.detach().clone()
    why = "Merging twice adds ΔW twice."
    expect_error("merge of a merged layer", RuntimeError, layer.merge, why=why)
    if not torch.equal(weight, layer.weight):
        raise CheckError("the weight after a refused merge", expected="unchanged", got="changed")


def check_modes(step: ModuleType) -> None:
    """train() and eval() change no weight: only merge does."""
    layer = step.MergeableLoRALinear(nn.Linear(SIZE, SIZE), r=R, lora_alpha=R * SCALING)
    with torch.no_grad():
        layer.lora_B.normal_()
    weight = layer.weight.detach().clone()
    for mode in ("eval", "train"):
        getattr(layer, mode)()
        if not torch.equal(weight, layer.weight):
            raise CheckError(
                f"the weight after layer.{mode}()",
                expected="unchanged",
                got="changed",
                why=(
                    f"{mode}() merges. Then every validation pass rounds the weights, and a saved model "
                    "may hold ΔW twice. Merge on request only."
                ),
            )


CHECKS = (
    check_float64,
    check_modes,
    check_one_rounding,
    check_dropout_stays_outside,
    check_forward,
    check_second_merge,
)
