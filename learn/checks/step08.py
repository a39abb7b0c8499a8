"""The checks of step 8."""

from types import ModuleType

import torch

from learn.checks.step07 import SCALING, make_layer
from learn.oracle import CheckError, expect_error, expect_value


def check_drift(step: ModuleType) -> str:
    """The drift by adding and subtracting adapters in turn, here in bfloat16, is measured right."""
    weight = torch.randn(64, 64).bfloat16()
    deltas = [(0.1 * torch.randn(64, 64)).bfloat16() for _ in range(100)]
    before = weight.clone()
    shares = []
    for count in (0, 1, 10, 100):
        moving = before.clone()
        for delta in deltas[:count]:
            moving = (moving + delta) - delta
        wanted = (moving != before).double().mean().item()
        got = step.drift(weight, deltas[:count])
        if not torch.equal(weight, before):
            raise CheckError("drift(weight, …)", expected="`weight` unchanged", got="changed: work on a copy")
        expect_value(f"drift(weight, deltas) with {count} deltas", got, wanted)
        shares.append(f"{wanted:.1%} after {count}")
    return f"Weights that subtraction does not restore in bfloat16: {', '.join(shares[1:])} adapters."


def check_restores(step: ModuleType) -> None:
    """After 100 cycles of merge and unmerge, W is the same bit for bit, in float32, bfloat16 and float16."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = make_layer(step.RestorableLoRALinear, dtype)
        parameter, before = layer.weight, layer.weight.detach().clone()
        memory = layer.weight.data_ptr()
        name = str(dtype).removeprefix("torch.")
        for cycle in range(1, 101):
            layer.merge()
            merged = layer.weight.detach().clone()
            layer.unmerge()
            if layer.merged:
                raise CheckError("layer.merged after unmerge", expected="False", got="True")
            if torch.equal(layer.weight, before):
                continue
            share = (layer.weight != before).double().mean()
            why = "The sum was rounded, so subtracting ΔW does not give W back. Keep a copy of W instead."
            if torch.equal(layer.weight, merged):
                why = (
                    "The weight still holds W + ΔW. What you kept shares memory with the weight: keep a "
                    "clone(), made before the merge."
                )
            raise CheckError(
                f"the weight after {cycle} cycle{'s' * (cycle != 1)}, {name}",
                expected="W, bit for bit",
                got=f"{share:.1%} of the elements differ, by up to {(layer.weight - before).abs().max():.3g}",
                why=why,
            )
        if layer.weight is not parameter or layer.weight.data_ptr() != memory:
            raise CheckError(
                "the weight after unmerge",
                expected="the same Parameter, written in place",
                got="another object or other memory",
                why="Hooks, optimizers and tied layers hold the old one: write in place with copy_.",
            )


def check_changed_adapter(step: ModuleType) -> None:
    """unmerge restores W even if A or B was changed while the layer was merged."""
    layer = make_layer(step.RestorableLoRALinear)
    before = layer.weight.detach().clone()
    layer.merge()
    with torch.no_grad():
        layer.lora_B.add_(1)
    layer.unmerge()
    if not torch.equal(layer.weight, before):
        raise CheckError(
            "the weight after merge, a change of B, unmerge",
            expected="W, bit for bit",
            got=f"other values, by up to {(layer.weight - before).abs().max():.3g}",
            why="ΔW was subtracted with the new B. Restore the copy of W.",
        )


def check_states(step: ModuleType) -> None:
    """Only a merged layer can be unmerged; then the adapter is active, and merge works again."""
    layer, x = make_layer(step.RestorableLoRALinear), torch.randn(5, 64)
    expect_error("unmerge of a layer that is not merged", RuntimeError, layer.unmerge)
    with torch.no_grad():
        before = layer(x)
        layer.merge()
        layer.unmerge()
        if not torch.equal(layer(x), before):
            raise CheckError(
                "forward after merge and unmerge",
                expected="the output before, bit for bit",
                got=f"other values, by up to {(layer(x) - before).abs().max():.3g}",
            )
    expect_value("layer.unmerged_weight after unmerge", layer.unmerged_weight, None)
    expect_error("unmerge, twice", RuntimeError, layer.unmerge)
    layer.merge()
    expect_value("layer.merged after merge, unmerge, merge", layer.merged, True)


def check_merge(step: ModuleType) -> None:
    """merge still gives what it gave in step 7, and refuses a second time without losing the copy of W."""
    layer = make_layer(step.RestorableLoRALinear)
    before = layer.weight.detach().clone()
    wanted = (before.double() + SCALING * (layer.lora_B.double() @ layer.lora_A.double())).float()
    layer.merge()
    if not torch.equal(layer.weight, wanted):
        raise CheckError("the weight after merge", expected="that of step 7", got="other values")
    expect_error("merge of a merged layer", RuntimeError, layer.merge)
    layer.unmerge()
    if not torch.equal(layer.weight, before):
        raise CheckError(
            "the weight after merge, a refused merge, unmerge",
            expected="W",
            got="other values",
            why=(
                "The refused merge replaced the copy of W by W + ΔW. Keep the copy only once merge "
                "has succeeded."
            ),
        )


CHECKS = (check_drift, check_restores, check_changed_adapter, check_states, check_merge)
