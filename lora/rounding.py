"""Rounds float64 correctly to any floating-point dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x`, float64, in `dtype`, rounded once: to nearest, ties to even.

    torch converts float64 to 16 bits by way of float32. The first of these roundings can move a number
    beside a tie onto it, and the second one then goes the wrong way. Here the step to float32 rounds to
    odd: it truncates, and sets the last bit if anything was lost. The second rounding is then correct,
    because float32 has more than two bits beyond bfloat16 and float16 (Boldo and Melquiond 2008, "Emulation
    of a FMA and correctly rounded sums", IEEE Trans. Computers 57).
    """
    if dtype.itemsize >= 4:
        return x.to(dtype)
    single = x.float()
    exact = single.double()
    bits = single.view(torch.int32)
    bits = bits - (exact.abs() > x.abs()).int()  # towards zero, for both signs
    bits = torch.where(exact == x, bits, bits | 1)
    return bits.view(torch.float32).to(dtype)
