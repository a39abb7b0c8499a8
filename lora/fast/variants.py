"""The fast classes of the variants of LoRA, which `fuse` puts in place of those in lora/variants.

Each computes the formula of its variant with the frozen weights of FastLinear, and the product of its thin
factors with the autograd function of FastLoRALinear. VeRA's factors are not thin, so it uses ordinary ops.
"""

from __future__ import annotations

from lora.fast.layers import FAST_CLASSES, FastLoRALinear
from lora.variants.dora import DoRALinear
from lora.variants.lora_fa import LoRAFALinear
from lora.variants.pissa import MiLoRALinear, PiSSALinear
from lora.variants.vera import VeRALinear


class FastDoRALinear(DoRALinear, FastLoRALinear):
    """DoRALinear, which rescales the output of FastLoRALinear: x (..., in) -> (..., out)."""


class FastLoRAFALinear(FastLoRALinear, LoRAFALinear):
    """LoRAFALinear, fused. Backward saves A·x, (n, r), and not x, (n, in)."""


class FastPiSSALinear(FastLoRALinear, PiSSALinear):
    """PiSSALinear, fused, with factors of rank 2r."""


class FastMiLoRALinear(FastLoRALinear, MiLoRALinear):
    """MiLoRALinear, fused, with factors of rank 2r."""


class FastVeRALinear(VeRALinear, FastLoRALinear):
    """VeRALinear with the frozen weights of FastLinear."""


FAST_CLASSES |= {
    DoRALinear: FastDoRALinear,
    LoRAFALinear: FastLoRAFALinear,
    PiSSALinear: FastPiSSALinear,
    MiLoRALinear: FastMiLoRALinear,
    VeRALinear: FastVeRALinear,
}
