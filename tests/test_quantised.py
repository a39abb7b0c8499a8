"""A quantised base: what holds for a model in float32 holds for the dequantised one, bit for bit.

The reference is the dense model, `dequantise`d, or NumPy. tests/test_bitsandbytes.py compares NF4's bytes.
"""

import copy
import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import content, randomise_adapter, tiny_roberta
from test_adapters import five_adapters, logits
from test_any_model import gpt2, process_group
from test_fuzz import load_damaged
from test_variant import COMPUTED, config_of, randomise
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForSequenceClassification

from bench.steps import BenchModel, memory_bytes
from lora import (
    AdapterError,
    LoraConfig,
    count_parameters,
    disabled,
    eject,
    inject,
    load_adapter,
    merge,
    merged,
    save_adapter,
)
from lora.adapted import has_adapter, lora_layers
from lora.check import check
from lora.files import CONFIG_FILE, TENSOR_FILE, _from_peft_key, _to_peft_key, saved_modules
from lora.fingerprint import difference, fingerprint
from lora.quantised import Bf16Embedding, dequantise, int8, quantise
from lora.quantised.int8 import Int8, round_rows
from lora.quantised.nf4 import BLOCK, LEVELS, NF4, absmax_levels
from lora.quantised.tensor import Bf16, QuantisedTensor
from lora.rounding import round_to
from lora.storage import read_tensors, write_tensors
from lora.variants.eva import inject_eva
from model import HEAD, speed_up
from train import evaluate, export, predict
from train.anatomy.measure import decompose_bases, measure
from train.anatomy.run import load_run
from train.config import RecipeError
from train.distributed import data_parallel
from train.job import run_job
from train.loop import Trainer
from train.playground.served import InputError, Knobs, Served
from train.runs import RunError
from train.signals import InterruptedRunError
from train.trained import load_adapters, load_trained, read_trained_adapter

__all__ = ["process_group"]  # a fixture

STORED = {"bf16": Bf16, "int8": Int8, "nf4": NF4}
storages = pytest.mark.parametrize("precision", STORED)
QUERY = "roberta.encoder.layer.0.attention.self.query"


def base(precision, **settings):
    """A tiny RoBERTa whose frozen weights are stored in `precision`."""
    model = tiny_roberta(**settings)
    quantise(model, precision, keep=HEAD)
    return model


def dense(model):
    """The same values in float32."""
    copied = copy.deepcopy(model)
    dequantise(copied)
    return copied


def dense_state(model):
    """The state of the model with dequantised weights."""
    return {name: tensor + 0 for name, tensor in model.state_dict().items()}


def matrix(rows=48, columns=80, seed=0, scale=0.02):
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def autocast(enabled):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


