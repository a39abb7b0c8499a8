"""`speed_up`: a RoBERTa that trains faster, with lora.fast and a faster dropout, attention and last layer.

On the CPU torch draws dropout one float at a time, and its fused attention is slower than separate matrix
products, most of all in backward (figures in bench/NOTES.md). Here the random bits of dropout come from a
vectorised hash (lora/fast/dropout.py), and attention has a backward of its own. On CUDA both use torch's
own kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
    RobertaForSequenceClassification,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.roberta.modeling_roberta import RobertaClassificationHead, RobertaLayer

from lora.fast import fuse
from lora.fast.dropout import draw_keep, pack, unpack, zero_dropped
from lora.fast.function import is_traced, outside_autocast

ATTENTION = "lora_fast"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def speed_up(model: PreTrainedModel, precision: str = "bf16") -> None:
    """Makes the model's forward and backward faster, in place.

    Linear and LoRA layers, dropout and attention change their class or function; modules, Parameters and
    hooks stay. Layers injected later become fast too. With precision "bf16" or "fp16", frozen Linears keep
    a copy of their weight in that dtype for use under autocast (lora/fast/layers.py).

    In training, the last layer of a RobertaForSequenceClassification computes only the first token's row,
    the one that its head reads: last_hidden_state is then (B, 1, D). Replace the head before this call if
    the new one reads more.

    Outputs in eval mode stay the same to the rounding of the precision. In training, dropout has the same
    probabilities but other random numbers (lora/fast/dropout.py).

    Raises ValueError if precision is not "fp32", "bf16" or "fp16".
    """
    if precision not in DTYPES:
        raise ValueError(f"precision: {precision!r} is not one of {', '.join(DTYPES)}")
    fuse(model, None if precision == "fp32" else DTYPES[precision])
    for module in model.modules():
        if type(module) is nn.Dropout and not module.inplace:
            module.__class__ = FastDropout
    model.set_attn_implementation(ATTENTION)
    head = getattr(model, "classifier", None)
    if type(model) is RobertaForSequenceClassification and type(head) is RobertaClassificationHead:
        last = model.roberta.encoder.layer[-1]
        if type(last) is RobertaLayer and not last.is_decoder:
            last.__class__ = FirstTokenLayer


class FirstTokenLayer(RobertaLayer):  # type: ignore[misc]
    """RobertaLayer that in training computes only the first token's row, the one that the head reads.

    Query, attention and feed-forward are computed for that row, key and value for all rows:
    hidden_states (B, L, D) -> (B, 1, D). In eval mode, or with another attention implementation, it is
    RobertaLayer: (B, L, D) -> (B, L, D).
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *rest: Any, **kwargs: Any
    ) -> Tensor:
        attention = self.attention.self
        if not self.training or attention.config._attn_implementation != ATTENTION:
            out: Tensor = super().forward(hidden_states, attention_mask, *rest, **kwargs)
            return out

        def heads(x: Tensor) -> Tensor:  # (B, L, D) -> (B, H, L, d)
            return x.view(*x.shape[:-1], -1, attention.attention_head_size).transpose(1, 2)

        first = hidden_states[:, :1]
        mixed, _ = fast_attention(
            attention,
            heads(attention.query(first)),
            heads(attention.key(hidden_states)),
            heads(attention.value(hidden_states)),
            None if attention_mask is None else attention_mask[:, :, :1],
            dropout=attention.dropout.p if attention.training else 0.0,
            scaling=attention.scaling,
        )
        mixed = self.attention.output(mixed.flatten(2), first)
        row: Tensor = self.feed_forward_chunk(mixed)
        return row


class FastDropout(nn.Dropout):
    """nn.Dropout with faster random bits on the CPU. Returns x itself for p = 0 and in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu" or self.p == 1 or is_traced():
            return super().forward(x)
        out: Tensor = _Dropout.apply(x, self.p)  # type: ignore[no-untyped-call]
        return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        keep = draw_keep(x.shape, p, x.device)
        ctx.p = p
        ctx.save_for_backward(pack(keep))
        return zero_dropped(x, keep).mul_(1 / (1 - p))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        keep = unpack(ctx.saved_tensors[0], grad.shape)
        return zero_dropped(grad, keep).mul(1 / (1 - ctx.p)), None


def fast_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention with transformers' interface: query (B, H, M, d), key, value (B, H, L, d) -> (B, M, H, d).

    attention_mask: True for attended keys, broadcast to (B, H, M, L), or None. Torch's own attention is
    used on other devices and for everything else: causal attention without a mask, an additive mask or
    bias, heads that share keys, mixed dtypes. A row whose keys are all masked attends to all keys equally;
    torch's gives 0.
    """
    supported = dropout < 1 and _is_supported(module, query, key, value, attention_mask, rest)
    if query.device.type != "cpu" or is_traced() or not supported:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
        return result
    scaling = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    bias = None
    if attention_mask is not None:
        # Half of the lowest number, so that adding it to a score cannot overflow.
        lowest = torch.finfo(query.dtype).min / 2
        bias = torch.zeros(attention_mask.shape, dtype=query.dtype).masked_fill_(~attention_mask, lowest)
    out: Tensor = _Attention.apply(query, key, value, bias, scaling, dropout)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2), None


