"""Int8: a matrix in 8 bits a number, with one scale for each row, and products in int8.

    W (out, in) ≈ scale (out,) ⊙ Q (out, in)        scale = max|w| / 127 of a row,  Q = round(w / scale), int8

The error of a number is at most half of its row's scale, but for float32's own rounding. Zero stays zero.

In bfloat16, as under autocast, the products with W are computed in int8 too, on a CPU with instructions for
them (VNNI), which takes half the time. The rows of x are rounded in the same way, x ≈ s ⊙ X, and

    x·Wᵀ ≈ s ⊙ (X·Qᵀ) ⊙ scaleᵀ        X·Qᵀ in int32, exactly

so that only the rounding of x is new: at most half of max|x| / 127 of its row for each number (LLM.int8(),
Dettmers et al. 2022, arXiv 2208.07339, section 2.2, without its treatment of outliers). The gradient of x
needs g·W, where the scales belong to the summed dimension. They are multiplied into g before it is rounded:

    g·W ≈ t ⊙ (G·Q)        g ⊙ scaleᵀ ≈ t ⊙ G

which changes each number of g ⊙ scaleᵀ by at most half of the largest of its row / 127. In other dtypes, on
other CPUs and on other devices W is dequantised for each product.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora.quantised.tensor import Stored

_LONGEST = 2**31 // 127**2  # products whose sum fits in int32
_TINY = 1e-36  # instead of the largest value of a row of zeros; its inverse is finite


@dataclass(frozen=True)
class Int8(Stored):
    """A matrix (out, in) in int8. codes: (out, in) int8. scales: (out,) float32."""

    name: ClassVar[str] = "int8"
    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @staticmethod
    def quantise(weight: Tensor) -> Int8:
        """Rounds a floating-point matrix (out, in). Raises ValueError if a value is not finite."""
        if not weight.isfinite().all():
            raise ValueError("a value is not finite")
        return Int8(*round_rows(weight))

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix, (out, in): scale · code in float32, then in `dtype`."""
        return (self.codes * self.scales[:, None]).to(dtype)

    def product(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Writes x·Wᵀ + bias to `out` (n, out): x (n, in)."""
        if not _in_int8(x):
            super().product(x, bias, out)
            return
        codes, scales = round_rows(x)
        y = torch._int_mm(codes, self.codes.t()) * scales[:, None]
        y.mul_(self.scales)
        out.copy_(y if bias is None else y.add_(bias.float()))

    def transposed_product(self, g: Tensor) -> Tensor:
        """The gradient g·W, (n, in), of g (n, out)."""
        if not _in_int8(g) or g.requires_grad:  # for a second derivative: rounding has none
            return super().transposed_product(g)
        codes, scales = round_rows(g.float() * self.scales)
        return (torch._int_mm(codes, self.codes) * scales[:, None]).to(g.dtype)


def _in_int8(x: Tensor) -> bool:
    fits = x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[1] <= _LONGEST
    return fits and has_int8_products()


@functools.cache
def has_int8_products() -> bool:
    """Whether the CPU has instructions with which a product in int8 is faster than one in bfloat16."""
    can = torch.cpu.get_capabilities()
    return any(can.get(feature, False) for feature in ("avx512_vnni", "avx_vnni", "amx_int8"))


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n, m) int8 and scales (n,) float32 of floating-point rows x (n, m): x ≈ scales ⊙ codes."""
    largest = x.abs().amax(dim=1).float().clamp(min=_TINY)
    # A product of bfloat16 and float32 would be several times as slow as the cast.
    codes = x.to(torch.float32, copy=True).mul_((127 / largest)[:, None]).round_()
    return codes.to(torch.int8), largest / 127
