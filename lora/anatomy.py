"""Analysis of what an adapter learned: sizes, ranks and directions of ΔW, and how two updates compare.

Everything is computed in float64, and no function changes its arguments. M is any matrix (out, in).
ΔW = s·B·A is an adapter's update with scaling s (lora/linear.py). Directions are orthonormal columns,
strongest first: U (out, k) in the output space, V (in, k) in the input space.

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
        """The best approximation of M of that rank, (out, in) (Eckart-Young theorem)."""
        return (self.U[:, :rank] * self.S[:rank]) @ self.V[:, :rank].T


@torch.no_grad()
def svd(M: Tensor) -> Svd:
    """The thin singular value decomposition of any matrix, k = min(out, in)."""
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    return Svd(U, S, Vh.T)


@torch.no_grad()
def delta_svd(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Svd:
    """The SVD of ΔW = s·B·A without forming ΔW: lora_A (r, in), lora_B (out, r).

    k = min(r, in, out).

    With B = Q_B·R_B and Aᵀ = Q_A·R_A, ΔW = Q_B·(s·R_B·R_Aᵀ)·Q_Aᵀ. The singular values of ΔW are those of
    the r x r core in the middle; its singular vectors are the core's, multiplied by Q_B and Q_A. QR and SVD
    are backward stable, so the error of a singular value is at most rounding times the largest one.
    """
    Q_B, R_B = torch.linalg.qr(lora_B.double())  # (out, r), (r, r)
    Q_A, R_A = torch.linalg.qr(lora_A.double().T)  # (in, r), (r, r)
    core = svd(scaling * (R_B @ R_A.T))
    return Svd(Q_B @ core.U, core.S, Q_A @ core.V)


@torch.no_grad()
def singular_values_from_grams(gram_A: Tensor, gram_B: Tensor) -> Tensor:
    """Singular values of B·A, (r,) descending, from A·Aᵀ and Bᵀ·B alone, both (r, r) float64.

    Cheap enough to run during training. Squaring loses half of the digits: the error is about 1e-8 of the
    largest value. `delta_svd` is accurate to rounding.
    """
    values, vectors = torch.linalg.eigh(gram_B)
    root = vectors * values.clamp(min=0).sqrt()  # Bᵀ·B = root·rootᵀ
    squares = torch.linalg.eigvalsh(root.T @ gram_A @ root)  # the eigenvalues of Bᵀ·B·A·Aᵀ, ascending
    S: Tensor = squares.clamp(min=0).sqrt().flip(0)
    return S


def effective_rank(S: Tensor) -> float:
    """exp(-Σ p·ln p) with p = S / ΣS, from 1 (one direction) to k (all equal); 0 for M = 0.

    Roy and Vetterli 2007, definition 1.
    """
    if not S.any():
        return 0.0
    return float(torch.special.entr(S / S.sum()).sum().exp())


def stable_rank(S: Tensor) -> float:
    """‖M‖_F² / ‖M‖₂² = ΣS² / S₁²; small singular values have little influence on it; 0 for M = 0."""
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
    """The number of directions that hold this share, in (0, 1), of ‖M‖_F²; 0 for M = 0."""
    held = energy(S)
    return int((held < share).sum()) + 1 if held.any() else 0


@torch.no_grad()
def subspace_similarity(X: Tensor, Y: Tensor) -> Tensor:
    """φ(i, j) = ‖X_iᵀ·Y_j‖_F² / min(i, j) in [0, 1], (m, n): row i-1 and column j-1 hold φ(i, j).

    X (d, m) and Y (d, n) are directions in one space; X_i is the first i columns of X. 1 means that the
    smaller span lies inside the larger one, 0 that they are orthogonal. LoRA paper, section 7.2, equation 4.
    """
    m, n = X.shape[1], Y.shape[1]
    sums = (X.double().T @ Y.double()).square().cumsum(0).cumsum(1)
    return sums / torch.minimum(torch.arange(1, m + 1)[:, None], torch.arange(1, n + 1))


def expected_similarity(m: int, n: int, d: int) -> Tensor:
    """The mean of φ over random directions in d dimensions: max(i, j) / d, (m, n).

    A random span of j directions holds on average j/d of the squared length of a unit vector, so
    E‖X_iᵀ·Y_j‖_F² = i·j/d. This is the baseline for φ, as in the right panel of the paper's figure 4.
    """
    return torch.maximum(torch.arange(1, m + 1)[:, None], torch.arange(1, n + 1)).double() / d


@torch.no_grad()
def principal_angles(X: Tensor, Y: Tensor) -> Tensor:
    """The principal angles between two spans, (min(m, n),), in radians from 0 to π/2, ascending.

    X (d, m) and Y (d, n) are directions. Small angles are inaccurate from their cosine and large ones from
    their sine, so each angle is computed from both (Björck and Golub 1973, section 3).
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
    """‖Uᵀ·M·V‖_F, the size of M in the directions U and V. LoRA paper, section 7.3."""
    return float((U.double().T @ M.double() @ V.double()).norm())


def expected_projected_norm(norm: float, shape: tuple[int, int], rank: int) -> float:
    """The root mean square of ‖Uᵀ·M·V‖_F over random U and V of `rank` columns: rank·‖M‖_F / √(out·in).

    norm: ‖M‖_F. shape: (out, in) of M. The column "Random" of the LoRA paper's table 7 in closed form.
    """
    out, in_ = shape
    return min(rank, out, in_) * norm / math.sqrt(out * in_)


def amplification(delta: Svd, weight: Tensor) -> float:
    """‖ΔW‖_F / ‖Uᵀ·W·V‖_F with the directions U and V of ΔW; 0 for ΔW = 0.

    A large factor means that ΔW amplifies directions that are weak in W. LoRA paper, section 7.3, table 7.
    """
    if not delta.S.any():
        return 0.0
    present = projected_norm(weight, delta.U, delta.V)
    return float(delta.S.norm()) / present if present else math.inf


@torch.no_grad()
def captured_energy(M: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """‖U_kᵀ·M·V_k‖_F² / ‖M‖_F² for k = 1, 2, …, K, (K,): the share of M in another matrix's directions.

    Zeros for M = 0.
    """
    K = min(U.shape[1], V.shape[1])
    inside = (U[:, :K].double().T @ M.double() @ V[:, :K].double()).square()
    total = M.double().square().sum()
    return inside.cumsum(0).cumsum(1).diagonal() / (total if total > 0 else 1)


@torch.no_grad()
def nearest_cosines(U: Tensor, U_pretrained: Tensor) -> Tensor:
    """For each column of U (out, k), the largest |cosine| with a column of U_pretrained (out, n): (k,).

    A singular vector of a tuned matrix is an intruder dimension if this value is below some ε: it is
    similar to no pretrained one (Shuttleworth et al. 2024, definition 3.1 and algorithm 1). The absolute
    value is used because the sign of a singular vector is arbitrary.
    """
    return (U.double().T @ U_pretrained.double()).abs().amax(dim=1)


def intruders(cosines: Tensor, epsilon: float) -> int:
    """The number of `nearest_cosines` below ε, in (0, 1]."""
    return int((cosines < epsilon).sum())
