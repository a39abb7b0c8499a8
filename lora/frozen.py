"""A frozen Linear that keeps its weight in the compute dtype too, so that autocast has nothing to cast.

Autocast casts a frozen weight anew at every forward, and keeps each copy for backward. One copy made
once costs 2 bytes a weight and saves both. The Parameters stay as they are; the copies are plain
attributes that no state dict, save or fingerprint sees, made anew when the weight they came from
changes (its version, storage, device or dtype), a merge included. A write through `weight.data` moves none
of these, so it is not seen here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.functional import cast_shared


class _Copies(NamedTuple):
    key: Any  # what was copied, as _identity tells it
    sources: tuple[Tensor, ...]  # held, so that no other weight can come to lie at their addresses
    made: tuple[Tensor, ...]


class FrozenLinear(nn.Linear):
    """An nn.Linear that takes over another one's Parameters: x (..., in) -> (..., out).

    `compute_dtype` None leaves it a plain Linear; otherwise, under autocast to that dtype, a frozen
    weight is read from its copy.
    """

    compute_dtype: torch.dtype | None = None
    _copies: _Copies | None = None

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate a weight only to drop it
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.training = linear.training
        self.compute_dtype = getattr(linear, "compute_dtype", None)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.compute_weights()
        if weight is self.weight:
            return super().forward(x)
        return F.linear(cast_shared(x, weight.dtype), weight, bias)

    def compute_weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias to multiply by: the copies where they apply, else the Parameters."""
        dtype, device = self.compute_dtype, self.weight.device.type
        parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)
        if (
            dtype is None
            or torch.compiler.is_compiling()  # which sees no versions or addresses, and fuses its own casts
            or any(p.requires_grad or p.is_meta or p.is_inference() for p in parameters)
            or self.weight.dtype == torch.float64  # autocast leaves it alone
            or not torch.is_autocast_enabled(device)
            or torch.get_autocast_dtype(device) != dtype
        ):
            return self.weight, self.bias
        key = tuple(_identity(p) for p in parameters)
        if self._copies is None or self._copies.key != key:
            with torch.inference_mode(False):  # copies first made in evaluation serve training too
                sources = tuple(p.detach() for p in parameters)
                self._copies = _Copies(key, sources, tuple(source.to(dtype) for source in sources))
        weight, *bias = self._copies.made
        return weight, bias[0] if bias else None

    def compute_in(self, dtype: torch.dtype | None) -> None:
        """Sets `compute_dtype`; copies in another dtype are dropped."""
        if dtype != self.compute_dtype:
            self.compute_dtype, self._copies = dtype, None

    @property
    def copies(self) -> tuple[Tensor, ...]:
        """The copies that there are at present: of the weight and, where there is one, the bias.

        A Parameter that has the compute dtype already needs none.
        """
        if self._copies is None:
            return ()
        pairs = zip(self._copies.sources, self._copies.made, strict=True)
        return tuple(copy for source, copy in pairs if copy is not source)

    def copy_bytes(self) -> int:
        """What the copies take in memory at present."""
        return sum(copy.nbytes for copy in self.copies)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": None}  # a deep copy or a pickle makes its own


def _identity(parameter: Tensor) -> tuple[int, int, torch.device, torch.dtype]:
    return parameter._version, parameter.data_ptr(), parameter.device, parameter.dtype
