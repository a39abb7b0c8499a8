"""DoRA: the length and the direction of each row of the weight are trained separately.

DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5) replaces W by

    W' = m ⊙ (W + ΔW) / ‖W + ΔW‖          ΔW = scaling·B·A, as in LoRA

    m        (out,)  the magnitude of each row, starts at ‖W‖
    ‖W + ΔW‖ (out,)  the Euclidean norm of each row; a constant for the gradient (section 4.3)

The paper calls the rows columns, because it multiplies from the other side. With h = W·x + b + ΔW·x, the
output of LoRA, and g = m / ‖W + ΔW‖, the output is

    W'·x + b = g ⊙ (h - b) + b = h + (g - 1) ⊙ (h - b)

At the start g = 1 exactly, because m and the norms are computed alike, so the output is W·x + b bit for bit.

The norms need no (out, in) matrix besides W in float32 or float64. For a row w of W, and b one of scaling·B,

    ‖w + b·A‖² = ‖w‖² + b·(2A·w + A·Aᵀ·b)

Where b·A is nearly -w, the sum cancels, so no norm is taken to be less than 2√eps·‖w‖, 7e-4·‖w‖ in float32.

Trains A, B and m: `out` numbers more than LoRA. Each forward also computes W·Aᵀ, which costs as much as W·x
for r tokens. Dropout applies to the input of A alone, so that W·x is computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
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
        """‖W + ΔW‖ of each row, (out,), in the dtype of lora_A; a row of zeros has a tiny norm.

        They are computed in float32 or float64, also under autocast: in 16 bits the sum cancels to nothing.
        """
        device, dtype = self.lora_A.device.type, torch.promote_types(self.lora_A.dtype, torch.float32)
        full = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if full else nullcontext():
            A, B = self.lora_A.to(dtype), self.scaling * self.lora_B.to(dtype)
            W = self.base_weight.to(A)
            lengths = torch.linalg.vector_norm(W, dim=1)
            squares = lengths.square() + (B * (2 * (W @ A.T) + B @ (A @ A.T))).sum(1)
        norms: Tensor = squares.clamp(min=0).sqrt().maximum(self._least(lengths))
        return norms.to(self.lora_A.dtype).clamp(min=torch.finfo(self.lora_A.dtype).tiny)

    def _least(self, lengths: Tensor) -> Tensor:
        """The least norms of rows whose norms in W are `lengths`: 2√eps times these, and not zero."""
        computed = torch.finfo(torch.promote_types(self.lora_A.dtype, torch.float32))
        least: Tensor = (2 * computed.eps**0.5 * lengths).clamp(min=computed.tiny**0.5)
        return least

    @torch.no_grad()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DoRALinear:
        # In another dtype or on another device the norms may be rounded differently, and g = 1 has to stay.
        was_fresh = self._is_fresh()
        super()._apply(fn, recurse)
        if was_fresh and not self.lora_magnitude_vector.is_meta:
            self.lora_magnitude_vector.copy_(self.row_norms())
            if self._unmerged_weight is not None:  # W' = W, whatever m was when the cast merged again
                self.weight.copy_(self._unmerged_weight)
                self._merged_from = tuple(tensor.detach().clone() for tensor in self._watched())
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
        weight, m = super().merged_weight(), self.lora_magnitude_vector
        norms = weight.norm(dim=1).maximum(self._least(self.base_weight.double().norm(dim=1)))
        g: Tensor = (m.double() / norms).where(m != self.row_norms(), 1)  # 1 where it is 1 in forward
        return g[:, None] * weight
