"""The fast layers against their reference classes: the same values and gradients, less memory."""

import copy
import math
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import copy_bytes, randomise_adapter, tiny_roberta
from torch import nn
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import RobertaForTokenClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lora import LoraConfig, LoRALinear, eject, inject, merge, unmerge
from lora.adapted import lora_layers
from lora.adapters import Adapters
from lora.fast import FastLinear, FastLoRALinear, fuse
from lora.fast.dropout import _LOW_15, _mix, draw_keep, pack, unpack, zero_dropped
from lora.fast.function import cast_shared, lora_linear
from model import speed_up
from model.fast import FastDropout, fast_attention
from train.hardware import autocast

CPU = torch.device("cpu")
# A statistic further from its mean than this many standard deviations comes once in 1.7 million runs.
FALSE_ALARM_SIGMAS = 5


def make_layer(dtype=torch.float32, in_features=12, out_features=20, r=3, p=0.0, bias=True) -> LoRALinear:
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=bias).to(dtype)
    layer = LoRALinear(linear, r=r, lora_alpha=2 * r, lora_dropout=p)
    nn.init.normal_(layer.lora_B)
    fuse(layer)
    assert type(layer) is FastLoRALinear
    return layer


def reference(layer: FastLoRALinear) -> LoRALinear:
    """The same layer, computed by the formula."""
    copied = copy.deepcopy(layer)
    copied.__class__ = LoRALinear
    return copied


# --- the fused LoRA function -------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_in_float64(p, bias):
    layer = make_layer(torch.float64, p=p, bias=bias)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)

    def function(x, A, B):
        torch.manual_seed(1)  # the same mask each time
        return lora_linear(x, layer.weight, layer.bias, A, B, layer.scaling, p)

    assert gradcheck(function, (x, layer.lora_A, layer.lora_B))


@pytest.mark.parametrize(
    "shape", [(12,), (7, 12), (2, 5, 12), (2, 3, 2, 12), (0, 12), (3, 0, 12), (0, 5, 12)]
)
@pytest.mark.parametrize(("out_features", "r"), [(20, 3), (1, 1), (12, 40)])
def test_values_and_gradients_are_those_of_the_formula(shape, out_features, r):
    fast = make_layer(out_features=out_features, r=r)
    results = []
    for layer in (fast, reference(fast)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2), requires_grad=True)
        h = layer(x)
        h.square().sum().backward()
        results.append((h.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad))
    for fused, plain in zip(*results, strict=True):
        assert fused.shape == plain.shape
        # float32: sums of at most 40 terms, 2⁻²⁴ each, on values of order 10 to 1,000
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-3)


def test_forward_is_fused_in_the_fast_class_and_only_for_a_frozen_base():
    layer = make_layer()
    x = torch.randn(3, 12)
    assert "_LoRALinear" in layer(x).grad_fn.name()
    assert "_LoRALinear" not in reference(layer)(x).grad_fn.name()
    layer.weight.requires_grad_(True)  # a trainable base needs a gradient that the fused function omits
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_backward_uses_the_mask_that_forward_used():
    layer = make_layer(in_features=64, p=0.5).train()
    x = torch.ones(8, 64, requires_grad=True)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    torch.manual_seed(4)
    h = layer(x)
    h.backward(torch.ones_like(h))
    torch.manual_seed(4)
    mask = draw_keep(x.shape, 0.5, CPU) != 0
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(x.grad != 0, mask)
    expected = 2.0 * layer.scaling * (mask.float() @ layer.lora_A.T @ layer.lora_B.T)  # 2 = 1 / (1 - p)
    torch.testing.assert_close(h.detach(), expected, rtol=1e-5, atol=1e-4)  # float32 sums of 64 terms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_agrees_with_float32_to_its_own_precision(dtype):
    layer = make_layer(in_features=64, out_features=32, r=4)
    x = torch.randn(16, 64)
    x32, x16 = x.clone().requires_grad_(), x.clone().requires_grad_()
    h32 = layer(x32)
    h32.sum().backward()
    grad32 = layer.lora_A.grad.clone()
    layer.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        h16 = layer(x16)
    assert h16.dtype == dtype
    h16.float().sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == x16.grad.dtype == torch.float32
    unit = torch.finfo(dtype).eps
    # some ten roundings to 16 bits, each half a unit of the largest value that meets it
    for got, wanted in ((h16.float(), h32), (x16.grad, x32.grad), (layer.lora_A.grad, grad32)):
        assert (got - wanted).abs().max() <= 8 * unit * wanted.abs().max()


