"""Fast random bits for dropout, stored as one bit an element.

On the CPU torch draws one float per element on one thread. Here the elements are numbered from a start
that torch's default generator draws, and a vectorised, multithreaded hash of the number gives 15 bits to
each of four elements. An element is dropped if its 15 bits are below round(p·2¹⁵), so the probability is
within 2⁻¹⁶ (1.5e-5) of p. On other devices, and for p above 0.99, torch's own kernel draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# The finaliser of MurmurHash3 with the constants of P. Evensen's "moremur", designed for consecutive numbers.
_MIX = (0x3C79AC492BA7B653, 0x1C69B3F74AC4AE35)
_LOW_15 = 0x7FFF7FFF7FFF7FFF
_LARGEST_P = 0.99  # above, 15 bits are too coarse for 1 - p
_CHUNK = 2**17  # 64-bit words: 1 MiB, so that a dozen passes stay in the cache
# Multiplies eight bytes that are 0 or 1: the top byte of the product has one bit of each.
_GATHER = 0x0102040810204080
_BYTES = 0x0101010101010101
_EACH_BIT = 0x8040201008040201 - 2**64  # byte i has only bit i set, as a signed integer
_TO_TOP = 0x7F7F7F7F7F7F7F7F


def draw_keep(shape: torch.Size, p: float, device: torch.device) -> Tensor:
    """A random mask of the elements to keep, each drawn independently with probability 1 - p.

    On the CPU the mask is int16: -1 (all bits set) for a kept element, 0 for a dropped one. On other devices
    it is bool.
    """
    if device.type != "cpu" or p > _LARGEST_P:
        keep = torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - p)
        return keep if device.type != "cpu" else keep.to(torch.int16).neg_()
    words = torch.empty(-(-shape.numel() // 4), dtype=torch.int64)
    start = int(torch.empty((), dtype=torch.int64).random_(2**62))
    for first in range(0, len(words), _CHUNK):
        chunk = words[first : first + _CHUNK]
        torch.arange(start + first, start + first + len(chunk), out=chunk)
        _mix(chunk)
        lanes = chunk.view(torch.int16)
        # Negative exactly where the bits reach the threshold; the shift copies the sign to all 16 bits.
        torch.sub(round(p * 2**15) - 1, lanes, out=lanes).bitwise_right_shift_(15)
    return words.view(torch.int16)[: shape.numel()].view(shape)


def _mix(words: Tensor) -> None:
    """Hashes int64 words in place to four times 15 bits, each with a zero as the top bit.

    torch's shift is arithmetic, which loses one of 64 bits: collisions stay as rare as in a random hash.
    """
    shifted = torch.empty_like(words)
    for shift, factor in zip((27, 33), _MIX, strict=True):
        torch.bitwise_right_shift(words, shift, out=shifted)
        words.bitwise_xor_(shifted).mul_(factor)
    torch.bitwise_right_shift(words, 27, out=shifted)
    words.bitwise_xor_(shifted).bitwise_and_(_LOW_15)


def zero_dropped(x: Tensor, keep: Tensor) -> Tensor:
    """`x` with the dropped elements set to zero, unscaled: callers fold 1 / (1 - p) into a product."""
    if x.device.type != "cpu":
        return x * keep
    # A bitwise and is several times as fast as a product with a bool tensor.
    integer = _SAME_SIZE[x.element_size()]
    return (x.view(integer) & keep.to(integer)).view(x.dtype)


def pack(keep: Tensor) -> Tensor:
    """The mask as one bit an element, (⌈elements / 8⌉,) uint8. Off the CPU, `keep` itself."""
    if keep.device.type != "cpu":
        return keep
    flat = keep.reshape(-1).to(torch.int8)
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    words = flat.view(torch.int64).bitwise_and_(_BYTES)
    return words.mul_(_GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `pack`."""
    if packed.device.type != "cpu":
        return packed
    lanes = packed.to(torch.int64).mul_(_BYTES).bitwise_and_(_EACH_BIT)  # byte i is 0 or 2ⁱ
    lanes = lanes.add_(_TO_TOP).bitwise_right_shift_(7).bitwise_and_(_BYTES)  # 0 or 1
    return lanes.view(torch.int8)[: shape.numel()].to(torch.int16).neg_().view(shape)
