"""Step 12: look inside. What did the adapter learn?"""

import torch
from torch import Tensor


@torch.no_grad()
def singular_values(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The r largest singular values of ΔW = scaling·B·A, float64, largest first. r is at most in and out."""
    # [step 12: torch.linalg.svdvals of ΔW in float64]
    delta = scaling * (lora_B.double() @ lora_A.double())
    S: Tensor = torch.linalg.svdvals(delta)
    return S[: len(lora_A)]
    # [end]


def effective_rank(S: Tensor) -> float:
    """exp(-Σ p·ln p) with p = S / ΣS: how many directions ΔW uses. All singular values S are positive."""
    # [step 12: the formula]
    p = S / S.sum()
    return (-(p * p.log()).sum()).exp().item()
    # [end]


@torch.no_grad()
def cut(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """New factors A (rank, in) and B (out, rank), float64, with the best product of that rank.

    Best: B·A of the new factors is as close to B·A of the old ones as a matrix of that rank can be.
    """
    # [step 12: the strongest `rank` directions of the SVD of B·A, split into two factors]
    U, S, Vh = torch.linalg.svd(lora_B.double() @ lora_A.double(), full_matrices=False)
    return Vh[:rank], U[:, :rank] * S[:rank]
    # [end]
