"""Bonus: DoRA, mixed batches, and another architecture."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learn.solutions.step03 import MyLoRALinear
from learn.solutions.step06 import inject


def dora(
    x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor
) -> Tensor:
    """DoRA's forward: x (n, in) -> (n, out).

    V = W + scaling·B·A. Each output row of V is divided by its norm and multiplied by its element of
    `magnitude`, (out,). The norm is a constant for backward. The bias is added last.
    """
    # [step 13: V; its norms by rows, detached; the product; the bias]
    V = weight + scaling * lora_B @ lora_A  # (out, in)
    norm: Tensor = V.norm(dim=1).detach()  # (out,)
    return F.linear(x, V) * (magnitude / norm) + bias
    # [end]


def mixed_batch(
    h: Tensor, x: Tensor, adapters: Sequence[tuple[Tensor, Tensor, float]], which: Sequence[int]
) -> Tensor:
    """Adds to each row of h (n, out) the update of its own adapter, for inputs x (n, in).

    adapters: (A, B, scaling) of each. which: the index of each row's adapter, or -1 for none. A row is the
    same, bit for bit, as if the whole batch had its adapter. Raises ValueError for any other index.
    """
    # [step 13: run every adapter on the whole batch, and choose rows with torch.where]
    if not all(-1 <= index < len(adapters) for index in which):
        raise ValueError(f"{list(which)}: not all of -1 to {len(adapters) - 1}")
    chosen, result = torch.tensor(which)[:, None], h
    for index, (lora_A, lora_B, scaling) in enumerate(adapters):
        adapted = h + scaling * F.linear(F.linear(x, lora_A), lora_B)
        result = torch.where(chosen == index, adapted, result)
    return result
    # [end]


def adapt_llama(model: nn.Module) -> list[str]:
    """Adapts the query and value projections of a Llama, with r=4 and lora_alpha=8. Returns their names.

    Use your injector of step 6 and your layer of step 3. print(model) shows how the layers are called.
    """
    # [step 13: one call of inject; the head of a language model is its lm_head]
    return inject(model, ("q_proj", "v_proj"), lambda linear: MyLoRALinear(linear, 4, 8), head="lm_head")
    # [end]
