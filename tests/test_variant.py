"""Variants of LoRA: whatever holds for LoRA holds for each of them.

A variant is one class, and everything that handles adapters works with it. So one is also defined here, and
taken through the same life without a change in `lora/`.
"""

import copy
import dataclasses
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_roberta
from test_fuzz import load_damaged
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from lora import (
    AdapterError,
    LoraConfig,
    LoRALinear,
    MergeableLinear,
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
from lora.ablate import scaled, truncated
from lora.adapted import has_low_rank, lora_layers
from lora.anatomy import principal_angles, svd
from lora.fast import FastLinear, fuse
from lora.files import CONFIG_FILE, TENSOR_FILE, _from_peft_key, _to_peft_key
from lora.inject import layer_class
from lora.storage import read_tensors, write_tensors
from lora.variants import VARIANTS
from lora.variants.eva import EVALinear, inject_eva
from lora.variants.lora_plus import parameter_groups
from model import load_base, speed_up
from train.batches import encode
from train.checkpoint import CheckpointError, load_last_checkpoint, save_checkpoint
from train.data import load_news
from train.job import _make_model
from train.loop import Trainer
from train.telemetry import Telemetry


class GatedLoRALinear(LoRALinear):
    """h = W·x + b + gate ⊙ (scaling·B·A·x) with a trained gate (out,)."""

    adapter_tensors = (*LoRALinear.adapter_tensors, "gate")
    trained_tensors = (*LoRALinear.trained_tensors, "gate")

    def __init__(self, linear, **settings):
        super().__init__(linear, **settings)
        self.gate = nn.Parameter(torch.ones_like(self.lora_B[:, 0]))

    def forward(self, x):
        h = MergeableLinear.forward(self, x)  # W·x + b: (..., in) -> (..., out)
        if self.merged or not self.enabled:
            return h
        x = F.dropout(x.to(self.lora_A.dtype), self.lora_dropout, self.training)
        return (h + self.gate * self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)).to(h.dtype)

    @torch.no_grad()
    def merged_weight(self):
        return self.base_weight.double() + self.gate.double()[:, None] * self.delta_weight()


# Fields of the config, and the trained numbers of a tiny RoBERTa's four layers of 32 x 32 with r = 4
SETTINGS: dict[str, tuple[dict, int]] = {
    "dora": ({"use_dora": True}, 4 * (4 * 64 + 32)),
    "lora_fa": ({"use_lora_fa": True}, 4 * 4 * 32),
    "pissa": ({"init_lora_weights": "pissa"}, 4 * 4 * 64),
    "milora": ({"init_lora_weights": "milora", "use_rslora": True}, 4 * 4 * 64),
    "vera": ({"peft_type": "VERA"}, 4 * (4 + 32)),
    "vera, pair not saved": (
        {"peft_type": "VERA", "projection_prng_key": 7, "save_projection": False},
        4 * (4 + 32),
    ),
}
START = {"eva": {"init_lora_weights": "eva"}}  # then the layers are LoRALinear
COMPUTED = [name for name in SETTINGS if "," not in name]  # which differ in what they compute
variants = pytest.mark.parametrize("variant", COMPUTED)
CYCLES = int(os.environ.get("CYCLES", "20"))  # `make test-long` runs 1,000
DAMAGED = int(os.environ.get("DAMAGED", "60"))  # files of each variant, and 300 there
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def config_of(variant: str, **settings) -> LoraConfig:
    fields = {"r": 4, "lora_alpha": 8, "modules_to_save": ("classifier",)}
    return LoraConfig(**{**fields, **(START.get(variant) or SETTINGS[variant][0]), **settings})


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
def test_many_cycles_give_back_every_bit(variant, dtype):
    model = nn.ModuleDict({"query": nn.Linear(7, 5)}).to(dtype)
    weight = model["query"].weight
    with torch.no_grad():
        weight[0, :4] = torch.tensor([-0.0, 0.0, torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny])
    inject(model, config_of(variant, modules_to_save=(), target_modules=("query",)))
    randomise(model)
    before = weight.detach().clone()
    merge(model)
    assert not torch.equal(weight, before)
    # one rounding of the float64 sum: half a unit in the last place, or half of the smallest subnormal number
    half = torch.finfo(dtype).eps / 2 * 1.001
    torch.testing.assert_close(
        weight.double(), model["query"].merged_weight(), rtol=half, atol=half * torch.finfo(dtype).tiny
    )
    unmerge(model)
    for _ in range(CYCLES):
        model["query"].merge()
        model["query"].unmerge()
    assert torch.equal(weight.detach().view(torch.uint8), before.view(torch.uint8))


