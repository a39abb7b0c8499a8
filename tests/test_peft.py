"""Adapters go both ways with PEFT. Runs where PEFT is installed: `make test-peers`."""

import copy
import dataclasses
import json
import re

import pytest
import safetensors.torch
import torch
from conftest import randomise_adapter
from conftest import tiny_roberta as wild_roberta

from learn import course
from learn.runner import check_step
from lora import (
    AdapterError,
    Adapters,
    LoraConfig,
    combine,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from lora.adapted import lora_layers
from lora.files import CONFIG_FILE, TENSOR_FILE
from lora.variants.eva import inject_eva

peft = pytest.importorskip("peft")

SELF = "roberta.encoder.layer.{}.attention.self"
CONFIGS = {
    "query and value": {"target_modules": ["query", "value"]},
    "whole names": {"target_modules": [f"{SELF.format(0)}.key", f"{SELF.format(1)}.query"]},
    "a regular expression": {"target_modules": r".*layer\.1\..*(query|dense)"},
    "different sets in different layers": {
        "target_modules": [f"{SELF.format(0)}.query", "1.attention.self.value"]
    },
    "all linear layers": {"target_modules": ["query", "key", "value", "dense"]},
    "rank and alpha patterns": {
        "target_modules": ["query", "value"],
        "rank_pattern": {"query": 5, r"1\.attention\.self\.value": 1},
        "alpha_pattern": {r"layer.0.attention.self.value": 3},
    },
    "rsLoRA": {"target_modules": ["query", "value"], "use_rslora": True},
    "rsLoRA with patterns": {
        "target_modules": ["query", "value"],
        "use_rslora": True,
        "rank_pattern": {"query": 9},
        "alpha_pattern": {"value": 7},
    },
    "a gaussian start": {"target_modules": ["query"], "init_lora_weights": "gaussian"},
    "entries that the model does not have": {
        "target_modules": ["query", "q_proj"],
        "modules_to_save": ["classifier", "score", "qa_outputs"],
    },
}


def tiny_roberta():
    """Of weights as large as a trained model's: larger ones would blow roundings up from layer to layer."""
    return wild_roberta(initializer_range=0.05)


def close(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal to 2e-6 of the largest logit: float32, the same products in another order."""
    return bool((first - second).abs().max() <= 2e-6 * second.abs().max())


@torch.no_grad()
def make_peft(task_type, input_ids, **settings):
    model = tiny_roberta()
    config = peft.LoraConfig(task_type=task_type, r=4, lora_alpha=6, **settings)
    model = peft.get_peft_model(model, config).eval()
    randomise_adapter_of_peft(model)
    assert not torch.equal(model(input_ids).logits, tiny_roberta()(input_ids).logits)
    return model


def randomise_adapter_of_peft(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        elif parameter.requires_grad and "out_proj.bias" in name:
            parameter.add_(0.3)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*trained on")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_what_peft_saved_loads_here_and_goes_back(name, task_type, tmp_path, input_ids):
    theirs = make_peft(task_type, input_ids, **CONFIGS[name])
    wanted = theirs(input_ids).logits
    theirs.save_pretrained(tmp_path / "theirs")

    ours = tiny_roberta()
    load_adapter(ours, tmp_path / "theirs")
    assert close(ours(input_ids).logits, wanted)
    merge(ours)
    assert (ours(input_ids).logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()  # float32 merges round

    save_adapter(ours, tmp_path / "ours", base="tiny", task_type=task_type)
    again = peft.PeftModel.from_pretrained(tiny_roberta(), str(tmp_path / "ours")).eval()
    assert close(again(input_ids).logits, wanted)


@torch.no_grad()
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_what_is_saved_here_loads_there(use_rslora, task_type, tmp_path, input_ids):
    model = tiny_roberta()
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=("query", "dense"), modules_to_save=("classifier",),
        use_rslora=use_rslora, rank_pattern={"query": 3}, alpha_pattern={"dense": 5},
    )  # fmt: skip
    inject(model, config)
    randomise_adapter(model)
    model.classifier.out_proj.bias.add_(0.3)
    wanted = model(input_ids).logits
    save_adapter(model, tmp_path, base="tiny", task_type=task_type, metadata={"labels": ["a"]})
    theirs = peft.PeftModel.from_pretrained(tiny_roberta(), str(tmp_path)).eval()
    assert close(theirs(input_ids).logits, wanted)


@torch.no_grad()
def test_a_16_bit_adapter_of_peft_loads(tmp_path, input_ids):
    theirs = make_peft("SEQ_CLS", input_ids, target_modules=["query", "value"])
    theirs.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / TENSOR_FILE)
    safetensors.torch.save_file({key: t.half() for key, t in tensors.items()}, tmp_path / TENSOR_FILE)
    wanted = peft.PeftModel.from_pretrained(tiny_roberta(), str(tmp_path)).eval()(input_ids).logits
    ours = tiny_roberta()
    load_adapter(ours, tmp_path)
    assert close(ours(input_ids).logits, wanted)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {"use_qalora": True}, {"lora_bias": True}, {"bias": "lora_only"}, {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"}, {"layers_to_transform": [0]}, {"layers_to_transform": 0},
        {"exclude_modules": ["value"]}, {"trainable_token_indices": [1, 2]},
    ],
    ids=str,
)  # fmt: skip
def test_what_would_change_the_outputs_and_is_not_supported_is_refused_by_name(settings, tmp_path, input_ids):
    model = tiny_roberta()
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], **settings)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=next(iter(settings))):
        load_adapter(tiny_roberta(), tmp_path)


def test_every_field_of_pefts_default_config_passes(tmp_path, input_ids):
    """PEFT's own defaults, all written out: none of them may be refused."""
    with torch.no_grad():
        make_peft("SEQ_CLS", input_ids, target_modules=["query"]).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert len(fields) > 25
    load_adapter(tiny_roberta(), tmp_path)


# --- variants ----------------------------------------------------------------------------------------


def gradients(model: torch.nn.Module, input_ids) -> dict[str, torch.Tensor]:
    """By the names of this project, of the mean of squared logits."""
    model.zero_grad()
    model(input_ids).logits.square().mean().backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            name = name.removeprefix("base_model.model.").replace(".modules_to_save", "")
            found[re.sub(r"\.default(\.weight)?", "", name)] = parameter.grad
    return found


def assert_same_gradients(ours, theirs, input_ids):
    """Relative to each tensor's norm, 1e-5: float32, the same sums in another order."""
    mine, wanted = gradients(ours, input_ids), gradients(theirs, input_ids)
    assert mine.keys() == wanted.keys()
    for name, gradient in mine.items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


@torch.no_grad()
def randomise_all(model: torch.nn.Module) -> None:
    """Moves the trained tensors of PEFT's adapter away from their start."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_" in name or "vera_" in name):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


BOTH_SHAPES = ["query", "value", "output.dense"]  # 32 x 32 and 32 x 64
VARIANTS = {
    "DoRA": peft.LoraConfig(r=4, lora_alpha=6, target_modules=BOTH_SHAPES, use_dora=True),
    "DoRA with rsLoRA": peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["query"], use_dora=True, use_rslora=True, rank_pattern={"query": 3}
    ),
    "VeRA": peft.VeraConfig(r=16, target_modules=BOTH_SHAPES, projection_prng_key=5),
    "VeRA by the key": peft.VeraConfig(r=16, target_modules=BOTH_SHAPES, save_projection=False),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*trained on", "ignore:Specified to not")
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_a_variant_goes_both_ways_and_has_pefts_gradients(name, task_type, tmp_path, input_ids):
    config = copy.deepcopy(VARIANTS[name])
    config.task_type = task_type
    theirs = peft.get_peft_model(tiny_roberta(), config).eval()
    randomise_all(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tiny_roberta()
    load_adapter(ours, tmp_path / "theirs")
    with torch.no_grad():
        wanted = theirs(input_ids).logits
        assert close(ours(input_ids).logits, wanted)
    assert_same_gradients(ours, theirs, input_ids)

    save_adapter(ours, tmp_path / "ours", base="tiny", task_type=task_type)
    again = peft.PeftModel.from_pretrained(tiny_roberta(), str(tmp_path / "ours"), is_trainable=True).eval()
    with torch.no_grad():
        assert close(again(input_ids).logits, wanted)
    assert_same_gradients(ours, again, input_ids)
    first, second = (
        safetensors.torch.load_file(tmp_path / each / TENSOR_FILE) for each in ("theirs", "ours")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_starts_as_pefts_and_its_folder_is_plain_lora_for_peft(use_rslora, tmp_path, input_ids):
    theirs = peft.get_peft_model(
        tiny_roberta(),
        peft.LoraConfig(
            task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=BOTH_SHAPES, use_rslora=use_rslora,
            init_lora_weights="pissa",
        ),
    ).eval()  # fmt: skip
    ours = tiny_roberta()
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=tuple(BOTH_SHAPES), modules_to_save=("classifier",),
        use_rslora=use_rslora, init_lora_weights="pissa", rank_pattern={"query": 3},
    )  # fmt: skip
    inject(ours, dataclasses.replace(config, rank_pattern={}))
    with torch.no_grad():
        assert torch.equal(ours(input_ids).logits, tiny_roberta()(input_ids).logits)  # PEFT's are not
        parameters = dict(theirs.named_parameters())
        for name, layer in lora_layers(ours).items():
            A, B = (parameters[f"base_model.model.{name}.lora_{key}.default.weight"] for key in "AB")
            signs = (layer.lora_A * A).sum(1).sign()
            # PEFT's SVD is in float32, whose error in a singular vector is 2⁻²⁴ of the largest singular
            # value over the gap to the next one, here about a hundredth of it
            assert (layer.lora_A - signs[:, None] * A).abs().max() <= 1e-4 * A.abs().max()
            assert (layer.lora_B - signs * B).abs().max() <= 1e-4 * B.abs().max()
            for key, tensor in (("A", A), ("B", B)):  # to compare gradients at the same point
                getattr(layer, f"lora_{key}").copy_(tensor)
                getattr(layer, f"start_{key}").copy_(tensor)
    assert_same_gradients(ours, theirs, input_ids)

    ours = tiny_roberta()
    inject(ours, config)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter.add_(0.1 * noise)
        wanted = ours(input_ids).logits
        save_adapter(ours, tmp_path, base="tiny", task_type="SEQ_CLS")
        assert json.loads((tmp_path / CONFIG_FILE).read_text())["init_lora_weights"] is True
        plain = peft.PeftModel.from_pretrained(tiny_roberta(), str(tmp_path)).eval()
        assert plain.peft_config["default"].r == 8
        assert close(plain(input_ids).logits, wanted)


@torch.no_grad()
def test_peft_reads_the_ranks_that_eva_has_distributed(tmp_path, input_ids):
    ours = tiny_roberta()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=tuple(BOTH_SHAPES), init_lora_weights="eva")
    inject_eva(ours, config, [{"input_ids": input_ids}])
    assert len({layer.r for layer in lora_layers(ours).values()}) > 1
    randomise_adapter(ours)
    save_adapter(ours, tmp_path, base="tiny")
    theirs = peft.PeftModel.from_pretrained(tiny_roberta(), str(tmp_path)).eval()
    assert close(theirs(input_ids).logits, ours(input_ids).logits)


@torch.no_grad()
def test_peft_reads_a_sum_of_adapters(tmp_path, input_ids):
    """Of other ranks, targets and starts: PEFT sees plain LoRA with a rank for each layer."""
    model = tiny_roberta()
    adapters = Adapters(model)
    for seed, config in enumerate(
        (
            LoraConfig(r=3, lora_alpha=6, modules_to_save=("classifier",)),
            LoraConfig(r=2, target_modules=("query", "output.dense"), init_lora_weights="pissa"),
        )
    ):
        adapters.add(str(seed), config, seed)
        adapters.use(str(seed))
        randomise_adapter(model, seed)
    combine(adapters, "sum", {"0": 0.5, "1": -0.25})
    adapters.save("sum", tmp_path, base="tiny", task_type="SEQ_CLS")
    adapters.use("sum")
    theirs = peft.PeftModel.from_pretrained(tiny_roberta(), str(tmp_path))
    assert close(model(input_ids).logits, theirs(input_ids).logits)


def test_unmerging_in_peft_drifts_and_here_it_does_not(tmp_path, input_ids):
    theirs = make_peft("SEQ_CLS", input_ids, target_modules=["query", "value"]).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    layer = theirs.base_model.model.roberta.encoder.layer[0].attention.self.query
    before = layer.get_base_layer().weight.clone()
    for _ in range(10):
        theirs.merge_adapter()
        theirs.unmerge_adapter()
    assert not torch.equal(layer.get_base_layer().weight, before)
    ours = tiny_roberta().to(torch.bfloat16)
    weight = ours.roberta.encoder.layer[0].attention.self.query.weight
    assert torch.equal(weight, before)
    load_adapter(ours, tmp_path, check_base=False)
    for _ in range(10):
        merge(ours)
        unmerge(ours)
    assert torch.equal(weight, before)


def test_peft_reads_what_step_10_of_the_course_writes(tmp_path):
    (tmp_path / course.file_name(10)).write_text(course.solution(10))
    result = check_step(tmp_path, 10)
    assert result.done, result.message
    assert result.passed[-1][1].startswith("peft ")
