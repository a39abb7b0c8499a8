"""The checks of step 4."""

import json
import re
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from learn.oracle import CheckError, NewTensors, expect

N, IN, OUT, R, SCALING = 9, 7, 11, 2, 1.5


def _inputs() -> dict[str, Tensor]:
    """Forward's tensors, float64, W and b as if they trained. All sizes differ."""
    shapes = {"x": (N, IN), "weight": (OUT, IN), "bias": (OUT,), "lora_A": (R, IN), "lora_B": (OUT, R)}
    return {name: torch.randn(shape).double().requires_grad_() for name, shape in shapes.items()}


def _gradients(h: Tensor, inputs: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor | None]:
    try:
        found = torch.autograd.grad(h, list(inputs.values()), grad, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        wrong = re.search(r"invalid gradient at index (\d) - got (\[.*?\])", str(error))
        if wrong is None:
            raise
        name = list(inputs)[int(wrong[1])]
        raise CheckError(
            f"the gradient of {name}, which backward returns",
            expected=f"the shape of {name}, {tuple(inputs[name].shape)}",
            got=f"the shape {tuple(json.loads(wrong[2]))}",
            why="Check the order of the factors and the transposes.",
        ) from error
    return dict(zip(inputs, found, strict=True))


def check_gradients(step: ModuleType) -> None:
    """Without dropout, the gradients of x, A and B equal autograd's in float64."""
    inputs, grad = _inputs(), torch.randn(N, OUT).double()
    x, weight, bias, A, B = inputs.values()
    wanted = _gradients(F.linear(x, weight, bias) + SCALING * F.linear(F.linear(x, A), B), inputs, grad)
    got = _gradients(step.LoRAFunction.apply(*inputs.values(), SCALING, 0.0), inputs, grad)
    for name in ("lora_B", "lora_A", "x"):
        expected = wanted[name]
        assert expected is not None
        mistakes = {
            "The scaling is missing.": expected / SCALING,
            "The scaling is applied twice.": expected * SCALING,
        }
        if name == "x":
            frozen, adapter = grad @ weight, (grad @ B) @ A
            mistakes = {
                "The adapter's part is missing: x also reaches h through A and B.": frozen,
                "The frozen layer's part is missing: x also reaches h through W.": SCALING * adapter,
                "The scaling is missing in the adapter's part.": frozen + adapter,
                "The scaling is applied twice in the adapter's part.": frozen + SCALING**2 * adapter,
            }
        what = f"the gradient of {name}, {tuple(expected.shape)}"
        if got[name] is None:
            raise CheckError(what, expected="a tensor", got="None, which backward returns in its place")
        expect(what, got[name], expected.detach(), mistakes)


def check_frozen(step: ModuleType) -> None:
    """W and b get no gradient: None is returned for them."""
    inputs = _inputs()
    found = _gradients(
        step.LoRAFunction.apply(*inputs.values(), SCALING, 0.0), inputs, torch.ones(N, OUT).double()
    )
    for name in ("weight", "bias"):
        gradient = found[name]
        if gradient is not None:
            raise CheckError(
                f"the gradient of {name}",
                expected="None",
                got=f"a tensor of shape {tuple(gradient.shape)}",
                why="W and b are frozen. Their gradients would cost time and memory, and nobody uses them.",
            )


def check_mask(step: ModuleType) -> None:
    """With dropout, backward uses the mask that forward drew, which identity matrices make visible."""
    eye, bias = torch.eye(IN).double(), torch.zeros(IN).double()
    x = (torch.rand(N, IN).double() + 1).requires_grad_()
    A, B = eye.clone().requires_grad_(), eye.clone().requires_grad_()
    h = step.LoRAFunction.apply(x, eye, bias, A, B, 1.0, 0.5)  # x + x * keep
    keep, grad = (h / x - 1).detach().round(), torch.randn(N, IN).double()
    first = torch.autograd.grad(h, (x, A, B), grad, retain_graph=True)
    second = torch.autograd.grad(h, (x, A, B), grad, retain_graph=True)
    if not all(torch.equal(one, two) for one, two in zip(first, second, strict=True)):
        raise CheckError(
            "backward of one forward, called twice",
            expected="the same gradients",
            got="two different ones",
            why="The mask is drawn again in backward. Save the mask that forward used.",
        )
    dropped = (x * keep).detach()
    for name, got, wanted, ignored in (
        ("lora_B", first[2], grad.T @ dropped, grad.T @ x.detach()),
        ("lora_A", first[1], grad.T @ dropped, grad.T @ x.detach()),
        ("x", first[0], grad + grad * keep, 2 * grad),
    ):
        why = "The mask is not applied: dropped elements had no influence on the adapter's output."
        if name == "lora_A":
            why = "The mask is not applied: A was multiplied by the dropped x, x * keep."
        everywhere = {"The mask is on the frozen layer's part too, which had no dropout.": 2 * grad * keep}
        mistakes = {why: ignored} | (everywhere if name == "x" else {})
        expect(f"the gradient of {name} with dropout 0.5", got, wanted, mistakes)


def check_thin(step: ModuleType) -> None:
    """Backward forms nothing of the size of W, and saves nothing of the size of h or of ΔW."""
    inputs, grad = _inputs(), torch.randn(N, OUT).double()
    for name in ("weight", "bias"):
        inputs[name].requires_grad_(False)
    h: Any = step.LoRAFunction.apply(*inputs.values(), SCALING, 0.5)
    for name, value in vars(h.grad_fn).items():
        if isinstance(value, Tensor):
            raise CheckError(
                f"forward keeps a tensor as ctx.{name}.",
                expected="ctx.save_for_backward(tensors)",
                why="Autograd frees what it saves after backward, and notices if it is overwritten before.",
            )
    saved = [each for each in h.grad_fn.saved_tensors if each is not None]
    extra = [
        each for each in saved if not any(each.data_ptr() == known.data_ptr() for known in inputs.values())
    ]
    for each in extra:
        if tuple(each.shape) in ((N, OUT), (OUT, IN), (IN, OUT)):
            raise CheckError(
                f"save_for_backward keeps a tensor of shape {tuple(each.shape)}.",
                expected=f"only x, the mask {(N, IN)} and the thin product {(N, R)}, besides the parameters",
                why="What is saved stays in memory from forward to backward, in every layer.",
            )
    wide = [tuple(each.shape) for each in saved if tuple(each.shape) == (N, IN)]
    if len(wide) > 2:
        raise CheckError(
            f"save_for_backward keeps {len(wide)} tensors of shape {(N, IN)}.",
            expected="two: x and the mask",
            why="Compute x * keep again in backward: that is cheaper than keeping it.",
        )
    with NewTensors() as new:
        torch.autograd.grad(h, (inputs["x"], inputs["lora_A"], inputs["lora_B"]), grad)
    if (OUT, IN) in new.shapes or (IN, OUT) in new.shapes:
        raise CheckError(
            f"backward forms a matrix of shape {(OUT, IN)}, as large as W.",
            expected=f"only thin products, such as grad @ B of shape {(N, R)}",
            why="Multiply from the left: (grad @ B) @ A, not grad @ (B @ A).",
        )


CHECKS = (check_gradients, check_frozen, check_mask, check_thin)
