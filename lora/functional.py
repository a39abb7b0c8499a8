"""The autograd function behind LoRALinear: the same formula, with less kept for backward.

    h = W·x + b + s·B·A·m(x)        s = scaling / (1 - p),  m = dropout's mask, p its probability

Written plainly, autograd would keep x for A and again with the mask laid over it, a copy of W where
autocast casts it, and the scaled products. What backward needs is less; for one row x of the batch, with
g = ∂L/∂h, and the first two summed over its n rows:

    ∂L/∂B = s·g·(A·m(x))ᵀ           keeps the thin product A·m(x), (n, r)
    ∂L/∂A = s·(Bᵀ·g)·m(x)ᵀ          keeps x, (n, in): one tensor for query, key and value
    ∂L/∂x = Wᵀ·g + m(s·Aᵀ·Bᵀ·g)     keeps the mask, a bit an element (CUDA: a byte), and W itself, no copy

W and b are frozen and get no gradient; ∂L/∂x is left out where nobody needs it. Everything thin is
multiplied first (n·r numbers, not n·in), the order that is cheapest for any r below in and out
(compare arXiv 2312.03415).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.dropout import draw_keep, pack, unpack, zero_dropped

_use_plain = False


@contextmanager
def plain_formula() -> Iterator[None]:
    """LoRALinear computes the plain formula inside: slower, and differentiable any number of times."""
    global _use_plain
    before, _use_plain = _use_plain, True
    try:
        yield
    finally:
        _use_plain = before


def can_fuse(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor) -> bool:
    """Whether `lora_linear` covers the case; else the plain formula does.

    Not for a base that trains, for torch.compile (it fuses the plain formula by itself), torch.func, the
    meta device, float64 under autocast (which leaves it alone), or a 16-bit base with float32 adapters
    outside autocast, where the two products differ in dtype.
    """
    if _use_plain or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if x.is_meta or weight.requires_grad or (bias is not None and bias.requires_grad):
        return False
    if torch.is_autocast_enabled(x.device.type):
        return x.dtype != torch.float64
    return x.dtype == weight.dtype == lora_A.dtype


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
) -> Tensor:
    """W·x + b + scaling·B·A·dropout(x): x (..., in) -> (..., out), in autocast's dtype or else x's.

    weight (out, in) and bias (out,) must be frozen, in any dtype; lora_A (r, in) and lora_B (out, r) get
    gradients in their own. dropout: the probability, 0 outside training.

    Raises RuntimeError in a backward with create_graph=True: there is no second derivative here.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = cast_shared(x, torch.get_autocast_dtype(x.device.type))
    out: Tensor = _LoRALinear.apply(x, weight, bias, lora_A, lora_B, scaling, dropout)  # type: ignore[no-untyped-call]
    return out


def outside_autocast(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """For a Function's backward: called inside autocast, it computes in the dtypes that forward chose."""

    @functools.wraps(backward)
    def run(ctx: Any, grad: Tensor) -> Any:
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, grad)

    return run


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
        scaling: float, dropout: float,
    ) -> Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])  # (n, in)
        h = x.new_empty(*x.shape[:-1], weight.shape[0])  # returned itself, no view: a caller may write to it
        flat = h.view(-1, h.shape[-1])  # (n, out)
        if bias is None:
            torch.mm(rows, weight.to(x.dtype).t(), out=flat)
        else:
            torch.addmm(bias.to(x.dtype), rows, weight.to(x.dtype).t(), out=flat)
        packed = None
        if dropout:
            keep = draw_keep(rows.shape, dropout, x.device)
            packed = pack(keep)
            rows = zero_dropped(rows, keep)
        thin = F.linear(rows, lora_A.to(x.dtype))  # (n, r)
        ctx.scaling = scaling / (1 - dropout)
        flat.addmm_(thin, lora_B.to(x.dtype).t(), alpha=ctx.scaling)
        ctx.save_for_backward(x, weight, lora_A, lora_B, thin, packed)
        return h

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fused LoRA function has no second derivative; lora.functional.plain_formula() has"
            )
        x, weight, lora_A, lora_B, thin, packed = ctx.saved_tensors
        rows, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])  # (n, in), (n, out)
        needs_x, _, _, needs_A, needs_B, _, _ = ctx.needs_input_grad
        keep = None if packed is None else unpack(packed, rows.shape)
        thin_grad = (g @ lora_B.to(g.dtype)).mul_(ctx.scaling)  # (n, r)
        grad_x = grad_A = grad_B = None
        if needs_A:
            dropped = rows if keep is None else zero_dropped(rows, keep)
            grad_A = (thin_grad.t() @ dropped).to(lora_A.dtype)  # (r, in)
        if needs_B:
            grad_B = (g.t() @ thin).to(lora_B.dtype).mul_(ctx.scaling)  # (out, r)
        if needs_x:
            grad_x = thin_grad @ lora_A.to(g.dtype)  # (n, in)
            if keep is not None:
                grad_x = zero_dropped(grad_x, keep)
            grad_x = grad_x.addmm_(g, weight.to(g.dtype)).view(x.shape)
        return grad_x, None, None, grad_A, grad_B, None, None


_last_cast: tuple[weakref.ref[Tensor], int, Tensor] | None = None


def cast_shared(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, the same tensor again when query, key and value ask one after another.

    Autocast would cast for each of them. The last cast is kept as long as its source lives, no longer.
    Nothing is shared in inference mode, where a tensor does not tell whether it was written to.
    """
    global _last_cast
    if x.dtype == dtype:
        return x
    if x.is_inference() or torch.is_inference_mode_enabled():
        return x.to(dtype)
    if _last_cast is not None:
        source, version, result = _last_cast
        if (
            source() is x
            and version == x._version
            and result.dtype == dtype
            and result.requires_grad == (x.requires_grad and torch.is_grad_enabled())
        ):
            return result
    result = x.to(dtype)
    _last_cast = (weakref.ref(x, _forget_cast), x._version, result)
    return result


def _forget_cast(source: weakref.ref[Tensor]) -> None:
    global _last_cast
    if _last_cast is not None and _last_cast[0] is source:
        _last_cast = None