@variants
@torch.no_grad()
def test_a_variant_on_a_conv1d_is_that_on_a_linear(variant):
    linear, conv = nn.Sequential(nn.Linear(6, 9)), nn.Sequential(Conv1D(9, 6))
    conv[0].weight.copy_(linear[0].weight.T)
    conv[0].bias.copy_(linear[0].bias)
    x = torch.randn(4, 6)
    base, states = conv(x), []
    for model in (linear, conv):
        inject(model, config_of(variant, modules_to_save=(), target_modules=("0",)), seed=3)
        if model is conv:
            assert torch.equal(conv(x), base)
        randomise(model)
        states.append(model[0].adapter_state())
        merge(model)
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, msg=name)  # float32 sums in another order
    torch.testing.assert_close(conv[0].weight.T, linear[0].weight)


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
    caught = load_damaged(intact, folder, tiny_roberta, wanted, input_ids, DAMAGED)  # test_fuzz.py has more
    assert caught > DAMAGED * 2 / 3  # the damage is real


def test_a_folder_of_pissa_with_a_tensor_of_another_shape_is_an_error(tmp_path):
    model = tiny_roberta()
    inject(model, config_of("pissa"))
    save_adapter(model, tmp_path, base="tiny")
    tensors, note = read_tensors(tmp_path / TENSOR_FILE, "lora", _from_peft_key)
    for change in (lambda B: B.sum(), lambda B: B[:, :-1], lambda B: B[0]):
        changed = {key: change(tensor) if "lora_B" in key else tensor for key, tensor in tensors.items()}
        write_tensors(tmp_path / TENSOR_FILE, changed, "lora", note, _to_peft_key)
        with pytest.raises(AdapterError, match="lora_B is|start_B is|damaged"):
            load_adapter(tiny_roberta(), tmp_path)


def test_a_variant_with_a_missing_tensor_in_its_folder_is_an_error(config, tmp_path):
    model = tiny_roberta()
    inject(model, config)
    save_adapter(model, tmp_path, base="tiny")
    with pytest.raises(AdapterError, match="4 tensors are missing: .*gate"):
        load_adapter(tiny_roberta(), tmp_path, layer=GatedLoRALinear)


@torch.no_grad()
def test_ablations_work_where_the_update_has_low_rank_and_are_refused_elsewhere(adapted, input_ids):
    layers = lora_layers(adapted)
    if not has_low_rank(next(iter(layers.values()))):
        for change in (scaled(adapted, 2.0), truncated(adapted, 1)):
            with pytest.raises(RuntimeError, match="query: the update of a .* is not scaling"), change:
                pass
        return
    before = {key: tensor.clone() for key, tensor in adapted.state_dict().items()}
    wanted = {name: svd(layer.delta_weight()) for name, layer in layers.items()}
    logits = adapted(input_ids).logits
    with truncated(adapted, 2):
        assert not torch.equal(adapted(input_ids).logits, logits)
        for name, layer in layers.items():
            A, B = layer.factors()
            best = wanted[name].truncated(2)
            for delta in (layer.delta_weight(), layer.scaling * B.double() @ A.double()):
                assert (delta - best).abs().max() <= 1e-6 * best.abs().max()  # B is rounded to float32
    with scaled(adapted, 0.0), disabled(adapted):
        base = adapted(input_ids).logits
    with scaled(adapted, 0.0):
        assert torch.equal(adapted(input_ids).logits, base)
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapted.state_dict().items())