@pytest.mark.parametrize("shape", [(12,), (7, 12), (2, 5, 12)])
def test_outputs_may_be_written_to_as_any_linears(shape):
    layer, x, qkv = make_layer(), torch.randn(shape), heads()
    for in_place, pure in ((F.relu_, F.relu), (lambda h: h.mul_(2), lambda h: h * 2)):
        for outputs, inputs in (
            (lambda: layer(x), (layer.lora_A, layer.lora_B)),
            (lambda: fast_attention(bidirectional(), *qkv, None)[0], qkv),
        ):
            found, wanted = (
                torch.autograd.grad(change(outputs()).sum(), inputs) for change in (in_place, pure)
            )
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_backward_inside_autocast_computes_in_forwards_dtype():
    layer, (q, k, v) = make_layer(p=0.5), heads()
    x = torch.randn(3, 12, requires_grad=True)
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(0)
        loss = layer(x).sum() + fast_attention(bidirectional(), q, k, v, None, dropout=0.5)[0].sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(loss, (x, layer.lora_A, layer.lora_B, q, k, v)))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_float64_and_the_meta_device_are_as_a_linear_has_them():
    layer = make_layer(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(3, 12, dtype=torch.float64)).dtype == torch.float64
    assert make_layer().to("meta")(torch.randn(3, 12, device="meta")).shape == (3, 20)


def test_the_input_gets_no_gradient_where_nobody_needs_one():
    layer = make_layer()
    x = torch.randn(3, 12)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.weight.grad is None


