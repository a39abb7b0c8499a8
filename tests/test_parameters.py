"""The ledger: who trains, counted. The README's table stands on these numbers."""

import dataclasses

import torch

from lora import count_parameters, eject, inject, save_adapter
from lora.modules import train_only
from lora.modules import lora_layers
from model import load_base
from train.config import load_recipe


def test_roberta_base_has_the_published_counts(tmp_path):
    from lora import LoraConfig

    model, tokenizer = load_base("random:roberta-base", num_labels=4)
    assert tokenizer is None
    inject(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, modules_to_save=("classifier",)))
    ledger = count_parameters(model)
    assert ledger.lora == 12 * 2 * 8 * (768 + 768) == 294_912
    assert ledger.head == 768 * 768 + 768 + 768 * 4 + 4 == 593_668
    assert ledger.trainable == 888_580
    assert ledger.total == 124_943_620
    assert ledger.frozen == ledger.total - ledger.trainable
    assert "888,580" in str(ledger)

    save_adapter(model, tmp_path, base="random:roberta-base")
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 3_600_000


def test_every_parameter_counts_once_in_one_role(model, config):
    total = sum(parameter.numel() for parameter in model.parameters())
    full = count_parameters(model, head=("classifier",))
    assert (full.lora, full.frozen, full.total) == (0, 0, total)
    assert full.head == sum(parameter.numel() for parameter in model.classifier.parameters())
    train_only(model, ("classifier",))
    head = count_parameters(model, head=("classifier",))
    assert (head.base, head.trainable, head.total) == (0, full.head, total)
    inject(model, config)
    lora = count_parameters(model)
    assert lora.head == full.head
    assert lora.total == total + lora.lora


def test_frozen_weights_get_no_gradient(model, config, input_ids):
    inject(model, config)
    model(input_ids).logits.sum().backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    assert sum(p.numel() for p in trained) == count_parameters(model).trainable
    assert all(torch.isfinite(p.grad).all() for p in trained)


def test_the_six_recipes_of_which_weights_spend_the_same():
    """On other weights and at other ranks, with one scaling, so that the weights are all that differs."""
    model, _ = load_base("random:minilm", num_labels=5)
    scalings, settings = set(), set()
    for name in ("q", "k", "v", "o", "qv", "qkvo"):
        _, recipe = load_recipe(f"which-{name}")
        inject(model, recipe.lora_config())
        assert count_parameters(model).lora == 6 * 8 * (384 + 384) == 36_864
        scalings |= {layer.scaling for layer in lora_layers(model).values()}
        settings.add(dataclasses.replace(recipe, r=8, lora_alpha=16, target_modules=("query", "value")))
        eject(model)
    assert scalings == {2.0}
    assert settings == {load_recipe("quickstart")[1]}
