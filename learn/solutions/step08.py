"""Step 8: unmerge. Show the drift of subtraction, then restore bit for bit."""

from typing import Any

import torch
from torch import Tensor

from learn.solutions.step07 import MergeableLoRALinear


@torch.no_grad()
def drift(weight: Tensor, deltas: list[Tensor]) -> float:
    """The share of the elements of `weight` that differ after adding and subtracting each of `deltas`.

    All tensors have the same dtype and shape. `weight` itself is not changed.
    """
    # [step 8: on a copy, add and subtract each delta; then compare with weight]
    copy = weight.clone()
    for delta in deltas:
        copy += delta
        copy -= delta
    return (copy != weight).double().mean().item()
    # [end]


class RestorableLoRALinear(MergeableLoRALinear):
    """Your layer, with an unmerge that restores W bit for bit."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.unmerged_weight: Tensor | None = None  # a copy of W while merged

    @torch.no_grad()
    def merge(self) -> None:
        """Keeps a copy of W, then merges as in step 7."""
        # [step 8: make the copy, then call super().merge()]
        copy = self.weight.detach().clone()
        super().merge()
        self.unmerged_weight = copy
        # [end]

    @torch.no_grad()
    def unmerge(self) -> None:
        """Writes W back into `self.weight`, in place. Raises RuntimeError if the layer is not merged."""
        # [step 8: refuse if not merged; write W back; the layer is no longer merged]
        if self.unmerged_weight is None:
            raise RuntimeError("the layer is not merged")
        self.weight.copy_(self.unmerged_weight)
        self.unmerged_weight, self.merged = None, False
        # [end]
