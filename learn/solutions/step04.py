"""Step 4: backward by hand."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class LoRAFunction(torch.autograd.Function):
    """LoRA's forward and backward, without autograd inside.

    Use as LoRAFunction.apply(x, weight, bias, lora_A, lora_B, scaling, dropout).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor,
        scaling: float, dropout: float,
    ) -> Tensor:  # fmt: skip
        """x (n, in) -> h (n, out). weight (out, in), bias (out,), lora_A (r, in), lora_B (out, r)."""
        keep = (torch.rand_like(x) >= dropout) / (1 - dropout)  # (n, in): 0, or 1 / (1 - dropout)
        keep = keep.to(x.dtype)
        thin = F.linear(x * keep, lora_A)  # (n, r)
        h = F.linear(x, weight, bias) + scaling * F.linear(thin, lora_B)
        # [step 4: ctx.save_for_backward(tensors), and ctx.scaling = scaling]
        ctx.save_for_backward(x, keep, thin, weight, lora_A, lora_B)
        ctx.scaling = scaling
        # [end]
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad is ∂L/∂h, (n, out). Returns one gradient, or None, for each of forward's seven arguments."""
        # [step 4: the gradients of x, lora_A and lora_B by hand]
        x, keep, thin, weight, lora_A, lora_B = ctx.saved_tensors
        grad_thin = ctx.scaling * (grad @ lora_B)  # (n, r)
        grad_A = grad_thin.T @ (x * keep)  # (r, in)
        grad_B = ctx.scaling * (grad.T @ thin)  # (out, r)
        grad_x = grad @ weight + (grad_thin @ lora_A) * keep  # (n, in)
        return grad_x, None, None, grad_A, grad_B, None, None
        # [end]
