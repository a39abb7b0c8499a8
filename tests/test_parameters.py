"""Parameter counts by role. The documentation's table has these numbers."""

import re
from pathlib import Path

import torch

from lora import count_parameters, eject, inject, save_adapter
from lora.adapted import lora_layers
from lora.modules import train_only
from model import load_base
from train.config import load_recipe, parse_setting


def test_roberta_base_has_the_published_counts(tmp_path):
    from lora import LoraConfig

    model, tokenizer = load_base("random:roberta-base", num_labels=4)
    assert tokenizer is None
    inject(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, modules_to_save=("classifier",)))
    counts = count_parameters(model)
    assert counts.lora == 12 * 2 * 8 * (768 + 768) == 294_912
    assert counts.head == 768 * 768 + 768 + 768 * 4 + 4 == 593_668
    assert counts.trainable == 888_580
    assert counts.total == 124_943_620
    assert counts.frozen == counts.total - counts.trainable
    assert "888,580" in str(counts)

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
    model.requires_grad_(False)
    assert count_parameters(model).frozen == lora.total


def test_frozen_weights_get_no_gradient(model, config, input_ids):
    inject(model, config)
    model(input_ids).logits.sum().backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    assert sum(p.numel() for p in trained) == count_parameters(model).trainable
    assert all(torch.isfinite(p.grad).all() for p in trained)


def test_make_which_compares_six_choices_of_weights_at_equal_cost():
    """Different weights and ranks, with one scaling and one number of parameters."""
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    listed = makefile.partition("WHICH :=")[2].partition("\nwhich:")[0]
    choices = re.findall(r"(\w+):(\d+):([\w.,]+)", listed)
    assert [name for name, _, _ in choices] == ["q", "k", "v", "o", "qv", "qkvo"]
    model, _ = load_base("random:minilm", num_labels=5)
    for _, r, targets in choices:
        settings = (f"r={r}", f"lora_alpha={2 * int(r)}", f"target_modules={targets}")
        _, recipe = load_recipe("quickstart", dict(map(parse_setting, settings)))
        inject(model, recipe.lora_config())
        assert count_parameters(model).lora == 6 * 8 * (384 + 384) == 36_864
        assert {layer.scaling for layer in lora_layers(model).values()} == {2.0}
        eject(model)