def test_a_second_derivative_is_an_error_that_names_the_class_that_has_one():
    layer = make_layer()
    x = torch.randn(3, 12, requires_grad=True)
    with pytest.raises(RuntimeError, match="LoRALinear has"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (grad,) = torch.autograd.grad(reference(layer)(x).square().sum(), x, create_graph=True)
    torch.autograd.grad(grad.sum(), x)


def test_torch_func_and_torch_compile_use_the_formula():
    layer = make_layer()
    x = torch.randn(3, 12)
    parameters = dict(layer.named_parameters())
    grads = torch.func.grad(lambda params: torch.func.functional_call(layer, params, x).sum())(parameters)
    layer(x).sum().backward()
    torch.testing.assert_close(grads["lora_B"], layer.lora_B.grad, rtol=1e-5, atol=1e-5)  # float32 sums
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


def saved_bytes(function, ignore=()):
    """Bytes of the storages that autograd keeps for backward, each once, those of `ignore` left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in ignore}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too: no address is used twice
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        function()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("frozen_A", [False, True])
def test_query_and_value_keep_the_input_once_the_thin_product_and_a_bit_an_element(p, frozen_A):
    rows, width, r = 64, 96, 4
    layers = [make_layer(in_features=width, out_features=width, r=r, p=p).train() for _ in range(2)]
    for layer in layers:
        layer.lora_A.requires_grad_(not frozen_A)
    x = torch.randn(rows, width, requires_grad=True)
    weights = [parameter for layer in layers for parameter in layer.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = saved_bytes(lambda: [layer(x) for layer in layers], weights)
    mask = rows * width // 8 if p else 0
    input_once = 0 if frozen_A else 2 * rows * width  # only the gradient of A needs it
    assert kept == input_once + 2 * (2 * rows * r + mask)


class CountedProducts(TorchDispatchMode):
    """Counts the batched products of B·A·x, which nothing else in RoBERTa computes with baddbmm."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.baddbmm_.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("length", [3, 10])
def test_rows_of_adapters_of_one_rank_are_computed_together_and_as_each_alone(precision, length):
    """The 4 layers of an adapter of rank 4 are rowwise for 10 tokens a row, not for 3."""
    model = tiny_roberta()
    speed_up(model, precision)
    adapters = Adapters(model)
    ids = torch.arange(3, 3 + 6 * length).view(6, length)
    alone = {}

    def logits():
        with torch.no_grad(), autocast(CPU, precision):
            return model(input_ids=ids).logits

    names = ["a", "b", "b", "c", "d", "a"]
    for seed, (name, r) in enumerate({"a": 4, "b": 4, "c": 4, "d": 2}.items()):
        adapters.add(name, LoraConfig(r=r, lora_alpha=3 + seed), seed)
        adapters.use(name)
        randomise_adapter(model, seed)
        alone[name] = logits()
    for rows, products in ((names, 8), ([*names[:4], "b", "b"], 4), (["d", "a", None, None, "a", "a"], 8)):
        with adapters.rows(rows), CountedProducts() as counted:
            mixed = logits()
        assert counted.count == (products if length == 10 else 4 * rows.count("d"))
        for row, name in enumerate(rows):
            assert name is None or torch.equal(mixed[row], alone[name][row]), (rows, row)


# --- dropout -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5, 7), (0,), (64, 64)])
def test_a_mask_survives_being_packed_to_bits(shape):
    keep = draw_keep(torch.Size(shape), 0.3, CPU)
    packed = pack(keep)
    assert packed.nbytes == -(-keep.numel() // 8)
    assert torch.equal(unpack(packed, keep.shape), keep)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dropped_elements_are_zero_and_the_others_untouched(dtype):
    x = torch.randn(33, 17).to(dtype)
    x[0, :3] = torch.tensor([float("inf"), float("nan"), -0.0]).to(dtype)
    drawn = draw_keep(x.shape, 0.5, CPU)
    out, keep = zero_dropped(x, drawn), drawn != 0
    assert torch.equal(out[keep].view(torch.uint8), x[keep].view(torch.uint8))
    assert (out[~keep] == 0).all()


@pytest.mark.parametrize("p", [0.001, 0.1, 0.25, 0.5, 0.9])
def test_the_keep_rate_is_the_asked_one(p, monkeypatch):
    with monkeypatch.context() as patched:  # each of the 2¹⁵ values that an element's bits may have, once
        patched.setattr(
            "lora.fast.dropout._mix", lambda words: words.view(torch.int16).copy_(torch.arange(2**15))
        )
        kept = int((draw_keep(torch.Size([2**15]), p, CPU) != 0).sum())
    assert abs(kept / 2**15 - (1 - p)) <= 2**-16 < 1e-4
    torch.manual_seed(0)
    count = 2_000_000
    kept = int((draw_keep(torch.Size([count]), p, CPU) != 0).sum())
    sigma = math.sqrt(count * p * (1 - p))
    assert abs(kept - count * (1 - p)) < FALSE_ALARM_SIGMAS * sigma + count * 2**-16


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 7, 64, 768])
def test_elements_are_independent_of_their_neighbours_and_of_the_next_mask(distance):
    torch.manual_seed(1)
    count, p = 2_000_000, 0.1
    first, second = ((draw_keep(torch.Size([count]), p, CPU) != 0).float() - (1 - p) for _ in range(2))
    variance = p * (1 - p)
    for left, right in ((first[:-distance], first[distance:]), (first, second)):
        correlation = float((left * right).mean()) / variance
        assert abs(correlation) < FALSE_ALARM_SIGMAS / math.sqrt(count)


def test_every_lane_of_a_draw_has_the_same_rate():
    torch.manual_seed(2)
    keep = (draw_keep(torch.Size([4_000_000]), 0.5, CPU) != 0).view(-1, 4).float().mean(0)
    assert (keep - 0.5).abs().max() < FALSE_ALARM_SIGMAS * 0.5 / 1000


