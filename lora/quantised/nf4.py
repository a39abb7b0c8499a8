"""NF4: a matrix in 4 bits a number and a little more, as QLoRA stores it.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314, section 3 and appendix E) divides a matrix into blocks of 64
numbers and stores of each

    absmax            the largest absolute value of the block
    w / absmax        rounded to the nearest of 16 LEVELS, as a number of 4 bits

The levels are quantiles of a normal distribution, because trained weights are close to normal: the levels are
dense where most weights are. Zero is one of them, and so are ±1.

Double quantisation stores the absmax values in 8 bits too: their mean is subtracted, blocks of 256 of them
share one float32 scale, and each is rounded to the nearest of 256 ABSMAX_LEVELS. In bits for each number:

    4 (the level) + 8/64 (its absmax) + 32/(64·256) (the scale of 256 absmax) = 4.127

The table, the rounding and the packing are those of bitsandbytes, so that both give the same bytes. One
exception: its CPU kernel rounds absmax / scale to about 2⁻¹⁵ before it compares it with ABSMAX_LEVELS, so
that one value in hundreds gets a level that is slightly farther than the nearest one, which it has here.

The error of a number is at most absmax times half of the distance between the two levels around it, and in
addition |level| times the error of the stored absmax. Zero stays zero.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora.quantised.tensor import Stored

BLOCK = 64  # numbers that share an absmax
ABSMAX_BLOCK = 256  # absmax values that share a scale
_TINY = 2e-38  # a normal number instead of the absmax of a block of zeros; its inverse is finite
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip


@functools.cache
def absmax_levels() -> Tensor:
    """The 256 levels of the absmax values, float32, ascending (Dettmers 2015, arXiv 1511.04561).

    Seven decades, from 1e-7 to 1, on either side of zero. Each decade has twice as many levels as the one
    below it, in the middles of equal intervals. Zero and one are added.
    """
    levels = [torch.zeros(1, dtype=torch.float32), torch.ones(1, dtype=torch.float32)]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = 10.0 ** (decade - 6) * ((ends[:-1] + ends[1:]) / 2)
        levels += [middles, -middles]
    return torch.cat(levels).sort().values


@dataclass(frozen=True)
class NF4(Stored):
    """A matrix (out, in) in NF4.

    With n numbers in b = n/64 blocks:

    codes: (n/2,) uint8, two levels a byte, the first in the upper half.
    absmax_codes: (b,) uint8. absmax_scales: (⌈b/256⌉,) float32. absmax_mean: () float32.
    size: (out, in).
    """

    name: ClassVar[str] = "nf4"
    codes: Tensor
    absmax_codes: Tensor
    absmax_scales: Tensor
    absmax_mean: Tensor
    size: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @staticmethod
    def quantise(weight: Tensor) -> NF4:
        """Rounds a floating-point matrix, whose number of elements is a multiple of 64, to NF4.

        Raises ValueError for another number of elements, or if a value is not finite.
        """
        if weight.numel() % BLOCK:
            raise ValueError(f"{tuple(weight.shape)}: the number of elements is not a multiple of {BLOCK}")
        if not weight.isfinite().all():
            raise ValueError("a value is not finite")
        levels = torch.tensor(LEVELS, dtype=torch.float32, device=weight.device)
        codes, absmax = _nearest(weight.float().reshape(-1, BLOCK), levels)
        packed = codes[:, ::2] << 4 | codes[:, 1::2]
        mean = absmax.mean()
        absmax_codes, scales = _nearest_in_blocks(absmax - mean, absmax_levels().to(weight.device))
        return NF4(packed.flatten(), absmax_codes, scales, mean, tuple(weight.shape))

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix: level · absmax in float32, then in `dtype`."""
        device = self.codes.device
        scales = self.absmax_scales.repeat_interleave(ABSMAX_BLOCK)[: len(self.absmax_codes)]
        absmax = absmax_levels().to(device).index_select(0, self.absmax_codes.int())
        absmax = absmax * scales + self.absmax_mean  # (blocks,)
        weight = _pairs(device).index_select(0, self.codes.int()).view(torch.float32)  # (n,)
        return weight.view(-1, BLOCK).mul_(absmax[:, None]).view(self.size).to(dtype)


def _pairs(device: torch.device) -> Tensor:
    """The two levels of each byte in one int64, (256,), for a single lookup."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=device)
    return torch.cartesian_prod(levels, levels).view(torch.int64).flatten()


def _nearest(blocks: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of `blocks`, the numbers of the nearest levels to row / absmax, uint8, and the absmax."""
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1 / absmax.clamp(min=_TINY))[:, None]  # a block of zeros has level 0
    return _codes(scaled, levels), absmax


def _codes(scaled: Tensor, levels: Tensor) -> Tensor:
    """The numbers of the nearest levels, uint8."""
    between = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(scaled.clamp(-1, 1), between, out_int32=True).to(torch.uint8)


def _nearest_in_blocks(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """As `_nearest`, of blocks of 256 values, of which the last may be shorter.

    As in bitsandbytes, the last one is divided by its absmax where the others are multiplied by 1 / absmax.
    """
    full = len(values) // ABSMAX_BLOCK * ABSMAX_BLOCK
    codes, absmax = _nearest(values[:full].view(-1, ABSMAX_BLOCK), levels)
    if full == len(values):
        return codes.flatten(), absmax
    last = values[full:]
    largest = last.abs().max()
    rest = _codes(last / largest.clamp(min=_TINY), levels)
    return torch.cat([codes.flatten(), rest]), torch.cat([absmax, largest[None]])
