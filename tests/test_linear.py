"""LoRALinear: h = W·x + b + (α/r)·B·A·x, and nothing else."""

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise_adapter, tiny_roberta
from torch import nn

from lora import LoraConfig, LoRALinear, inject
from lora.adapted import lora_layers


def make_layer(dtype: torch.dtype = torch.float32, **settings: object) -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(12, 20).to(dtype), **{"r": 3, "lora_alpha": 6, **settings})  # type: ignore[arg-type]
    nn.init.normal_(layer.lora_B)
    return layer


def test_forward_is_the_formula():
    layer = make_layer(torch.float64)
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    A, B, W, b = layer.lora_A, layer.lora_B, layer.weight, layer.bias
    expected = x @ W.T + b + (6 / 3) * (x @ A.T @ B.T)
    assert (layer(x) - x @ W.T - b).abs().max() > 0.1  # the adapter has an effect
    # 12 + 3 + 3 float64 operations an element, values of order 10
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)


def test_delta_weight_is_scaling_times_B_times_A_in_float64():
    layer = make_layer(torch.bfloat16)
    delta = layer.delta_weight()
    assert delta.dtype == torch.float64
    assert delta.shape == layer.weight.shape
    torch.testing.assert_close(delta, 2.0 * layer.lora_B.double() @ layer.lora_A.double(), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 16 / 4), (True, 16 / 2)])
def test_scaling_is_alpha_over_r_or_over_its_root(use_rslora, scaling):
    assert LoRALinear(nn.Linear(8, 8), r=4, lora_alpha=16, use_rslora=use_rslora).scaling == scaling


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit(dtype):
    linear = nn.Linear(16, 24).to(dtype)
    x = torch.randn(7, 16).to(dtype)
    before = linear(x)
    layer = LoRALinear(linear, r=4, lora_alpha=8, lora_dropout=0.5).eval()
    assert torch.equal(layer(x), before)
    assert layer(x).dtype == dtype


def test_it_is_the_same_linear_with_two_more_tensors():
    linear = nn.Linear(8, 4)
    layer = LoRALinear(linear, r=2, lora_alpha=2)
    assert isinstance(layer, nn.Linear)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    assert layer.lora_A.shape == (2, 8)
    assert layer.lora_B.shape == (4, 2)


def test_adapters_are_float32_on_a_16_bit_layer():
    layer = make_layer(torch.bfloat16)
    assert {layer.lora_A.dtype, layer.lora_B.dtype} == {torch.float32}
    assert layer(torch.randn(2, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_layer_without_bias_works():
    layer = LoRALinear(nn.Linear(8, 4, bias=False), r=2, lora_alpha=2)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(3, 8)
    assert layer.bias is None
    torch.testing.assert_close(layer(x), x @ (layer.weight + layer.lora_B @ layer.lora_A).T)


def test_dropout_acts_on_the_adapter_alone_and_in_training_alone():
    layer = make_layer(lora_dropout=0.5)
    x = torch.randn(6, 12)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    torch.manual_seed(3)
    delta = layer.train()(x) - base
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    # float32 sums of some 20 terms of order 10, subtracted from each other
    torch.testing.assert_close(
        delta, layer.scaling * dropped @ layer.lora_A.T @ layer.lora_B.T, rtol=0, atol=1e-4
    )
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_at_the_start_B_learns_and_A_does_not():
    """∂L/∂A carries a factor B, which is zero; ∂L/∂B carries A·x, which is not."""
    layer = LoRALinear(nn.Linear(8, 4), r=2, lora_alpha=2)
    layer(torch.randn(3, 8)).square().sum().backward()
    assert layer.lora_A.grad.abs().max() == 0
    assert layer.lora_B.grad.abs().max() > 0


@pytest.mark.parametrize("r", [0, -1, 1.5, "8", True])
def test_a_rank_that_is_none_is_refused_by_name(r):
    with pytest.raises((TypeError, ValueError), match="^r: "):
        LoRALinear(nn.Linear(8, 4), r=r, lora_alpha=2)


@pytest.mark.parametrize("alpha", [0, -2, float("nan"), float("inf"), "16"])
def test_an_alpha_that_is_none_is_refused_by_name(alpha):
    with pytest.raises((TypeError, ValueError), match="^lora_alpha: "):
        LoRALinear(nn.Linear(8, 4), r=2, lora_alpha=alpha)


@pytest.mark.parametrize("p", [-0.1, 1, 1.5, float("nan"), "0.1"])
def test_a_dropout_that_is_none_is_refused_by_name(p):
    with pytest.raises((TypeError, ValueError), match="^lora_dropout: "):
        LoRALinear(nn.Linear(8, 4), r=2, lora_alpha=2, lora_dropout=p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_an_injected_model_executes_the_printed_formula(dtype, autocast):
    """Bit for bit, with dropout under a fixed seed, in every adapted layer of a model in training mode."""
    model = tiny_roberta().to(dtype)
    inject(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, modules_to_save=("classifier",)))
    randomise_adapter(model)
    compared = []

    def compare(layer, inputs, h):
        torch.set_rng_state(states.pop())
        (x,) = inputs
        wanted = F.linear(x, layer.weight, layer.bias)
        x = F.dropout(x.to(layer.lora_A.dtype), layer.lora_dropout, layer.training)
        wanted = (wanted + layer.scaling * F.linear(F.linear(x, layer.lora_A), layer.lora_B)).to(wanted.dtype)
        compared.append(torch.equal(h, wanted))

    states = []
    for layer in lora_layers(model).values():
        layer.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
        layer.register_forward_hook(compare)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        model.train()(torch.arange(3, 33).reshape(3, 10))
    assert compared == [True] * 4


def test_a_layer_made_by_itself_freezes_the_base():
    linear = nn.Linear(8, 4)
    layer = LoRALinear(linear, r=2, lora_alpha=2)
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    assert not linear.weight.requires_grad


def test_print_shows_the_adapter_and_its_state():
    layer = LoRALinear(nn.Linear(8, 4), r=2, lora_alpha=16, lora_dropout=0.1)
    shown = "in_features=8, out_features=4, bias=True, r=2, lora_alpha=16, lora_dropout=0.1"
    assert str(layer) == f"LoRALinear({shown}, merged=False, enabled=True)"
    layer.merge()
    assert "merged=True" in str(layer)
