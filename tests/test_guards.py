"""Guards against silent errors: stale weights, shared memory, writes that cannot be undone, lost hooks."""

import asyncio
import contextlib
import copy
import threading
import time
from fractions import Fraction
from importlib import import_module

import pytest
import torch
from conftest import randomise_adapter
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune

from lora import LoraConfig, LoRALinear, disabled, eject, inject, merge, merged, unmerge
from lora.adapted import lora_layers
from lora.fast import FastLinear, fuse
from lora.fast.dropout import draw_keep
from lora.fast.function import cast_shared
from lora.rounding import round_to


@pytest.fixture
def adapted(model, config):
    inject(model, config)
    randomise_adapter(model)
    return model


def weights(model):
    return {name: layer.weight.detach().clone() for name, layer in lora_layers(model).items()}


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def bf16_logits(model, input_ids):
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        return model(input_ids).logits


# --- copies of frozen weights ------------------------------------------------------------------------


@pytest.mark.parametrize("forward_between", [True, False])
def test_a_fused_optimizer_does_not_leave_stale_copies(forward_between):
    """AdamW(fused=True) does not raise a Parameter's version."""
    layer = nn.Linear(64, 64).requires_grad_(False)
    fuse(layer, torch.bfloat16)
    x = torch.randn(4, 64)
    before = bf16_forward(layer, x)
    layer.requires_grad_(True)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        if forward_between:
            layer(x).square().mean().backward()
        else:
            for parameter in layer.parameters():
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    layer.requires_grad_(False)
    after = bf16_forward(layer, x)
    assert not torch.equal(after, before)
    assert torch.equal(after, reference(layer, x))


def bf16_forward(layer, x):
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        return layer(x)


def reference(layer, x):
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.load_state_dict(layer.state_dict())
    return bf16_forward(plain, x)


def test_a_write_that_no_counter_shows_is_found_within_a_cycle_of_forwards():
    layer = nn.Linear(64, 64, bias=False).requires_grad_(False)
    fuse(layer, torch.bfloat16)
    x = torch.randn(4, 64)
    bf16_forward(layer, x)
    torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(layer.weight.detach()))[37] += 1
    found = [torch.equal(bf16_forward(layer, x), reference(layer, x)) for _ in range(64 // 16)]
    assert found[-1]
    bf16_forward(layer, x)
    layer.weight.data[5] += 1
    layer.eval()
    assert torch.equal(bf16_forward(layer, x), reference(layer, x))  # at once after a change of mode


def test_a_write_to_one_element_of_a_bias_is_found_at_once():
    layer = nn.Linear(64, 64).requires_grad_(False)
    fuse(layer, torch.bfloat16)
    x = torch.randn(4, 64)
    for row in range(64):
        bf16_forward(layer, x)
        layer.bias.data[row] += 1
        assert torch.equal(bf16_forward(layer, x), reference(layer, x))


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("own", ["data", "dlpack"])
def test_a_cast_is_not_reused_after_a_write_to_one_row(own, gradients):
    x = torch.zeros(100, 8)
    alias = x.data if own == "data" else torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x))
    with torch.set_grad_enabled(gradients):
        cast_shared(x, torch.bfloat16)
        alias[5] = 1
        assert torch.equal(cast_shared(x, torch.bfloat16), x.bfloat16())


@pytest.mark.parametrize("own", ["numpy", "from_numpy", "dlpack"])
def test_a_cast_is_not_reused_for_memory_that_another_library_refills(own):
    x = torch.zeros(16, 8)
    if own == "from_numpy":
        array = x.numpy().copy()
        x = torch.from_numpy(array)
    elif own == "numpy":
        array = x.numpy()
    else:
        array = torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x))
    with torch.no_grad():
        first = cast_shared(x, torch.bfloat16)
        array[:] = 1
        assert torch.equal(cast_shared(x, torch.bfloat16), x.bfloat16())
        assert not torch.equal(first, x.bfloat16())


def test_dropout_close_to_one_keeps_its_share():
    """15 random bits cannot express 0.99999; the share kept is within 6 standard deviations."""
    n, p = 1_000_000, 0.99999
    kept = int((draw_keep(torch.Size([n]), p, torch.device("cpu")) != 0).sum())
    assert abs(kept - n * (1 - p)) < 6 * (n * p * (1 - p)) ** 0.5
    assert kept > 0