def test_every_bit_of_an_elements_number_decides_on_every_bit_of_its_hash():
    # Avalanche: one bit of the number flipped, each of the 60 bits flips for half of the numbers.
    numbers = torch.arange(2**20, 2**20 + 2**14)
    hashed = numbers.clone()
    _mix(hashed)
    assert not (hashed & ~_LOW_15).any()
    for bit in range(62):
        flipped = numbers ^ (1 << bit)
        _mix(flipped)
        changed = (hashed ^ flipped)[:, None] >> torch.tensor([i for i in range(64) if _LOW_15 >> i & 1])
        rate = (changed & 1).double().mean(0)
        assert (rate - 0.5).abs().max() < FALSE_ALARM_SIGMAS * 0.5 / math.sqrt(len(numbers))


def test_masks_come_from_torchs_generator():
    torch.manual_seed(3)
    first = draw_keep(torch.Size([1000]), 0.1, CPU)
    torch.manual_seed(3)
    assert torch.equal(draw_keep(torch.Size([1000]), 0.1, CPU), first)
    assert not torch.equal(draw_keep(torch.Size([1000]), 0.1, CPU), first)


def test_dropout_scales_up_and_backward_uses_its_mask():
    dropout = FastDropout(0.25)
    x = torch.randn(50, 40, requires_grad=True)
    out = dropout(x)
    kept = out != 0
    assert torch.equal(out[kept], x[kept] * (1 / 0.75))
    out.backward(torch.ones_like(out))
    assert torch.equal(x.grad != 0, kept)
    assert x.grad.unique().tolist() == [0.0, pytest.approx(4 / 3)]


def test_dropout_of_everything_leaves_what_the_base_computes():
    layer = make_layer()
    layer.lora_dropout = 1.0
    x = torch.randn(4, 12)
    assert torch.equal(layer.train()(x), F.linear(x, layer.weight, layer.bias))


def test_dropout_in_place_stays_so(model):
    model.extra = nn.Dropout(inplace=True)
    speed_up(model, "fp32")
    assert type(model.extra) is nn.Dropout


def test_dropout_costs_nothing_at_zero_and_in_eval():
    x = torch.randn(5)
    assert FastDropout(0.0).train()(x) is x
    assert FastDropout(0.5).eval()(x) is x


# --- attention ---------------------------------------------------------------------------------------


def heads(dtype=torch.float32, batch=2, count=3, length=6, width=4):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, length, count, width)
    return [
        torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]


def bidirectional() -> nn.Module:
    module = nn.Module()
    module.is_causal = False
    return module


def padding_mask(batch=2, length=6):
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool)
    mask[1, :, :, 4:] = False
    return mask


