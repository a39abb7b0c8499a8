"""A batch whose rows belong to different adapters. `Adapters.rows` (lora/adapters.py) puts these modules in.

    h_i = W·x_i + b + ΔW_k(i)·x_i          k(i) is the adapter of row i of the batch

W·x + b is computed once for all rows. In the exact mode, row i equals the same batch computed with its
adapter alone, bit for bit. A matrix product of another shape may round differently, so each product keeps
the shape that it has when the adapter is alone:

    rowwise layers   multiply each row of a batch by matrices of its own, A (r, in) and s·B (out, r), also if
                     these are the same for all rows. Layers of one rank are computed together: each row takes
                     its matrices, and two batched products do the rest, as in Punica's kernels for GPUs
                     (arXiv 2310.18547). The cost hardly depends on the number of adapters.
    other modules    are computed for the whole batch, and their rows are selected: K adapters cost K times
                     the thin products.

FastLoRALinear (lora/fast) is rowwise, LoRALinear is not. The fast mode computes every layer with ΔW = s·B·A
as if it were rowwise, and all ranks together: smaller ones are filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.adapted import has_low_rank
from lora.linear import LoRALinear
from lora.mergeable import MergeableLinear, share_hooks


class MixedModule(nn.Module):
    """Computes each row of a batch (n, ...) with its own module: x (n, ...) -> (n, ..., most outputs).

    base: the module that stood here before all adapters; its Parameters and hooks are this module's too.
    rows: the numbers of the rows of each module, int64, in sum `size`.

    Raises RuntimeError in training mode, ValueError if x has another number of rows.
    """

    def __init__(self, base: nn.Module, rows: Mapping[nn.Module, Tensor], size: int, exact: bool):
        super().__init__()
        self._parameters.update(base._parameters)
        share_hooks(base, self)
        self.training = base.training
        self._size = size
        self._exact = exact
        self._base = [base]  # in a list, so that it is not registered as a child
        self._adapts = any(isinstance(module, MergeableLinear) for module in rows)
        self._others = dict(rows)
        groups: dict[Any, dict[LoRALinear, Tensor]] = {}
        for module in rows:
            if isinstance(module, MergeableLinear) and has_low_rank(module):
                A, _ = module.factors()
                key = (type(module), len(A), A.dtype) if exact else None
                groups.setdefault(key, {})[module] = self._others.pop(module)
        self._groups = [(group, *_joined_rows(group, size)) for group in groups.values()]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.training:
            raise RuntimeError("a mixed batch in training mode; call eval() first")
        if len(x) != self._size:
            raise ValueError(f"rows() was given {self._size} names, and this batch has {len(x)} rows")
        h: Any = self._base[0].forward(x, *args, **kwargs) if self._adapts else None  # W·x + b, once
        parts = []
        others = list(self._others.items())
        for layers, rows, numbers in self._groups:
            if self._exact and not next(iter(layers)).is_rowwise(x):
                others += layers.items()
                continue
            y = h.clone()
            add_rowwise_(y, x, *_stacked(list(layers)), numbers)
            parts.append((rows, y if len(rows) == self._size else y[rows]))
        for module, rows in others:
            if isinstance(module, MergeableLinear):
                module.base_output = h
                try:
                    y = module.forward(x)
                finally:
                    module.base_output = None
            elif module is self._base[0] and h is not None:
                y = h
            else:
                y = module.forward(x, *args, **kwargs)
            parts.append((rows, y[rows]))
        return _joined(parts, self._size)


def add_rowwise_(h: Tensor, x: Tensor, A: Tensor, B: Tensor, numbers: Tensor) -> Tensor:
    """Adds B[k]·A[k]·x[i] with k = numbers[i] to each row h[i] of a batch, in place, in the dtype of h.

    h (n, ..., out), x (n, ..., in), A (K, r, in), B (K, out, r), numbers (n,) int64. Returns the thin
    products A[k]·x[i], (n, L, r), where L is the product of the dimensions between.
    """
    A, B = (each.to(h.dtype).index_select(0, numbers).transpose(1, 2) for each in (A, B))
    thin = torch.bmm(x.to(h.dtype).reshape(len(x), -1, x.shape[-1]), A)
    h.view(*thin.shape[:2], -1).baddbmm_(thin, B)
    return thin


def _stacked(layers: Sequence[LoRALinear]) -> tuple[Tensor, Tensor]:
    """A (K, r, in) and scaling·B (K, out, r) of K layers, where r is the largest rank."""
    factors = [layer.factors() for layer in layers]
    most = max(len(A) for A, _ in factors)
    A = torch.stack([A if len(A) == most else F.pad(A, (0, 0, 0, most - len(A))) for A, _ in factors])
    B = torch.stack([B if len(A) == most else F.pad(B, (0, most - len(A))) for A, B in factors])
    # Of at least float32, as where add_product_ multiplies by a number: 16 bits would round the scaling.
    dtype = torch.promote_types(B.dtype, torch.float32)
    scaling = torch.tensor([layer.scaling for layer in layers], dtype=dtype, device=B.device)
    return A, (scaling[:, None, None] * B).to(B.dtype)


def _joined_rows(group: Mapping[Any, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """The rows of all layers, and for each row of the batch the number of its layer, 0 if there is none."""
    rows = torch.cat(list(group.values()))
    lengths = torch.tensor([len(each) for each in group.values()], device=rows.device)
    numbers = rows.new_zeros(size)
    numbers[rows] = torch.arange(len(group), device=rows.device).repeat_interleave(lengths)
    return rows, numbers


def _joined(parts: list[tuple[Tensor, Tensor]], size: int) -> Tensor:
    """The rows of all parts in order. Where the last dimensions differ, -inf fills up the smaller ones."""
    if len(parts) == 1:
        return parts[0][1]
    most = max((y for _, y in parts), key=lambda y: y.shape[-1])
    out = most.new_empty(size, *most.shape[1:])
    for rows, y in parts:
        out[rows] = F.pad(y, (0, most.shape[-1] - y.shape[-1]), value=-torch.inf)
    return out
