"""A frozen linear layer that can hold a merged weight, and the guards of the merged state.

While a layer is merged, `weight` holds W + ΔW and `_unmerged_weight` a copy of W. The guards:

    forward in training mode          error: gradients would bypass the adapter
    backward in eval mode             the same error, unless the adapter is frozen
    forward after the adapter changed error: the merged weight does not contain the change
    state_dict                        contains W, so that a saved model is unmerged
    load_state_dict                   error: unmerging would undo what is loaded
    to(device), deepcopy              move or copy the copy of W too
    to(dtype)                         casts the copy of W, and merges again from it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class MergeableLinear(nn.Linear):
    """A frozen nn.Linear with the Parameters of `linear`: x (..., in) -> (..., out).

    A subclass adds an adapter and describes it:

    adapter_tensors: names of the parameters and buffers that make up the adapter. They are saved, loaded,
        and watched for changes while merged.
    trained_tensors: those of them that train. The others stay frozen.
    merged_weight(): the weight with the adapter folded in, (out, in), float64, before rounding.
    """

    adapter_tensors: ClassVar[tuple[str, ...]] = ()
    trained_tensors: ClassVar[tuple[str, ...]] = ()

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate a weight only to discard it
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.training = linear.training
        self.enabled = True
        self._unmerged_weight: Tensor | None = None
        self._was_trainable = False
        self._merged_from: tuple[Tensor, ...] = ()
        self._merged_versions: tuple[int, ...] | None = None

    def merged_weight(self) -> Tensor:
        """The weight with the adapter folded in, (out, in), float64."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether `weight` holds the merged weight. Only `merge` and `unmerge` change it."""
        return self._unmerged_weight is not None

    @property
    def base_weight(self) -> Tensor:
        """W, (out, in): the weight without the adapter, merged or not."""
        return self.weight if self._unmerged_weight is None else self._unmerged_weight

    @torch.no_grad()
    def merge(self) -> None:
        """Replaces the weight by `merged_weight()`, rounded once to its dtype, and keeps a copy of W.

        The weight is frozen while it is merged. Raises RuntimeError if the layer is merged or disabled,
        ValueError if the merged weight is not finite.
        """
        if self.merged:
            raise RuntimeError("the layer is merged already; unmerge it first")
        if not self.enabled:
            raise RuntimeError("the adapter is switched off by disabled(); merging would switch it on")
        weight = self.merged_weight().to(self.weight.dtype)
        if not weight.isfinite().all():
            raise ValueError(f"W + ΔW is not finite in {self.weight.dtype}")
        self._replace_weight(weight)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores W from its copy, bit for bit. Raises RuntimeError if the layer is not merged."""
        if self._unmerged_weight is None:
            raise RuntimeError("the layer is not merged; merge it first")
        self.weight.copy_(self._unmerged_weight).requires_grad_(self._was_trainable)
        self._unmerged_weight, self._merged_from, self._merged_versions = None, (), None

    def to_linear(self) -> nn.Linear:
        """An nn.Linear with the same weight and bias Parameters, without the adapter."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.merged:
            return super().forward(x)
        if self.training and torch.is_grad_enabled():
            raise RuntimeError("training while merged: gradients would bypass the adapter; unmerge first")
        self._check_adapter_unchanged()
        h = super().forward(x)
        trained = [tensor for tensor in self._adapter() if tensor.requires_grad]
        if torch.is_grad_enabled() and trained:
            h = _ForbidBackward.apply(h, *trained)  # type: ignore[no-untyped-call]
        return h

    def _replace_weight(self, weight: Tensor) -> None:
        self._remember_adapter()
        # The copy is made before the write, so that an interrupt between the two loses nothing.
        self._was_trainable = self.weight.requires_grad
        self._unmerged_weight = self.weight.detach().clone()
        self.weight.requires_grad_(False).copy_(weight)

    def _adapter(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.adapter_tensors)

    def _remember_adapter(self) -> None:
        self._merged_from = tuple(tensor.detach().clone() for tensor in self._adapter())
        self._merged_versions = tuple(tensor._version for tensor in self._adapter())

    def _check_adapter_unchanged(self) -> None:
        """Raises RuntimeError if the adapter has changed since the merge."""
        versions = tuple(tensor._version for tensor in self._adapter())
        changed = self._merged_versions not in (None, versions)
        # Writes through `.data` do not change the version, so on the CPU the values are compared too. On an
        # accelerator the comparison would make every forward wait for the device. A deep copy has versions
        # of its own, so its values are compared once.
        if not changed and (self._merged_versions is None or self.weight.device.type == "cpu"):
            pairs = zip(self._merged_from, self._adapter(), strict=True)
            changed = not all(torch.equal(before, now) for before, now in pairs)
            self._merged_versions = versions
        if changed:
            names = " or ".join(self.adapter_tensors)
            raise RuntimeError(f"{names} changed while merged: the weight is stale; unmerge and merge again")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._unmerged_weight is not None:
            destination[prefix + "weight"] = self._unmerged_weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.merged:
            name = prefix.rstrip(".") or "the layer"
            raise RuntimeError(f"{name}: load_state_dict into a merged layer; unmerge first")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_merged_versions": None}  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MergeableLinear:
        if self._unmerged_weight is None:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        self._check_adapter_unchanged()
        dtype = self.weight.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._unmerged_weight = fn(self._unmerged_weight)
        self._remember_adapter()
        if self.weight.dtype != dtype:
            self.unmerge()
            self.merge()
        return self


class _ForbidBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, *trained: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            "backward while merged: gradients would bypass the adapter; unmerge first, or freeze the adapter "
            "if only the input's gradient is needed"
        )
