"""The baselines: PEFT (Hugging Face) and loralib (by the paper's authors), applied to the same model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lora import LoraConfig
from lora.inject import find_targets
from lora.modules import train_only
from lora.targets import all_linear


def with_peft(model: Any, config: LoraConfig) -> Any:
    """The model in PEFT's wrapper, with a trainable head."""
    import peft

    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            task_type="SEQ_CLS",
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=list(config.target_modules),
            use_dora=config.use_dora,
        ),
    )


def with_peft_nf4(model: Any, config: LoraConfig, compute_dtype: torch.dtype) -> Any:
    """`with_peft` on a base whose linear layers bitsandbytes has stored in NF4, as QLoRA does.

    compute_dtype: of the products with the dequantised weights.
    """
    import bitsandbytes

    settings = {"quant_type": "nf4", "compress_statistics": True}
    for name in all_linear(model):
        if not name.startswith(config.modules_to_save):
            linear = model.get_submodule(name)
            stored = bitsandbytes.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                compute_dtype=compute_dtype,
                **settings,
            )
            stored.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, **settings)
            stored.bias = linear.bias
            model.set_submodule(name, stored.to(linear.weight.device))  # `to` quantises
    model.is_loaded_in_4bit = True  # by which PEFT chooses its layers
    return with_peft(model, config)


def state_tensors(parameter: Tensor) -> list[Tensor]:
    """The tensors that bitsandbytes keeps beside the codes of a quantised parameter."""
    states = [state for state in (getattr(parameter, "quant_state", None),) if state]
    states += [state.state2 for state in states if state.state2]
    return [value for state in states for value in vars(state).values() if isinstance(value, Tensor)]


def with_loralib(model: Any, config: LoraConfig) -> Any:
    """The model with its target layers replaced by loralib's, as loralib's README describes."""
    import loralib

    for name in sorted(set(find_targets(model, config).names)):
        base = model.get_submodule(name)
        layer = loralib.Linear(
            base.in_features,
            base.out_features,
            r=config.r,
            lora_alpha=int(config.lora_alpha),
            lora_dropout=config.lora_dropout,
            merge_weights=False,
            dtype=base.weight.dtype,
        )
        layer.weight.data.copy_(base.weight.data)
        layer.bias.data.copy_(base.bias.data)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    train_only(model, config.modules_to_save)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
    return model


@dataclass(frozen=True)
class AdaptedLayer:
    """An adapted layer of a baseline: its Parameters A (r, in) and B (out, r), and its weight (out, in)."""

    A: Tensor
    B: Tensor
    weight: Tensor


def adapted_layer(kind: str, model: Any, name: str) -> AdaptedLayer:
    """The adapted layer, named as in the bare model, of a model that `BASELINES[kind]` returned."""
    if kind == "peft":
        layer = model.base_model.model.get_submodule(name)
        return AdaptedLayer(
            layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.get_base_layer().weight
        )
    layer = model.get_submodule(name)
    return AdaptedLayer(layer.lora_A, layer.lora_B, layer.weight)


def head(kind: str, model: Any) -> nn.Module:
    """The trained classification head."""
    found: nn.Module = model.classifier
    return found.modules_to_save["default"] if kind == "peft" else found  # type: ignore[index,return-value]


BASELINES: dict[str, Callable[[Any, LoraConfig], Any]] = {"peft": with_peft, "loralib": with_loralib}
_NEEDED = {"peft": ("peft",), "loralib": ("loralib",), "peft-nf4": ("peft", "bitsandbytes")}


def installed(kinds: Iterable[str] = BASELINES) -> list[str]:
    """Those of the baselines whose packages are installed."""
    return [kind for kind in kinds if all(find_spec(package) for package in _NEEDED[kind])]