# --- the merged state --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parameter", "buffer", "overlap", "assign"])
def test_a_weight_whose_memory_another_tensor_shares_is_not_merged(kind):
    model = nn.ModuleDict({"query": nn.Linear(8, 8), "other": nn.Linear(8, 8, bias=False)})
    weight = model["query"].weight
    if kind == "parameter":
        model["other"].weight = nn.Parameter(weight.data)
    elif kind == "buffer":
        model.register_buffer("view", weight.data[2:4])
    elif kind == "overlap":
        memory = torch.randn(12, 8)
        model["query"].weight = nn.Parameter(memory[:8])
        model["other"].weight = nn.Parameter(memory[4:])
    else:
        state = model.state_dict()
        state["other.weight"] = state["query.weight"]
        model.load_state_dict(state, assign=True)
    inject(model, LoraConfig(r=2, target_modules=("query",)))
    randomise_adapter(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"share one weight"):
        merge(model)
    with pytest.raises(RuntimeError, match=r"share one weight"), merged(model):
        pass
    assert equal(before, dict(model.named_parameters()))


def test_parts_of_one_memory_that_do_not_overlap_are_merged():
    memory = torch.randn(16, 8)
    model = nn.ModuleDict({"query": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
    model["query"].weight, model["other"].weight = nn.Parameter(memory[:8]), nn.Parameter(memory[8:])
    inject(model, LoraConfig(r=2, target_modules=("query",)))
    merge(model)
    unmerge(model)


@pytest.mark.parametrize("kind", ["inference", "expanded", "overlapping", "meta", "pruned", "parametrized"])
def test_a_layer_that_cannot_be_written_to_leaves_the_model_unmerged(kind):
    model = nn.ModuleDict({"query": nn.Linear(8, 8), "value": nn.Linear(8, 8)})
    if kind == "inference":
        with torch.inference_mode():
            model["value"] = nn.Linear(8, 8)
    if kind == "expanded":
        model["value"].weight = nn.Parameter(torch.randn(1, 8).expand(8, 8))
    if kind == "overlapping":
        model["value"].weight = nn.Parameter(torch.randn(15).as_strided((8, 8), (1, 1)))
    if kind == "meta":
        model["value"].to("meta")
    inject(model, LoraConfig(r=2, target_modules=("query", "value")))
    randomise_adapter(model)
    if kind == "pruned":
        prune.l1_unstructured(model["value"], "weight", amount=0.5)
    if kind == "parametrized":
        parametrizations.weight_norm(model["value"])
    before = model["query"].weight.detach().clone()
    for _ in range(2):  # the first error leaves nothing behind
        with pytest.raises(RuntimeError, match="value: the weight"):
            merge(model)
        assert torch.equal(model["query"].weight, before)
        assert not any(layer.merged for layer in lora_layers(model).values())
    if kind in ("pruned", "parametrized"):
        with pytest.raises(RuntimeError, match="value: the weight is not a Parameter"):
            eject(model)
    else:
        eject(model)


def test_an_unmerge_that_cannot_write_leaves_every_layer_merged():
    model = nn.ModuleDict({"query": nn.Linear(8, 8), "value": nn.Linear(8, 8)})
    with torch.inference_mode():
        model["value"] = nn.Linear(8, 8)
    inject(model, LoraConfig(r=2, target_modules=("query", "value")))
    with torch.inference_mode():
        merge(model)
    with pytest.raises(RuntimeError, match="value: the weight is a tensor of inference mode"):
        unmerge(model)
    assert all(layer.merged for layer in lora_layers(model).values())


def test_merging_a_model_on_the_meta_device_is_an_error(adapted):
    with pytest.raises(RuntimeError, match="meta device"):
        merge(adapted.to("meta"))


def test_an_overflow_of_a_cast_while_merged_leaves_one_state(adapted, input_ids):
    layers = list(lora_layers(adapted).values())
    with torch.no_grad():
        layers[1].lora_B.mul_(1e6)
    before = {name: weight.half() for name, weight in weights(adapted).items()}
    merge(adapted)
    with pytest.warns(UserWarning, match="not finite in torch.float16"):
        adapted.half()
    assert {layer.merged for layer in layers} == {True}
    assert {layer.weight.dtype for layer in layers} == {torch.float16}
    unmerge(adapted)
    assert equal(weights(adapted), before)


def test_another_weight_in_the_place_of_the_merged_one_is_an_error(adapted, input_ids):
    merge(adapted)
    state = adapted.state_dict()  # holds W
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="overwritten or replaced"):
            functional_call(adapted, state, (input_ids,))
        parameters = {name: p.detach().clone() for name, p in adapted.named_parameters()}
        same = functional_call(adapted, parameters, (input_ids,)).logits
        assert torch.equal(same, adapted(input_ids).logits)
        average = copy.deepcopy(adapted)
        for mean, new in zip(average.parameters(), adapted.parameters(), strict=True):
            mean.data.lerp_(new.data + 1, 0.1)
        with pytest.raises(RuntimeError, match="changed while merged|overwritten"):
            average(input_ids)
        next(iter(lora_layers(adapted).values())).weight.add_(1)
        with pytest.raises(RuntimeError, match="overwritten or replaced"):
            adapted(input_ids)


@pytest.mark.parametrize("part", ["", "roberta", "roberta.encoder"])
def test_load_state_dict_into_a_merged_model_writes_nothing(adapted, part):
    merge(adapted)
    module = adapted.get_submodule(part)
    before = {name: tensor.clone() for name, tensor in adapted.named_parameters()}
    changed = {name: tensor + 1 for name, tensor in module.state_dict().items()}
    for model in (adapted, copy.deepcopy(adapted)):
        with pytest.raises(RuntimeError, match="load_state_dict into a merged layer; unmerge first"):
            model.get_submodule(part).load_state_dict(changed)
        assert equal(before, dict(model.named_parameters()))
    unmerge(adapted)
    module.load_state_dict(changed)
    eject(adapted)
    assert not any(m._load_state_dict_pre_hooks for m in adapted.modules())


def test_the_output_of_a_merged_layer_may_be_changed_in_place(adapted):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True)).eval()
    inject(model, LoraConfig(r=2, target_modules=("0",)))
    randomise_adapter(model)
    x = torch.randn(3, 8)
    expected = model(x)
    merge(model)
    h = model(x)
    # one rounding of W + ΔW and another order of sums
    torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="backward while merged"):
        h.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float64_is_rounded_once_to_16_bits(dtype):
    """Random values, ties, their neighbours and subnormal numbers, against rational arithmetic."""
    generator = torch.Generator().manual_seed(0)
    step = torch.finfo(dtype).eps
    ties = 1 + step * (torch.arange(64, dtype=torch.float64) + 0.5)
    near = torch.cat([ties * (1 + sign * 2.0**-k) for sign in (-1, 1) for k in (30, 40, 52)])
    tiny = torch.finfo(dtype).smallest_normal * torch.rand(500, dtype=torch.float64, generator=generator)
    x = torch.cat([torch.randn(2000, dtype=torch.float64, generator=generator), ties, near, -near, tiny])
    rounded = round_to(x, dtype)
    grid = {-1: torch.nextafter(rounded, -torch.full_like(rounded, torch.inf)),
            1: torch.nextafter(rounded, torch.full_like(rounded, torch.inf))}  # fmt: skip
    even = (rounded.view(torch.int16) & 1) == 0
    for i, value in enumerate(x.tolist()):
        error = abs(Fraction(rounded[i].item()) - Fraction(value))
        for neighbour in grid.values():
            other = abs(Fraction(neighbour[i].item()) - Fraction(value))
            assert error < other or (error == other and even[i])


