"""The autograd function of FastLoRALinear: the formula of LoRALinear, with less saved for backward.

    h = W·x + b + s·B·A·m(x)        s = scaling / (1 - p),  m = the dropout mask, p its probability

With ordinary ops autograd saves x, the masked x, the cast of W and the scaled products. Backward needs
less. With g = ∂L/∂h of one row x, where the first two are sums over the n rows:

    ∂L/∂B = s·g·(A·m(x))ᵀ           needs the thin product A·m(x), (n, r)
    ∂L/∂A = s·(Bᵀ·g)·m(x)ᵀ          needs x, (n, in), one tensor for query, key and value; only if A trains
    ∂L/∂x = Wᵀ·g + m(s·Aᵀ·Bᵀ·g)     needs the mask, one bit an element (CUDA: a byte), and W, no cast of it

W and b are frozen and get no gradient. ∂L/∂x is omitted if x needs none. Each product starts with the thin
factor (n·r elements, not n·in), which is the cheapest order for any r below in and out (compare
arXiv 2312.03415).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.fast.dropout import draw_keep, pack, unpack, zero_dropped
from lora.mixed import add_rowwise_
from lora.quantised.tensor import QuantisedTensor


def is_traced() -> bool:
    """Whether torch.compile or torch.jit.trace, or torch.func, which needs ordinary ops, is active."""
    tracing = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return tracing or torch._C._are_functorch_transforms_active()


def can_fuse(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor) -> bool:
    """Whether `lora_linear` supports the case.

    It does not support a trainable base, tracing, the meta device, float64 under autocast (which does not
    cast it), or, without autocast, a 16-bit base with a float32 adapter.
    """
    if is_traced() or x.is_meta or weight.requires_grad or (bias is not None and bias.requires_grad):
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
    """W·x + b + scaling·B·A·dropout(x): x (..., in) -> (..., out), in the autocast dtype or else that of x.

    weight (out, in) and bias (out,) must be frozen and may have any dtype. lora_A (r, in) and lora_B
    (out, r) get gradients in their own dtype. dropout: the probability, 0 outside training.

    Raises RuntimeError in a backward with create_graph=True: there is no second derivative.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = cast_shared(x, torch.get_autocast_dtype(x.device.type))
    out: Tensor = _LoRALinear.apply(x, weight, bias, lora_A, lora_B, scaling, dropout)  # type: ignore[no-untyped-call]
    return out


def has_long_rows(x: Tensor, lora_A: Tensor) -> bool:
    """Whether x is a batch (n, L, in) with L >= r: a copy of A (r, in) for each row is no larger than x."""
    return x.ndim == 3 and len(x) > 0 and x.shape[1] >= len(lora_A)


def add_product_(h: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Adds scaling·B·A·x to h (..., out) in place, and returns A·x of all tokens, (n, r). x has h's dtype.

    A batch with long rows is multiplied row by row, so that each row is computed by the same operations
    where the rows belong to different adapters (lora/mixed.py).
    """
    if has_long_rows(x, lora_A):
        first = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return add_rowwise_(h, x, lora_A[None], scaling * lora_B[None], first).flatten(0, 1)
    thin = F.linear(x.reshape(-1, x.shape[-1]), lora_A.to(x.dtype))
    h.view(-1, h.shape[-1]).addmm_(thin, lora_B.to(x.dtype).t(), alpha=scaling)
    return thin


def outside_autocast(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """Decorates a Function's backward, so that it computes in the dtypes of forward inside autocast too."""

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
        h = x.new_empty(*x.shape[:-1], weight.shape[0])  # not a view: callers may write to it in place
        flat = h.view(-1, h.shape[-1])  # (n, out)
        bias = None if bias is None else bias.to(x.dtype)
        if isinstance(weight, QuantisedTensor):
            weight.stored.product(rows, bias, out=flat)
        elif bias is None:
            torch.mm(rows, weight.to(x.dtype).t(), out=flat)
        else:
            torch.addmm(bias, rows, weight.to(x.dtype).t(), out=flat)
        packed = None
        masked = x
        if dropout:
            keep = draw_keep(rows.shape, dropout, x.device)
            packed = pack(keep)
            masked = zero_dropped(rows, keep)
        ctx.scaling = scaling / (1 - dropout)
        thin = add_product_(h, masked, lora_A, lora_B, ctx.scaling)  # (n, r)
        ctx.shape = x.shape
        needs_x, _, _, needs_A, *_ = ctx.needs_input_grad
        saved_x = x if needs_A else None
        ctx.save_for_backward(saved_x, weight, lora_A, lora_B, thin, packed if needs_x or needs_A else None)
        return h

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("FastLoRALinear has no second derivative (create_graph=True); do not fuse()")
        x, weight, lora_A, lora_B, thin, packed = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])  # (n, out)
        needs_x, _, _, needs_A, needs_B, _, _ = ctx.needs_input_grad
        keep = None if packed is None else unpack(packed, torch.Size((len(g), ctx.shape[-1])))
        thin_grad = (g @ lora_B.to(g.dtype)).mul_(ctx.scaling)  # (n, r)
        grad_x = grad_A = grad_B = None
        if needs_A:
            rows = x.reshape(-1, x.shape[-1])  # (n, in)
            dropped = rows if keep is None else zero_dropped(rows, keep)
            grad_A = (thin_grad.t() @ dropped).to(lora_A.dtype)  # (r, in)
        if needs_B:
            grad_B = (g.t() @ thin).to(lora_B.dtype).mul_(ctx.scaling)  # (out, r)
        if needs_x:
            grad_x = thin_grad @ lora_A.to(g.dtype)  # (n, in)
            if keep is not None:
                grad_x = zero_dropped(grad_x, keep)
            if isinstance(weight, QuantisedTensor):
                grad_x += weight.stored.transposed_product(g)
            else:
                grad_x.addmm_(g, weight.to(g.dtype))
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_A, grad_B, None, None


_last_cast: tuple[weakref.ref[Tensor], int, Tensor] | None = None


def cast_shared(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`. Query, key and value, which cast the same x in turn, share one cast.

    The cast is cached until its source tensor is freed. It is cached only where gradients are enabled: it is
    then saved for backward, and sharing saves memory too. Only tensors whose writes raise their version are
    cached: not those of inference mode, and not those whose memory belongs to NumPy or another library.
    `.data` and DLPack write without a trace, so on the CPU an x that autograd did not compute is compared.
    """
    global _last_cast
    if x.dtype == dtype:
        return x
    if not torch.is_grad_enabled() or x.is_inference() or not x.untyped_storage().resizable():
        return x.to(dtype)
    last = _last_cast  # once, because the garbage collector may forget it at any moment
    if last is not None:
        source, version, result = last
        if (
            source() is x
            and version == x._version
            and result.dtype == dtype
            and result.requires_grad == x.requires_grad
            and (x.grad_fn is not None or x.device.type != "cpu" or torch.equal(result, x.to(dtype)))
        ):
            return result
    result = x.to(dtype)
    _last_cast = (weakref.ref(x, _forget_cast), x._version, result)
    return result


def _forget_cast(source: weakref.ref[Tensor]) -> None:
    global _last_cast
    if _last_cast is not None and _last_cast[0] is source:
        _last_cast = None
