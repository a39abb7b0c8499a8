"""Step 11: train the quickstart on your own layer, through the real loop."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learn.solutions.step02 import init_factors
from learn.solutions.step07 import merged_weight
from lora.mergeable import MergeableLinear


class MyLoRALinear(MergeableLinear):
    """Your layer by the library's protocol: what the adapter consists of, what trains, what merge writes."""

    adapter_tensors = ("lora_A", "lora_B")  # saved, loaded, and watched while merged
    trained_tensors = ("lora_A", "lora_B")
    watched_settings = ("scaling",)  # numbers that the merged weight depends on, watched too

    def __init__(
        self,
        linear: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__(linear)  # takes over weight and bias, and freezes them
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        dtype = torch.promote_types(self.weight.dtype, torch.float32)  # the adapter's, 32 bits at least
        # [step 11: self.lora_A and self.lora_B, from your step 2, in this dtype; self.scaling]
        lora_A, lora_B = init_factors(self.in_features, self.out_features, r, generator)
        self.lora_A = nn.Parameter(lora_A.to(dtype))
        self.lora_B = nn.Parameter(lora_B.to(dtype))
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        # [end]

    def forward(self, x: Tensor) -> Tensor:
        """As in step 3. While merged or switched off, the library's layer computes all of it."""
        h = super().forward(x)  # W·x + b, in the dtype that the model computes in
        if self.merged or not self.enabled:
            return h
        # [step 11: cast x to lora_A's dtype; your formula of step 3; cast the result to h's dtype]
        x = F.dropout(x.to(self.lora_A.dtype), self.lora_dropout, self.training)
        return (h + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)).to(h.dtype)
        # [end]

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + ΔW in float64. self.base_weight is W, merged or not."""
        # [step 11: your function of step 7]
        return merged_weight(self.base_weight, self.lora_A, self.lora_B, self.scaling)
        # [end]
