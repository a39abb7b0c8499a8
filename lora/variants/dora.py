"""DoRA: the length and the direction of each row of the weight are trained separately.

DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5) replaces W by

    W' = m ⊙ (W + ΔW) / ‖W + ΔW‖          ΔW = scaling·B·A, as in LoRA

    m        (out,)  the magnitude of each row, starts at ‖W‖
    ‖W + ΔW‖ (out,)  the Euclidean norm of each row; a constant for the gradient (section 4.3)

The paper calls the rows columns, because it multiplies from the other side. With h = W·x + b + ΔW·x, the
output of LoRA, and g = m / ‖W + ΔW‖, the output is

    W'·x + b = g ⊙ (h - b) + b = h + (g - 1) ⊙ (h - b)

At the start g = 1 exactly, because m and the norms are computed alike, so the output is W·x + b bit for bit.

The norms need no (out, in) matrix besides W in the dtype of A. For a row w of W and b of B,

    ‖w + s·b·A‖² = ‖w‖² + 2s·b·(A·w) + s²·b·(A·Aᵀ)·bᵀ

Trains A, B and m: `out` numbers more than LoRA. Each forward also computes W·Aᵀ, which costs as much as W·x
for r tokens. Dropout applies to the input of A alone, so that W·x is computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora.linear import LoRALinear


class DoRALinear(LoRALinear):
    """An nn.Linear with a DoRA adapter: x (..., in) -> (..., out).

    Differs from LoRALinear by `lora_magnitude_vector` (out,), PEFT's name of m, in the dtype of lora_A. The
    update W' - W has no low rank.
    """

    adapter_tensors = (*LoRALinear.adapter_tensors, "lora_magnitude_vector")
    trained_tensors = (*LoRALinear.trained_tensors, "lora_magnitude_vector")
    detached = "the norm counts as a constant (section 4.3)"  # for lora.check_layer

    def __init__(self, linear: nn.Linear, *args: Any, **settings: Any):
        super().__init__(linear, *args, **settings)
        self.lora_magnitude_vector = nn.Parameter(self.row_norms())

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)  # W·x + b + ΔW·x: (..., in) -> (..., out)
        if self.merged or not self.enabled:
            return h
        g = self.lora_magnitude_vector / self.row_norms()
        without_bias = h if self.bias is None else h - self.bias.to(h.dtype)
        return torch.addcmul(h, (g - 1).to(h.dtype), without_bias)

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """‖W + ΔW‖ of each row, (out,), in the dtype of lora_A; a row of zeros has a tiny norm."""
        A, B, W = self.lora_A, self.lora_B, self.base_weight.to(self.lora_A)
        cross = 2 * self.scaling * (W @ A.T) + self.scaling**2 * (B @ (A @ A.T))  # (out, r)
        squares = torch.linalg.vector_norm(W, dim=1).square() + (B * cross).sum(1)
        norms: Tensor = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()
        return norms

    @torch.no_grad()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DoRALinear:
        # In another dtype or on another device the norms may be rounded differently, and g = 1 has to stay.
        if not self._is_fresh():
            super()._apply(fn, recurse)
            return self
        was_merged = self.merged
        if was_merged:
            self.unmerge()
        super()._apply(fn, recurse)
        if not self.lora_magnitude_vector.is_meta:
            self.lora_magnitude_vector.copy_(self.row_norms())
        if was_merged:
            self.merge()
        return self

    def _is_fresh(self) -> bool:
        """Whether g = 1, because nothing has trained. The weight may have been moved already."""
        m, B = self._parameters.get("lora_magnitude_vector"), self._parameters.get("lora_B")
        if m is None or B is None or m.is_meta or self.base_weight.is_meta:
            return False
        return not B.any() and torch.equal(m, self.row_norms())

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W' = m ⊙ (W + ΔW) / ‖W + ΔW‖, (out, in), float64: the weight that `merge` rounds."""
        weight = super().merged_weight()
        norms = weight.norm(dim=1).clamp(min=torch.finfo(self.lora_A.dtype).tiny ** 0.5)
        g: Tensor = self.lora_magnitude_vector.double() / norms
        return g[:, None] * weight
