"""The checks of step 12."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from learn.checks.step11 import YOURS
from learn.course import folder_of
from learn.oracle import expect, expect_value
from lora.adapted import lora_layers
from lora.anatomy import delta_svd, effective_rank, svd
from train.inference import TestSplit
from train.runs import SUMMARY, run_recipe
from train.trained import load_trained


def _factors() -> tuple[Tensor, Tensor]:
    """A (6, 24) and B (32, 6), float32, with a product of uneven directions."""
    return torch.randn(6, 24), torch.randn(32, 6) * 0.5 ** torch.arange(6)


def check_singular_values(step: ModuleType) -> None:
    """singular_values equals the library's, which finds them from the r x r core of two QR decompositions."""
    A, B = _factors()
    wanted = delta_svd(A, B, 2.0).S
    full = torch.linalg.svdvals(2 * (B.double() @ A.double()))
    mistakes = {
        "The scaling is missing.": wanted / 2,
        "These are the singular values of A alone.": svd(A).S,
        "Of ΔW's singular values only the first r are not zero: cut the others off.": full,
        "The smallest comes first; the largest should.": wanted.flip(0),
        "These are the squares, the eigenvalues of ΔWᵀ·ΔW.": wanted.square(),
    }
    expect("singular_values(A, B, 2.0)", step.singular_values(A, B, 2.0), wanted, mistakes)


def check_effective_rank(step: ModuleType) -> None:
    """effective_rank is 1 for one direction, k for k equal ones, and the library's value in between."""
    for S in (torch.tensor([3.0]), torch.full((5,), 0.7), torch.tensor([4.0, 2.0, 1.0, 0.5])):
        S = S.double()
        p = S / S.sum()
        q = S.square() / S.square().sum()
        wanted = effective_rank(S)
        got = step.effective_rank(S)
        mistakes = {
            "This is the entropy. Its exponential counts directions.": -(p * p.log()).sum(),
            "p is formed from the squares of S; in this definition it is S / ΣS.": (
                -(q * q.log()).sum()
            ).exp(),
            "The logarithm has base 2, and the exponential base e.": (-(p * p.log2()).sum()).exp(),
            "The sign of the sum is missing.": (p * p.log()).sum().exp(),
        }
        known = {why: each.reshape(1) for why, each in mistakes.items()}
        what = f"effective_rank({S.tolist()})"
        if not isinstance(got, int | float):
            expect_value(what, got, wanted)
        value, exact = (torch.tensor([number], dtype=torch.float64) for number in (got, wanted))
        expect(what, value, exact, known)


def check_cut(step: ModuleType) -> None:
    """cut gives the factors of the best approximation, whose error is the library's, for ranks 1 to 6."""
    A, B = _factors()
    product = B.double() @ A.double()
    for rank in (1, 3, 6):
        cut = step.cut(A, B, rank)
        if not (isinstance(cut, tuple) and len(cut) == 2):
            expect_value(f"cut(A, B, {rank})", cut, "two factors (A, B)")
        shapes = tuple(tuple(each.shape) for each in cut)
        swapped = {"The two factors are swapped: return A, then B.": ((32, rank), (rank, 24))}
        expect_value(f"the shapes of cut(A, B, {rank})", shapes, ((rank, 24), (32, rank)), swapped)
        dtypes = {each.dtype for each in cut}
        expect_value(f"the dtypes of cut(A, B, {rank})", dtypes, {torch.float64})
        best = svd(product)
        mistakes = {
            "These are the first rows of A and columns of B, not the strongest directions of B·A.": (
                B[:, :rank].double() @ A[:rank].double()
            ),
            "The singular values are missing.": best.U[:, :rank] @ best.V[:, :rank].T,
            "The singular values are in both factors, so the product has their squares.": (
                (best.U[:, :rank] * best.S[:rank].square()) @ best.V[:, :rank].T
            ),
        }  # fmt: skip
        expect(f"B·A of cut(A, B, {rank})", cut[1].double() @ cut[0].double(), best.truncated(rank), mistakes)


def check_run(step: ModuleType) -> str:
    """With your functions, the run of step 11 is measured: its effective ranks, and its accuracy by rank."""
    folder = folder_of(step) / YOURS
    if not (folder / SUMMARY).is_file():
        return f"There is no run in {folder.name}, so nothing is measured. `make learn STEP=11` trains one."
    recipe, trained = run_recipe(folder), load_trained(folder)
    test_set = TestSplit.of(trained, recipe)
    test_set.prepare(trained.model)
    layers: list[Any] = list(lora_layers(trained.model).values())
    ranks = [
        step.effective_rank(step.singular_values(each.lora_A.detach(), each.lora_B.detach(), each.scaling))
        for each in layers
    ]
    start = [(each.lora_A.detach().clone(), each.lora_B.detach().clone()) for each in layers]
    found = []
    for rank in (recipe.r, 1, 0):
        with torch.no_grad():
            for layer, (A, B) in zip(layers, start, strict=True):
                layer.lora_A.zero_()
                layer.lora_B.zero_()
                if rank:
                    layer.lora_A[:rank], layer.lora_B[:, :rank] = step.cut(A, B, rank)
        found.append(f"{test_set.score(trained.model)['accuracy']:.1%} with rank {rank}")
    return (
        f"Effective rank of ΔW: {min(ranks):.1f} to {max(ranks):.1f} in {len(ranks)} layers of rank "
        f"{recipe.r}. Test accuracy: {', '.join(found)}."
    )


CHECKS = (check_singular_values, check_effective_rank, check_cut, check_run)