def _is_supported(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rest: Mapping[str, Any]
) -> bool:
    """Whether the result is softmax(s·Q·Kᵀ + mask)·V in one dtype, under autocast the autocast dtype."""
    autocast = torch.is_autocast_enabled("cpu")
    computed = torch.get_autocast_dtype("cpu") if autocast else query.dtype
    if not query.dtype == key.dtype == value.dtype == computed or rest.get("position_bias") is not None:
        return False
    if query.shape[:2] != key.shape[:2] or query.shape[-1] != value.shape[-1]:
        return False
    if mask is not None:
        return mask.dtype == torch.bool
    causal = rest.get("is_causal")
    return query.shape[2] == 1 or not (getattr(module, "is_causal", True) if causal is None else causal)


class _Attention(torch.autograd.Function):
    """O = D(P)·V / (1 - p), P = softmax(s·Q·Kᵀ + bias), D the dropout mask (arXiv 1706.03762, eq. 1)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scaling: float, p: float
    ) -> Tensor:
        ctx.scaling, ctx.p = scaling, p
        # Made contiguous here once, for forward and backward.
        scaled_q, heads_k, heads_v = _heads(q, scaling), _heads(k), _heads(v)  # (B·H, M or L, d)
        scores = torch.bmm(scaled_q, heads_k.transpose(1, 2))  # (B·H, M, L)
        if bias is not None:
            scores.view(*q.shape[:2], *scores.shape[1:]).add_(bias)
        probabilities = dropped = _softmax(scores)
        packed = None
        if p:
            keep = draw_keep(probabilities.shape, p, q.device)
            packed = pack(keep)
            dropped = zero_dropped(probabilities, keep)
        ctx.save_for_backward(scaled_q, heads_k, heads_v, probabilities, packed)
        out = q.new_empty(q.shape)  # not a view: callers may write to it in place
        torch.bmm(dropped, heads_v, out=out.view(-1, *q.shape[2:]))
        return out.mul_(1 / (1 - p)) if p else out

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled_q, heads_k, heads_v, probabilities, packed = ctx.saved_tensors
        g = _heads(grad, 1 / (1 - ctx.p))
        dropped = probabilities
        score_grad = torch.bmm(g, heads_v.transpose(1, 2))  # (B·H, M, L)
        if packed is not None:
            keep = unpack(packed, probabilities.shape)
            dropped = zero_dropped(probabilities, keep)
            score_grad = zero_dropped(score_grad, keep)
        # In the first layer of a frozen model, projections without an adapter need no gradient.
        needs_q, needs_k, needs_v, *_ = ctx.needs_input_grad
        q_grad = k_grad = v_grad = None
        if needs_v:
            v_grad = torch.bmm(dropped.transpose(1, 2), g).view(*grad.shape[:2], *heads_v.shape[1:])
        score_grad = torch._softmax_backward_data(score_grad, probabilities, -1, probabilities.dtype)
        if needs_q:
            q_grad = torch.bmm(score_grad, heads_k).mul_(ctx.scaling).view(grad.shape)
        if needs_k:
            k_grad = torch.bmm(score_grad.transpose(1, 2), scaled_q).view(*grad.shape[:2], *heads_k.shape[1:])
        return q_grad, k_grad, v_grad, None, None, None


def _softmax(scores: Tensor) -> Tensor:
    if scores.element_size() > 2 or scores.shape[-1] % 32 == 0:
        return scores.softmax(-1)
    # torch's 16-bit softmax takes three times as long if the row length is not a multiple of 32.
    return scores.float().softmax(-1).to(scores.dtype)


def _heads(x: Tensor, factor: float = 1.0) -> Tensor:
    """factor·x as (B·H, L, d), contiguous, in one pass over memory: x is (B, H, L, d)."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if factor == 1:
        out.copy_(x)
    else:
        torch.mul(x, factor, out=out)
    return out.view(-1, *x.shape[2:])


def _mask(
    *sizes: int, attention_mask: Tensor | None = None, allow_is_bidirectional_skip: bool = False, **rest: Any
) -> Tensor | None:
    """The mask that transformers makes for torch's attention, or None if nothing is masked.

    The values are only inspected on the CPU. On an accelerator that would make each forward wait for it.
    """
    may_skip = allow_is_bidirectional_skip and (attention_mask is None or attention_mask.device.type == "cpu")
    mask: Tensor | None = sdpa_mask(
        *sizes, attention_mask=attention_mask, allow_is_bidirectional_skip=may_skip, **rest
    )
    return mask


AttentionInterface.register(ATTENTION, fast_attention)
AttentionMaskInterface.register(ATTENTION, _mask)
