"""LoRA-FA: A stays at its random start, and only B is trained.

LoRA-FA (Zhang et al. 2023, arXiv 2308.03303, section 3.1) computes what LoRA computes,

    h = W·x + b + scaling·B·A·x          A (r, in) frozen at random, B (out, r) starts at zero

With g = ∂L/∂h, the gradient of B is scaling·g·(A·x)ᵀ. So backward needs the thin product A·x, (n, r), of
each row, where LoRA also needs x, (n, in), for the gradient of A. FastLoRALinear (lora/fast/function.py)
saves x only if A trains; with ordinary ops autograd does the same.

Trains B: out·r numbers, half of LoRA's for a square W, and half of its optimizer state. ΔW is confined to
the r random input directions in A. A folder in PEFT's format is plain LoRA; our note in it keeps A frozen.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lora.linear import LoRALinear


class LoRAFALinear(LoRALinear):
    """An nn.Linear with a LoRA-FA adapter: LoRALinear, of which only lora_B trains."""

    trained_tensors = ("lora_B",)

    def __init__(self, linear: nn.Linear, *args: Any, **settings: Any):
        super().__init__(linear, *args, **settings)
        self.lora_A.requires_grad_(False)
