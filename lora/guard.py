"""What keeps a merged layer from losing its own weight, or from computing something stale.

The state is one tensor: `_kept`, the weight from before the merge, or None. Everything else that torch
does with a module while it is merged goes through here:

    forward, training    error: gradients would flow past the adapter
    backward, in eval    the same error, unless lora_A is frozen
    forward, lora_A or lora_B changed since the merge
                         error: the merged weight no longer holds them
    state_dict           the kept weight, so that what is saved is the unmerged layer
    load_state_dict      error: it would overwrite the merged weight, and unmerging would undo that
    to(device)           the kept weight moves along
    to(dtype)            the kept weight is cast, and the layer is merged anew from it
    deepcopy             copies the kept weight with the rest
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora.frozen import FrozenLinear


class MergeGuard(FrozenLinear):
    """A frozen Linear that can swap its weight for a merged one."""

    lora_A: nn.Parameter  # noqa: N815
    lora_B: nn.Parameter  # noqa: N815
    enabled: bool

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self._kept: Tensor | None = None
        self._merged_from: tuple[Tensor, Tensor] | None = None
        self._merged_versions: tuple[int, int] | None = None

    @property
    def merged(self) -> bool:
        """Whether the weight holds W + ΔW. Changed by `merge` and `unmerge` alone."""
        return self._kept is not None

    @property
    def base_weight(self) -> Tensor:
        """W, (out, in): the weight without the adapter, whether merged or not."""
        return self.weight if self._kept is None else self._kept

    def check_can_merge(self) -> None:
        """Raises RuntimeError if the layer is merged, or switched off by `disabled`."""
        if self.merged:
            raise RuntimeError("the layer is merged already; unmerge it first")
        if not self.enabled:
            raise RuntimeError("the adapter is switched off by disabled(); merging would switch it on")

    def replace_weight(self, merged: Tensor) -> None:
        """Writes `merged` into the weight and keeps what was there."""
        self._remember_adapter()
        self._kept = self.weight.detach().clone()  # before the write: a stop between the two loses nothing
        self.weight.copy_(merged)
        torch.clear_autocast_cache()  # it may hold a cast of the weight from before

    def restore_weight(self) -> None:
        """Writes the kept weight back and lets go of the copy. Raises RuntimeError if not merged."""
        if self._kept is None:
            raise RuntimeError("the layer is not merged; merge it first")
        self.weight.copy_(self._kept)
        self._kept = self._merged_from = self._merged_versions = None
        torch.clear_autocast_cache()

    def merge(self) -> None:
        raise NotImplementedError

    def unmerge(self) -> None:
        raise NotImplementedError

    def _remember_adapter(self) -> None:
        self._merged_from = (self.lora_A.detach().clone(), self.lora_B.detach().clone())
        self._merged_versions = (self.lora_A._version, self.lora_B._version)

    def _refuse_if_stale(self) -> None:
        versions = (self.lora_A._version, self.lora_B._version)
        stale = self._merged_versions not in (None, versions)
        # A version counter misses writes through `.data`, so on the CPU the values are compared too; on
        # an accelerator that would make every forward wait for the device. A copy's counters start anew.
        if not stale and (self._merged_versions is None or self.weight.device.type == "cpu"):
            assert self._merged_from is not None
            kept_A, kept_B = self._merged_from
            stale = not (torch.equal(kept_A, self.lora_A) and torch.equal(kept_B, self.lora_B))
            self._merged_versions = versions
        if stale:
            raise RuntimeError(
                "lora_A or lora_B changed while merged: the merged weight is stale; unmerge and merge again"
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    "training while merged: gradients would flow past the adapter; unmerge the model first"
                )
            self._refuse_if_stale()
            if torch.is_grad_enabled() and self.lora_A.requires_grad:
                out: Tensor = _NoWayBack.apply(super().forward(x), self.lora_A)  # type: ignore[no-untyped-call]
                return out
        return super().forward(x)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._kept is not None:
            destination[prefix + "weight"] = self._kept

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.merged:
            raise RuntimeError(
                f"{prefix.rstrip('.') or 'the layer'}: load_state_dict into a merged layer; unmerge first"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_merged_versions": None}

    @torch.no_grad()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MergeGuard:
        if self._kept is None:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        self._refuse_if_stale()
        dtype = self.weight.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._kept = fn(self._kept)
        self._remember_adapter()
        if self.weight.dtype != dtype:
            self.unmerge()
            self.merge()
        return self


class _NoWayBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, lora_A: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        raise RuntimeError(
            "backward while merged: gradients would flow past the adapter; unmerge the model first, "
            "or freeze the adapter if gradients of the input alone are wanted"
        )
