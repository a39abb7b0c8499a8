"""The checks of step 1."""

from types import ModuleType

import torch

from learn.oracle import CheckError, NewTensors, expect, expect_value


def check_delta(step: ModuleType) -> None:
    """delta(A, B) is the product B·A of shape (out, in), here (7, 5), compared in float64."""
    A, B = torch.randn(2, 5).double(), torch.randn(7, 2).double()
    transposed = "This is the transpose of ΔW, (in, out): the product is B·A, not Aᵀ·Bᵀ."
    expect("delta(A, B)", step.delta(A, B), B @ A, {transposed: (B @ A).T})


def check_count(step: ModuleType) -> None:
    """low_rank_parameters counts the elements of two factors, for a square and two other layers."""
    for out, in_, r in ((768, 768, 8), (1536, 384, 4), (384, 1536, 4)):
        counted = torch.empty(r, in_).numel() + torch.empty(out, r).numel()
        mistakes = {
            "This is the size of W itself.": out * in_,
            "This assumes a square layer: B has `out` rows, A has `in` columns.": 2 * r * in_,
            "This assumes a square layer: A has `in` columns, B has `out` rows.": 2 * r * out,
            "This multiplies the two sizes. There are two separate matrices: add their sizes.": r
            * in_
            * out
            * r,
        }
        what = f"low_rank_parameters({out}, {in_}, {r})"
        expect_value(what, step.low_rank_parameters(out, in_, r), counted, mistakes)


def check_saving_rank(step: ModuleType) -> None:
    """largest_saving_rank is the largest r that saves elements, found here by trying every r."""
    for out, in_ in ((768, 768), (1536, 384), (5, 7), (3, 3)):
        best = max(r for r in range(out * in_) if r * (out + in_) < out * in_)
        mistakes = {
            f"With r = {best + 1} the factors have as many elements as W, or more: that saves nothing.": best
            + 1,
            "This is the largest rank of W. Two factors of that rank have more elements than W.": min(
                out, in_
            ),
        }
        what = f"largest_saving_rank({out}, {in_})"
        expect_value(what, step.largest_saving_rank(out, in_), best, mistakes)


def check_apply(step: ModuleType) -> None:
    """apply_delta(x, A, B) is ΔW·x for every row of x, and forms no matrix of the size of ΔW."""
    x, A, B = torch.randn(2, 3, 40).double(), torch.randn(2, 40).double(), torch.randn(50, 2).double()
    with NewTensors() as new:
        got = step.apply_delta(x, A, B)
    expect("apply_delta(x, A, B) for x (2, 3, 40), A (2, 40), B (50, 2)", got, x @ (B @ A).T)
    largest = max(new.shapes, key=lambda shape: torch.Size(shape).numel())
    if torch.Size(largest).numel() >= 40 * 50:
        raise CheckError(
            f"apply_delta forms ΔW: a tensor of shape {largest}, {40 * 50:,} elements.",
            expected="nothing larger than the input and the output, 300 elements",
            why="The result is right, but the saving is lost. Multiply x by A first, and the result by B.",
        )


CHECKS = (check_delta, check_count, check_saving_rank, check_apply)
