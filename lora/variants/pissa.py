"""PiSSA and MiLoRA: LoRA that starts at singular vectors of W instead of at random and zero.

PiSSA (Meng et al. 2024, arXiv 2404.02948, equations 2 and 3) starts at the r largest singular values of
W = U·diag(S)·Vᵀ, MiLoRA (Wang et al. 2024, arXiv 2406.09044, section 3) at the r smallest:

    A₀ = √(S_r / s)·V_rᵀ  (r, in)        B₀ = U_r·√(S_r / s)  (out, r)        s = scaling

The papers subtract s·B₀·A₀ from W, so that the start changes nothing. Here W stays, and the update is the
change since the start. The output is

    h = W·x + b + ΔW·x          ΔW = s·(B·A - B₀·A₀) = s·((B - B₀)·A + B₀·(A - A₀))

The second form is computed: it is exactly zero at the start, and it does not subtract two large products.

Trains A and B, as LoRA does. A₀ and B₀ are frozen and saved. It costs an SVD of each weight at the start and
thin products of rank 2r. A folder holds plain LoRA of rank 2r, [A; A₀] and [B, -B₀], which PEFT reads. Our
note in it says how to divide it again, so that here it is loaded as it was, with its start.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.config import LoraConfig
from lora.linear import LoRALinear
from lora.mergeable import MergeableLinear


class PiSSALinear(LoRALinear):
    """An nn.Linear with a PiSSA adapter: x (..., in) -> (..., out).

    Differs from LoRALinear by the start of lora_A and lora_B, and by the buffers `start_A` (r, in) and
    `start_B` (out, r), in the dtype of lora_A. Raises ValueError if the weight is not finite, if r exceeds
    the number of singular values, or if one at which the adapter would start is 0 to rounding: its direction
    would get no gradient.
    """

    adapter_tensors = (*LoRALinear.adapter_tensors, "start_A", "start_B")
    without_start: ClassVar[dict[str, bool]] = {"start": False}  # spares load_adapter the SVD
    largest = True  # which of the singular values

    def __init__(self, linear: nn.Linear, *args: Any, start: bool = True, **settings: Any):
        super().__init__(linear, *args, **settings)
        if start:
            self._start()
        self.register_buffer("start_A", self.lora_A.detach().clone())
        self.register_buffer("start_B", self.lora_B.detach().clone())
        self.start_A: Tensor
        self.start_B: Tensor

    @torch.no_grad()
    def _start(self) -> None:
        """Sets A and B to A₀ and B₀."""
        if self.r > min(self.weight.shape):
            raise ValueError(f"r: {self.r} is more than the rank {min(self.weight.shape)} of the weight")
        W = self.base_weight.detach().double()
        if not W.is_meta and not W.isfinite().all():
            raise ValueError("the weight is not finite")
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        part = slice(self.r) if self.largest else slice(len(S) - self.r, None)
        rounding = max(W.shape) * torch.finfo(W.dtype).eps * S[0]  # of the singular values
        if not S.is_meta and not (S[part] > rounding).all():
            raise ValueError(
                "a singular value at which the adapter would start is 0, and would get no gradient"
            )
        root = (S[part] / self.scaling).sqrt()
        self.lora_A.copy_(root[:, None] * Vh[part])
        self.lora_B.copy_(U[:, part] * root)

    def forward(self, x: Tensor) -> Tensor:
        h = MergeableLinear.forward(self, x)  # W·x + b: (..., in) -> (..., out)
        if self.merged or not self.enabled:
            return h
        A, B = self.factors()
        x = F.dropout(x.to(A.dtype), self.lora_dropout, self.training)
        return (h + self.scaling * F.linear(F.linear(x, A), B)).to(h.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """[A; A - A₀] (2r, in) and [B - B₀, B₀] (out, 2r): ΔW is their product, times scaling."""
        A, B = self.lora_A, self.lora_B
        return torch.cat([A, A - self.start_A]), torch.cat([B - self.start_B, self.start_B], dim=1)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW = s·(B·A - B₀·A₀), (out, in), float64."""
        A, B = self.lora_A.double(), self.lora_B.double()
        A0, B0 = self.start_A.double(), self.start_B.double()
        return self.scaling * ((B - B0) @ A + B0 @ (A - A0))

    @staticmethod
    def plain_config(config: LoraConfig) -> LoraConfig:
        """The config of plain LoRA of rank 2r with the same scaling."""
        factor = 2**0.5 if config.use_rslora else 2
        return dataclasses.replace(
            config,
            r=2 * config.r,
            lora_alpha=factor * config.lora_alpha,
            rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
            alpha_pattern={key: factor * alpha for key, alpha in config.alpha_pattern.items()},
            init_lora_weights=True,
        )

    @staticmethod
    def to_plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A folder's tensors, with [A; A₀] as lora_A and [B, -B₀] as lora_B."""
        starts = {_start_of(name) for name in tensors if name.endswith((".lora_A", ".lora_B"))}
        plain = {name: tensor for name, tensor in tensors.items() if name not in starts}
        for name in plain:
            if name.endswith(".lora_A"):
                plain[name] = torch.cat([plain[name], tensors[_start_of(name)]])
            if name.endswith(".lora_B"):
                plain[name] = torch.cat([plain[name], -tensors[_start_of(name)]], dim=1)
        return plain

    @staticmethod
    def from_plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_plain`."""
        found = dict(tensors)
        for name, tensor in tensors.items():
            if name.endswith(".lora_A"):
                r = tensor.shape[0] // 2
                found[name], found[_start_of(name)] = tensor[:r], tensor[r:]
            if name.endswith(".lora_B"):
                r = tensor.shape[-1] // 2
                found[name], found[_start_of(name)] = tensor[:, :r], -tensor[:, r:]
        return found


def _start_of(name: str) -> str:
    """The name of the start of the tensor `name`, which ends in .lora_A or .lora_B."""
    return f"{name[: -len('lora_A')]}start_{name[-1]}"


class MiLoRALinear(PiSSALinear):
    """PiSSALinear with the smallest singular values."""

    largest = False