@pytest.mark.parametrize("queries", [6, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_torchs(masked, queries):
    q, k, v = heads()
    q = q.detach()[:, :, :queries].requires_grad_()
    mask = padding_mask()[:, :, :queries] if masked else None
    out, _ = fast_attention(bidirectional(), q, k, v, mask, scaling=0.5)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5).transpose(1, 2)
    # float32: sums of at most six terms of order 1
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), upstream)
    for got, expected in zip(grads, torch.autograd.grad(wanted, (q, k, v), upstream), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_what_is_more_than_plain_attention_is_left_to_torchs():
    q, k, v = heads()
    causal = nn.Module()  # which says nothing, so that torch's attention takes it for causal
    added = torch.zeros(2, 1, 6, 6).masked_fill(~padding_mask(), float("-inf"))
    position_bias = torch.randn(2, 3, 6, 6)
    wide = torch.randn(2, 3, 6, 5)
    cases = {
        "causal by default": ((causal, q, k, v, None), {}),
        "causal as a keyword": ((bidirectional(), q, k, v, None), {"is_causal": True}),
        "an additive mask": ((bidirectional(), q, k, v, added), {}),
        "a bias of positions": ((bidirectional(), q, k, v, None), {"position_bias": position_bias}),
        "values wider than keys": ((bidirectional(), q, k, wide, None), {}),
        "everything dropped": ((bidirectional(), q, k, v, None), {"dropout": 1.0}),
    }
    plain = fast_attention(bidirectional(), q, k, v, None)[0]
    for name, (arguments, keywords) in cases.items():
        out = fast_attention(*arguments, **keywords)[0]
        assert torch.equal(out, sdpa_attention_forward(*arguments, **keywords)[0]), name
        assert out.shape != plain.shape or not torch.allclose(out, plain), name


def test_attention_of_mixed_dtypes_trains_under_autocast():
    """Rotary embeddings leave queries and keys in float32 beside values in bfloat16."""
    q, k, v = heads()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for value in (v.bfloat16(), v):
            out = fast_attention(bidirectional(), q, k, value, padding_mask())[0]
            wanted = sdpa_attention_forward(bidirectional(), q, k, value, padding_mask())[0]
            assert torch.equal(out, wanted)
    out.float().sum().backward()
    assert q.grad is not None


def test_with_an_accelerator_the_mask_is_made_without_waiting_for_its_values(config):
    """The meta device has no values: a look at them would raise."""
    _, fast = adapted(config, "fp32")
    fast.to("meta")
    mask = torch.ones(3, 10, dtype=torch.int64, device="meta")
    assert fast(torch.zeros(3, 10, dtype=torch.int64, device="meta"), attention_mask=mask).logits.is_meta


@pytest.mark.parametrize("queries", [6, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_dropout_passes_gradcheck(masked, queries):
    q, k, v = heads(torch.float64)
    q = q.detach()[:, :, :queries].requires_grad_()
    mask = padding_mask()[:, :, :queries] if masked else None

    def function(q, k, v):
        torch.manual_seed(1)
        return fast_attention(bidirectional(), q, k, v, mask, dropout=0.3, scaling=0.5)[0]

    assert gradcheck(function, (q, k, v))


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_attention_gives_gradients_to_those_alone_that_need_them(needed):
    all_three = heads()
    fast_attention(bidirectional(), *all_three, None)[0].square().sum().backward()
    alone = [x.detach().requires_grad_(number == needed) for number, x in enumerate(all_three)]
    fast_attention(bidirectional(), *alone, None)[0].square().sum().backward()
    assert [x.grad is not None for x in alone] == [number == needed for number in range(3)]
    assert torch.equal(alone[needed].grad, all_three[needed].grad)


def test_attention_keeps_one_matrix_of_length_by_length_and_a_bit_an_element():
    q, k, v = heads(length=64)
    kept = saved_bytes(lambda: fast_attention(bidirectional(), q, k, v, None, dropout=0.1), (q, k, v))
    elements = 2 * 3 * 64 * 64  # rows, heads
    assert kept == q.nbytes + k.nbytes + v.nbytes + elements * q.element_size() + elements // 8


def test_a_second_derivative_is_an_error_not_a_wrong_number():
    x = torch.randn(2, 3, 8, 4, requires_grad=True)
    functions = (
        lambda: FastDropout(0.5)(x),
        lambda: fast_attention(bidirectional(), x, x, x, None, dropout=0.0)[0],
        lambda: fast_attention(bidirectional(), x, x, x, None, dropout=0.5)[0],
    )
    for function in functions:
        (first,) = torch.autograd.grad(function().square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


# --- speed_up ----------------------------------------------------------------------------------------


def adapted(config, precision="bf16"):
    model = tiny_roberta()
    inject(model, config)
    randomise_adapter(model)
    fast = copy.deepcopy(model)
    speed_up(fast, precision)
    return model, fast


MASK = torch.tensor([[1] * 10, [1] * 7 + [0] * 3, [1] * 4 + [0] * 6])


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_eval_logits_stay_to_the_precision_at_hand(config, input_ids, precision):
    stock, fast = adapted(config, precision)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        plain = stock(input_ids, attention_mask=MASK).logits.float()
        quick = fast(input_ids, attention_mask=MASK).logits.float()
    # float32: some hundred roundings; bfloat16: two layers, each some ten roundings of 2⁻⁹
    tolerance = {"fp32": 1e-4, "bf16": 0.06}[precision] * plain.abs().max()
    assert (plain - quick).abs().max() <= tolerance


def test_float32_gradients_stay_to_rounding(config, input_ids):
    stock, fast = adapted(config, "fp32")
    for model in (stock, fast):
        model(input_ids, attention_mask=MASK).logits.square().sum().backward()
    compared = 0
    for (name, plain), (_, quick) in zip(stock.named_parameters(), fast.named_parameters(), strict=True):
        if plain.requires_grad:
            assert (plain.grad - quick.grad).abs().max() <= 1e-4 * plain.grad.abs().max(), name
            compared += 1
    assert compared == 2 * 2 * 2 + 4


@pytest.mark.parametrize("trained", ["adapter", "everything"])
def test_the_last_layer_for_the_first_token_alone_trains_the_same(config, input_ids, trained):
    """Without dropout, in training: the stock model's logits and gradients from one row a text."""
    stock, fast = adapted(replace(config, lora_dropout=0.0), "fp32")
    if trained == "everything":
        for model in (stock, fast):
            eject(model)
            model.requires_grad_(True)
    rows = []
    fast.roberta.encoder.layer[-1].register_forward_hook(lambda _, __, out: rows.append(out.shape[1]))
    logits = []
    for model in (stock, fast):
        without_dropout(model.train())
        logits.append(model(input_ids, attention_mask=MASK).logits)
        logits[-1].square().sum().backward()
    assert rows == [1]
    # float32: some hundred roundings
    assert (logits[0] - logits[1]).abs().max() <= 1e-5 * logits[0].abs().max()
    compared = 0
    for (name, plain), (_, quick) in zip(stock.named_parameters(), fast.named_parameters(), strict=True):
        if plain.grad is None:
            assert quick.grad is None
        elif not name.endswith("key.bias"):  # which shifts a row of scores, so its gradient is rounding alone
            assert (plain.grad - quick.grad).abs().max() <= 1e-4 * plain.grad.abs().max(), name
            compared += 1
    assert compared == {"adapter": 2 * 2 * 2 + 4, "everything": 5 + 2 * 15 + 4}[trained]


@torch.no_grad()
def test_in_eval_mode_and_for_another_head_every_row_is_there(config, input_ids):
    stock, fast = adapted(config, "fp32")
    assert fast.roberta(input_ids).last_hidden_state.shape == (3, 10, 32)
    other = RobertaForTokenClassification(stock.config).train()
    speed_up(other, "fp32")
    assert other(input_ids).logits.shape[:2] == (3, 10)
    stock.classifier = nn.Identity()
    speed_up(stock, "fp32")
    assert stock.train()(input_ids).logits.shape == (3, 10, 32)


@torch.no_grad()
def test_in_training_another_attention_may_be_chosen_after_all(config, input_ids):
    stock, fast = adapted(replace(config, lora_dropout=0.0), "fp32")
    logits = []
    for model in (stock, fast):
        model.set_attn_implementation("eager")
        without_dropout(model.train())
        logits.append(model(input_ids, attention_mask=MASK).logits)
    # float32: some hundred roundings
    assert (logits[0] - logits[1]).abs().max() <= 1e-5 * logits[0].abs().max()


@torch.no_grad()
def test_in_training_outputs_spread_as_the_stock_models_do(config, input_ids):
    stock, fast = adapted(config, "fp32")
    assert_same_spread(stock.train(), fast.train(), input_ids)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, -1])
def test_attentions_own_dropout_spreads_the_outputs_as_the_stock_models_does(config, input_ids, layer):
    """As above, with no dropout but that of one layer's attention, which the others would drown."""
    stock, fast = adapted(replace(config, lora_dropout=0.0), "fp32")
    for model in (stock, fast):
        without_dropout(model.train())
        model.roberta.encoder.layer[layer].attention.self.dropout.p = 0.5
    assert_same_spread(stock, fast, input_ids)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def assert_same_spread(stock, fast, input_ids, draws=1500):
    """Mean and standard deviation of each of a text's logits over that many draws of dropout."""
    statistics = []
    for model in (stock, fast):
        torch.manual_seed(0)
        logits = model(input_ids[:1].expand(draws, -1)).logits.double()
        statistics.append((logits.mean(0), logits.std(0)))
    (mean, spread), (quick_mean, quick_spread) = statistics
    assert (spread > 0.1).all()
    sigma = spread * math.sqrt(2 / draws)
    assert ((mean - quick_mean).abs() < FALSE_ALARM_SIGMAS * sigma).all()
    # the standard deviation of a standard deviation is about σ/√(2n) for a normal; allow a heavier tail
    assert ((spread - quick_spread).abs() < 2 * FALSE_ALARM_SIGMAS * sigma / math.sqrt(2)).all()


def test_speed_up_is_in_place_and_idempotent_and_leaves_parameters_alone(config):
    stock, fast = adapted(config)
    before, modules = dict(fast.named_parameters()), dict(fast.named_modules())
    speed_up(fast, "bf16")
    assert all(fast.get_submodule(name) is module for name, module in modules.items())
    assert all(parameter is before[name] for name, parameter in fast.named_parameters())
    state, plain = fast.state_dict(), stock.state_dict()
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[key], plain[key]) and state[key].dtype == plain[key].dtype for key in plain)


