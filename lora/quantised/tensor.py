"""A frozen weight that is stored in fewer bits: a tensor that is dequantised where it is used.

QuantisedTensor has the shape of the matrix and the dtype float32, and holds what NF4 or Int8 keep of it. It
takes the place of the weight of an nn.Linear, and the layer stays an nn.Linear, a LoRALinear or a variant:

    F.linear(x, W, b)          `linear` below: backward keeps W as stored, and dequantises it again
    W.double(), W.bfloat16()   the dense matrix: computed in float32, then in that dtype
    W.to(device), W.clone()    a QuantisedTensor
    any other operation        dequantises it to float32 first
    writing to it              an error, but for copying another one that is stored alike, as
                               load_state_dict does. A part of it, such as W[0], is a dense copy

So the model is the base that the adapter is trained on: W means the dequantised matrix everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

_READ_ONLY = "a quantised weight cannot be written to; to merge, eject with a dtype"


@dataclasses.dataclass(frozen=True)
class Stored:
    """What is stored of a matrix (out, in). A subclass is one way to store it (nf4.py, int8.py).

    name: of this way, as in `lora.quantised.PRECISIONS`.
    """

    name: ClassVar[str]

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix, (out, in): computed in float32, then in `dtype`."""
        raise NotImplementedError

    def product(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Writes x·Wᵀ + bias to `out` (n, out): x (n, in), in the dtype of x."""
        weight = self.dequantise(x.dtype).t()
        if bias is None:
            torch.mm(x, weight, out=out)
        else:
            torch.addmm(bias, x, weight, out=out)

    def transposed_product(self, g: Tensor) -> Tensor:
        """The gradient g·W, (n, in), of g (n, out), in the dtype of g."""
        return g @ self.dequantise(g.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that hold the matrix, by name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, Tensor)}

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Stored:
        """The same with `function` of each tensor, such as a copy on another device."""
        return dataclasses.replace(self, **{name: function(t) for name, t in self.tensors().items()})


@dataclasses.dataclass(frozen=True)
class Bf16(Stored):
    """A matrix (out, in) in bfloat16, which a product in bfloat16 reads as it is."""

    name: ClassVar[str] = "bf16"
    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @staticmethod
    def quantise(weight: Tensor) -> Bf16:
        """Rounds a floating-point matrix (out, in)."""
        return Bf16(weight.bfloat16())

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix, (out, in), in `dtype`."""
        return self.values.to(dtype)


class QuantisedTensor(Tensor):
    """A matrix (out, in) that is held as `stored`. Its dtype is float32."""

    stored: Stored

    @staticmethod
    def __new__(cls, stored: Stored) -> QuantisedTensor:
        device = next(iter(stored.tensors().values())).device
        tensor: QuantisedTensor = Tensor._make_wrapper_subclass(
            cls, stored.shape, dtype=torch.float32, device=device
        )
        tensor.stored = stored
        return tensor

    def __init__(self, stored: Stored):
        pass

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"QuantisedTensor({type(self.stored).__name__}, shape={tuple(self.shape)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantisedTensor:
        copied = QuantisedTensor(self.stored.mapped(Tensor.clone))
        if getattr(self, "_is_param", False):
            copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)  # type: ignore[assignment]
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is F.linear:
            return linear(*args, **(kwargs or {}))
        if function is Tensor.__setitem__ and isinstance(args[0], QuantisedTensor):
            raise RuntimeError(_READ_ONLY)
        if function is Tensor.share_memory_:
            raise TypeError("a quantised weight cannot be moved to shared memory")
        is_assignment = function == Tensor.data.__set__  # type: ignore[attr-defined]
        if is_assignment and not isinstance(args[1], QuantisedTensor):  # as by model.half()
            raise TypeError(
                "a quantised weight has no other dtype; call lora.quantised.dequantise(model, dtype)"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        if is_assignment:  # as by model.cuda()
            args[0].stored = args[1].stored
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, QuantisedTensor):
            if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
                return QuantisedTensor(first.stored)
            if function is torch.ops.aten.clone.default:
                return QuantisedTensor(first.stored.mapped(Tensor.clone))
            if function is torch.ops.aten._to_copy.default:
                dtype = kwargs.get("dtype")
                if dtype is None or dtype == first.dtype:
                    device = kwargs.get("device") or first.device
                    return QuantisedTensor(first.stored.mapped(lambda tensor: tensor.to(device, copy=True)))
                if dtype.is_floating_point:
                    return first.stored.dequantise(dtype).to(kwargs.get("device") or first.device, copy=True)
            if function is torch.ops.aten.copy_.default and _is_alike(first, args[1]):
                for name, tensor in first.stored.tensors().items():  # in place, so that `.data` sees it too
                    tensor.copy_(args[1].stored.tensors()[name])
                return first
        if function._schema.is_mutable:
            named = zip(function._schema.arguments, args, strict=False)
            written = [value for each, value in named if each.alias_info and each.alias_info.is_write]
            written += [kwargs.get(each.name) for each in function._schema.arguments if each.is_out]
            if any(isinstance(leaf, QuantisedTensor) for leaf in torch.utils._pytree.tree_leaves(written)):
                raise RuntimeError(f"{function}: {_READ_ONLY}")
        args = torch.utils._pytree.tree_map_only(QuantisedTensor, lambda q: q.stored.dequantise(), args)
        kwargs = torch.utils._pytree.tree_map_only(QuantisedTensor, lambda q: q.stored.dequantise(), kwargs)
        return function(*args, **kwargs)


def _is_alike(tensor: QuantisedTensor, other: Any) -> bool:
    if not isinstance(other, QuantisedTensor):
        return False
    return type(tensor.stored) is type(other.stored) and tensor.shape == other.shape


def stored_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors in memory that hold a quantised tensor, or any other itself."""
    return [*tensor.stored.tensors().values()] if isinstance(tensor, QuantisedTensor) else [tensor]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of a quantised weight: input (..., in) -> (..., out), in the autocast dtype or else its own.

    Raises RuntimeError if the weight requires a gradient or the input is not floating-point.
    """
    if isinstance(input, QuantisedTensor):
        input = input.stored.dequantise()
    if not input.is_floating_point():
        raise RuntimeError(f"a linear layer needs floating-point inputs, and these are {input.dtype}")
    if isinstance(weight, QuantisedTensor):
        if weight.requires_grad:
            raise RuntimeError("a quantised weight cannot train; call lora.quantised.dequantise(model) first")
        if not torch._C._are_functorch_transforms_active():  # torch.func needs ordinary ops
            device = input.device.type
            if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
                input = input.to(torch.get_autocast_dtype(device))
            out: Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
            return out
        weight = weight.stored.dequantise(input.dtype)
    return F.linear(input, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantisedTensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)  # as stored, so that it takes no further memory
        h = x.new_empty(*x.shape[:-1], len(weight))
        bias = None if bias is None else bias.to(x.dtype)
        weight.stored.product(x.reshape(-1, x.shape[-1]), bias, out=h.view(-1, len(weight)))
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (weight,) = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            stored = isinstance(weight, QuantisedTensor)  # hooks for saved tensors may return a dense one
            product = weight.stored.transposed_product(rows) if stored else rows @ weight.to(rows.dtype)
            grad_x = product.view(*grad.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, None, grad_bias
