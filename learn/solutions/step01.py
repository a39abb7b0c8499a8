"""Step 1: a low-rank product, and what it saves."""

from torch import Tensor


def delta(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """The update ΔW = B·A.

    lora_A: (r, in). lora_B: (out, r). Returns a tensor of shape (out, in).
    """
    # [step 1: multiply the two factors]
    return lora_B @ lora_A
    # [end]


def low_rank_parameters(out_features: int, in_features: int, r: int) -> int:
    """The number of elements of A and B together."""
    # [step 1: count the elements of A (r, in) and B (out, r)]
    return r * (in_features + out_features)
    # [end]


def largest_saving_rank(out_features: int, in_features: int) -> int:
    """The largest r for which A and B together have fewer elements than W (out, in)."""
    # [step 1: the largest r with r·(in + out) < in·out]
    return (in_features * out_features - 1) // (in_features + out_features)
    # [end]


def apply_delta(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """ΔW applied to every row of x: (..., in) -> (..., out), without forming ΔW."""
    # [step 1: apply A, then B]
    return (x @ lora_A.T) @ lora_B.T
    # [end]
