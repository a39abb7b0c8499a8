"""Variants of LoRA: whatever holds for LoRA holds for each of them.

A variant is one class, and everything that handles adapters works with it. So one is also defined here, and
taken through the same life without a change in `lora/`.
"""

import copy
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_roberta
from test_fuzz import damage
from torch import nn

from lora import (
    AdapterError,
    LoraConfig,
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
from lora.fast import FastLinear, fuse
from lora.files import CONFIG_FILE, TENSOR_FILE
from lora.inject import VARIANTS, layer_class
from lora.modules import lora_layers
from lora.variants.eva import EVALinear
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


# Fields of the config, and the trained numbers of a tiny RoBERTa's four layers of 32 x 32 with r = 4
SETTINGS = {
    "dora": ({"use_dora": True}, 4 * (4 * 64 + 32)),
    "lora_fa": ({"use_lora_fa": True}, 4 * 4 * 32),
    "pissa": ({"init_lora_weights": "pissa"}, 4 * 4 * 64),
    "milora": ({"init_lora_weights": "milora", "use_rslora": True}, 4 * 4 * 64),
    "vera": ({"peft_type": "VERA", "projection_prng_key": 7}, 4 * (4 + 32)),
    "vera, pair not saved": ({"peft_type": "VERA", "save_projection": False}, 4 * (4 + 32)),
}
variants = pytest.mark.parametrize("variant", SETTINGS)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def config_of(variant: str, **settings) -> LoraConfig:
    fields = {"r": 4, "lora_alpha": 8, "modules_to_save": ("classifier",)}
    return LoraConfig(**{**fields, **SETTINGS[variant][0], **settings})


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Moves every trained tensor of the adapters away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for tensor in (getattr(layer, key) for key in layer.trained_tensors):
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_((0.3 * noise).to(tensor.dtype))


@pytest.fixture(params=SETTINGS)
def adapted(request):
    """A tiny RoBERTa with a variant whose adapter has been moved away from its start."""
    model = tiny_roberta()
    inject(model, config_of(request.param), seed=3)
    randomise(model)
    return model


def test_every_variant_of_the_table_is_tested():
    tested = {layer_class(config_of(name)) for name in SETTINGS}
    assert {layer for _, _, layer in VARIANTS} == tested | {EVALinear}  # EVA is plain LoRA once it has begun


@pytest.mark.parametrize("variant", ["gated", *SETTINGS])
def test_a_variant_lives_its_whole_life(variant, config, input_ids, tmp_path):
    layer, parameters = GatedLoRALinear, 4 * (4 * 64 + 32)
    chosen = {"layer": layer}
    if variant != "gated":
        config, parameters, chosen = config_of(variant), SETTINGS[variant][1], {}
        layer = layer_class(config)
    model = tiny_roberta()
    original = copy.deepcopy(model)
    inject(model, config, seed=3, **chosen)
    layers = lora_layers(model)
    assert {type(each) for each in layers.values()} == {layer}
    assert count_parameters(model).lora == parameters
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, original(input_ids).logits)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    telemetry = Telemetry(model)
    for _ in range(2):  # in the first step some tensors have no gradient, such as A while B is zero
        optimizer.zero_grad()
        model(input_ids).logits.square().sum().backward()
        telemetry.note_gradients()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {f"{name}.{key}" for name, each in layers.items() for key in each.trained_tensors}
    assert changed == trained | {name for name in before if name.startswith("classifier.")}
    line = telemetry.line()
    gradients = {f"gradient_norm_{key.removeprefix('lora_')}" for key in layer.trained_tensors}
    assert gradients <= set(line) <= gradients | {"delta_over_weight", "effective_rank"}
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
    for name in (CONFIG_FILE, TENSOR_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    loaded = tiny_roberta()
    load_adapter(loaded, tmp_path / "a", **chosen)
    assert loaded.lora_config == config
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, logits)
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == [
        name for name, p in model.named_parameters() if p.requires_grad
    ]

    merge(model)
    for each in next(iter(layers.values())).adapter_tensors:
        with torch.no_grad():
            tensor = getattr(next(iter(layers.values())), each)
            kept = tensor.clone()
            tensor.add_(1)
            with pytest.raises(RuntimeError, match=f"{each}.* changed while merged"):
                model(input_ids)
            tensor.copy_(kept)
    merge(loaded)
    with pytest.raises(RuntimeError, match="backward while merged"):
        loaded(input_ids).logits.sum().backward()
    unmerge(model)
    assert all(torch.equal(each.weight, before[f"{name}.weight"]) for name, each in layers.items())
    eject(model)
    assert model.state_dict().keys() == original.state_dict().keys()
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    original.classifier = model.classifier
    assert torch.equal(model(input_ids).logits, original(input_ids).logits)


