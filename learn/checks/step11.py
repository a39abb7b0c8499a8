"""The checks of step 11."""

import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from learn.checks import reference
from learn.checks.reference import Reference
from learn.course import folder_of
from learn.oracle import CheckError, expect, expect_value
from lora import check_layer, merged, read_adapter
from train.config import Recipe, load_recipe
from train.job import run_job
from train.runs import ADAPTER

YOURS, OURS = "run-yours", "run-library"
EPOCHS = 2  # enough for a good classifier; it is trained twice
SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.5}


def _pair(step: ModuleType) -> tuple[Any, Any]:
    """The reader's layer and the library's, on one Linear, with the same seed."""
    linear = nn.Linear(48, 32)
    yours, ours = (
        kind(linear, **SETTINGS, generator=torch.Generator().manual_seed(3))
        for kind in (step.MyLoRALinear, Reference)
    )
    return yours, ours


def check_start(step: ModuleType) -> None:
    """From the same seed your layer starts with the library's A, B and scaling."""
    yours, ours = _pair(step)
    for name in ("lora_A", "lora_B"):
        got = getattr(yours, name, None)
        if not isinstance(got, nn.Parameter):
            raise CheckError(f"layer.{name}", expected="an nn.Parameter", got=f"{type(got).__name__}")
        expect(
            f"layer.{name}", got, getattr(ours, name), tolerance=1e-6
        )  # the bound may be rounded differently
    expect_value("layer.scaling", yours.scaling, ours.scaling, {"Divide lora_alpha by r.": 8})
    expect_value("layer.lora_dropout", yours.lora_dropout, 0.5)


def check_outputs(step: ModuleType) -> None:
    """The outputs, in float32 and inside autocast, and the merged weight are the library's."""
    yours, ours = _pair(step)
    with torch.no_grad():
        ours.lora_B.normal_()
        yours.lora_A.copy_(ours.lora_A)
        yours.lora_B.copy_(ours.lora_B)
    x = torch.randn(5, 48)
    yours.eval()
    ours.eval()
    expect("forward in eval mode", yours(x), ours(x).detach(), tolerance=1e-6)  # float32 sums of 48 products
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = yours(x), ours(x).detach()
    if isinstance(got, torch.Tensor) and got.dtype != wanted.dtype:
        raise CheckError(
            "forward inside autocast",
            expected=f"{wanted.dtype}",
            got=f"{got.dtype}",
            why="The next layer gets another dtype than without the adapter: cast the result to h.dtype.",
        )
    expect("forward inside autocast", got, wanted, tolerance=1e-2)  # bfloat16 has 8 bits
    with torch.no_grad():
        wanted = ours.merged_weight()
        expect("layer.merged_weight()", yours.merged_weight(), wanted, tolerance=1e-12)
    model = nn.Sequential(yours)
    with merged(model):
        expect("layer.merged_weight() while merged", yours.merged_weight(), wanted, tolerance=1e-12)


def check_promises(step: ModuleType) -> None:
    """Your class keeps the promises that the library relies on, as `lora.check_layer` tests them."""
    report = check_layer(step.MyLoRALinear)
    if report.problems:
        raise CheckError(
            "lora.check_layer(MyLoRALinear)",
            expected=f"{len(report.lines)} properties that hold",
            got=f"{len(report.problems)} that do not, first: {report.problems[0]}",
        )


def check_training(step: ModuleType) -> str:
    """Two epochs of the quickstart with your layer end where the library's layer ends."""
    _, recipe = load_recipe("quickstart", {"epochs": EPOCHS})
    return compare(Path(str(step.__file__)), recipe, folder_of(step))


def compare(path: Path, recipe: Recipe, folder: Path) -> str:
    """Trains MyLoRALinear of `path` and the library's layer by one recipe, and compares what they learned.

    Equal bits are reported. Otherwise the test accuracies may differ by 3 points, which is more than another
    order of roundings changes, and less than a mistake in the formula. Raises CheckError.
    """
    for name in [name for name in sys.modules if name.startswith("layer_")]:
        del sys.modules[name]  # load_layer loads a file once, but an earlier step may have changed
    results = {}
    for name, layer in ((YOURS, f"{path}:MyLoRALinear"), (OURS, f"{reference.__file__}:Reference")):
        shutil.rmtree(folder / name, ignore_errors=True)
        changed = Recipe(**{**vars(recipe), "layer": layer})
        results[name] = run_job(name, changed, folder / name).summary
    yours, ours = (read_adapter(folder / name / ADAPTER).tensors for name in (YOURS, OURS))
    same = sum(torch.equal(yours[name], ours[name]) for name in ours)
    accuracy, wanted = (results[name]["test_accuracy"] for name in (YOURS, OURS))
    found = f"test accuracy {accuracy:.2%}, with the library's layer {wanted:.2%}"
    if abs(accuracy - wanted) > 0.03:
        raise CheckError(
            f"the test accuracy after {recipe.epochs} epochs",
            expected=f"{wanted:.2%}, as with the library's layer",
            got=f"{accuracy:.2%}",
        )
    if same == len(ours):
        return f"{found}. All {same} tensors of the adapter and the head are equal, bit for bit."
    return f"{found}. {same} of {len(ours)} tensors are equal, bit for bit; the others differ a little."


CHECKS = (check_start, check_outputs, check_promises, check_training)