def test_a_copy_made_inside_disabled_is_enabled(adapted, input_ids):
    with torch.no_grad():
        expected = adapted(input_ids).logits
        with disabled(adapted):
            twin = copy.deepcopy(adapted)
        assert torch.equal(twin(input_ids).logits, expected)


def test_a_second_thread_cannot_enter_a_context(adapted):
    errors = []

    def enter(context):
        try:
            with context(adapted):
                pass
        except RuntimeError as error:
            errors.append(str(error))

    for context in (merged, disabled):
        before = weights(adapted)
        with context(adapted):
            thread = threading.Thread(target=enter, args=(merged if context is merged else disabled,))
            thread.start()
            thread.join()
        assert "another thread" in errors.pop()
        assert equal(before, weights(adapted))
        thread = threading.Thread(target=enter, args=(context,))
        thread.start()
        thread.join()
        assert not errors


def test_a_second_task_cannot_enter_a_context(adapted):
    """Tasks of one thread leave contexts in any order, and the first one would restore the second's state."""

    async def enter(wait, stay):
        await asyncio.sleep(wait)
        with disabled(adapted):
            await asyncio.sleep(stay)

    async def both():
        return await asyncio.gather(enter(0, 0.05), enter(0.01, 0.05), return_exceptions=True)

    first, second = asyncio.run(both())
    assert first is None
    assert "another thread or task" in str(second)
    assert all(layer.enabled for layer in lora_layers(adapted).values())