# --- what each variant is -----------------------------------------------------------------------------


def layer_of(variant: str, **settings) -> LoRALinear:
    """A layer with a float64 weight (20, 12)."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"query": nn.Linear(12, 20)}).double()
    inject(model, config_of(variant, target_modules=("query",), modules_to_save=(), **settings))
    return model["query"]


def test_the_gradient_of_dora_takes_the_norm_for_a_constant():
    layer, x = layer_of("dora"), torch.randn(5, 12, dtype=torch.float64)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_magnitude_vector.mul_(1.3)
    parameters = [layer.lora_A, layer.lora_B, layer.lora_magnitude_vector]
    weight = layer.weight + 2 * layer.lora_B @ layer.lora_A
    norm = weight.norm(dim=1)
    direct = F.linear(x, weight * (layer.lora_magnitude_vector / norm.detach())[:, None], layer.bias)
    upstream = torch.randn_like(direct)
    wanted = torch.autograd.grad(direct, parameters, upstream)
    for got, expected in zip(torch.autograd.grad(layer(x), parameters, upstream), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)  # float64


def test_dora_sees_changes_of_magnitude_that_bfloat16_has_no_number_for():
    """Below 1 + 2⁻⁸ the factor itself is 1 in bfloat16; its distance from 1 is not."""
    layer = layer_of("dora").float()
    x = torch.randn(400, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        h = (layer(x) - layer.bias).double()
        layer.lora_magnitude_vector.mul_(1.003)
        factor = ((layer(x) - layer.bias).double() * h).sum() / (h * h).sum()
    assert factor == pytest.approx(1.003, abs=5e-4)  # 8,000 roundings of 2⁻⁹, which average out


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_fresh_dora_stays_one_in_another_dtype(dtype):
    model, x = nn.ModuleDict({"query": nn.Linear(200, 96)}), torch.randn(5, 200).to(dtype)
    inject(model, config_of("dora", target_modules=("query",), modules_to_save=()))
    other = copy.deepcopy(model).eval()
    layer = model.to(dtype)["query"]
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    merge(other)
    unmerge(other.to(dtype))  # cast while merged
    assert torch.equal(other["query"](x), layer(x))
    other["query"].weight = nn.Parameter(layer.weight.detach().to("meta"))  # as another adapter has moved it
    other.to(torch.float32)
    with torch.no_grad():
        layer.lora_magnitude_vector[3] *= 2
    trained = layer.lora_magnitude_vector.clone()
    assert torch.equal(model.to(torch.float32)["query"].lora_magnitude_vector, trained.float())


def test_a_cast_that_a_fresh_merged_dora_does_not_fit_in_converts_every_layer():
    model = nn.ModuleDict({"key": nn.Linear(4, 4), "query": nn.Linear(4, 4), "value": nn.Linear(4, 4)})
    with torch.no_grad():
        model["query"].weight[0, 0] = 1e5
    inject(model, config_of("dora", target_modules=("key", "query", "value"), modules_to_save=()))
    merge(model)
    with pytest.warns(UserWarning, match="not finite in torch.float16"):
        model.half()
    assert all(layer.merged and layer.weight.dtype == torch.float16 for layer in model.values())
    unmerge(copy.deepcopy(model))
    model.to("meta")


def test_dora_forms_no_matrix_of_the_size_of_the_weight_and_one_product_with_it():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            out = operation(*args, **(kwargs or {}))
            outs = [each for each in torch.utils._pytree.tree_leaves(out) if isinstance(each, torch.Tensor)]
            made.extend(
                each for each in outs if each.shape == (20, 30) and each.data_ptr() != weight.data_ptr()
            )
            wide.extend(each for each in outs if each.shape == (7, 20) and operation in products)
            return out

    made, wide, products = [], [], (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
    model = nn.ModuleDict({"query": nn.Linear(30, 20)})
    inject(model, config_of("dora", target_modules=("query",), modules_to_save=(), lora_dropout=0.5))
    layer, weight = model["query"].train(), model["query"].weight
    with Watch():
        layer(torch.randn(7, 30))
    assert not made
    assert len(wide) == 2  # W·x + b, and B·(A·x)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_norms_of_dora_are_exact_in_16_bits_too(dtype):
    """Squares of 16 bits overflow and vanish, and their sum cancels where ΔW is nearly -W."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"query": nn.Linear(6, 8)}).eval()
    layer = model["query"]
    layer.weight[0] *= 1e-3 / layer.weight[0].norm()
    layer.weight[1] *= 300 / layer.weight[1].norm()
    x, before = torch.randn(5, 6), layer.weight.double()
    inject(model, config_of("dora", r=6, lora_alpha=6, target_modules=("query",), modules_to_save=()))
    layer = model["query"]
    fresh = copy.deepcopy(model).to(dtype)["query"]
    assert torch.equal(fresh(x.to(dtype)), F.linear(x.to(dtype), fresh.weight, fresh.bias))
    assert torch.equal(fresh.merged_weight(), fresh.weight.double())
    layer.lora_B.copy_(-0.75 * before @ torch.linalg.inv(layer.lora_A.double()))  # W + ΔW = W / 4
    layer.lora_magnitude_vector.mul_(1.3)
    other = copy.deepcopy(model).to(dtype)["query"]
    with torch.autocast("cpu", torch.bfloat16):
        norms = layer.row_norms()
    # B is rounded to float32, and the condition number of A makes more of it; bfloat16 would be off by 0.1.
    torch.testing.assert_close(norms.double(), before.norm(dim=1) / 4, rtol=1e-4, atol=0)
    torch.testing.assert_close(layer.merged_weight(), 1.3 * before, rtol=1e-3, atol=1e-3)
    # m has 8 bits at least, and the merged rows have its length, whatever the rounding of A and B
    lengths = other.merged_weight().norm(dim=1) / before.norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 1.3), rtol=0.01, atol=0)
    layer.lora_B.div_(0.75)  # W + ΔW = 0: the direction is noise, and stays finite
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).abs().max() < 1000 * F.linear(x, before.float()).abs().max()