def test_speed_up_refuses_another_precision(model):
    with pytest.raises(ValueError, match="int8"):
        speed_up(model, "int8")


def test_trainable_weights_are_left_to_autocast(model, input_ids):
    reference_model = copy.deepcopy(model)
    speed_up(model, "bf16")
    reference_model.set_attn_implementation(model.config._attn_implementation)
    logits = [_logits(each, input_ids) for each in (model, reference_model)]
    assert torch.equal(*logits)
    assert not any(module.copies for module in model.modules() if isinstance(module, FastLinear))


@pytest.mark.parametrize("frozen", [True, False])
def test_injecting_after_speed_up_ends_in_the_same_state_as_before_it(config, input_ids, frozen):
    after, before = tiny_roberta(), tiny_roberta()
    after.requires_grad_(not frozen)
    speed_up(after, "bf16")
    inject(after, config)
    inject(before, config)
    speed_up(before, "bf16")
    for (name, mine), (_, other) in zip(after.named_modules(), before.named_modules(), strict=True):
        assert type(mine) is type(other), name
        assert getattr(mine, "compute_dtype", None) == getattr(other, "compute_dtype", None), name
    assert {type(layer) for layer in lora_layers(after).values()} == {FastLoRALinear}
    gradients = []
    for model in (after, before):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.train()(input_ids).logits.float().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    eject(after)
    assert not any(isinstance(module, LoRALinear) for module in after.modules())
    assert {type(m) for m in after.modules() if isinstance(m, nn.Linear)} == {FastLinear}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_gives_the_same_gradients(config, input_ids, precision):
    _, fast = adapted(config, precision)
    again = copy.deepcopy(fast)
    again.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    kept = []
    for model in (fast, again):
        model.train()
        torch.manual_seed(0)

        def step(model=model):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                model(input_ids).logits.float().square().sum().backward()

        kept.append(saved_bytes(step, model.parameters()))
    assert kept[1] < kept[0]
    compared = 0
    for (name, first), (_, second) in zip(fast.named_parameters(), again.named_parameters(), strict=True):
        if first.requires_grad:
            assert torch.equal(first.grad, second.grad), name
            compared += 1
    assert compared == 12


