"""Merging: the whole model or nothing, exact to undo, and a state machine without silent states."""

import copy
import dataclasses

import pytest
import torch
from conftest import randomise_adapter
from torch import nn

from lora import LoRALinear, disabled, eject, inject, merge, merged, unmerge
from lora.adapted import lora_layers


@pytest.fixture
def adapted(model, config):
    inject(model, config)
    randomise_adapter(model)
    return model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in lora_layers(model).items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits, so that -0.0 and 0.0 differ."""
    return tensor.detach().contiguous().view(torch.uint8)


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(bits(first[name]), bits(second[name])) for name in first)


def test_a_layer_whose_merge_fails_stays_unmerged(config):
    model = nn.ModuleDict({"query": nn.Linear(3, 2)})
    inject(model, dataclasses.replace(config, r=2, modules_to_save=(), target_modules=("query",)))
    layer = model["query"]
    layer.weight = nn.Parameter(torch.ones(1, 3).expand(2, 3), requires_grad=False)
    before = layer(torch.ones(3))
    with pytest.raises(RuntimeError, match="single memory location"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer(torch.ones(3)), before)


@torch.no_grad()
def test_merging_keeps_what_the_model_computes(adapted, input_ids):
    apart = adapted(input_ids).logits
    with disabled(adapted):
        base = adapted(input_ids).logits
    merge(adapted)
    folded = adapted(input_ids).logits
    assert (apart - base).abs().max() > 1e-3
    # A bound per layer is in test_exact.py; end to end, logits of order 1 differ by float32 roundings
    torch.testing.assert_close(folded, apart, rtol=0, atol=1e-5)
    assert all(layer.merged for layer in lora_layers(adapted).values())


def test_merging_twice_and_unmerging_what_is_not_merged_are_errors_that_name_the_layer(adapted):
    with pytest.raises(RuntimeError, match="query is not merged"):
        unmerge(adapted)
    merge(adapted)
    merged_weights = weights(adapted)
    with pytest.raises(RuntimeError, match="query is merged; unmerge the model first"):
        merge(adapted)
    assert same_bits(weights(adapted), merged_weights)


def test_a_layer_that_cannot_be_merged_leaves_every_weight_as_it_was(adapted):
    name, layer = list(lora_layers(adapted).items())[2]
    with torch.no_grad():
        layer.lora_B[1, 1] = float("inf")
    before = weights(adapted)
    with pytest.raises(ValueError, match=f"{name}: .*not finite"):
        merge(adapted)
    assert same_bits(weights(adapted), before)
    assert not any(layer.merged for layer in lora_layers(adapted).values())


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_an_exception_half_way_leaves_every_weight_as_it_was(adapted, monkeypatch, moment):
    before = weights(adapted)
    third = list(lora_layers(adapted).values())[2]
    write = LoRALinear._replace_weight

    def interrupted(layer: LoRALinear, merged_weight: torch.Tensor) -> None:
        if layer is third:
            if moment == "during":
                layer._unmerged_weight = layer.weight.detach().clone()
                layer.weight[:1] = merged_weight[:1]
            if moment == "after":
                write(layer, merged_weight)
            raise KeyboardInterrupt
        write(layer, merged_weight)

    monkeypatch.setattr(LoRALinear, "_replace_weight", interrupted)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        merge(adapted)
    assert same_bits(weights(adapted), before)
    assert not any(layer.merged for layer in lora_layers(adapted).values())


@pytest.mark.parametrize("start_merged", [False, True])
@pytest.mark.parametrize("fail", [False, True])
def test_contexts_leave_the_state_that_they_found(adapted, input_ids, start_merged, fail):
    if start_merged:
        merge(adapted)
    before = weights(adapted)
    for context in (merged, disabled):
        try:
            with context(adapted), context(adapted):
                if context is merged:
                    assert all(layer.merged for layer in lora_layers(adapted).values())
                if fail:
                    raise KeyError
        except KeyError:
            pass
        assert same_bits(weights(adapted), before)
        assert {layer.merged for layer in lora_layers(adapted).values()} == {start_merged}
        assert {layer.enabled for layer in lora_layers(adapted).values()} == {True}


@torch.no_grad()
@pytest.mark.parametrize("start_merged", [False, True])
def test_disabled_is_the_base_with_the_trained_head(adapted, input_ids, start_merged):
    with torch.no_grad():
        adapted.classifier.out_proj.bias.add_(1)
    plain = copy.deepcopy(adapted)
    eject(plain)
    if start_merged:
        merge(adapted)
    with disabled(adapted):
        assert torch.equal(adapted(input_ids).logits, plain(input_ids).logits)
    assert not torch.equal(adapted(input_ids).logits, plain(input_ids).logits)


def test_merging_inside_disabled_is_an_error(adapted):
    with disabled(adapted):
        with pytest.raises(RuntimeError, match=r"is disabled|inside disabled"):
            merge(adapted)
        with pytest.raises(RuntimeError, match=r"is disabled|inside disabled"), merged(adapted):
            pass
        with pytest.raises(RuntimeError, match=r"is disabled|inside disabled"):
            eject(adapted)
    with merged(adapted), disabled(adapted):  # the other way round is well defined
        assert not any(layer.merged for layer in lora_layers(adapted).values())


def test_injecting_and_ejecting_while_merged_are_errors(adapted, config):
    merge(adapted)
    with pytest.raises(RuntimeError, match="adapter already"):
        inject(adapted, config)
    with pytest.raises(RuntimeError, match="unmerge the model first"):
        eject(adapted)


def test_training_while_merged_is_an_error(adapted, input_ids):
    merge(adapted)
    adapted.train()
    with pytest.raises(RuntimeError, match="training while merged"):
        adapted(input_ids)
    with torch.no_grad():
        adapted(input_ids)
    adapted.eval()
    with pytest.raises(RuntimeError, match="backward while merged"):
        adapted(input_ids).logits.sum().backward()
    for name in ("lora_A", "lora_B"):  # each trained tensor would miss its gradient
        with pytest.raises(RuntimeError, match="backward while merged"):
            adapted(input_ids).logits.sum().backward()
        for layer in lora_layers(adapted).values():
            getattr(layer, name).requires_grad_(False)
    adapted(input_ids).logits.sum().backward()  # only the input's gradient is needed


@pytest.mark.parametrize("trainable", [True, False])
def test_the_base_weight_is_frozen_while_it_is_merged(adapted, trainable):
    """Unmerging would undo what training did to the merged weight."""
    for layer in lora_layers(adapted).values():
        layer.weight.requires_grad_(trainable)
    merge(adapted)
    assert not any(layer.weight.requires_grad for layer in lora_layers(adapted).values())
    unmerge(adapted)
    assert all(layer.weight.requires_grad == trainable for layer in lora_layers(adapted).values())


@pytest.mark.parametrize("change", [lambda p: p.add_(1), lambda p: p.data.mul_(2)])
def test_an_adapter_that_changed_while_merged_is_an_error(adapted, input_ids, change):
    merge(adapted)
    with torch.no_grad():
        change(next(iter(lora_layers(adapted).values())).lora_B)
        with pytest.raises(RuntimeError, match="changed while merged"):
            adapted(input_ids)
        unmerge(adapted)
        adapted(input_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ejecting_with_merge_leaves_plain_linears_that_compute_the_same(adapted, input_ids, dtype):
    adapted.to(dtype)
    reference = copy.deepcopy(adapted)
    merge(reference)
    eject(adapted, merge=True)
    for name, module in adapted.named_modules():
        assert not isinstance(module, LoRALinear), name
        assert not any("lora" in key or "unmerged" in key for key in vars(module)), name
        assert not module._forward_hooks
    assert not any("lora" in key for key in adapted.state_dict())
    assert torch.equal(adapted(input_ids).logits, reference(input_ids).logits)


def test_a_model_without_adapter_is_an_error(model):
    for act in (merge, unmerge):
        with pytest.raises(RuntimeError, match="no adapter"):
            act(model)


def test_a_weight_that_another_module_holds_too_is_not_merged(model, config):
    model.roberta.pooler = nn.Linear(32, 32)
    model.roberta.pooler.weight = model.roberta.encoder.layer[0].attention.self.query.weight
    inject(model, config)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"pooler.* share one weight"):
        merge(model)
    with pytest.raises(RuntimeError, match="share one weight"), merged(model):
        pass
    assert same_bits(weights(model), before)


def test_an_unmerge_that_was_stopped_half_way_can_be_finished(adapted):
    before = weights(adapted)
    merge(adapted)
    next(iter(lora_layers(adapted).values())).unmerge()
    unmerge(adapted)
    assert same_bits(weights(adapted), before)