@torch.no_grad()
@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit_in_its_fast_class_either(
    variant, dtype, precision, input_ids, monkeypatch
):
    model = tiny_roberta().to(dtype)
    fuse(model, precision)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
        before = model(input_ids).logits
        inject(model, config_of(variant))  # the layers become fast, because the Linears are
        assert torch.equal(model(input_ids).logits, before)


@variants
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_fast_class_has_the_values_and_gradients_of_the_formula(variant, dropout, input_ids):
    model = tiny_roberta(initializer_range=0.1)
    inject(model, config_of(variant, lora_dropout=dropout))
    randomise(model)
    fast = copy.deepcopy(model)
    fuse(fast)
    kind = layer_class(model.lora_config)
    for layer in lora_layers(fast).values():
        assert isinstance(layer, FastLinear)
        assert isinstance(layer, kind)
    results = []
    for each in (model, fast):  # the mode of evaluation: in training the masks differ
        logits = each(input_ids).logits
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for p in each.parameters() if p.grad is not None)])
    for plain, fused in zip(*results, strict=True):
        # float32: sums of at most 64 terms, through two layers
        assert (plain - fused).abs().max() <= 1e-5 * plain.abs().max()
    fast.train()(input_ids).logits.sum().backward()
    eject(fast)
    assert all(type(m) is not nn.Linear for m in fast.roberta.encoder.modules() if isinstance(m, nn.Linear))


@variants
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_cycles_give_back_every_bit(variant, dtype):
    model = nn.ModuleDict({"query": nn.Linear(7, 5)}).to(dtype)
    weight = model["query"].weight
    with torch.no_grad():
        weight[0, :4] = torch.tensor([-0.0, 0.0, torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny])
    inject(model, config_of(variant, modules_to_save=(), target_modules=("query",)))
    randomise(model)
    before = weight.detach().clone()
    merge(model)
    assert not torch.equal(weight, before)
    # one rounding of the float64 sum: half a unit in the last place
    torch.testing.assert_close(
        weight.double(), model["query"].merged_weight(), rtol=torch.finfo(dtype).eps / 2 * 1.001,
        atol=torch.finfo(dtype).smallest_normal,
    )  # fmt: skip
    unmerge(model)
    # The copy of W is restored alike in every dtype.
    for _ in range(1000 if dtype == torch.bfloat16 else 50):
        model["query"].merge()
        model["query"].unmerge()
    assert torch.equal(weight.detach().view(torch.uint8), before.view(torch.uint8))


def test_a_layer_that_cannot_be_merged_leaves_every_weight_as_it_was(adapted):
    layers = lora_layers(adapted)
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    name, layer = list(layers.items())[2]
    with torch.no_grad():
        getattr(layer, layer.trained_tensors[-1]).view(-1)[1] = float("inf")
    with pytest.raises(ValueError, match=f"{name}: .*not finite"):
        merge(adapted)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers.items())
    assert not any(layer.merged for layer in layers.values())


@torch.no_grad()
def test_damaged_files_are_caught_or_harmless(adapted, input_ids, tmp_path):
    intact, folder = tmp_path / "intact", tmp_path / "damaged"
    save_adapter(adapted, intact, base="tiny")
    wanted = adapted(input_ids).logits
    rng, target, caught = random.Random(1), tiny_roberta(), 0
    for _ in range(60):  # of each variant, 300 in all; test_fuzz.py has more of LoRA
        shutil.copytree(intact, folder, dirs_exist_ok=True)
        name = CONFIG_FILE if rng.random() < 0.2 else TENSOR_FILE
        (folder / name).write_bytes(damage((intact / name).read_bytes(), rng))
        try:
            load_adapter(target, folder)
        except (AdapterError, FileNotFoundError):
            caught += 1
            assert not any(isinstance(module, LoRALinear) for module in target.modules())
        else:
            assert torch.equal(target(input_ids).logits, wanted)
            target = tiny_roberta()
    assert caught > 40  # the damage is real


def test_a_variant_with_a_missing_tensor_in_its_folder_is_an_error(config, tmp_path):
    model = tiny_roberta()
    inject(model, config)
    save_adapter(model, tmp_path, base="tiny")
    with pytest.raises(AdapterError, match="4 tensors are missing: .*gate"):
        load_adapter(tiny_roberta(), tmp_path, layer=GatedLoRALinear)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": 1}, "use_dora: 1 is not one of False, True"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)