def test_a_row_of_zeros_has_no_direction_and_stays_finite():
    layer = layer_of("dora")
    with torch.no_grad():
        layer.weight[3] = 0
    fresh = type(layer)(layer.to_linear(), r=2, lora_alpha=2)
    x = torch.randn(5, 12, dtype=torch.float64)
    assert torch.equal(fresh(x), F.linear(x, layer.weight, layer.bias))
    assert torch.equal(fresh.merged_weight()[3], torch.zeros(12, dtype=torch.float64))


@pytest.mark.parametrize(("variant", "part"), [("pissa", slice(4)), ("milora", slice(8, 12))])
def test_pissa_and_milora_start_at_the_two_ends_of_the_spectrum(variant, part):
    layer = layer_of(variant)
    U, S, Vh = (
        torch.from_numpy(each) for each in np.linalg.svd(layer.weight.detach().numpy(), full_matrices=False)
    )
    start = layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach()
    torch.testing.assert_close(start, (U[:, part] * S[part]) @ Vh[part], rtol=0, atol=1e-12)  # float64
    balanced = layer.lora_A.detach().norm(dim=1), layer.lora_B.detach().norm(dim=0)
    torch.testing.assert_close(*balanced, rtol=1e-12, atol=0)  # each has the root of a singular value
    assert not layer.delta_weight().any()
    with pytest.raises(ValueError, match="r: 13 is more than 12"):
        layer_of(variant, r=13)
    with torch.no_grad():
        layer.weight.zero_()
    with pytest.raises(ValueError, match="would start is 0"):
        type(layer)(layer.to_linear(), r=2, lora_alpha=2)
    model = nn.ModuleDict({"query": nn.Linear(12, 20)})
    config = config_of(variant, target_modules=("query",), modules_to_save=(), r=12)
    with torch.no_grad():
        model["query"].weight[:, 1] = model["query"].weight[:, 0]  # the last singular value is 0 to rounding
        with pytest.raises(ValueError, match="query: .*would start is 0"):
            inject(model, config)
        model["query"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="query: the weight is not finite"):
        inject(model, config)


