"""Step 7: merge. Why float64, and why one rounding."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from learn.solutions.step03 import MyLoRALinear


@torch.no_grad()
def merged_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """W + scaling·B·A in float64, (out, in), not rounded yet. The arguments may have 16 bits."""
    # [step 7: the sum, in float64 from the first operation on]
    return weight.double() + scaling * (lora_B.double() @ lora_A.double())
    # [end]


class MergeableLoRALinear(MyLoRALinear):
    """Your layer, which can also hold W + ΔW in place of W."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.merged = False

    @torch.no_grad()
    def merge(self) -> None:
        """Writes the merged weight into `self.weight`, rounded once. Raises RuntimeError if merged."""
        # [step 7: refuse a second merge; write in place with self.weight.copy_(...); set self.merged]
        if self.merged:
            raise RuntimeError("the layer is merged already")
        self.weight.copy_(merged_weight(self.weight, self.lora_A, self.lora_B, self.scaling))
        self.merged = True
        # [end]

    def forward(self, x: Tensor) -> Tensor:
        """As in step 3, and one product with the merged weight while merged."""
        # [step 7: two cases]
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        return super().forward(x)
        # [end]
