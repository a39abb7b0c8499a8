"""A frozen Linear that keeps its weight in the compute dtype too, so that autocast has nothing to cast.

Autocast casts a frozen weight anew at every forward, and keeps each copy for backward. One copy made
once costs 2 bytes a weight and saves both. The Parameters stay as they are; the copies are plain
attributes that no state dict, save or fingerprint sees, made anew when the weight they came from
changes (its version, storage, device or dtype), a merge included. A write through `weight.data` moves none
of these, so it is not seen here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.functional import cast_shared


class FrozenLinear(nn.Linear):
    """An nn.Linear that takes over another one's Parameters: x (..., in) -> (..., out).

    `compute_dtype` None leaves it a plain Linear; otherwise, under autocast to that dtype, a frozen
    weight is read from its copy.
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate a weight only to drop it
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.training = linear.training
        self.compute_dtype: torch.dtype | None = getattr(linear, "compute_dtype", None)
        self._copies: tuple[Any, Tensor, Tensor | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.compute_weights()
        if weight is self.weight:
            return super().forward(x)
        return F.linear(cast_shared(x, weight.dtype), weight, bias)

    def compute_weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias to multiply by: the copies where they apply, else the Parameters."""
        dtype, device = self.compute_dtype, self.weight.device.type
        if (
            dtype is None
            or torch.compiler.is_compiling()  # which sees no versions or addresses, and fuses its own casts
            or self.weight.requires_grad
            or (self.bias is not None and self.bias.requires_grad)
            or not torch.is_autocast_enabled(device)
            or torch.get_autocast_dtype(device) != dtype
        ):
            return self.weight, self.bias
        key = (_identity(self.weight), None if self.bias is None else _identity(self.bias), dtype)
        if self._copies is None or self._copies[0] != key:
            with torch.inference_mode(False):  # copies first made in evaluation serve training too
                bias = None if self.bias is None else self.bias.detach().to(dtype)
                self._copies = (key, self.weight.detach().to(dtype), bias)
        return self._copies[1], self._copies[2]

    def compute_in(self, dtype: torch.dtype | None) -> None:
        """Sets `compute_dtype`; copies in another dtype are dropped."""
        if dtype != self.compute_dtype:
            self.compute_dtype, self._copies = dtype, None

    @property
    def copies(self) -> tuple[Tensor, ...]:
        """The copies that there are at present: of the weight and, where there is one, the bias."""
        return tuple(copy for copy in self._copies[1:] if copy is not None) if self._copies else ()

    def copy_bytes(self) -> int:
        """What the copies take in memory at present."""
        return sum(copy.nbytes for copy in self.copies)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": None}  # a deep copy or a pickle makes its own


def _identity(parameter: Tensor) -> tuple[int, int, torch.device, torch.dtype]:
    return parameter._version, parameter.data_ptr(), parameter.device, parameter.dtype
