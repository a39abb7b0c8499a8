"""The checks of the bonus."""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from learn.oracle import CheckError, expect, expect_error, expect_value


def check_dora(step: ModuleType) -> None:
    """dora equals the formula in float64, gives W·x + b at the start, and detaches the norm in backward."""
    x, W, b = torch.randn(5, 8).double(), torch.randn(8, 8).double(), torch.randn(8).double()
    A, B = torch.randn(2, 8).double(), torch.randn(8, 2).double().requires_grad_()
    m = torch.rand(8).double() + 0.5
    V = W + 1.5 * B @ A
    rows, columns = V.norm(dim=1), V.norm(dim=0)
    wanted = F.linear(x, V) * (m / rows.detach()) + b
    mistakes = {
        "The norm is over the columns of V. Each output row has a norm: dim=1.": (
            F.linear(x, V / columns * m) + b
        ),
        "The norm is over the columns of V, as seen from the outputs: dim=1, not dim=0.": (
            F.linear(x, V) * (m / columns) + b
        ),
        "The bias is scaled too; it is added last.": (F.linear(x, V) + b) * (m / rows),
        "The norm is that of W, not of W + ΔW.": F.linear(x, V) * (m / W.norm(dim=1)) + b,
    }  # fmt: skip
    got = step.dora(x, W, b, A, B, 1.5, m)
    expect("dora(x, W, b, A, B, 1.5, m)", got, wanted.detach(), {k: v.detach() for k, v in mistakes.items()})
    start = step.dora(x, W, b, A, torch.zeros_like(B), 1.5, W.norm(dim=1))
    expect("dora with B = 0 and m = the row norms of W", start, F.linear(x, W, b))
    grad = torch.randn(5, 8).double()
    (gradient,) = torch.autograd.grad(got, B, grad)
    (detached,) = torch.autograd.grad(wanted, B, grad, retain_graph=True)
    (through,) = torch.autograd.grad(F.linear(x, V) * (m / rows) + b, B, grad)
    why = {"The gradient goes through the norm. DoRA treats it as a constant: detach()": through}
    expect("the gradient of B through dora", gradient, detached, why)


def check_mixed(step: ModuleType) -> None:
    """Each row of a mixed batch equals, bit for bit, the batch run wholly with its adapter, in float32."""
    x, h = torch.randn(7, 96), torch.randn(7, 64)
    adapters = [(torch.randn(4, 96), torch.randn(64, 4), s) for s in (0.5, 2.0)]
    which = [0, 1, -1, 1, 0, 0, -1]
    before = h.clone()
    whole = [h + s * F.linear(F.linear(x, A), B) for A, B, s in adapters] + [h]
    wanted = torch.stack([whole[index][row] for row, index in enumerate(which)])
    got = step.mixed_batch(h, x, adapters, which)
    if isinstance(got, torch.Tensor) and got.shape == wanted.shape and not torch.equal(got, wanted):
        close = torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)
        why = (
            "Equal up to rounding: gathered rows form products of another shape, which round otherwise."
            if close
            else f"Row {int((got - wanted).abs().amax(1).argmax())} is the furthest off."
        )
        raise CheckError(
            f"mixed_batch(h, x, adapters, {which})",
            expected="the rows of whole batches, bit for bit",
            got=f"other values, by up to {(got - wanted).abs().max():.3g}",
            why=why,
        )
    expect("mixed_batch", got, wanted, tolerance=0)
    if not torch.equal(h, before):
        raise CheckError("h after mixed_batch", expected="unchanged", got="changed")
    for wrong in (2, -2):
        expect_error(
            f"mixed_batch with adapter {wrong} of 2", ValueError, step.mixed_batch, h, x, adapters,
            [wrong] * 7, why="An unknown adapter must not mean the base model.",
        )  # fmt: skip


def check_llama(step: ModuleType) -> None:
    """The query and value projections of a small Llama are adapted, and its outputs are the same."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model, ids = LlamaForCausalLM(config).eval(), torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        before = model(ids).logits
        names = step.adapt_llama(model)
        wanted = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"]
        expect_value("the names that adapt_llama returns", names, wanted)
        expect("the logits with a fresh adapter", model(ids).logits, before, tolerance=0)
        for name in names:
            layer: Any = model.get_submodule(name)
            expect_value(f"r and scaling of {name}", (len(layer.lora_A), layer.scaling), (4, 8 / 4))
            layer.lora_B.normal_()
        if torch.equal(model(ids).logits, before):
            raise CheckError("the logits after a change of lora_B", expected="other values", got="the same")


CHECKS = (check_dora, check_mixed, check_llama)
