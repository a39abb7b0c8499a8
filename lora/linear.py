"""A linear layer with a LoRA adapter. Read this file first.

LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1) freezes a pretrained weight W and learns what to
add to it as the product of two thin matrices:

    h = W·x + b + ΔW·x          ΔW = (α/r)·B·A

    W  (out, in)  frozen        A  (r, in)   starts random
    b  (out,)     frozen        B  (out, r)  starts at zero, so at first ΔW = 0 and h = W·x + b

With r far below in and out, A and B hold r·(in + out) numbers where W holds in·out: for a layer of
768 x 768 and r = 8, 12,288 instead of 589,824. Training touches A and B alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.config import check_alpha, check_dropout, check_rank
from lora.functional import can_fuse, lora_linear
from lora.guard import MergeGuard


class LoRALinear(MergeGuard):
    """`linear` with an adapter beside it: x (..., in) -> h (..., out), in the dtype that `linear` gives.

    It is an nn.Linear whose `weight` and `bias` are the given layer's own Parameters, and it adds
    `lora_A` (r, in) and `lora_B` (out, r): float32 on a 16-bit layer too, because steps of training
    are smaller than 16 bits resolve. `generator` draws lora_A, on the CPU, so that every device
    starts from the same adapter.

    Raises TypeError or ValueError if r, lora_alpha or lora_dropout is outside its range.
    """

    def __init__(
        self,
        linear: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        generator: torch.Generator | None = None,
    ):
        check_rank("r", r)
        check_alpha("lora_alpha", lora_alpha)
        check_dropout("lora_dropout", lora_dropout)
        super().__init__(linear)
        self.r = r
        self.lora_dropout = lora_dropout
        # rsLoRA (arXiv 2312.03732, equation 3): dividing by √r keeps high ranks from learning slowly.
        self.scaling = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
        self.enabled = True

        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        bound = 1 / math.sqrt(self.in_features)  # Kaiming's uniform with a = √5, as nn.Linear starts
        lora_A = torch.empty(r, self.in_features, dtype=dtype).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(lora_A.to(self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, dtype=dtype, device=self.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged or not self.enabled:
            return super().forward(x)  # W·x + b: (..., in) -> (..., out)
        weight, bias = self.compute_weights()  # W and b, in the dtype to multiply in
        if can_fuse(x, weight, bias, self.lora_A):  # the formula in one step, which keeps less for backward
            p = self.lora_dropout if self.training else 0.0
            return lora_linear(x, weight, bias, self.lora_A, self.lora_B, self.scaling, p)
        return self.formula(x)

    def formula(self, x: Tensor) -> Tensor:
        """W·x + b + scaling·B·A·dropout(x), written plainly: the reference, and what torch.compile sees."""
        h = F.linear(x, self.weight, self.bias)  # (..., in) -> (..., out)
        x = F.dropout(x.to(self.lora_A.dtype), self.lora_dropout, self.training)
        thin = F.linear(x, self.lora_A)  # (..., in) -> (..., r)
        return (h + self.scaling * F.linear(thin, self.lora_B)).to(h.dtype)  # (..., r) -> (..., out)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW = scaling·B·A, (out, in), in float64: what `merge` adds to W before it rounds."""
        return self.scaling * (self.lora_B.double() @ self.lora_A.double())

    @torch.no_grad()
    def merge(self) -> None:
        """Folds ΔW into the weight, so that forward costs what a plain Linear costs. Keeps a copy of W.

        The sum is formed in float64 and rounded once, to the weight's dtype.

        Raises RuntimeError if the layer is merged or disabled, ValueError if the sum is not finite.
        """
        self.check_can_merge()
        merged = (self.weight.double() + self.delta_weight()).to(self.weight.dtype)
        if not merged.isfinite().all():
            raise ValueError(f"W + ΔW is not finite in {self.weight.dtype}")
        self.replace_weight(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the kept W back: the same bits, not a subtraction's approximation of them.

        Raises RuntimeError if the layer is not merged.
        """
        self.restore_weight()
