"""What a run logs of its adapter: the true numbers, at the true moment, and nothing else changes."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import content, randomise_adapter

from lora import inject
from lora.adapted import lora_layers
from lora.anatomy import effective_rank
from model import load_base
from train.batches import collate, encode
from train.data import load_news
from train.job import run_job
from train.loop import Trainer
from train.telemetry import Telemetry

KEYS = {"delta_over_weight", "effective_rank", "gradient_norm_A", "gradient_norm_B"}


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    return dataclasses.replace(tiny_recipe, epochs=2, base_dropout=0.0, lora_dropout=0.0, log_every_steps=3)


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("telemetry") / "run"
    return folder, run_job("tiny", recipe, folder).summary


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_in_the_first_step_b_has_a_gradient_and_a_has_none(run):
    folder, summary = run
    logged = [line for line in lines(folder) if line.keys() >= KEYS]
    assert [line["step"] for line in logged] == [1, 3, 6, 7, 9, 12, 14]  # 7 steps an epoch
    assert logged[0]["gradient_norm_A"] == [0.0] * 4
    assert min(logged[0]["gradient_norm_B"]) > 1e-4
    assert min(logged[-1]["gradient_norm_A"]) > 1e-6
    assert min(logged[-1]["delta_over_weight"]) > 1e-4
    assert all(1 <= rank <= 8 for rank in logged[-1]["effective_rank"])
    assert len(summary["adapted_layers"]) == 4
    assert summary["adapted_layers"][1].endswith("layer.0.attention.self.value")


def test_off_by_one_setting_and_training_is_the_same_bit_for_bit(run, recipe, tmp_path):
    run_job("tiny", dataclasses.replace(recipe, telemetry=False), tmp_path / "off")
    with_it, without = content(run[0])[0], content(tmp_path / "off")[0]
    assert with_it["adapter_model.safetensors"] == without["adapter_model.safetensors"]
    assert [{k: v for k, v in line.items() if k not in KEYS} for line in lines(run[0])] == lines(
        tmp_path / "off"
    )


def test_the_baselines_have_no_adapter_to_watch(recipe, tmp_path):
    run_job("tiny", dataclasses.replace(recipe, method="head", epochs=1), tmp_path / "head")
    assert not any(KEYS & line.keys() for line in lines(tmp_path / "head"))


def test_sizes_and_ranks_are_those_of_the_product_itself(model, config):
    """Gram matrices square the numbers: 1e-7 of float64's digits are left, and more than enough."""
    inject(model, config)
    randomise_adapter(model)
    line = Telemetry(model).line()
    for number, layer in enumerate(lora_layers(model).values()):
        delta = layer.delta_weight()
        size = float(delta.norm() / layer.weight.double().norm())
        assert line["delta_over_weight"][number] == pytest.approx(size, rel=1e-7)
        rank = effective_rank(torch.linalg.svdvals(delta)[: layer.r])
        assert line["effective_rank"][number] == pytest.approx(rank, rel=1e-6)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "precision"), [(27, 1, "fp32"), (8, 4, "fp32"), (8, 4, "fp16")]
)
def test_gradients_are_the_mean_losss_unscaled_and_before_clipping(
    recipe, batch_size, accumulation, precision
):
    """One step over all 27 rows, however cut, clipped to next to nothing, against plain autograd."""
    recipe = dataclasses.replace(
        recipe, batch_size=batch_size, accumulation_steps=accumulation, epochs=1, max_gradient_norm=1e-3
    )
    news = load_news(recipe.data, recipe.validation_fraction, recipe.seed)
    model, tokenizer = load_base(recipe.model, num_labels=3, dropout=0.0)
    inject(model, recipe.lora_config())
    randomise_adapter(model)
    rows, validation = (encode(split, tokenizer, 16) for split in (news.train, news.validation))
    batch = collate(rows, torch.arange(27).numpy(), tokenizer.pad_token_id)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    F.cross_entropy(logits, batch.labels, label_smoothing=recipe.label_smoothing).backward()
    wanted = [
        (float(layer.lora_A.grad.norm()), float(layer.lora_B.grad.norm()))
        for layer in lora_layers(model).values()
    ]
    model.zero_grad(set_to_none=True)
    cpu = torch.device("cpu")
    trainer = Trainer(model, recipe, rows, validation, tokenizer.pad_token_id, cpu, precision)
    line = next(iter(trainer.epochs()))
    assert line["step"] == 1
    assert line["gradient_norm"] > 10 * recipe.max_gradient_norm
    found = list(zip(line["gradient_norm_A"], line["gradient_norm_B"], strict=True))
    # float32: sums in another order. float16: some hundred roundings of 2⁻¹¹; unscaled, it would be 65536.
    for pair, wanted_pair in zip(found, wanted, strict=True):
        assert pair == pytest.approx(wanted_pair, rel=1e-4 if precision == "fp32" else 0.05)


def test_an_adapter_that_has_run_away_leaves_no_numbers_that_json_cannot_hold(model, config):
    inject(model, config)
    with torch.no_grad():
        next(iter(lora_layers(model).values())).lora_B.fill_(float("inf"))
    assert Telemetry(model).line() == {}
