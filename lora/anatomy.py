"""What an adapter learnt, as mathematics on tensors: sizes, ranks, directions, and what they share.

Everything is computed in float64 and nothing here changes its arguments. M stands for a matrix
(out, in), ΔW = s·B·A for an adapter's, s its scaling (lora/linear.py). Directions are orthonormal
columns, strongest first: U (out, k) on the side of the outputs, V (in, k) on the side of the inputs.

Sources: Hu et al. 2021, arXiv 2106.09685, section 7 and appendices G and H (similarity, amplification);
Roy and Vetterli, EUSIPCO 2007 (effective rank); Rudelson and Vershynin 2007, arXiv math/0503442 (stable
rank); Björck and Golub 1973 (principal angles); Shuttleworth et al. 2024, arXiv 2410.21228 (intruders).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Svd:
    """M = U·diag(S)·Vᵀ, thin: U (out, k), S (k,) descending, V (in, k), all float64."""

    U: Tensor
    S: Tensor
    V: Tensor

    def truncated(self, rank: int) -> Tensor:
        """The best approximation of M with that rank, (out, in): its strongest directions (Eckart-Young)."""
        return (self.U[:, :rank] * self.S[:rank]) @ self.V[:, :rank].T


@torch.no_grad()
def svd(M: Tensor) -> Svd:
    """The thin singular value decomposition of any matrix, k = min(out, in)."""
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    return Svd(U, S, Vh.T)


@torch.no_grad()
def delta_svd(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Svd:
    """ΔW = s·B·A decomposed, without ever forming it: lora_A (r, in), lora_B (out, r).

    k = r, which must not exceed in or out.

    With B = Q_B·R_B and Aᵀ = Q_A·R_A, ΔW = Q_B·(s·R_B·R_Aᵀ)·Q_Aᵀ: the singular values are those of the
    r x r core in the middle, and its singular vectors turned by Q_B and Q_A are ΔW's. QR and SVD are both
    backward stable, so a singular value is wrong by no more than rounding times the largest one.
    """
    Q_B, R_B = torch.linalg.qr(lora_B.double())  # (out, r), (r, r)
    Q_A, R_A = torch.linalg.qr(lora_A.double().T)  # (in, r), (r, r)
    core = svd(scaling * (R_B @ R_A.T))
    return Svd(Q_B @ core.U, core.S, Q_A @ core.V)


@torch.no_grad()
def singular_values_from_grams(gram_A: Tensor, gram_B: Tensor) -> Tensor:
    """Singular values of B·A, (r,) descending, from A·Aᵀ and Bᵀ·B alone, both (r, r) float64.

    Cheap, for watching: squaring costs half of the digits, so a value is wrong by some 1e-8 of the
    largest. `delta_svd` is exact.
    """
    values, vectors = torch.linalg.eigh(gram_B)
    root = vectors * values.clamp(min=0).sqrt()  # Bᵀ·B = root·rootᵀ
    squares = torch.linalg.eigvalsh(root.T @ gram_A @ root)  # the eigenvalues of Bᵀ·B·A·Aᵀ, ascending
    S: Tensor = squares.clamp(min=0).sqrt().flip(0)
    return S


def effective_rank(S: Tensor) -> float:
    """exp(-Σ p·ln p) with p = S / ΣS, from 1 (one direction) to k (all alike); 0 for M = 0.

    Roy and Vetterli 2007, definition 1.
    """
    if not S.any():
        return 0.0
    return float(torch.special.entr(S / S.sum()).sum().exp())


def stable_rank(S: Tensor) -> float:
    """‖M‖_F² / ‖M‖₂² = ΣS² / S₁²: a rank that small singular values hardly move; 0 for M = 0."""
    if not S.any():
        return 0.0
    return float((S / S.max()).square().sum())


def energy(S: Tensor) -> Tensor:
    """The share of ‖M‖_F² in the first 1, 2, …, k directions, (k,); zeros for M = 0."""
    if not S.any():
        return torch.zeros_like(S)
    sums = S.square().cumsum(0)
    return sums / sums[-1]


def rank_holding(S: Tensor, share: float) -> int:
    """How many directions it takes to hold that share, in (0, 1), of ‖M‖_F²; 0 for M = 0."""
    held = energy(S)
    return int((held < share).sum()) + 1 if held.any() else 0


@torch.no_grad()
def subspace_similarity(X: Tensor, Y: Tensor) -> Tensor:
    """φ(i, j) = ‖X_iᵀ·Y_j‖_F² / min(i, j) in [0, 1], (m, n): row i-1 and column j-1 hold φ(i, j).

    X (d, m) and Y (d, n) are directions in one space, X_i the first i of them. 1: the smaller of the two
    spans lies inside the other; 0: they are orthogonal. LoRA paper, section 7.2, equation 4.
    """
    m, n = X.shape[1], Y.shape[1]
    sums = (X.double().T @ Y.double()).square().cumsum(0).cumsum(1)
    return sums / torch.minimum(torch.arange(1, m + 1)[:, None], torch.arange(1, n + 1))


def expected_similarity(m: int, n: int, d: int) -> Tensor:
    """What φ is on average over random directions in d dimensions: max(i, j) / d, (m, n).

    A fixed unit vector has on average j/d of its length squared in a random span of j directions, so
    E‖X_iᵀ·Y_j‖_F² = i·j/d. The baseline to hold a φ against: the paper's figure 4, on the right.
    """
    return torch.maximum(torch.arange(1, m + 1)[:, None], torch.arange(1, n + 1)).double() / d


@torch.no_grad()
def principal_angles(X: Tensor, Y: Tensor) -> Tensor:
    """The angles between two spans, (min(m, n),), in radians from 0 to π/2, ascending.

    X (d, m) and Y (d, n) are directions. Cosines lose small angles to rounding and sines lose large ones,
    so each angle comes from both (Björck and Golub 1973, section 3).
    """
    X, Y = X.double(), Y.double()
    if X.shape[1] < Y.shape[1]:
        X, Y = Y, X
    inside = X.T @ Y  # (m, n), n <= m
    cosines = torch.linalg.svdvals(inside)  # descending
    sines = torch.linalg.svdvals(Y - X @ inside).flip(0)  # ascending; (d, n)
    return torch.atan2(sines[: len(cosines)], cosines)


@torch.no_grad()
def projected_norm(M: Tensor, U: Tensor, V: Tensor) -> float:
    """‖Uᵀ·M·V‖_F: how much M there is in those directions. LoRA paper, section 7.3."""
    return float((U.double().T @ M.double() @ V.double()).norm())


def expected_projected_norm(norm: float, shape: tuple[int, int], rank: int) -> float:
    """‖Uᵀ·M·V‖_F for random directions, `rank` on both sides: rank·‖M‖_F / √(out·in), as a root mean square.

    norm: ‖M‖_F, shape: M's (out, in). The column "Random" of the LoRA paper's table 7, without drawing.
    """
    out, in_ = shape
    return min(rank, out, in_) * norm / math.sqrt(out * in_)


def amplification(delta: Svd, weight: Tensor) -> float:
    """‖ΔW‖_F / ‖Uᵀ·W·V‖_F, U and V being ΔW's directions: how many times what W had there; 0 for ΔW = 0.

    LoRA paper, section 7.3 and table 7. Large: ΔW speaks up what W only whispered.
    """
    if not delta.S.any():
        return 0.0
    present = projected_norm(weight, delta.U, delta.V)
    return float(delta.S.norm()) / present if present else math.inf


@torch.no_grad()
def captured_energy(M: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """‖U_kᵀ·M·V_k‖_F² / ‖M‖_F² for k = 1, 2, …, (K,): the share of M inside another matrix' directions.

    Zeros for M = 0.
    """
    K = min(U.shape[1], V.shape[1])
    inside = (U[:, :K].double().T @ M.double() @ V[:, :K].double()).square()
    total = M.double().square().sum()
    return inside.cumsum(0).cumsum(1).diagonal() / (total if total > 0 else 1)


@torch.no_grad()
def nearest_cosines(U: Tensor, U_pretrained: Tensor) -> Tensor:
    """For each column of U (out, k) its largest |cosine| with a column of U_pretrained (out, n): (k,).

    A tuned matrix' singular vector whose value is below some ε is an intruder dimension: it looks like
    none of the pretrained ones. Shuttleworth et al. 2024, definition 3.1 and algorithm 1. The sign of a
    singular vector means nothing, hence the absolute value.
    """
    return (U.double().T @ U_pretrained.double()).abs().amax(dim=1)


def intruders(cosines: Tensor, epsilon: float) -> int:
    """How many of the `nearest_cosines` are below ε, in (0, 1]."""
    return int((cosines < epsilon).sum())