def test_a_context_restores_the_state_that_another_thread_has_left(adapted, monkeypatch):
    merge_module = import_module("lora.merge")  # the package's attribute of that name is the function
    one_thread = merge_module._one_thread

    def after_the_other(layers):
        unmerge(adapted)  # as another thread does that leaves merged() just before
        return one_thread(layers)

    monkeypatch.setattr(merge_module, "_one_thread", after_the_other)
    merge(adapted)
    with merged(adapted):
        pass
    assert not any(layer.merged for layer in lora_layers(adapted).values())


def test_threads_that_merge_at_the_same_time_lose_no_weight(adapted, monkeypatch):
    merged_weight = LoRALinear.merged_weight

    def slow(layer):
        time.sleep(0.001)  # the other thread runs
        return merged_weight(layer)

    monkeypatch.setattr(LoRALinear, "merged_weight", slow)
    before = weights(adapted)

    def change():
        for operation in (merge, unmerge) * 3:
            with contextlib.suppress(RuntimeError):  # the other thread was first
                operation(adapted)

    threads = [threading.Thread(target=change) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    states = {layer.merged for layer in lora_layers(adapted).values()}
    assert len(states) == 1
    if states == {True}:
        unmerge(adapted)
    assert equal(before, weights(adapted))


# --- inject ------------------------------------------------------------------------------------------


def test_hooks_stay_through_inject_and_eject(model, config, input_ids):
    calls = []
    query = model.roberta.encoder.layer[0].attention.self.query
    handle = query.register_forward_hook(lambda *_: calls.append("forward"))
    query.register_forward_pre_hook(lambda *_: calls.append("before"))
    model(input_ids)
    inject(model, config)
    model(input_ids)
    assert calls == ["before", "forward"] * 2
    handle.remove()
    model(input_ids)
    assert calls[4:] == ["before"]
    eject(model)
    model(input_ids)
    assert calls[4:] == ["before"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: setattr(q, "forward", lambda x: x), "whose forward is patched"),
        (lambda q: setattr(q, "weight", nn.Parameter(q.weight.to(torch.complex64))), "complex64"),
        (lambda q: setattr(q, "weight", nn.Parameter(q.weight.to(torch.int8), False)), "int8"),
        (lambda q: q.register_buffer("scale", torch.ones(1), persistent=False), "which holds scale too"),
        (lambda q: q.register_parameter("gain", nn.Parameter(torch.ones(1))), "which holds gain too"),
    ],
)
def test_what_would_be_lost_is_refused(model, config, change, message):
    change(model.roberta.encoder.layer[1].attention.self.query)
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(TypeError, match=message):
        inject(model, config)
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_a_failed_swap_leaves_the_model_unchanged():
    class ReadOnly(nn.ModuleDict):
        def __setattr__(self, name, value):
            if name == "value" and name in self:
                raise AttributeError("value is read-only")
            super().__setattr__(name, value)

    class Misspelt(LoRALinear):
        trained_tensors = ("lora_A", "lora_C")

    for kind, layer in ((ReadOnly, LoRALinear), (nn.ModuleDict, Misspelt)):
        model = kind({"query": nn.Linear(8, 8), "value": nn.Linear(8, 8)})
        modules = list(model.children())
        with pytest.raises(AttributeError):
            inject(model, LoraConfig(r=2, target_modules=("query", "value")), layer=layer)
        assert list(model.children()) == modules
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert not hasattr(model, "lora_config")


def test_a_saved_module_whose_memory_is_shared_within_leaves_the_model_unchanged(model, config):
    model.classifier.dense.weight = nn.Parameter(torch.zeros(1, 32).expand(32, 32))
    with pytest.raises(TypeError, match=r"classifier.dense.weight is an expanded or overlapping view"):
        inject(model, config)


def test_a_saved_module_with_state_that_is_no_tensor_is_refused(model, config):
    class Counter(nn.Linear):
        def get_extra_state(self):
            return {"steps": 1}

    model.classifier.dense = Counter(32, 32)
    with pytest.raises(TypeError, match=r"classifier.dense._extra_state is not a tensor"):
        inject(model, config)


def test_a_saved_module_that_cannot_train_leaves_the_model_unchanged(model, config):
    model.classifier.dense.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"classifier.dense.weight is torch.int8, which cannot train"):
        inject(model, config)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert not hasattr(model, "lora_config")


def test_copies_and_hooks_of_a_sped_up_model_survive_deepcopy(adapted, input_ids):
    fuse(adapted, torch.bfloat16)
    twin = copy.deepcopy(adapted)
    assert torch.equal(bf16_logits(adapted, input_ids), bf16_logits(twin, input_ids))
    assert any(type(module) is FastLinear for module in twin.modules())
