"""FastLinear and FastLoRALinear: nn.Linear and LoRALinear with less to compute and less memory.

Autocast casts a frozen weight at every forward and keeps the cast for backward. FastLinear casts it once,
which costs 2 bytes an element, and reuses the copy. FastLoRALinear computes the formula of LoRALinear in
one autograd function that saves less for backward (lora/fast/function.py).

The Parameters are unchanged. The copies are kept beside the model, so that a state dict does not contain
them, and are freed with their weight. They are dropped

    if the weight or bias has requires_grad, or `train()` or `eval()` changes the mode;
    if the version, address, device or dtype of a Parameter changes, as in a merge;
    if the bias or a row of the weight does not equal its copy. Some optimizers, collectives, DLPack and
        `.data` write to a Parameter without raising its version. A CPU forward therefore compares the bias
        and 16 rows, other ones each time, so that it covers all rows of a matrix of 768 in 48 forwards. On
        an accelerator a comparison would wait for the device. After such a write there, or to a few rows
        alone, call `eval()` or `train()` to change the mode.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lora.fast.function import add_product_, can_fuse, cast_shared, has_long_rows, is_traced, lora_linear
from lora.linear import LoRALinear
from lora.quantised.tensor import QuantisedTensor


class _Copies(NamedTuple):
    key: Any  # identifies the contents of the sources
    sources: tuple[Tensor, ...]  # kept alive, so that no other weight can get the same address
    copies: tuple[Tensor, ...]


# By the weight that they are copies of, so that the layers of several adapters share them.
_all_copies: Any = WeakTensorKeyDictionary()


class FastLinear(nn.Linear):
    """nn.Linear that reads a frozen weight from a copy in `compute_dtype` under autocast to that dtype.

    x (..., in) -> (..., out). Without autocast, with a trainable weight or with compute_dtype None it is
    nn.Linear.
    """

    compute_dtype: torch.dtype | None = None
    _first_row = 0  # of those that the next forward compares

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.compute_weights()
        x = x.contiguous()  # otherwise F.linear rounds before it adds the bias, unlike in a fused layer
        if weight is self.weight:
            return super().forward(x)
        return F.linear(cast_shared(x, weight.dtype), weight, bias)

    def compute_weights(self) -> tuple[Tensor, Tensor | None]:
        """The weight and bias to multiply by: the copies where they apply, otherwise the Parameters."""
        dtype, device = self.compute_dtype, self.weight.device.type
        if self.weight.requires_grad:
            self._drop_copies()
        parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)
        if (
            dtype is None
            or is_traced()  # tracing sees neither versions nor addresses
            or any(p.requires_grad or p.is_meta or p.is_inference() for p in parameters)
            or isinstance(self.weight, QuantisedTensor)  # dequantised for each product
            or self.weight.dtype == torch.float64  # autocast does not cast it
            or not torch.is_autocast_enabled(device)
            or torch.get_autocast_dtype(device) != dtype
        ):
            return self.weight, self.bias
        key = (dtype, *((p._version, p.data_ptr(), p.device, p.dtype) for p in parameters))
        found: _Copies | None = _all_copies.get(self.weight)
        if found is None or found.key != key or not self._rows_are_equal(found):
            with torch.inference_mode(False):  # copies made during evaluation must serve training too
                sources = tuple(p.detach() for p in parameters)
                found = _Copies(key, sources, tuple(source.to(dtype) for source in sources))
            _all_copies[self.weight] = found
        weight, *bias = found.copies
        return weight, bias[0] if bias else None

    def _rows_are_equal(self, copies: _Copies) -> bool:
        """Whether some rows of the weight's copy and all of the bias's are right. True on an accelerator."""
        if self.weight.device.type != "cpu":
            return True
        step = max(1, len(self.weight) // 16)
        self._first_row = (self._first_row + 1) % step
        rows = slice(self._first_row, None, step)
        (weight, *bias), (weight_copy, *bias_copy) = copies.sources, copies.copies
        return torch.equal(weight[rows].to(weight_copy.dtype), weight_copy[rows]) and all(
            torch.equal(source.to(copy.dtype), copy) for source, copy in zip(bias, bias_copy, strict=True)
        )

    def train(self, mode: bool = True) -> FastLinear:
        if mode != self.training:
            self._drop_copies()
        super().train(mode)
        return self

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Sets `compute_dtype`, and drops copies in another dtype."""
        if self.compute_dtype not in (None, dtype):
            self._drop_copies()
        self.compute_dtype = dtype

    @property
    def copies(self) -> tuple[Tensor, ...]:
        """The copies that exist now. A Parameter already in the compute dtype needs none."""
        found: _Copies | None = _all_copies.get(self.weight)
        pairs = zip(found.sources, found.copies, strict=True) if found is not None else ()
        return tuple(copy for source, copy in pairs if copy is not source)

    def _drop_copies(self) -> None:
        _all_copies.pop(self.weight, None)

    def on_inject(self, layer: LoRALinear) -> None:
        """Makes the layer that replaces this one fast too. Called by `inject`."""
        fuse(layer, self.compute_dtype)


class FastLoRALinear(LoRALinear, FastLinear):
    """LoRALinear with a fused forward and backward: x (..., in) -> (..., out).

    Values and gradients equal LoRALinear's to rounding. Dropout has the same probability but other random
    numbers (lora/fast/dropout.py). There is no second derivative.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.merged and self.enabled:
            A, B = self.factors()
            if self.base_output is not None and can_fuse(x, self.weight, self.bias, A):
                h = self.base_output.clone()
                add_product_(h, x.to(h.dtype), A, B, self.scaling)
                return h
            weight, bias = self.compute_weights()
            p = self.lora_dropout if self.training else 0.0
            if p < 1 and can_fuse(x, weight, bias, A):
                return lora_linear(x, weight, bias, A, B, self.scaling, p)
        return super().forward(x)

    def is_rowwise(self, x: Tensor) -> bool:
        """Whether `forward` in eval mode has a product for each row of the batch x (lora/mixed.py)."""
        A, _ = self.factors()
        return has_long_rows(x, A) and can_fuse(x, self.weight, self.bias, A)

    def to_linear(self) -> nn.Linear:
        """A FastLinear with the same weight and bias Parameters, without the adapter."""
        linear = super().to_linear()
        fuse(linear, self.compute_dtype)
        return linear


# variants.py adds those of the variants.
FAST_CLASSES: dict[type[nn.Module], type[FastLinear]] = {
    nn.Linear: FastLinear,
    LoRALinear: FastLoRALinear,
}


def fuse(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turns every nn.Linear and LoRALinear of the model into its fast class, in place.

    The modules stay the same objects, with their Parameters, hooks and names; only their class changes.
    The variants in lora/variants have fast classes too. Other subclasses of nn.Linear and LoRALinear are left
    unchanged. Layers injected later become fast too.

    dtype: the autocast dtype for which to keep copies of frozen weights; None keeps none.
    """
    for module in model.modules():
        if type(module) in FAST_CLASSES:
            module.__class__ = FAST_CLASSES[type(module)]
        if isinstance(module, FastLinear):
            module.set_compute_dtype(dtype)
