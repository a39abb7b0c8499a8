"""A frozen base in fewer bits (QLoRA, arXiv 2305.14314).

Read `nf4.py`, `int8.py` and `tensor.py` in this order. `quantise` changes how a model stores its weights:

    fp32   4 bytes a number, as loaded
    bf16   2 bytes
    int8   1 byte, and one float32 scale for each row          (int8.py)
    nf4    half a byte, and a scale of about a byte for each 64  (nf4.py)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lora.adapted import has_adapter
from lora.interrupts import uninterrupted
from lora.modules import modules_named, unique_modules
from lora.quantised.int8 import Int8
from lora.quantised.nf4 import NF4
from lora.quantised.tensor import Bf16, QuantisedTensor, Stored
from lora.targets import all_linear

_ROUND: dict[str, Callable[[Tensor], Stored]] = {kind.name: kind.quantise for kind in (Bf16, Int8, NF4)}
PRECISIONS = ("fp32", *_ROUND)


def quantise(model: nn.Module, precision: str, keep: Sequence[str] = ()) -> None:
    """Stores the weights of all linear layers and embeddings in `precision`, in place, and freezes these.

    Call it before `inject`, on a float32 model. Linear layers are stored as "bf16", "int8" or "nf4" says,
    embeddings as bfloat16. An embedding still returns float32. Biases and norms stay as they are, and so do
    modules whose names end with one of `keep`, such as a new head, weights that several modules share, and
    the output layer of a language model. "fp32" changes nothing. `model.half()` and the like fail afterwards,
    and may have converted other parameters by then.

    Raises RuntimeError if the model has an adapter or is quantised, ValueError for an unknown precision, a
    pattern of `keep` that matches nothing, a weight that cannot be stored or a model without any, TypeError
    for a layer that is no nn.Linear. The model is then unchanged.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
    if has_adapter(model):
        raise RuntimeError("the model has an adapter; quantise the base before inject")
    if precision == "fp32":
        return
    modules = unique_modules(model)
    kept: set[nn.Module] = set()
    for pattern in keep:
        found = [module for _, module in modules_named(model, pattern)]
        if not found:
            names = ", ".join(filter(None, modules))
            raise ValueError(f"keep: {pattern!r} matches no module; there are {names}")
        kept.update(*(module.modules() for module in found))
    linears = {id(modules[name]) for name in all_linear(model) if name in modules}
    uses: dict[int, int] = {}  # of each weight: a tied one stays as it is
    for module in modules.values():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    new: dict[nn.Module, nn.Parameter] = {}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is None or module in kept or uses[id(weight)] > 1:
            continue
        if isinstance(weight, QuantisedTensor):
            raise RuntimeError(f"{name} is quantised already")
        if id(module) in linears:
            if not isinstance(module, nn.Linear):
                kind = type(module).__name__
                raise TypeError(f"{name} is a {kind}; only an nn.Linear can be quantised; name it in keep")
            new[module] = nn.Parameter(_stored(name, weight, precision), requires_grad=False)
        elif type(module) is nn.Embedding:
            new[module] = nn.Parameter(_float32(name, weight).bfloat16(), requires_grad=False)
    if not new:
        raise ValueError("the model has no linear layer or embedding to store")
    with uninterrupted():
        for module, weight in new.items():
            module.weight = weight
            if isinstance(module, nn.Embedding):
                module.__class__ = Bf16Embedding


def dequantise(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Stores all weights that `quantise` has changed in `dtype` again, in place. What was rounded stays so.

    For a model in another dtype than float32, `model.to(dtype)` then converts the other parameters.

    Raises RuntimeError if the model has an adapter.
    """
    if has_adapter(model):
        raise RuntimeError("the model has an adapter; eject it first")
    with uninterrupted():
        for module in unique_modules(model).values():
            weight = module._parameters.get("weight")
            if isinstance(weight, QuantisedTensor):
                module.weight = nn.Parameter(weight.stored.dequantise(dtype), requires_grad=False)
            elif isinstance(module, Bf16Embedding):
                module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
                module.__class__ = nn.Embedding  # type: ignore[assignment]


def _float32(name: str, weight: Tensor) -> Tensor:
    if weight.dtype != torch.float32:  # norms and biases keep their dtype, and must agree with the outputs
        raise ValueError(f"{name} is {weight.dtype}; quantise a float32 model")
    return weight.detach()


def _stored(name: str, weight: Tensor, precision: str) -> Tensor:
    weight = _float32(name, weight).contiguous()
    try:
        return QuantisedTensor(_ROUND[precision](weight))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


class Bf16Embedding(nn.Embedding):
    """An nn.Embedding whose table is bfloat16: indices (...) -> (..., D) float32."""

    stored_as = "bf16"  # a reason not to train it (lora/targets.py)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()