@pytest.mark.parametrize("variant", ["pissa", "milora"])
def test_loading_computes_no_start(variant, tmp_path, monkeypatch):
    def linear(out_features=12):
        torch.manual_seed(0)
        return nn.ModuleDict({"query": nn.Linear(12, out_features)})

    model, loaded = linear(), linear()
    inject(model, config_of(variant, target_modules=("query",), modules_to_save=()))
    save_adapter(model, tmp_path, base="tiny")
    monkeypatch.setattr("torch.linalg.svd", None)
    with torch.no_grad():
        loaded["query"].weight.zero_()  # a weight that no adapter could start from
    load_adapter(loaded, tmp_path, check_base=False)
    assert torch.equal(loaded["query"].start_B, model["query"].start_B)
    with pytest.raises(AdapterError, match="lora_B is"):
        load_adapter(linear(3), tmp_path)


def test_lora_fa_trains_b_alone_without_inject_too():
    layer = layer_of("lora_fa")
    alone = type(layer)(layer.to_linear(), r=2, lora_alpha=2)
    assert [name for name, p in alone.named_parameters() if p.requires_grad] == ["lora_B"]


def test_the_layers_of_vera_share_one_pair_also_after_a_copy_and_a_move(input_ids, tmp_path):
    model = tiny_roberta()
    inject(model, config_of("vera", target_modules=("query", "output.dense")))
    save_adapter(model, tmp_path, base="tiny")
    loaded = tiny_roberta()
    load_adapter(loaded, tmp_path)
    for each in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16), loaded):
        pairs = {layer.projection for layer in lora_layers(each).values()}
        (pair,) = pairs
        assert pair.vera_A.shape == (4, 64)
        assert pair.vera_B.shape == (32, 4)
        assert not any("projection" in key for key in each.state_dict())
        assert pair.vera_A.dtype == torch.float32
    x, query = torch.randn(3, 32), "roberta.encoder.layer.0.attention.self.query"
    before = model.get_submodule(query)(x)
    model.get_submodule("roberta.encoder.layer.1").double()(x[None].double())  # the pair is of both dtypes
    assert torch.equal(model.get_submodule(query)(x), before)


def test_a_merged_vera_notices_that_its_pair_has_changed():
    model, x = nn.ModuleDict({"query": nn.Linear(12, 12)}).eval(), torch.randn(5, 12)
    inject(model, config_of("vera", target_modules=("query",), modules_to_save=()))
    randomise(model)
    merge(model)
    y = model["query"](x)
    assert torch.equal(copy.deepcopy(model)["query"](x), y)
    with torch.no_grad():
        model["query"].projection.vera_B.mul_(2)
    with pytest.raises(RuntimeError, match="changed while merged"):
        model["query"](x)


