"""The checks of step 2."""

import math
from types import ModuleType

import torch
from torch import Tensor

from learn.oracle import CheckError, expect, expect_value


def _new(step: ModuleType, seed: int = 0) -> tuple[Tensor, Tensor]:
    factors = step.init_factors(48, 32, 4, torch.Generator().manual_seed(seed))
    if not (isinstance(factors, tuple) and len(factors) == 2):
        raise CheckError("init_factors(48, 32, 4, generator)", expected="(A, B)", got=f"{factors!r}")
    return factors


def check_shapes(step: ModuleType) -> None:
    """A is (r, in) and B is (out, r), here (4, 48) and (32, 4), both float32."""
    A, B = _new(step)
    for name, got, shape in (("A", A, (4, 48)), ("B", B, (32, 4))):
        why = ""
        if tuple(got.shape) == shape[::-1]:
            why = f"{name} is transposed: F.linear(x, {name}) needs (outputs, inputs), as nn.Linear stores W."
        found = (tuple(got.shape), got.dtype)
        if found != (shape, torch.float32):
            raise CheckError(
                f"{name} of init_factors(48, 32, 4, generator)",
                expected=f"{shape}, torch.float32",
                got=f"{found[0]}, {found[1]}",
                why=why,
            )


def check_zero(step: ModuleType) -> None:
    """At the start ΔW = B·A is zero, because B is zero, and A is not."""
    A, B = _new(step)
    if not A.any() and not B.any():
        why = "Both factors are zero. Then both gradients are zero, at every step, and nothing ever trains."
    elif A.any() and B.any():
        why = "Both factors are random. Then ΔW is random, and the model is damaged before the first step."
    elif not A.any():
        why = "A is zero and B is random. That would train too, but it is not what LoRA does. Swap the two."
    else:
        return
    raise CheckError(
        "A and B of init_factors(48, 32, 4, generator)",
        expected="A random, B zero",
        got=f"largest |A| {A.abs().max():.3g}, largest |B| {B.abs().max():.3g}",
        why=why,
    )


def check_distribution(step: ModuleType) -> None:
    """A is uniform between -1/√in and 1/√in, drawn from the generator: the same seed gives the same A."""
    (A, _), (again, _), (other, _) = _new(step), _new(step), _new(step, seed=1)
    if torch.equal(A, other):
        raise CheckError(
            "A is the same for two seeds.", expected="A drawn from `generator`", got="fixed numbers"
        )
    if not torch.equal(A, again):
        raise CheckError(
            "A differs between two calls with the same seed.",
            expected="A drawn from `generator`",
            got="A drawn from the global generator",
            why="Pass generator=generator.",
        )

    def uniform(bound: float, low: float = -1) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.empty(4, 48).uniform_(low * bound, bound, generator=generator)

    normal = torch.empty(4, 48).normal_(generator=torch.Generator().manual_seed(0))
    mistakes = {
        "The bound is 1/in; it is 1/√in.": uniform(1 / 48),
        "The bound is 1/√r; it is 1/√in, so that A·x is of the size of x.": uniform(1 / 2),
        "The bound is 1/√out; it is 1/√in.": uniform(1 / math.sqrt(32)),
        "The bound is 1. Then A·x grows with the width of the layer.": uniform(1),
        "A is between 0 and the bound, so its mean is not zero.": uniform(1 / math.sqrt(48), low=0),
        "This is a standard normal distribution, too wide: divide, or use uniform_.": normal,
    }
    # float32: the bound may be rounded differently
    expect("A of init_factors(48, 32, 4, generator)", A, uniform(1 / math.sqrt(48)), mistakes, tolerance=1e-6)


def check_learning(step: ModuleType) -> None:
    """learning_factors says which gradients are not zero, compared with autograd in all four cases."""
    x, grad = torch.randn(3, 5).double(), torch.randn(3, 7).double()
    for zero in (("B",), ("A",), (), ("A", "B")):
        A = (torch.randn(2, 5).double() * ("A" not in zero)).requires_grad_()
        B = (torch.randn(7, 2).double() * ("B" not in zero)).requires_grad_()
        grads = torch.autograd.grad((x @ A.T) @ B.T, (A, B), grad)
        wanted = {name for name, each in zip(("A", "B"), grads, strict=True) if each.any()}
        got = step.learning_factors(A.detach(), B.detach())
        mistakes = {
            "It is the other factor: the gradient of A has the factor B, and the reverse.": {"A", "B"}
            - set(zero)
        }
        state = " and ".join(f"{name} {'zero' if name in zero else 'random'}" for name in ("A", "B"))
        expect_value(f"learning_factors(A, B) with {state}", got, wanted, mistakes)
    A, B = torch.zeros(2, 5).double(), torch.zeros(7, 2).double()
    A[1, :2] = B[3] = torch.tensor([1.0, -1.0]).double()
    what = "learning_factors(A, B), when each has a 1, a -1 and else zeros"
    expect_value(what, step.learning_factors(A, B), {"A", "B"})
    negative = -torch.ones(2, 5).double(), -torch.ones(7, 2).double()
    expect_value("learning_factors(A, B), when all are -1", step.learning_factors(*negative), {"A", "B"})


CHECKS = (check_shapes, check_zero, check_distribution, check_learning)
