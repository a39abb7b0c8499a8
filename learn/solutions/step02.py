"""Step 2: the start. Which factor is zero, and what can learn in the first step."""

import math

import torch
from torch import Tensor


def init_factors(
    in_features: int, out_features: int, r: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """New factors A (r, in) and B (out, r), float32.

    A is drawn from `generator`, uniform between -1/√in and 1/√in. B is zero.
    """
    # [step 2: A from tensor.uniform_(low, high, generator=generator), B zero]
    bound = 1 / math.sqrt(in_features)
    lora_A = torch.empty(r, in_features).uniform_(-bound, bound, generator=generator)
    return lora_A, torch.zeros(out_features, r)
    # [end]


def learning_factors(lora_A: Tensor, lora_B: Tensor) -> set[str]:
    """Which factors get a gradient that is not zero, when A and B have these values.

    Returns a subset of {"A", "B"}. Assume that x and the gradient of h are random, so that no product with
    them is zero by chance. Do not call autograd.
    """
    # [step 2: the gradient of A has the factor B, the gradient of B has the factor A]
    learning = set()
    if lora_B.any():
        learning.add("A")
    if lora_A.any():
        learning.add("B")
    return learning
    # [end]
