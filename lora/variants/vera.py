"""VeRA: all layers share one random pair of matrices, and each trains two vectors that scale it.

VeRA (Kopiczko et al. 2023, arXiv 2310.11454, equation 2) computes

    h = W·x + b + ΔW·x          ΔW = diag(λ_b)·B·diag(λ_d)·A

    A    (r, in)   frozen, random, the same for all layers     λ_d  (r,)    trained, starts at d_initial
    B    (out, r)  frozen, random, the same for all layers     λ_b  (out,)  trained, starts at zero

The pair has the largest `in` and the largest `out` of all layers, and each layer uses a slice: the first
`in` columns of A and the first `out` rows of B. Kaiming uniform numbers from `projection_prng_key` fill it,
as in PEFT, so that it need not be saved (save_projection).

Trains out + r numbers per layer: with r = 256 fewer than LoRA with r = 1, if in > 256. It costs thin products
of rank r, which is large, and there is no α: scaling is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.config import LoraConfig
from lora.linear import LoRALinear
from lora.mergeable import MergeableLinear
from lora.validation import check_number

_WATCHED = 16  # rows of the shared pair whose values are compared while a layer is merged
_FIELDS = ("projection_prng_key", "d_initial", "save_projection")


class Projection(nn.Module):
    """The frozen pair: vera_A (r, in) and vera_B (out, r), Kaiming uniform from the seed `key`, float32.

    A cast leaves it as it is, because it belongs to layers that are not cast too.
    """

    def __init__(self, out_features: int, in_features: int, r: int, key: int):
        super().__init__()
        generator = torch.Generator().manual_seed(key)
        for name, shape in (("vera_A", (r, in_features)), ("vera_B", (out_features, r))):
            bound = math.sqrt(6 / shape[1])  # Kaiming uniform for a ReLU, as in PEFT
            matrix = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, matrix, persistent=False)
        self.vera_A: Tensor
        self.vera_B: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Projection:
        def move(matrix: Tensor) -> Tensor:
            return fn(matrix) if matrix.is_meta else matrix.to(fn(matrix[:0]).device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


class VeRALinear(LoRALinear):
    """An nn.Linear with a VeRA adapter: x (..., in) -> (..., out).

    Differs from LoRALinear by its tensors: `vera_lambda_b` (out,) and `vera_lambda_d` (r,), float32 or
    float64, and the shared `projection`. lora_alpha, use_rslora and generator have no effect.
    """

    adapter_tensors = ("vera_lambda_b", "vera_lambda_d")
    trained_tensors = adapter_tensors
    save_projection = True

    def __init__(
        self,
        linear: nn.Linear,
        r: int,
        lora_alpha: float = 1.0,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        generator: torch.Generator | None = None,
    ):
        LoraConfig(r=r, lora_dropout=lora_dropout)  # checks the values
        MergeableLinear.__init__(self, linear)
        self.r, self.lora_alpha, self.lora_dropout, self.scaling = r, lora_alpha, lora_dropout, 1.0
        dtype, device = torch.promote_types(self.weight.dtype, torch.float32), self.weight.device
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device))
        self.vera_lambda_d = nn.Parameter(torch.full((r,), LoraConfig.d_initial, dtype=dtype, device=device))
        self.projection = Projection(self.out_features, self.in_features, r, 0).to(device)

    @classmethod
    def share(cls, layers: Sequence[VeRALinear], config: LoraConfig) -> None:
        """Gives the layers of a model one pair, and λ_d the start of the config. Called by `inject`."""
        out_features = max(layer.out_features for layer in layers)
        in_features = max(layer.in_features for layer in layers)
        pair = Projection(out_features, in_features, config.r, config.projection_prng_key)
        pair.to(layers[0].weight.device)
        for layer in layers:
            layer.projection, layer.save_projection = pair, config.save_projection
            with torch.no_grad():
                layer.vera_lambda_d.fill_(config.d_initial)

    def shared_tensors(self) -> dict[str, Tensor]:
        """What a folder holds once for all layers."""
        return dict(self.projection.named_buffers()) if self.save_projection else {}

    def forward(self, x: Tensor) -> Tensor:
        h = MergeableLinear.forward(self, x)  # W·x + b: (..., in) -> (..., out)
        if self.merged or not self.enabled:
            return h
        A, B = (matrix.to(self.vera_lambda_d) for matrix in self._slices())
        x = F.dropout(x.to(A.dtype), self.lora_dropout, self.training)
        thin = self.vera_lambda_d * F.linear(x, A)  # (..., r)
        return (h + self.scaling * self.vera_lambda_b * F.linear(thin, B)).to(h.dtype)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW = diag(λ_b)·B·diag(λ_d)·A, (out, in), float64."""
        A, B = self._slices()
        d, b = self.vera_lambda_d.double(), self.vera_lambda_b.double()
        return self.scaling * b[:, None] * (B.double() @ (d[:, None] * A.double()))

    def _watched(self) -> tuple[Tensor, ...]:
        return (*(matrix[:_WATCHED] for matrix in self._slices()), *super()._watched())

    def _versions(self) -> tuple[tuple[int, int], ...]:
        pair = self.projection.buffers()
        versions = ((id(each), 0 if each.is_inference() else each._version) for each in pair)
        return (*versions, *super()._versions())

    @torch.no_grad()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VeRALinear:
        rows = self._merged_from[:2]  # of the pair, which is not cast
        super()._apply(fn, recurse)
        if self.merged:
            moved = (row.to(self.projection.vera_A.device) for row in rows)
            self._merged_from = (*moved, *self._merged_from[2:])
        return self

    def _slices(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r): the part of the pair that the layer uses, float32."""
        return self.projection.vera_A[:, : self.in_features], self.projection.vera_B[: self.out_features]


def check_vera(config: LoraConfig) -> None:
    """Raises TypeError or ValueError if a setting of VeRA is invalid, or given together with one of LoRA.

    lora_alpha is ignored, as in PEFT.
    """
    check_number("d_initial", config.d_initial)
    if not abs(config.d_initial) < torch.finfo(torch.float32).max:
        raise ValueError(f"d_initial: {config.d_initial!r} is not within float32")
    if type(config.projection_prng_key) is not int or not 0 <= config.projection_prng_key < 2**63:
        raise ValueError(f"projection_prng_key: {config.projection_prng_key!r} is not a seed")
    if type(config.save_projection) is not bool:
        raise TypeError(f"save_projection: {config.save_projection!r} is not true or false")
    is_vera = config.peft_type == "VERA"
    for name in ("use_rslora", "rank_pattern", "alpha_pattern") if is_vera else _FIELDS:
        if getattr(config, name) not in (getattr(LoraConfig, name, {}), {}):
            raise ValueError(f"{name}: not a setting of peft_type {config.peft_type!r}")
