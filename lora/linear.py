"""A linear layer with a LoRA adapter. Read this file first.

LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1) freezes a pretrained weight W and learns an update of
it as the product of two thin matrices:

    h = W·x + b + ΔW·x          ΔW = scaling·B·A,  scaling = α/r

    W  (out, in)  frozen        A  (r, in)   initialised at random
    b  (out,)     frozen        B  (out, r)  initialised to zero, so that at first ΔW = 0 and h = W·x + b

For r much smaller than in and out, A and B have r·(in + out) elements where W has in·out: 12,288 instead
of 589,824 for a 768 x 768 layer and r = 8. Training updates A and B only.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.config import LoraConfig
from lora.mergeable import MergeableLinear


class LoRALinear(MergeableLinear):
    """An nn.Linear with a LoRA adapter: x (..., in) -> h (..., out), in the dtype `linear` returns.

    `weight` and `bias` are the Parameters of `linear`, which are frozen. `lora_A` (r, in) and `lora_B`
    (out, r) are float32, or float64 for a float64 weight: 16 bits are too coarse for optimizer steps.
    `generator`, a CPU generator, draws lora_A, so that the adapter does not depend on the device.

    Subclass it to define a variant of LoRA. Everything that handles adapters relies on four attributes:
    `adapter_tensors`, `trained_tensors`, `watched_settings` and `merged_weight` (lora/mergeable.py).

    Raises TypeError or ValueError if r, lora_alpha or lora_dropout is out of range.
    """

    adapter_tensors: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    trained_tensors: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    watched_settings = ("scaling",)

    def __init__(
        self,
        linear: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        generator: torch.Generator | None = None,
    ):
        LoraConfig(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout)  # checks the values
        super().__init__(linear)
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        # rsLoRA (arXiv 2312.03732, equation 3) divides by √r, so that a high rank does not slow learning.
        self.scaling = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r

        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        bound = 1 / math.sqrt(self.in_features)  # Kaiming uniform with a = √5, the default of nn.Linear
        device = "meta" if self.weight.is_meta else "cpu"  # that of the generator
        lora_A = torch.empty(r, self.in_features, dtype=dtype, device=device)
        lora_A.uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(lora_A.to(self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, dtype=dtype, device=self.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)  # W·x + b: (..., in) -> (..., out), or (W + ΔW)·x + b while merged
        if self.merged or not self.enabled:
            return h
        x = F.dropout(x.to(self.lora_A.dtype), self.lora_dropout, self.training)
        # A: (..., in) -> (..., r), B: (..., r) -> (..., out)
        return (h + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)).to(h.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of ΔW = scaling·B·A."""
        return self.lora_A, self.lora_B

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW = scaling·B·A, (out, in), float64."""
        A, B = self.factors()
        return self.scaling * (B.double() @ A.double())

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + ΔW, (out, in), float64: the weight that `merge` rounds to the dtype of W."""
        return self.base_weight.double() + self.delta_weight()

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        adapter = f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
        return f"{super().extra_repr()}, {adapter}, merged={self.merged}, enabled={self.enabled}"
