"""Step 3: the layer. Forward with scaling and dropout."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learn.solutions.step02 import init_factors


class MyLoRALinear(nn.Module):
    """An nn.Linear with an adapter: x (..., in) -> h (..., out)."""

    def __init__(
        self,
        linear: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias  # the same Parameters, not copies
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        out_features, in_features = self.weight.shape
        lora_A, lora_B = init_factors(in_features, out_features, r, generator)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)  # float64 on a float64 layer
        self.lora_A = nn.Parameter(lora_A.to(dtype))  # (r, in)
        self.lora_B = nn.Parameter(lora_B.to(dtype))  # (out, r)
        self.lora_dropout = lora_dropout
        # [step 3: set self.scaling]
        self.scaling = lora_alpha / r
        # [end]

    def forward(self, x: Tensor) -> Tensor:
        """W·x + b + scaling·B·A·dropout(x)."""
        # [step 3: the frozen layer's output, plus the scaled output of the adapter]
        h = F.linear(x, self.weight, self.bias)
        x = F.dropout(x, self.lora_dropout, self.training)
        return h + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)
        # [end]
