"""The layer protocol: a variant of LoRA is one class, and everything that handles adapters works with it.

Two variants are defined here and taken through a whole life without a change in `lora/`: a trained gate
per output row, and one whose merged weight is not W plus a product, as in DoRA.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_roberta
from torch import nn

from lora import (
    AdapterError,
    LoRALinear,
    count_parameters,
    disabled,
    eject,
    inject,
    load_adapter,
    merge,
    merged,
    save_adapter,
    unmerge,
)
from lora.adapted import lora_layers
from lora.fast import fuse
from train.telemetry import Telemetry


class GatedLoRALinear(LoRALinear):
    """h = W·x + b + gate ⊙ (scaling·B·A·x) with a trained gate (out,)."""

    adapter_tensors = (*LoRALinear.adapter_tensors, "gate")
    trained_tensors = (*LoRALinear.trained_tensors, "gate")

    def __init__(self, linear, **settings):
        super().__init__(linear, **settings)
        self.gate = nn.Parameter(torch.ones(self.out_features))

    def forward(self, x):
        if self.merged or not self.enabled:
            return super().forward(x)
        h = F.linear(x, self.weight, self.bias)
        return h + self.gate * self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)

    @torch.no_grad()
    def merged_weight(self):
        return self.base_weight.double() + self.gate.double()[:, None] * self.delta_weight()


class RescaledLoRALinear(LoRALinear):
    """h = m ⊙ ((W + ΔW)·x) / ‖W + ΔW‖ + b by rows, with A frozen and m (out,) a trained magnitude."""

    adapter_tensors = (*LoRALinear.adapter_tensors, "magnitude")
    trained_tensors = ("lora_B", "magnitude")

    def __init__(self, linear, **settings):
        super().__init__(linear, **settings)
        self.magnitude = nn.Parameter(self.weight.norm(dim=1))

    def forward(self, x):
        if self.merged or not self.enabled:
            return super().forward(x)
        weight = self.weight + self.scaling * self.lora_B @ self.lora_A
        return F.linear(x, weight) * (self.magnitude / weight.detach().norm(dim=1)) + self.bias

    @torch.no_grad()
    def merged_weight(self):
        weight = self.base_weight.double() + self.delta_weight()
        return weight * (self.magnitude.double() / weight.norm(dim=1))[:, None]


VARIANTS = [
    (GatedLoRALinear, "gate", 4 * (4 * 64 + 32)),
    (RescaledLoRALinear, "magnitude", 4 * (4 * 32 + 32)),
]


@pytest.mark.parametrize(("layer", "extra", "parameters"), VARIANTS)
def test_a_variant_lives_its_whole_life(layer, extra, parameters, config, input_ids, tmp_path):
    model = tiny_roberta()
    original = copy.deepcopy(model)
    inject(model, config, seed=3, layer=layer)
    layers = lora_layers(model)
    assert {type(each) for each in layers.values()} == {layer}
    assert count_parameters(model).lora == parameters
    with torch.no_grad():  # float32: one product, one division more
        torch.testing.assert_close(model(input_ids).logits, original(input_ids).logits, rtol=0, atol=1e-5)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    telemetry = Telemetry(model)
    for _ in range(2):  # in the first step A and the gate have no gradient, because B is zero
        optimizer.zero_grad()
        model(input_ids).logits.square().sum().backward()
        telemetry.note_gradients()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {f"{name}.{key}" for name, each in layers.items() for key in each.trained_tensors}
    assert changed == trained | {name for name in before if name.startswith("classifier.")}
    line = telemetry.line()
    assert set(line) == {f"gradient_norm_{key.removeprefix('lora_')}" for key in layer.trained_tensors}
    assert all(value > 0 for values in line.values() for value in values)

    with torch.no_grad():
        logits = model(input_ids).logits
        with disabled(model):
            base = model(input_ids).logits
        save_adapter(model, tmp_path / "a", base="tiny")
        with merged(model):
            save_adapter(model, tmp_path / "b", base="tiny")
            # float32 roundings of a model of order 1, against what the adapter adds
            assert (model(input_ids).logits - logits).abs().max() < 1e-4 < 0.1 * (logits - base).abs().max()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    loaded = tiny_roberta()
    with pytest.raises(AdapterError, match=f"no place in this model: .*{extra}"):
        load_adapter(loaded, tmp_path / "a")
    load_adapter(loaded, tmp_path / "a", layer=layer)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, logits)
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == [
        name for name, p in model.named_parameters() if p.requires_grad
    ]

    merge(model)
    with torch.no_grad():
        getattr(next(iter(layers.values())), extra).add_(1)
        with pytest.raises(RuntimeError, match=f"{extra} changed while merged"):
            model(input_ids)
        getattr(next(iter(layers.values())), extra).sub_(1)
    merge(loaded)
    with pytest.raises(RuntimeError, match="backward while merged"):
        loaded(input_ids).logits.sum().backward()
    unmerge(model)
    assert all(torch.equal(each.weight, before[f"{name}.weight"]) for name, each in layers.items())

    fuse(model)  # has no faster form of a variant, and leaves it as it is
    assert {type(each) for each in lora_layers(model).values()} == {layer}
    eject(model)
    assert model.state_dict().keys() == original.state_dict().keys()
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_a_variant_with_a_missing_tensor_in_its_folder_is_an_error(config, tmp_path):
    model = tiny_roberta()
    inject(model, config)
    save_adapter(model, tmp_path, base="tiny")
    with pytest.raises(AdapterError, match="4 tensors are missing: .*gate"):
        load_adapter(tiny_roberta(), tmp_path, layer=GatedLoRALinear)