@pytest.mark.parametrize("variant", ["pissa", "milora"])
def test_names_that_look_like_those_of_a_start_are_saved(variant, tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.start_proj, self.start_A = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.start_A(self.start_proj(x))

    config = config_of(variant, target_modules=("start_proj",), modules_to_save=("start_A",))
    model, loaded, x = nn.ModuleDict({"m": Model()}), nn.ModuleDict({"m": Model()}), torch.randn(3, 8)
    inject(model, config)
    randomise(model)
    save_adapter(model, tmp_path, base="tiny")
    load_adapter(loaded, tmp_path)
    assert torch.equal(loaded["m"](x), model["m"](x))


def eva_batches(input_ids):
    """Two batches, the second of other texts and partly padding."""
    mask = torch.ones_like(input_ids)
    mask[1, 6:] = 0
    return [{"input_ids": input_ids}, {"input_ids": input_ids.flip(1) + 40, "attention_mask": mask}]


@torch.no_grad()
@pytest.mark.parametrize("use_rslora", [False, True])
def test_eva_starts_at_the_singular_vectors_of_the_inputs_and_redistributes_the_rank(use_rslora, input_ids):
    config = config_of(
        "eva", lora_dropout=0.5, use_rslora=use_rslora, target_modules=("query", "output.dense")
    )
    model = tiny_roberta().train()
    original = copy.deepcopy(model).eval()
    inputs: dict[str, list[torch.Tensor]] = {}
    batches = eva_batches(input_ids)
    for name, module in original.named_modules():
        if name.endswith(("query", "output.dense")):
            module.register_forward_pre_hook(lambda _, x, name=name: inputs.setdefault(name, []).append(x[0]))
    wanted = [original(**batch).logits for batch in batches]
    inject_eva(model, config, batches, seed=3)
    assert model.training
    assert all(module.training for module in model.modules())
    model.eval()
    assert all(torch.equal(model(**b).logits, logits) for b, logits in zip(batches, wanted, strict=True))

    layers = lora_layers(model)
    explained = {}
    for name, layer in layers.items():
        assert type(layer) is LoRALinear
        first, second = inputs[name]
        X = torch.cat([first.flatten(0, 1), second[batches[1]["attention_mask"].bool()]]).double().numpy()
        _, S, Vh = np.linalg.svd(X, full_matrices=False)
        explained[name] = S**2 / (S**2).sum()
        angles = principal_angles(layer.lora_A.T, torch.from_numpy(Vh[: layer.r].copy()).T)
        assert angles.max() < 1e-6  # lora_A is rounded to float32
        assert layer.scaling == pytest.approx(8 / 4**0.5 if use_rslora else 2, rel=1e-12)
    ranks = {name: layer.r for name, layer in layers.items()}
    assert sum(ranks.values()) == 4 * len(layers)
    assert len(set(ranks.values())) > 1
    assert all(1 <= rank <= 8 for rank in ranks.values())
    weakest = min(explained[name][rank - 1] for name, rank in ranks.items() if rank > 1)
    strongest = max(explained[name][rank] for name, rank in ranks.items() if rank < 8)
    assert strongest <= weakest  # no direction outside explains more than one inside
    assert model.lora_config.init_lora_weights is True


def test_eva_gives_a_layer_no_more_directions_than_its_weight_has():
    """The inputs of the second layer vary in 8 directions, of which its weight has 2; the first's, in one.

    The layers get tokens of all rows in one dimension, and padding does not count there either.
    """

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.thin = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x, attention_mask):
            x = x.flatten(0, 1)
            return self.wide(x[:, :1].expand(-1, 8))[:, :2] + self.thin(x)

    model = Two()
    config = config_of("eva", r=4, modules_to_save=(), target_modules=("wide", "thin"))
    x, mask = torch.randn(4, 16, 8), torch.ones(4, 16)
    x[:, 12:], mask[:, 12:] = 100 * torch.eye(8)[3], 0
    inject_eva(model, config, [{"x": x, "attention_mask": mask}])
    assert {name: layer.r for name, layer in lora_layers(model).items()} == {"wide": 6, "thin": 2}
    _, _, Vh = np.linalg.svd(x[:, :12].reshape(48, 8).double().numpy())
    angles = principal_angles(model.thin.lora_A.T, torch.from_numpy(Vh[:2].copy()).T)
    assert angles.max() < 1e-6  # lora_A is rounded to float32


