"""NF4: a matrix in 4 bits a number and a little more, as QLoRA stores it.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314, section 3 and appendix E) divides a matrix into blocks of 64
numbers and stores of each

    absmax            the largest absolute value of the block
    w / absmax        rounded to the nearest of 16 LEVELS, as a number of 4 bits

The levels are quantiles of a normal distribution, because trained weights are close to normal: each level is
then used about equally often. Zero is one of them, and so are ±1.

Double quantisation stores the absmax values in 8 bits too: their mean is subtracted, blocks of 256 of them
share one float32 scale, and each is rounded to the nearest of 256 ABSMAX_LEVELS. In bits for each number:

    4 (the level) + 8/64 (its absmax) + 32/(64·256) (the scale of 256 absmax) = 4.127

The table, the rounding and the packing are those of bitsandbytes, so that both give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora.quantised.tensor import Stored

BLOCK = 64  # numbers that share an absmax
ABSMAX_BLOCK = 256  # absmax values that share a scale
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip


def absmax_levels() -> Tensor:
    """The 256 levels of the absmax values, float32, ascending (Dettmers 2015, arXiv 1511.04561).

    Seven decades, from 1e-7 to 1, on either side of zero. Each decade has twice as many levels as the one
    below it, in the middles of equal intervals. Zero and one are added.
    """
    levels = [torch.zeros(1), torch.ones(1)]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2**decade + 1)
        middles = 10.0 ** (decade - 6) * ((ends[:-1] + ends[1:]) / 2)
        levels += [middles, -middles]
    return torch.cat(levels).sort().values


@dataclass(frozen=True)
class NF4(Stored):
    """A matrix (out, in) in NF4.

    codes: (n/2,) uint8, two levels a byte, the first in the upper half. absmax_codes: (blocks,) uint8.
    absmax_scales: (blocks/256,) float32, rounded up. absmax_mean: (), float32. size: (out, in).
    """

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
        levels = torch.tensor(LEVELS, device=weight.device)
        codes, absmax = _nearest(weight.float().reshape(-1, BLOCK), levels)
        packed = codes[:, ::2] << 4 | codes[:, 1::2]
        mean = absmax.mean()
        absmax_codes, scales = _nearest_in_blocks(absmax - mean, absmax_levels().to(weight.device))
        return NF4(packed.flatten(), absmax_codes, scales, mean, tuple(weight.shape))

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix: level · absmax in float32, then in `dtype`."""
        device = self.codes.device
        scales = self.absmax_scales.repeat_interleave(ABSMAX_BLOCK)[: len(self.absmax_codes)]
        absmax = absmax_levels().to(device)[self.absmax_codes.int()] * scales + self.absmax_mean  # (blocks,)
        pairs = _pairs(device)[self.codes.int()]  # (n/2, 2)
        weight = pairs.view(-1, BLOCK).mul_(absmax[:, None])
        return weight.view(self.size).to(dtype)


def _pairs(device: torch.device) -> Tensor:
    """The two levels of each byte, (256, 2): one lookup for two numbers."""
    levels = torch.tensor(LEVELS, device=device)
    return torch.cartesian_prod(levels, levels)


def _nearest(blocks: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of `blocks`, the numbers of the nearest levels to row / absmax, uint8, and the absmax."""
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]  # a block of zeros has level 0
    between = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(scaled.clamp(-1, 1), between, out_int32=True).to(torch.uint8), absmax


def _nearest_in_blocks(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """As `_nearest`, of blocks of 256 values, of which the last may be shorter."""
    full = len(values) // ABSMAX_BLOCK * ABSMAX_BLOCK
    codes, absmax = _nearest(values[:full].view(-1, ABSMAX_BLOCK), levels)
    if full == len(values):
        return codes.flatten(), absmax
    last = values[full:]
    largest = last.abs().max().clamp(min=1e-38)
    between = (levels[:-1] + levels[1:]) / 2
    rest = torch.bucketize((last / largest).clamp(-1, 1), between, out_int32=True).to(torch.uint8)
    return torch.cat([codes.flatten(), rest]), torch.cat([absmax, largest[None]])
