"""A batch whose rows belong to different adapters. `Adapters.rows` (lora/adapters.py) puts these modules in.

    h_i = W·x_i + b + ΔW_k(i)·x_i          k(i) is the adapter of row i of the batch

W·x + b is computed once for all rows. Then, in the exact mode, each adapter adds its own part to it for the
whole batch, and the rows that belong to the adapter are selected: K adapters cost K thin products. Products
of fewer rows would be cheaper, but a matrix product of another shape may round differently, and a row would
depend on the other rows.

The fast mode gathers the matrices of each row, A (B, r, in) and s·B (B, out, r), and multiplies by them in
two batched products, as Punica's kernels do on GPUs (arXiv 2310.18547): the cost does not depend on K.
Smaller ranks are filled up with zeros. Adapters whose ΔW is not s·B·A are computed as in the exact mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.adapted import has_low_rank
from lora.mergeable import MergeableLinear, share_hooks


class MixedModule(nn.Module):
    """Computes each row of a batch (B, ...) with its own module: x (B, ...) -> (B, ..., most outputs).

    base: the module that stood here before all adapters; its Parameters and hooks are this module's too.
    rows: the numbers of the rows of each module, (n,) int64, in sum `size`.

    Raises RuntimeError in training mode, ValueError if x has another number of rows.
    """

    def __init__(self, base: nn.Module, rows: Mapping[nn.Module, Tensor], size: int, exact: bool):
        super().__init__()
        self._parameters.update(base._parameters)
        share_hooks(base, self)
        self.training = base.training
        self._size = size
        self._base = [base]  # in lists, so that they are not registered as children
        thin = [m for m in rows if not exact and isinstance(m, MergeableLinear) and has_low_rank(m)]
        self._rows = [(module, index) for module, index in rows.items() if module not in thin]
        self._stacked = _stack({m: rows[m] for m in thin}, size) if thin else None
        self._adapts = any(isinstance(module, MergeableLinear) for module in rows)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.training:
            raise RuntimeError("a mixed batch in training mode; call eval() first")
        if len(x) != self._size:
            raise ValueError(f"rows() was given {self._size} names, and this batch has {len(x)} rows")
        h: Any = self._base[0].forward(x, *args, **kwargs) if self._adapts else None  # W·x + b, once
        parts = []
        if self._stacked is not None:
            index, A, B = self._stacked
            parts.append((index, _add_rowwise(h, x, A, B)[index]))
        for module, index in self._rows:
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
            parts.append((index, y[index]))
        return _joined(parts, self._size)


def _joined(parts: list[tuple[Tensor, Tensor]], size: int) -> Tensor:
    """The rows of all parts in order. Where the last dimensions differ, -inf fills up the smaller ones."""
    most = max((y for _, y in parts), key=lambda y: y.shape[-1])
    out = most.new_empty(size, *most.shape[1:])
    for index, y in parts:
        out[index] = F.pad(y, (0, most.shape[-1] - y.shape[-1]), value=-torch.inf)
    return out


def _stack(rows: Mapping[Any, Tensor], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers of all rows (n,), and for each row of the batch A (B, r, in) and scaling·B (B, out, r)."""
    index = torch.cat(list(rows.values()))
    factors = {layer: layer.factors() for layer in rows}
    most = max(len(A) for A, _ in factors.values())
    (first_A, first_B), *_ = factors.values()
    all_A = first_A.new_zeros(size, most, first_A.shape[1], requires_grad=False)
    all_B = first_B.new_zeros(size, first_B.shape[0], most, requires_grad=False)
    with torch.no_grad():
        for layer, (A, B) in factors.items():
            all_A[rows[layer], : len(A)] = A
            all_B[rows[layer], :, : len(A)] = layer.scaling * B
    return index, all_A, all_B


def _add_rowwise(h: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Adds B·A·x to h, with other matrices for each row of the batch: x (B, ..., in) -> (B, ..., out)."""
    A, B = A.to(h.dtype), B.to(h.dtype)
    thin = torch.bmm(
        x.to(h.dtype).flatten(1, -2) if x.ndim > 2 else x.to(h.dtype)[:, None], A.transpose(1, 2)
    )
    return torch.baddbmm(h.view(len(h), -1, h.shape[-1]), thin, B.transpose(1, 2)).view_as(h)
