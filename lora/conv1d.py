"""LoRA on the Conv1D of transformers' GPT-2: a linear layer whose weight is stored as (in, out)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora.inject import CONVERSIONS
from lora.mergeable import MergeableLinear, share_hooks


class TransposedLinear(nn.Linear):
    """W·x + b with a weight (in, out), by the operation that Conv1D uses: x (..., in) -> (..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.addmm(self.bias, x.reshape(-1, self.in_features), self.weight)
        return h.view(*x.shape[:-1], self.out_features)


class TransposedLayer(MergeableLinear):
    """What differs between a layer class on an nn.Linear and on a Conv1D."""

    fan_in_fan_out = True

    def __init__(self, conv: Any, **settings: Any):
        """conv: a Conv1D, whose Parameters and hooks the layer takes over. settings: of the layer class."""
        linear = nn.Linear(conv.nx, conv.nf, device="meta").train(conv.training)
        linear.weight, linear.bias = conv.weight, conv.bias
        share_hooks(conv, linear)
        self._conv1d = type(conv)
        super().__init__(linear, **settings)

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return _empty, (type(self).__bases__[1],), self.__getstate__()  # the class has no importable name

    @property
    def base_weight(self) -> Tensor:
        """W, (out, in): a view of the stored weight."""
        return self.stored_weight.t()

    def rounded_weight(self, dtype: torch.dtype) -> Tensor:
        return super().rounded_weight(dtype).t().contiguous()

    def to_linear(self) -> Any:
        """A Conv1D with the same weight and bias Parameters and hooks, without the adapter."""
        with torch.device("meta"):
            conv = self._conv1d(self.out_features, self.in_features)
        conv.weight, conv.bias = self.weight, self.bias
        share_hooks(self, conv)
        return conv.train(self.training)


_classes: dict[type[MergeableLinear], type[MergeableLinear]] = {}


def on_conv1d(layer: type[MergeableLinear]) -> type[MergeableLinear]:
    """The class that adapts a Conv1D as `layer` adapts an nn.Linear, the same at every call."""
    if layer not in _classes:
        bases = (TransposedLayer, layer, TransposedLinear)
        _classes[layer] = type(f"{layer.__name__}OnConv1D", bases, {})
    return _classes[layer]


def _empty(layer: type[MergeableLinear]) -> MergeableLinear:
    kind = on_conv1d(layer)
    return kind.__new__(kind)


CONVERSIONS["Conv1D"] = on_conv1d
