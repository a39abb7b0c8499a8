"""Dropout's random numbers, cheaply: which elements stay, drawn 16 bits each, and kept as one bit.

On the CPU torch draws a float a time for dropout. Here one draw of 64 bits decides on four elements:
an element is dropped when its 16 bits are below round(p·2¹⁶), so it is dropped with a probability
within 2⁻¹⁷ (7.6e-6) of p. The bits come from torch's default generator. On other devices torch's own
kernel draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Eight bytes that are 0 or 1 times this number: the top byte of the product holds one bit of each.
_GATHER = 0x0102040810204080
_BYTES = 0x0101010101010101
_EACH_BIT = 0x8040201008040201 - 2**64  # byte i holds bit i alone, as a signed number
_TO_TOP = 0x7F7F7F7F7F7F7F7F


def keep_probability(p: float) -> float:
    """The probability with which `draw_keep` keeps an element on the CPU."""
    return 1 - round(p * 2**16) / 2**16


def draw_keep(shape: torch.Size, p: float, device: torch.device) -> Tensor:
    """A bool tensor, True where an element stays; each element is independent of every other."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - p)
    count = shape.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    threshold = round(p * 2**16) - 2**15  # of numbers from -2¹⁵ on
    return (bits.view(torch.int16)[:count] >= threshold).view(shape)


def zero_dropped(x: Tensor, keep: Tensor) -> Tensor:
    """`x` with zeros where `keep` is False, not scaled up: a caller has a product to scale anyway."""
    if x.device.type != "cpu":
        return x * keep
    # All ones or all zeros, laid over the bits of x: several times as fast as a product with a bool.
    integer = _SAME_SIZE[x.element_size()]
    return (x.view(integer) & keep.to(integer).neg_()).view(x.dtype)


def pack(keep: Tensor) -> Tensor:
    """One bit an element, (⌈elements / 8⌉,) uint8; on other devices than the CPU `keep` as it is."""
    if keep.device.type != "cpu":
        return keep
    flat = keep.reshape(-1).view(torch.uint8)
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    return (flat.view(torch.int64) * _GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """The bool tensor of this shape that `pack` was given."""
    if packed.device.type != "cpu":
        return packed
    lanes = packed.to(torch.int64).mul_(_BYTES).bitwise_and_(_EACH_BIT)
    lanes = lanes.add_(_TO_TOP).bitwise_right_shift_(7).bitwise_and_(_BYTES)
    return lanes.view(torch.bool)[: shape.numel()].view(shape)