def test_eva_needs_batches_and_says_so(input_ids):
    model = tiny_roberta()
    with pytest.raises(ValueError, match="init_lora_weights: 'pissa', and inject_eva"):
        inject_eva(model, config_of("pissa"), eva_batches(input_ids))
    with pytest.raises(ValueError, match="the ranks add up to 132, and the layers have room for 128"):
        inject_eva(model, config_of("eva", r=33), eva_batches(input_ids))
    with pytest.raises(ValueError, match="needs batches; call inject_eva"):
        inject(model, config_of("eva"))
    with pytest.raises(ValueError, match="query: no batch has reached"):
        inject_eva(model, config_of("eva"), [])
    padding = [{"input_ids": input_ids, "attention_mask": torch.zeros_like(input_ids)}]
    with pytest.raises(ValueError, match="query: its inputs are all zero or padding"):
        inject_eva(model, config_of("eva"), padding)
    with torch.no_grad():
        model.roberta.embeddings.LayerNorm.bias[0] = float("nan")
    with pytest.raises(ValueError, match="query: its inputs are not finite"):
        inject_eva(model, config_of("eva"), eva_batches(input_ids))
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    inject(model, config_of("dora"))
    with pytest.raises(RuntimeError, match="adapter already"):
        inject_eva(model, config_of("eva"), eva_batches(input_ids))


def test_eva_starts_from_training_rows_alone(tiny_recipe, monkeypatch):
    recipe = dataclasses.replace(tiny_recipe, r=4, init_lora_weights="eva")
    news = load_news(recipe.data, recipe.validation_fraction, recipe.seed)
    seen = []

    def spy(split, *rest):
        seen.extend(split["text"])
        return encode(split, *rest)

    monkeypatch.setattr("train.adapter.encode", spy)
    train = news.train.map(lambda row: {"text": f"train {row['text']}"})
    _make_model(recipe, dataclasses.replace(news, train=train))
    assert seen
    assert all(text.startswith("train ") for text in seen)


def test_the_rank_of_vera_may_exceed_that_of_the_weight():
    """λ_d has r trained numbers, whatever the weight's size."""
    model = nn.ModuleDict({"query": nn.Linear(7, 5)})
    inject(model, config_of("vera", r=64, modules_to_save=(), target_modules=("query",)))
    assert count_parameters(model).lora == 64 + 5
    with pytest.raises(ValueError, match="r: 64 is more than 5, the largest rank of the weight of query"):
        inject(nn.ModuleDict({"query": nn.Linear(7, 5)}), LoraConfig(r=64, target_modules=("query",)))


def test_a_layer_that_is_not_what_the_config_asks_for_is_refused(model):
    with pytest.raises(
        ValueError, match="layer: GatedLoRALinear is no DoRALinear, which the config asks for"
    ):
        inject(model, config_of("dora"), layer=GatedLoRALinear)


@pytest.mark.parametrize(("name", "value", "kind"), VARIANTS, ids=[kind.__name__ for *_, kind in VARIANTS])
def test_a_variant_is_refused_where_the_config_does_not_ask_for_it(name, value, kind, model, tmp_path):
    """A folder has the config alone: PEFT would read another adapter than the one that was trained."""
    own = type("Own", (kind,), {})
    with pytest.raises(ValueError, match=f"layer: Own needs a config with {name}={value!r}"):
        inject(model, LoraConfig(r=4), layer=own)
    inject(model, LoraConfig(r=4))
    save_adapter(model, tmp_path, base="tiny")
    with pytest.raises(AdapterError, match=f"layer: Own needs a config with {name}={value!r}"):
        load_adapter(tiny_roberta(), tmp_path, layer=own)


def test_a_rank_that_cannot_be_lowered_is_an_error(model, config):
    class Renamed(LoRALinear):
        def factors(self):
            return self.lora_B.T, self.lora_A.T  # names say nothing: A is the left factor here

        adapter_tensors = ("lora_A",)

    inject(model, config, layer=Renamed)
    with (
        pytest.raises(RuntimeError, match="Renamed has no tensor whose name ends in _B"),
        truncated(model, 1),
    ):
        pass