@torch.no_grad()
def test_copies_follow_their_weights_through_merges_and_changes(config, input_ids):
    _, fast = adapted(config)
    run = partial(_logits, fast, input_ids)
    unmerged = run()
    merge(fast)
    folded = run()
    layer = next(iter(lora_layers(fast).values()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.compute_weights()[0], layer.weight.bfloat16())
    unmerge(fast)
    assert not torch.equal(folded, unmerged)  # the merged weight was used: other roundings
    assert torch.equal(run(), unmerged)
    layer.weight.mul_(2)
    assert not torch.equal(run(), unmerged)


def _logits(model, input_ids):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(input_ids).logits


def test_copies_made_in_inference_mode_serve_training(config, input_ids):
    _, fast = adapted(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.inference_mode():
            fast(input_ids)
        fast.train()(input_ids).logits.float().sum().backward()


def test_copies_are_made_anew_for_another_weight_even_at_the_same_address():
    """Without a hold on what was copied, the next weight comes to lie where it was."""
    layer = nn.Linear(64, 64, bias=False).requires_grad_(False)
    fuse(layer, torch.bfloat16)
    weight = layer.weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for factor in range(1, 9):
            layer.weight = None
            layer.weight = nn.Parameter(weight * factor, requires_grad=False)
            assert torch.equal(layer.compute_weights()[0], layer.weight.bfloat16())


def test_weights_made_in_inference_mode_have_no_copies_and_work():
    with torch.inference_mode():
        layer = nn.Linear(4, 4).requires_grad_(False)
    fuse(layer, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert layer(torch.randn(2, 4)).dtype == torch.bfloat16
    assert not layer.copies


def test_a_weight_in_the_compute_dtype_needs_no_copy():
    layer = nn.Linear(4, 4).bfloat16().requires_grad_(False)
    fuse(layer, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(2, 4))
    assert copy_bytes(layer) == 0


def test_a_float64_weight_has_no_copy_for_autocast_leaves_it_alone():
    layer = nn.Linear(4, 4).double().requires_grad_(False)
    fuse(layer, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64
    assert copy_bytes(layer) == 0


def test_what_is_shared_or_hooked_stays_so():
    model = tiny_roberta()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = model.roberta.encoder.layer
    layers[1].intermediate.dense = layers[0].intermediate.dense
    calls = []
    for module in (layers[0].intermediate.dense, layers[0].output.dropout):
        module.register_forward_hook(lambda module, *_: calls.append(type(module)))
    speed_up(model)
    assert layers[1].intermediate.dense is layers[0].intermediate.dense
    model(torch.zeros(1, 4, dtype=torch.int64))
    assert calls == [FastLinear, FastDropout, FastLinear]


def test_copies_in_another_precision_are_given_back(config, input_ids):
    _, fast = adapted(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast(input_ids)
    assert sum(len(module.copies) for module in fast.modules() if isinstance(module, FastLinear))
    speed_up(fast, "fp32")
    assert not any(module.copies for module in fast.modules() if isinstance(module, FastLinear))


def test_copy_bytes_is_the_memory_of_the_copies(config, input_ids):
    _, fast = adapted(config)
    assert copy_bytes(fast) == 0
    _logits(fast, input_ids)
    # 12 frozen linears: 8 of 32x32, 2 of 32x64, 2 of 64x32, with their biases, at 2 bytes
    expected = 2 * (8 * (32 * 32 + 32) + 2 * (32 * 64 + 64) + 2 * (64 * 32 + 32))
    assert copy_bytes(fast) == expected
    assert copy_bytes(copy.deepcopy(fast)) == 0


def test_a_shared_cast_is_made_anew_when_the_tensor_changed_or_gradients_came_on():
    x = torch.randn(4, 4, requires_grad=True)
    with torch.no_grad():
        without = cast_shared(x, torch.bfloat16)
    shared = cast_shared(x, torch.bfloat16)
    assert shared is not without
    assert shared.requires_grad
    assert cast_shared(x, torch.bfloat16) is shared
    with torch.no_grad():
        x.add_(1)
    again = cast_shared(x, torch.bfloat16)
    assert again is not shared
    assert torch.equal(again, x.bfloat16())


def test_nothing_is_shared_in_inference_mode_which_counts_no_writes():
    x = torch.randn(4, 4)
    with torch.inference_mode():
        first = cast_shared(x, torch.bfloat16)
        inferred = x.clone()
        cast_shared(inferred, torch.bfloat16)
        inferred.mul_(3)
        assert torch.equal(cast_shared(inferred, torch.bfloat16), inferred.bfloat16())
    assert first.is_inference()
    assert not cast_shared(x, torch.bfloat16).is_inference()


def test_a_shared_cast_lives_no_longer_than_its_source():
    x = torch.randn(4, 4)
    cast = weakref.ref(cast_shared(x, torch.bfloat16))
    assert cast() is not None
    del x
    assert cast() is None