@pytest.fixture(scope="module", autouse=True)
def int8_products():
    """Products in int8 on every CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "has_int8_products", lambda: True)
        yield


@pytest.fixture(params=STORED)
def adapted(request, config):
    """A quantised RoBERTa with an adapter that is not fresh."""
    model = base(request.param)
    inject(model, config)
    randomise_adapter(model)
    return model


# --- what is stored -----------------------------------------------------------------------------------


@storages
def test_linears_and_embeddings_are_stored_and_the_rest_stays(precision):
    before = dict(tiny_roberta().named_parameters())
    model = base(precision)
    kinds = set()
    for name, parameter in model.named_parameters():
        assert parameter.shape == before[name].shape
        if isinstance(parameter, QuantisedTensor):
            assert type(parameter.stored) is STORED[precision]
            assert (parameter.dtype, parameter.requires_grad) == (torch.float32, False)
            kinds.add(name.rpartition(".")[0].rpartition(".")[2])
        elif "embeddings" in name and "LayerNorm" not in name:
            assert torch.equal(parameter, before[name].bfloat16())
        else:
            assert torch.equal(parameter, before[name])
    assert kinds == {"query", "key", "value", "dense"}
    assert count_parameters(model).total == count_parameters(tiny_roberta()).total
    ids = torch.tensor([[3, 4]])
    assert model.roberta.embeddings.word_embeddings(ids).dtype == torch.float32

    weights = {name: tensor.clone() for name, tensor in dense(model).named_parameters()}
    dequantise(model)
    assert not any(isinstance(p, QuantisedTensor) for p in model.parameters())
    assert not any(isinstance(m, Bf16Embedding) for m in model.modules())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    dequantise(model, torch.bfloat16)  # what is no longer quantised stays
    assert model.get_submodule(QUERY).weight.dtype == torch.float32


def test_fp32_changes_nothing():
    model, before = base("fp32"), dict(tiny_roberta().named_parameters())
    assert all(type(p) is nn.Parameter and torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_int8_equals_numpy(dtype):
    weight = matrix(seed=3).to(dtype)
    weight[5] = 0
    weight[6, :] = torch.tensor([-1.0, 1.0]).repeat(40)
    stored = Int8.quantise(weight)
    w = weight.float().numpy()
    largest = np.abs(w).max(axis=1)
    inverse = np.float32(1) / np.maximum(largest, np.float32(1e-36)) * np.float32(127)
    codes = np.rint(w * inverse[:, None]).astype(np.int8)
    assert np.array_equal(stored.codes.numpy(), codes)
    assert np.array_equal(stored.scales[largest > 0].numpy(), largest[largest > 0] / np.float32(127))
    assert np.array_equal(stored.dequantise().numpy(), codes * stored.scales.numpy()[:, None])
    assert not stored.dequantise()[5].any()
    assert set(stored.codes[6].tolist()) == {-127, 127}
    # half of a step, and the float32 roundings of scale, quotient and product
    assert (stored.dequantise() - weight.float()).abs().le(0.50001 * stored.scales[:, None]).all()


def test_an_int8_product_is_the_integers_product_scaled():
    weight = matrix(64, 96, scale=1.0)
    stored = Int8.quantise(weight)
    x = matrix(10, 96, seed=1, scale=3.0).bfloat16()
    x[2] = 0
    codes, scales = round_rows(x)
    # half of a step, and the roundings of float32
    assert (x.float() - scales[:, None] * codes).abs().le(0.50001 * scales[:, None]).all()
    exact = codes.numpy().astype(np.int64) @ stored.codes.numpy().astype(np.int64).T
    wanted = torch.from_numpy(exact).double() * scales[:, None].double() * stored.scales.double()
    bias = torch.arange(64.0).bfloat16()
    for b in (None, bias):
        out = x.new_empty(10, 64)
        stored.product(x, b, out)
        expected = wanted if b is None else wanted + b.double()
        # one rounding to bfloat16; those of float32 where the sum cancels
        torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-5)
    g = matrix(10, 64, seed=2).bfloat16()
    codes, scales = round_rows(g.float() * stored.scales)
    wanted = scales[:, None].double() * (codes.double() @ stored.codes.double())
    torch.testing.assert_close(stored.transposed_product(g).double(), wanted, rtol=2**-8, atol=0)
    # A row does not depend on the others, so neither do the texts of a batch.
    assert torch.equal(stored.transposed_product(g[3:4]), stored.transposed_product(g)[3:4])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_overflow_stays_visible_in_an_int8_product(value):
    stored, x = Int8.quantise(matrix()), torch.ones(3, 80).bfloat16()
    x[1, 7] = value
    out = x.new_empty(3, 48)
    stored.product(x, None, out)
    assert out.isfinite().all(dim=1).tolist() == [True, False, True]
    assert not out[1].isfinite().any()


@pytest.mark.parametrize("shape", [(48, 80), (5, 64), (300, 256), (64, 1)])
def test_nf4_takes_the_nearest_level_and_packs_the_first_in_the_upper_half(shape):
    weight = matrix(*shape, seed=4)
    weight.view(-1, BLOCK)[0] = 0
    stored = NF4.quantise(weight)
    blocks = weight.view(-1, BLOCK).double()
    scaled = blocks / blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-38)
    codes = torch.stack([stored.codes >> 4, stored.codes & 15], dim=1).view(-1, BLOCK)
    levels = torch.tensor(LEVELS).double()
    distance = (scaled[..., None] - levels).abs()
    chosen = distance.gather(2, codes.long()[..., None])[..., 0]
    assert (chosen <= distance.amin(2) + 1e-6).all()  # the quotient is in float32
    assert stored.shape == shape
    found = stored.dequantise()
    assert not found.view(-1, BLOCK)[0].any()
    # level · absmax, where the absmax is a level times a scale of 256 blocks, plus the mean
    scales = stored.absmax_scales.double().repeat_interleave(256)[: len(blocks)]
    absmax = absmax_levels().double()[stored.absmax_codes.long()] * scales + stored.absmax_mean.double()
    wanted = levels[codes.long()] * absmax[:, None]
    assert (found.view(-1, BLOCK) - wanted).abs().max() <= 1e-6 * wanted.abs().max()  # float32


def test_the_levels_are_what_the_papers_say():
    levels = absmax_levels()
    assert len(LEVELS) == 16
    assert len(levels) == 256
    for each in (torch.tensor(LEVELS), levels):
        assert (each.diff() > 0).all()
        assert 0 in each
        assert each[-1] == 1
    assert (LEVELS[0], float(levels.abs()[levels != 0].min())) == (-1, pytest.approx(5.5e-7))


def test_an_nf4_matrix_takes_four_bits_and_an_eighth_a_number():
    stored = NF4.quantise(matrix(768, 768))
    bits = 8 * sum(tensor.nbytes for tensor in stored.tensors().values()) / 768**2
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)  # and the mean


@storages
def test_the_memory_of_a_step_is_that_of_the_stored_tensors(precision):
    model = base(precision)
    inject(model, LoraConfig(r=4, target_modules=("query",), modules_to_save=HEAD))
    speed_up(model, "bf16")
    trained = [p for p in model.parameters() if p.requires_grad]
    ids, labels = torch.arange(3, 33).reshape(5, 6), torch.tensor([0, 1, 2, 0, 1])
    step = BenchModel("lora", model.train(), torch.optim.AdamW(trained), ids, labels, ids.device, "bf16")
    parts = memory_bytes(step)
    numbers, rows = 2 * (4 * 32 * 32 + 2 * 32 * 64), 2 * (5 * 32 + 64)
    blocks = numbers // 64
    stored = {"bf16": 2 * numbers, "int8": numbers + 4 * rows, "nf4": numbers // 2 + blocks + 8 * 12}
    embeddings = 2 * 32 * (300 + 66 + 1)
    matrices = [p for n, p in model.named_parameters() if isinstance(p, QuantisedTensor) or "embeddings" in n]
    rest = sum(p.nbytes for p in model.parameters() if all(p is not m for m in matrices))
    rest += 2 * 4 * 32  # the norm of the embeddings
    assert parts["weights"] == stored[precision] + embeddings + rest
    assert parts["weight_copies"] == 0
    assert parts["weight_casts"] == 2 * (32 * 32 + 3 * 32)  # of the head, which trains


# --- the adapter --------------------------------------------------------------------------------------


@torch.no_grad()
@storages
@pytest.mark.parametrize("variant", ["lora", *COMPUTED])
def test_a_fresh_adapter_changes_no_bit(precision, variant, input_ids):
    config = LoraConfig(r=4, modules_to_save=HEAD) if variant == "lora" else config_of(variant)
    for mixed in (False, True):
        for fast in (False, True):
            model = base(precision)
            if fast:
                speed_up(model, "bf16" if mixed else "fp32")

            def run(model=model, mixed=mixed):
                with autocast(mixed):  # each time anew, because it caches casts of what trains
                    return model(input_ids).logits

            before = run()
            inject(model, config)
            assert torch.equal(run(), before)
            randomise(model)
            assert not torch.equal(run(), before)
            with disabled(model):
                assert torch.equal(run(), before)
            eject(model)
            assert torch.equal(run(), before)


@torch.no_grad()
@storages
def test_eva_starts_from_the_inputs_of_the_quantised_model(precision, input_ids):
    model = base(precision)
    before = model(input_ids).logits
    reference = dense(model)
    for each in (model, reference):
        inject_eva(each, config_of("eva"), [{"input_ids": input_ids}])
    assert torch.equal(model(input_ids).logits, before)
    assert model.lora_config == reference.lora_config


@storages
@pytest.mark.parametrize("variant", ["lora", *COMPUTED])
@pytest.mark.parametrize("fast", [False, True])
def test_gradients_are_those_of_the_dense_model_and_no_dense_weight_is_saved(
    precision, variant, fast, input_ids
):
    model = base(precision, initializer_range=0.1)
    reference = dense(model)
    results = []
    for each in (model, reference):
        inject(each, LoraConfig(r=4, modules_to_save=HEAD) if variant == "lora" else config_of(variant))
        randomise(each)
        if fast:
            speed_up(each, "fp32")
        saved = []

        def note(tensor, saved=saved):
            if not isinstance(tensor, QuantisedTensor):
                saved.append(tuple(tensor.shape))
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            found = each(input_ids).logits
        found.square().sum().backward()
        gradients = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
        results.append([found.detach(), gradients, saved])
    (here, gradients, saved), (there, wanted, _) = results
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        # float32: sums of at most 64 terms in another order, through two layers
        assert (gradient - wanted[name]).abs().max() <= 1e-5 * wanted[name].abs().max(), name
    # The head trains, so its weight is saved, and has the shape of the encoder's squares.
    weights = [shape for shape in saved if shape in {(32, 32), (32, 64), (64, 32)}]
    assert len(weights) <= 1


@torch.no_grad()
@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_under_autocast_a_dequantised_weight_is_autocasts_own(precision, input_ids):
    model = base(precision)
    reference = dense(model)
    speed_up(model)
    speed_up(reference)
    with autocast(True):
        assert torch.equal(model(input_ids).logits, reference(input_ids).logits)


def test_under_autocast_int8_differs_by_the_rounding_of_its_inputs(input_ids):
    layer = nn.Linear(96, 64)
    layer.weight = nn.Parameter(QuantisedTensor(Int8.quantise(layer.weight.detach())), requires_grad=False)
    x = matrix(20, 96, scale=1.0).bfloat16().requires_grad_()
    g = matrix(20, 64, seed=1).bfloat16()
    with autocast(True):
        y = layer(x)
    y.backward(g)
    weight = layer.weight.double()
    step = x.detach().abs().amax(dim=1, keepdim=True).double() / 127
    exact = F.linear(x.detach().double(), weight, layer.bias.detach().double())
    # at most half a step of each input, and the roundings of products and biases to bfloat16
    assert ((y - exact).abs() <= 0.51 * step * weight.abs().sum(dim=1) + 2**-7 * (exact.abs() + 1)).all()
    step = (g.double() * layer.weight.stored.scales).abs().amax(dim=1, keepdim=True) / 127
    bound = 0.51 * step * layer.weight.stored.codes.double().abs().sum(dim=0)
    exact = g.double() @ weight
    assert ((x.grad - exact).abs() <= bound + 2**-7 * exact.abs()).all()


@storages
def test_a_second_derivative_is_that_of_the_dense_matrix(precision):
    weight = QuantisedTensor(STORED[precision].quantise(matrix(32, 32)))
    x = matrix(5, 32, seed=1, scale=1.0).requires_grad_()
    found = []
    for each in (weight, weight.stored.dequantise()):
        (first,) = torch.autograd.grad(F.linear(x, each).pow(3).sum(), x, create_graph=True)
        found += torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)  # float32
    with autocast(True):
        (first,) = torch.autograd.grad(F.linear(x, weight).float().pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert (second - found[0]).norm() <= 0.05 * found[0].norm()  # bfloat16, and int8 in forward


@torch.no_grad()
def test_merging_is_refused_and_changes_nothing(adapted, input_ids):
    before = adapted(input_ids).logits
    layer = adapted.get_submodule(QUERY)

    def enter():
        with merged(adapted):
            pass

    for action in (lambda: merge(adapted), enter, lambda: eject(adapted, merge=True)):
        with pytest.raises(RuntimeError, match="the weight is stored as .*: rounding W . ΔW .* eject"):
            action()
    with pytest.raises(RuntimeError, match="a quantised weight cannot be written to; to merge, eject"):
        layer.merge()
    assert not any(each.merged for each in lora_layers(adapted).values())
    assert torch.equal(adapted(input_ids).logits, before)


@torch.no_grad()
@storages
@pytest.mark.parametrize("variant", ["lora", *COMPUTED])
def test_ejecting_with_a_dtype_rounds_the_sum_once(precision, variant, input_ids):
    config = LoraConfig(r=4, modules_to_save=HEAD) if variant == "lora" else config_of(variant)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = base(precision)
        inject(model, config)
        randomise(model)
        layers = lora_layers(model)
        wanted = {name: round_to(layer.merged_weight(), dtype) for name, layer in layers.items()}
        if variant == "lora":
            for name, layer in layers.items():
                exact = layer.weight.stored.dequantise().double() + layer.delta_weight()
                assert torch.equal(wanted[name], round_to(exact, dtype))
        before = model(input_ids).logits
        eject(model, merge=True, dtype=dtype)
        assert not has_adapter(model)
        for name, weight in wanted.items():
            found = model.get_submodule(name).weight
            assert type(found) is nn.Parameter
            assert not found.requires_grad
            assert torch.equal(found, weight)
        if dtype == torch.float32:  # roundings of a model of order 1
            assert (model(input_ids).logits - before).abs().max() < 1e-4


@torch.no_grad()
def test_ejecting_a_conv1d_with_a_dtype_keeps_its_layout(input_ids):
    model = gpt2()
    inject(model, LoraConfig(r=4, target_modules=("c_attn",), modules_to_save=()))
    randomise_adapter(model)
    before = model(input_ids).logits
    eject(model, merge=True, dtype=torch.float32)
    assert (model(input_ids).logits - before).abs().max() < 1e-4  # float32


@torch.no_grad()
def test_an_ejection_that_fails_changes_nothing(adapted, input_ids):
    before = adapted(input_ids).logits
    with pytest.raises(ValueError, match="dtype: torch.float32 is for merge=True"):
        eject(adapted, dtype=torch.float32)
    with pytest.raises(ValueError, match="dtype: torch.int8 is not float32, bfloat16"):
        eject(adapted, merge=True, dtype=torch.int8)
    *_, (name, layer) = lora_layers(adapted).items()
    kept = layer.lora_B.clone()
    layer.lora_B[3, 0] = float("inf")
    with pytest.raises(ValueError, match=f"{name}: .*not finite"):
        eject(adapted, merge=True, dtype=torch.float32)
    layer.lora_B.copy_(kept)
    assert torch.equal(adapted(input_ids).logits, before)
    assert len(lora_layers(adapted)) == 4


@torch.no_grad()
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_each_row_of_a_mixed_batch_is_that_of_its_adapter_alone(adapted, mixed, fast):
    model = copy.deepcopy(adapted)
    eject(model)
    if fast:
        speed_up(model)
    adapters = five_adapters(model)
    ids = torch.randint(3, 300, (7, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = [*adapters.names, None, "plain"]
    precision = "bf16" if mixed else "fp32"
    with adapters.rows(names) as rows:
        found = logits(rows, batch, precision)
    for row, name in enumerate(names):
        adapters.use(name)
        alone = logits(model, batch, precision)[row]
        assert torch.equal(found[row, : len(alone)], alone)


@storages
def test_several_processes_get_the_gradients_of_one(precision, input_ids, config, process_group):
    model = base(precision)
    inject(model, config)
    randomise_adapter(model)
    found = []
    for forward in (model, data_parallel(model)):
        model.zero_grad()
        forward(input_ids).logits.square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


# --- tensors and files --------------------------------------------------------------------------------


@torch.no_grad()
def test_copies_and_moves_keep_what_is_stored_and_writes_are_errors(adapted, input_ids):
    before = adapted(input_ids).logits
    weight = adapted.get_submodule(QUERY).weight
    copied = copy.deepcopy(adapted)
    other = copied.get_submodule(QUERY).weight
    assert isinstance(other, nn.Parameter)
    pairs = zip(weight.stored.tensors().values(), other.stored.tensors().values(), strict=True)
    for here, there in pairs:
        assert torch.equal(here, there)
        assert here.data_ptr() != there.data_ptr()
    assert torch.equal(copied.to("cpu")(input_ids).logits, before)
    moved = copied.to("meta").get_submodule(QUERY).weight
    assert {tensor.device.type for tensor in moved.stored.tensors().values()} == {"meta"}
    assert isinstance(adapted.state_dict()[f"{QUERY}.weight"], QuantisedTensor)
    weight.data = QuantisedTensor(other.stored)  # what `to` does to a Parameter on another device
    assert weight.stored is other.stored
    weight.bfloat16().zero_()  # a copy, although bfloat16 is what bf16 stores
    assert torch.equal(adapted(input_ids).logits, before)
    model = base(weight.stored.name, seed=5)
    model.get_submodule(QUERY).weight.data.copy_(weight)
    assert torch.equal(dense_state(model)[f"{QUERY}.weight"], dense_state(adapted)[f"{QUERY}.weight"])

    floats = torch.ones(32, 32)
    for write in (
        weight.zero_, lambda: weight.add_(1), lambda: weight.copy_(floats),
        lambda: weight.__setitem__(0, 0), lambda: torch._foreach_mul_([floats, weight], 0.0),
        lambda: torch.mul(floats, 2, out=weight),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="a quantised weight cannot be written to"):
            write()
    for write in (
        copy.deepcopy(adapted).half,
        copy.deepcopy(adapted).bfloat16,
        lambda: setattr(weight, "data", floats),
    ):
        with pytest.raises(TypeError, match=r"has no other dtype; call lora.quantised.dequantise"):
            write()
    with pytest.raises(TypeError, match="shared memory"):
        adapted.share_memory()

    model = copy.deepcopy(adapted)
    randomise_adapter(model, seed=1)
    model.load_state_dict(adapted.state_dict())
    assert torch.equal(model(input_ids).logits, before)
    other = model.get_submodule(QUERY).weight
    assert weight.stored.tensors().keys() == other.stored.tensors().keys()
    for here, there in zip(weight.stored.tensors().values(), other.stored.tensors().values(), strict=True):
        assert here.data_ptr() != there.data_ptr()
    with pytest.raises(RuntimeError, match="a quantised weight cannot be written to"):
        model.load_state_dict(dense_state(adapted))
    assert torch.equal(adapted(input_ids).logits, before)


@storages
def test_what_a_dense_layer_refuses_is_refused(precision):
    layer = nn.Linear(64, 32)
    layer.weight = nn.Parameter(QuantisedTensor(STORED[precision].quantise(matrix(32, 64))), False)
    with pytest.raises(RuntimeError, match=r"needs floating-point inputs, and these are torch.int64"):
        layer(torch.ones(2, 64, dtype=torch.long))
    y = layer(torch.ones(2, 64, requires_grad=True))
    layer.load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@storages
def test_bias_empty_batch_and_torch_func_are_as_with_the_dense_matrix(precision):
    weight = QuantisedTensor(STORED[precision].quantise(matrix(64, 32)))
    exact = weight.stored.dequantise()
    bias = torch.ones(64, requires_grad=True)
    x = matrix(6, 32, seed=1).view(2, 3, 32).requires_grad_()
    for each in (x, x[:0]):
        g = torch.randn(len(each), 3, 64)
        here, there = (
            torch.autograd.grad(F.linear(input=each, weight=w, bias=bias), (each, bias), g)
            for w in (weight, exact)
        )
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6)  # float32
    torch.testing.assert_close(F.linear(weight, matrix(3, 32)), F.linear(exact, matrix(3, 32)))

    def loss(x, w):
        return F.linear(x, w, bias).square().sum()

    for transform in (torch.func.grad(loss), torch.func.vmap(loss, in_dims=(0, None))):
        torch.testing.assert_close(transform(x, weight), transform(x, exact), rtol=1e-5, atol=1e-5)


def test_nf4_does_not_depend_on_the_default_dtype_or_on_subnormal_numbers():
    weight = matrix(64, 64)
    weight[3] = 0
    wanted = NF4.quantise(weight)
    absmax_levels.cache_clear()
    torch.set_default_dtype(torch.float64)
    torch.set_flush_denormal(True)
    try:
        found = NF4.quantise(weight)
        assert torch.equal(found.dequantise(), wanted.dequantise())
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_flush_denormal(False)
    for name, tensor in wanted.tensors().items():
        assert torch.equal(tensor, found.tensors()[name])


def test_a_cpu_without_int8_products_dequantises(monkeypatch):
    monkeypatch.setattr(int8, "has_int8_products", lambda: False)
    stored = Int8.quantise(matrix(64, 96))
    x, g = matrix(10, 96, seed=1).bfloat16(), matrix(10, 64, seed=2).bfloat16()
    out, weight = x.new_empty(10, 64), stored.dequantise(torch.bfloat16)
    stored.product(x, None, out)
    assert torch.equal(out, x @ weight.t())
    assert torch.equal(stored.transposed_product(g), g @ weight)


def test_sums_that_int32_cannot_hold_are_computed_in_bfloat16():
    ones = torch.ones(1, 140_000)
    out = ones.new_empty(1, 1).bfloat16()
    Int8.quantise(ones).product(ones.bfloat16(), None, out)
    assert out.item() == pytest.approx(140_000, rel=2**-8)


@storages
@pytest.mark.parametrize("read", [lambda x, w: F.linear(x, w), lambda x, w: x @ w.t()])
def test_the_check_of_a_model_finds_a_module_that_reads_a_stored_weight(precision, read):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return read(self.down(self.up(x)), dict(self.named_modules())["up"].weight)

    model = Reader()
    quantise(model, precision)
    inject(model, LoraConfig(r=4, target_modules=("up", "down"), modules_to_save=()))
    problems = check(model, {"x": torch.randn(3, 64)}).problems
    assert any("up" in problem and "read" in problem for problem in problems), problems


@storages
def test_hooks_for_saved_tensors_may_return_a_dense_weight(precision):
    stored = STORED[precision].quantise(matrix(32, 64))
    x = matrix(5, 64, seed=1).requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        y = F.linear(x, QuantisedTensor(stored))
    (found,) = torch.autograd.grad(y.sum(), x)
    with saved_tensors_hooks(lambda t: t + 0, lambda t: t):
        y = F.linear(x, QuantisedTensor(stored))
    (dense,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, dense)


def test_the_check_of_a_model_accepts_a_quantised_base(adapted, input_ids):
    report = check(adapted, {"input_ids": input_ids})
    assert report
    assert "not compared" in str(report)


@torch.no_grad()
def test_an_adapter_loads_onto_its_own_base_and_no_other(adapted, input_ids, tmp_path):
    precision = adapted.get_submodule(QUERY).weight.stored.name
    before = adapted(input_ids).logits
    save_adapter(adapted, tmp_path / "a", base="tiny")
    loaded = base(precision)
    load_adapter(loaded, tmp_path / "a")
    assert torch.equal(loaded(input_ids).logits, before)
    save_adapter(loaded, tmp_path / "b", base="tiny")
    for name in (CONFIG_FILE, TENSOR_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for other in {"fp32", *STORED} - {precision}:
        model = base(other)
        names = f"stored as {precision}, and those of this model are {other.replace('fp32', 'float32')}"
        with pytest.raises(AdapterError, match=names):
            load_adapter(model, tmp_path / "a")
        assert not has_adapter(model)
        load_adapter(model, tmp_path / "a", check_base=False)
    equal = dense(base(precision))  # the same values, stored in float32
    load_adapter(equal, tmp_path / "a")
    with pytest.raises(AdapterError, match="with other weights"):
        load_adapter(base(precision, seed=1), tmp_path / "a")
    fresh = tiny_roberta()
    inject(fresh, adapted.lora_config)
    expected = fingerprint(fresh, lora_layers(fresh), saved_modules(fresh, fresh.lora_config))
    del expected["stored"]  # as before the entry existed
    here = lora_layers(adapted), saved_modules(adapted, adapted.lora_config)
    assert f"stored as float32, and those of this model are {precision}" in difference(
        expected, adapted, *here
    )
    save_adapter(equal, tmp_path / "c", base="tiny")  # and back
    load_adapter(base(precision), tmp_path / "c")


@torch.no_grad()
def test_damaged_files_are_caught_or_harmless(adapted, input_ids, tmp_path):
    intact, folder = tmp_path / "intact", tmp_path / "damaged"
    save_adapter(adapted, intact, base="tiny")
    precision, wanted = adapted.get_submodule(QUERY).weight.stored.name, adapted(input_ids).logits
    load_damaged(intact, folder, lambda: base(precision), wanted, input_ids, 20)


# --- what is refused ----------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.up, self.out = nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 64)
        self.out.weight = self.words.weight

    def forward(self, ids):
        return self.out(self.up(self.words(ids)))


@storages
def test_a_weight_that_two_modules_share_stays(precision):
    model = Tied()
    weight = model.words.weight
    quantise(model, precision)
    assert model.out.weight is model.words.weight is weight
    assert type(model.words) is nn.Embedding
    assert isinstance(model.up.weight, QuantisedTensor)
    inject(model, LoraConfig(r=4, target_modules=("up",), modules_to_save=()))
    model(torch.tensor([1, 2])).sum().backward()
    assert model.up.lora_B.grad is not None


@pytest.mark.parametrize("precision", ["int8", "nf4"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_weight_that_is_not_finite_is_refused_by_name(precision, value):
    model = tiny_roberta()
    name = "roberta.encoder.layer.1.output.dense"
    with torch.no_grad():
        model.get_submodule(name).weight[2, 3] = value
    with pytest.raises(ValueError, match=f"{name}: a value is not finite"):
        quantise(model, precision, keep=HEAD)
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())


@storages
def test_a_weight_of_other_strides_is_stored_like_any_other(precision, config, tmp_path):
    model = tiny_roberta()
    weight = model.get_submodule(QUERY).weight.detach()
    model.get_submodule(QUERY).weight = nn.Parameter(weight.t().contiguous().t())
    quantise(model, precision, keep=HEAD)
    inject(model, config)
    save_adapter(model, tmp_path, base="tiny")
    load_adapter(base(precision), tmp_path)


def test_a_module_is_kept_under_any_of_its_names():
    model = nn.ModuleDict({"up": nn.Linear(64, 64), "down": nn.Linear(64, 64)})
    model["other"] = model["up"]
    quantise(model, "nf4", keep=("other",))
    kept, stored = model["up"].weight, model["down"].weight
    assert type(kept.data) is torch.Tensor
    assert isinstance(stored, QuantisedTensor)


def test_what_cannot_be_quantised_is_refused_and_the_model_stays(model, config):
    with pytest.raises(ValueError, match="the model has no linear layer or embedding to store"):
        quantise(nn.LayerNorm(64), "nf4")
    with pytest.raises(TypeError, match="finds no Linear: the model is a Linear"):
        quantise(nn.Linear(64, 64), "nf4")
    with pytest.raises(ValueError, match="classifier.out_proj: .3, 32.: .* is not a multiple of 64"):
        quantise(model, "nf4")
    with pytest.raises(ValueError, match="precision: 'int4' is not one of fp32, bf16, int8, nf4"):
        quantise(model, "int4")
    with pytest.raises(ValueError, match="keep: 'clasifier' matches no module; there are roberta, "):
        quantise(model, "int8", keep=("clasifier",))
    with pytest.raises(ValueError, match="word_embeddings is torch.bfloat16; quantise a float32 model"):
        quantise(copy.deepcopy(model).bfloat16(), "bf16")
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    transformer = gpt2()
    with pytest.raises(TypeError, match="c_attn is a Conv1D; only an nn.Linear can be quantised"):
        quantise(transformer, "int8")
    assert all(type(parameter) is nn.Parameter for parameter in transformer.parameters())
    quantise(model, "int8")
    with pytest.raises(RuntimeError, match="query is quantised already"):
        quantise(model, "nf4")
    with pytest.raises(TypeError, match="classifier.dense.weight is stored as .*; name it in keep"):
        inject(model, config)
    with pytest.raises(TypeError, match="word_embeddings.weight is stored as bf16; name it in keep"):
        inject(model, LoraConfig(r=4, modules_to_save=("word_embeddings",)))
    inject(model, LoraConfig(r=4, modules_to_save=()))
    for change in (lambda: quantise(model, "int8"), lambda: dequantise(model)):
        with pytest.raises(RuntimeError, match="the model has an adapter"):
            change()


@pytest.mark.parametrize("fast", [False, True])
def test_a_quantised_weight_cannot_train(input_ids, fast):
    model = base("int8")
    if fast:
        speed_up(model)
    model.get_submodule(QUERY).weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="a quantised weight cannot train; call .*dequantise"):
        model(input_ids)


# --- runs ---------------------------------------------------------------------------------------------


def settings_of(recipe, precision, **settings):
    """Int8 under autocast, so that its products are in int8."""
    fields = {"epochs": 2, "checkpoint_every_steps": 3, "log_every_steps": 2, **settings}
    compute = "bf16" if precision == "int8" else "fp32"
    return dataclasses.replace(recipe, base_precision=precision, precision=compute, **fields)


@pytest.fixture(scope="module", params=STORED)
def run(request, tiny_recipe, tmp_path_factory):
    """A finished run on a quantised base: its recipe, folder and summary."""
    recipe = settings_of(tiny_recipe, request.param)
    folder = tmp_path_factory.mktemp("quantised") / "run"
    return recipe, folder, run_job("tiny", recipe, folder).summary


def test_a_stopped_and_resumed_run_is_the_run_that_was_not(run, tmp_path, monkeypatch):
    recipe, folder, _ = run
    step, steps = Trainer._step, 0

    def stopping(trainer, group):
        nonlocal steps
        steps += 1
        if steps == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, group)

    monkeypatch.setattr(Trainer, "_step", stopping)
    with pytest.raises(InterruptedRunError):
        run_job("tiny", recipe, tmp_path / "run")
    monkeypatch.undo()
    run_job("tiny", recipe, tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == content(folder)


def test_evaluate_predict_and_export_use_the_base_that_was_trained_on(run, tmp_path, capsys):
    recipe, folder, summary = run
    trained = load_trained(folder)
    weight = trained.model.get_submodule(QUERY).weight
    assert weight.stored.name == recipe.base_precision
    for path in (folder, folder / "adapter"):
        assert evaluate.main([str(path), "--data", recipe.data, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["confusion_matrix"] == summary["test_confusion_matrix"]
    assert predict.main([str(folder), "the team lost the final match"]) == 0
    assert capsys.readouterr().out.split("\t")[0] in {"money", "sport", "tech"}
    studied = load_run(folder)
    measured = measure(studied, decompose_bases(studied))[QUERY]
    dequantised = weight.stored.dequantise().norm()
    # float64 in the measure, float32 here
    ratio = trained.model.get_submodule(QUERY).delta_weight().norm() / dequantised
    assert measured["delta_over_weight"] == pytest.approx(float(ratio), rel=1e-5)
    served = Served([folder])
    assert sum(served.classify("run", "a match", Knobs(-1, 1))["knobs"]) == pytest.approx(1)
    with pytest.raises(InputError, match="the weight is stored as"):
        served.merge_and_unmerge("run", "a match")
    other = read_trained_adapter(folder)
    fp32 = dataclasses.replace(other, content=dataclasses.replace(other.content, metadata={}))
    with pytest.raises(RunError, match=f"its base is {recipe.model}.* in {recipe.base_precision}, and"):
        load_adapters({"a": fp32, "b": other})

    assert export.main([str(folder), str(tmp_path / "out")]) == 0
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    eject(trained.model, merge=True, dtype=torch.float32)
    dequantise(trained.model)
    ids = torch.arange(3, 19).reshape(2, 8)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, trained.model(ids).logits)
    assert all(p.dtype == torch.float32 for p in plain.parameters())


@pytest.mark.parametrize("note", ["nf5", 4, None])
def test_a_damaged_note_of_the_storage_is_an_error(run, tmp_path, note):
    recipe, folder, _ = run
    (tmp_path / CONFIG_FILE).write_bytes((folder / "adapter" / CONFIG_FILE).read_bytes())
    tensors, found = read_tensors(folder / "adapter" / TENSOR_FILE, "lora", _from_peft_key)
    assert found["metadata"]["base_precision"] == recipe.base_precision
    found["metadata"]["base_precision"] = note
    write_tensors(tmp_path / TENSOR_FILE, tensors, "lora", found, _to_peft_key)
    with pytest.raises(RunError, match="damaged: base_precision in its note is"):
        load_trained(tmp_path)


@storages
def test_the_head_alone_trains_and_loads_on_a_quantised_base(precision, tiny_recipe, tmp_path):
    recipe = settings_of(tiny_recipe, precision, method="head", epochs=1, max_train_examples=8)
    summary = run_job("tiny", recipe, tmp_path / "run").summary
    assert isinstance(load_trained(tmp_path / "run").model.get_submodule(QUERY).weight, QuantisedTensor)
    assert evaluate.evaluate(tmp_path / "run", None)["scores"].accuracy == summary["test_accuracy"]


def test_a_base_that_does_not_fit_is_an_error_without_traceback(tiny_recipe, tmp_path):
    odd = shutil.copytree(tiny_recipe.model, tmp_path / "odd")
    model = AutoModelForSequenceClassification.from_pretrained(odd)
    model.get_submodule(QUERY).weight.data[0, 0] = float("inf")
    model.save_pretrained(odd)
    recipe = dataclasses.replace(tiny_recipe, model=str(odd), base_precision="nf4")
    with pytest.raises(RecipeError, match=f"base_precision: {QUERY}: a value is not finite"):
        run_job("tiny", recipe, tmp_path / "run")


def test_a_base_that_trains_cannot_be_quantised(tiny_recipe):
    with pytest.raises(RecipeError, match="base_precision: 'nf4' is for a frozen base"):
        dataclasses.replace(tiny_recipe, base_precision="nf4", method="full")
    with pytest.raises(RecipeError, match="base_precision"):
        dataclasses.replace(tiny_recipe, base_precision="nf5")