def test_lora_plus_multiplies_the_rate_of_b_alone(config, input_ids):
    """One step of SGD by the groups, against one written by hand."""
    model = tiny_roberta()
    inject(model, config)
    randomise(model)
    model(input_ids).logits.square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = {}
    for name, p in trained.items():
        decayed = 0.1 * p if p.ndim == 2 else 0
        wanted[name] = (p - (0.8 if name.endswith("lora_B") else 0.05) * (p.grad + decayed)).detach()
    groups = parameter_groups(trained, 0.05, weight_decay=0.1, loraplus_lr_ratio=16)
    torch.optim.SGD(groups).step()
    for name, p in trained.items():  # float32: the same sum in another order
        torch.testing.assert_close(p.detach(), wanted[name], rtol=1e-6, atol=1e-7)
    assert len(parameter_groups(trained, 0.05, weight_decay=0.1)) == 2


def make_trainer(recipe):
    news = load_news(recipe.data, recipe.validation_fraction, recipe.seed)
    model, tokenizer, _ = _make_model(recipe, news)
    speed_up(model, "fp32")
    rows, validation = (encode(split, tokenizer, 16) for split in (news.train, news.validation))
    return Trainer(model, recipe, rows, validation, tokenizer.pad_token_id, torch.device("cpu"), "fp32")


def test_a_checkpoint_of_other_ranks_is_not_resumed(tiny_recipe, tmp_path):
    """Elsewhere the inputs, and so EVA's ranks, may come out otherwise; rank 1 would be broadcast to 2."""
    save_checkpoint(tmp_path, make_trainer(dataclasses.replace(tiny_recipe, r=1)), {})
    with pytest.raises(CheckpointError, match=r"lora_A is \(1, 32\), and that of the model \(2, 32\)"):
        load_last_checkpoint(tmp_path, make_trainer(dataclasses.replace(tiny_recipe, r=2)), {})


@pytest.mark.parametrize(
    "settings",
    [fields for name, (fields, _) in SETTINGS.items() if "," not in name]
    + [{"init_lora_weights": "eva"}, {"loraplus_lr_ratio": 16}, {}],
    ids=str,
)
def test_a_stopped_and_resumed_training_ends_in_the_same_bits(settings, tiny_recipe, tmp_path):
    recipe = dataclasses.replace(tiny_recipe, r=4, epochs=1, **settings)
    whole = make_trainer(recipe)
    for _ in whole.epochs():
        if whole.state.step == 3:
            save_checkpoint(tmp_path, whole, {})
    resumed = make_trainer(recipe)
    with torch.no_grad():  # as if the start came out otherwise, on another machine
        for layer in lora_layers(resumed.model).values():
            for key in layer.adapter_tensors:
                getattr(layer, key).add_(1)
    assert load_last_checkpoint(tmp_path, resumed, {})
    list(resumed.epochs())
    assert whole.state.step == resumed.state.step > 3
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    save_adapter(whole.model, tmp_path / "adapter", base="tiny")
    loaded, _ = load_base(recipe.model, num_labels=3)
    load_adapter(loaded, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": 1}, "use_dora: 1 is not one of False, True"),
        (
            {"init_lora_weights": "pisa"},
            "init_lora_weights: 'pisa' is not one of True, 'pissa', 'milora', 'eva'",
        ),
        ({"init_lora_weights": False}, "init_lora_weights: False"),
        ({"use_dora": True, "init_lora_weights": "pissa"}, "use_dora and init_lora_weights: .*choose one"),
        ({"use_lora_fa": True, "peft_type": "VERA"}, "use_lora_fa and peft_type: .*choose one"),
        ({"peft_type": "VERA", "use_rslora": True}, "use_rslora: not a setting of peft_type 'VERA'"),
        ({"peft_type": "VERA", "rank_pattern": {"query": 2}}, "rank_pattern: not a setting"),
        ({"projection_prng_key": 1}, "projection_prng_key: not a setting of peft_type 'LORA'"),
        ({"peft_type": "VERA", "projection_prng_key": -1}, "projection_prng_key: -1 is not a seed"),
        ({"peft_type": "VERA", "d_initial": float("nan")}, "d_initial: nan"),
        ({"peft_type": "LOHA"}, "peft_type: 'LOHA' is not one of 'LORA', 'VERA'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)
