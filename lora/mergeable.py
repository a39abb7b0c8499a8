"""A frozen linear layer that can hold a merged weight, and the guards of the merged state.

While a layer is merged, `weight` holds W + ΔW and `_unmerged_weight` a copy of W. The guards:

    forward in training mode           error: gradients would bypass the adapter
    backward in eval mode              the same error, unless the adapter is frozen
    forward after the adapter changed  error: the merged weight does not contain the change
    forward after the weight changed   error: the merged weight was overwritten or replaced
    state_dict                         contains W, so that a saved model is unmerged
    load_state_dict                    error: unmerging would undo what is loaded (lora/targets.py)
    to(device), deepcopy               move or copy the copy of W too
    to(dtype)                          casts the copy of W and the adapter, and merges again from them

Some writes do not raise a tensor's version (`.data`, some optimizers, collectives, DLPack), so values are
compared too: those of the adapter, and the 16 rows that the merge changed most. On an accelerator this would
wait for the device, so it is only done while the adapter is trainable.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora.interrupts import uninterrupted
from lora.rounding import round_to


class MergeableLinear(nn.Linear):
    """A frozen nn.Linear with the Parameters and hooks of `linear`: x (..., in) -> (..., out).

    A subclass adds an adapter and describes it:

    adapter_tensors: names of the parameters and buffers that make up the adapter. They are saved, loaded,
        and watched for changes while merged.
    trained_tensors: those of them that train. The others stay frozen.
    watched_settings: names of numbers that the merged weight depends on. They are watched too.
    merged_weight(): the weight of the merged layer, (out, in), float64, before rounding.

    Raises TypeError if the weight is not real and floating-point.
    """

    adapter_tensors: ClassVar[tuple[str, ...]] = ()
    trained_tensors: ClassVar[tuple[str, ...]] = ()
    watched_settings: ClassVar[tuple[str, ...]] = ()
    fan_in_fan_out: ClassVar[bool] = False  # whether `weight` is (in, out); PEFT's name
    base_output: Tensor | None = None  # W·x + b, while several adapters share it (lora/mixed.py)
    # The state before the first merge, in the class: a layer that was never merged needs no memory for it.
    enabled = True
    _unmerged_weight: Tensor | None = None
    _was_trainable = False
    _merged_from: tuple[Tensor, ...] = ()
    _merged_settings: Sequence[Any] = ()
    _merged_rows = torch.empty(0, dtype=torch.int64)  # the rows that are watched while merged
    _merged_versions: tuple[tuple[int, int], ...] | None = None

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate a weight only to discard it
        if not linear.weight.is_floating_point():
            raise TypeError(f"a weight of dtype {linear.weight.dtype} cannot be adapted")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.training = linear.training
        share_hooks(linear, self)

    def merged_weight(self) -> Tensor:
        """The weight of the merged layer, (out, in), float64."""
        raise NotImplementedError

    def rounded_weight(self, dtype: torch.dtype) -> Tensor:
        """`merged_weight()` rounded once to `dtype`, laid out as `weight`. ValueError if it is not finite."""
        weight = round_to(self.merged_weight(), dtype)
        if not weight.isfinite().all():
            raise ValueError(f"W + ΔW is not finite in {dtype}")
        return weight

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapter's tensors by name, not copies. A name may have dots, as `lora_A.weight`."""
        return {name: attrgetter(name)(self) for name in self.adapter_tensors}

    @property
    def merged(self) -> bool:
        """Whether `weight` holds the merged weight. Only `merge` and `unmerge` change it."""
        return self._unmerged_weight is not None

    @property
    def stored_weight(self) -> Tensor:
        """W in the layout of `weight`, merged or not."""
        return self.weight if self._unmerged_weight is None else self._unmerged_weight

    @property
    def base_weight(self) -> Tensor:
        """W, (out, in): the weight without the adapter, merged or not."""
        return self.stored_weight

    def is_rowwise(self, x: Tensor) -> bool:
        """Whether `forward` in eval mode has a product for each row of the batch x (lora/mixed.py)."""
        return False

    def merge(self) -> None:
        """Replaces the weight by `merged_weight()`, rounded once to its dtype, and keeps a copy of W.

        The weight is frozen while it is merged. `lora.merge` also checks that only this layer has the weight.

        Raises RuntimeError if the layer is merged or disabled or its weight cannot be written to, ValueError
        if the merged weight is not finite.
        """
        # An interrupt must not leave torch's gradient mode changed either.
        with uninterrupted(), torch.no_grad():
            if self.merged:
                raise RuntimeError("the layer is merged already; unmerge it first")
            if not self.enabled:
                raise RuntimeError("the adapter is switched off by disabled(); merging would switch it on")
            self._replace_weight(self.rounded_weight(self.weight.dtype))

    def unmerge(self) -> None:
        """Restores W from its copy, bit for bit. Raises RuntimeError if the layer is not merged."""
        with uninterrupted(), torch.no_grad():
            if self._unmerged_weight is None:
                raise RuntimeError("the layer is not merged; merge it first")
            self.weight.copy_(self._unmerged_weight).requires_grad_(self._was_trainable)
            self._unmerged_weight, self._merged_from, self._merged_versions = None, (), None

    def to_linear(self) -> nn.Linear:
        """An nn.Linear with the same weight and bias Parameters and hooks, without the adapter."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        share_hooks(self, linear)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.base_output is not None:
            return self.base_output
        if not self.merged:
            return super().forward(x)
        if self.training and torch.is_grad_enabled():
            raise RuntimeError("training while merged: gradients would bypass the adapter; unmerge first")
        self._check_unchanged()
        h = super().forward(x)
        trained = [tensor for tensor in self.adapter_state().values() if tensor.requires_grad]
        if torch.is_grad_enabled() and trained:
            h = _ForbidBackward.apply(h, *trained)  # type: ignore[no-untyped-call]
        return h

    def _replace_weight(self, weight: Tensor) -> None:
        unmerged, self._was_trainable = self.weight.detach().clone(), self.weight.requires_grad
        self.weight.copy_(weight)  # before the state changes, because it raises if memory is shared within
        self.weight.requires_grad_(False)
        self._unmerged_weight = unmerged
        self._merged_rows = (self.weight - unmerged).abs().amax(dim=1).topk(min(16, len(unmerged))).indices
        self._merged_from = tuple(tensor.detach().clone() for tensor in self._watched())
        self._merged_settings, self._merged_versions = self._settings(), self._versions()

    def _watched(self) -> tuple[Tensor, ...]:
        return (*self.adapter_state().values(), self.weight.detach()[self._merged_rows])

    def _versions(self) -> tuple[tuple[int, int], ...]:
        tensors = (*self.adapter_state().values(), self.weight)
        return tuple((id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)

    def _settings(self) -> list[Any]:
        return [getattr(self, name) for name in self.watched_settings]

    def _check_unchanged(self) -> None:
        """Raises RuntimeError if the adapter or the merged weight has changed since the merge."""
        versions, before = self._versions(), self._merged_versions
        trainable = any(tensor.requires_grad for tensor in self.adapter_state().values())
        same = versions == before and self._settings() == self._merged_settings
        if same and not trainable and self.weight.device.type != "cpu":
            return
        values = zip(self._merged_from, self._watched(), strict=True)
        *same_adapter, same_rows = (torch.equal(then, now) for then, now in values)
        if not all(same_adapter) or self._settings() != self._merged_settings:
            names = " or ".join((*self.watched_settings, *self.adapter_tensors))
            raise RuntimeError(f"{names} changed while merged: the weight is stale; unmerge and merge again")
        # A deep copy and functional_call have other tensors, with versions of their own.
        written = before is not None and before[-1][0] == versions[-1][0] and before[-1] != versions[-1]
        if written or not same_rows:
            raise RuntimeError("the merged weight was overwritten or replaced; unmerge restores W")
        self._merged_versions = versions

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._unmerged_weight is not None:
            destination[prefix + "weight"] = self._unmerged_weight

    def __getstate__(self) -> dict[str, Any]:
        # A copy has version counters of its own, and is not inside the contexts that the original is in.
        return {**super().__getstate__(), "_merged_versions": None, "enabled": True}  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MergeableLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._unmerged_weight is not None:
            self._unmerged_weight = fn(self._unmerged_weight)
            self._merged_rows = self._merged_rows.to(self.weight.device)
            before, self._merged_versions = self._merged_from, None
            # What was stale stays stale, because the values to compare with are moved or cast alike.
            self._merged_from = tuple(map(fn, before))
            if any(now.dtype != then.dtype for now, then in zip(self._merged_from, before, strict=True)):
                try:
                    self.weight.copy_(self.rounded_weight(self.weight.dtype))
                except ValueError as error:
                    warnings.warn(str(error), stacklevel=3)
                self._merged_from = (*self._merged_from[:-1], self._watched()[-1])
        return self


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Gives `target` the hooks of `source`, the same objects, so that their handles remove them from both."""
    for name, value in vars(source).items():
        if "hook" in name:
            vars(target)[name] = value


class _ForbidBackward(torch.autograd.Function):
    """Returns h itself, which depends on `trained` for autograd: backward is then an error."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, *trained: Tensor) -> Tensor:
        ctx.mark_dirty(h)  # as an in-place operation, so that callers may write to h in place
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            "backward while merged: gradients would bypass the adapter; unmerge first, or freeze the adapter "
            "if only the input's gradient is needed"
        )
