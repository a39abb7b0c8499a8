"""inject and eject: which layers, what changes, and that nothing else does."""

import copy
import dataclasses

import pytest
import torch
from conftest import randomise_adapter, tiny_roberta
from torch import nn
from torch.nn.utils import prune

from lora import LoraConfig, LoRALinear, eject, inject
from lora.adapted import lora_layers

LAYER = "roberta.encoder.layer"


def test_outputs_stay_bit_for_bit(model, config, input_ids):
    before = model(input_ids).logits
    inject(model, config)
    assert torch.equal(model(input_ids).logits, before)


def test_the_report_says_which_pattern_matched_what(model, config):
    report = inject(model, config)
    assert report.adapted["query"] == tuple(f"{LAYER}.{i}.attention.self.query" for i in range(2))
    assert report.saved == {"classifier": ("classifier",)}
    assert "2 layers" in str(report) == repr(report)
    assert set(lora_layers(model)) == {*report.adapted["query"], *report.adapted["value"]}


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (("attention.self.query",), 2),  # trailing components
        ((f"{LAYER}.1.attention.self.key",), 1),  # a whole name
        (("dense",), 6),  # three a layer; the classifier's own is trained whole
        ((f"{LAYER}.0.attention.self.query", "query"), 2),  # patterns may overlap
        (r".*\.0\..*\.(query|value)", 2),  # one string is a regular expression for whole names
    ],
)
def test_patterns_match_whole_trailing_components(model, config, targets, layers):
    inject(model, dataclasses.replace(config, target_modules=targets))
    assert len(lora_layers(model)) == layers


@pytest.mark.parametrize("targets", [("uery",), ("query", "q_proj"), ("self",), ("quer",), "query"])
def test_a_pattern_that_matches_no_linear_is_an_error_that_names_it(model, config, targets):
    bad = targets if isinstance(targets, str) else targets[-1]
    with pytest.raises((ValueError, TypeError), match=f"'{bad}'"):
        inject(model, dataclasses.replace(config, target_modules=targets))
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_error_names_the_layers_that_there_are(model):
    with pytest.raises(ValueError, match="dense, key, out_proj, query, value"):
        inject(model, LoraConfig(target_modules=("q_proj",)))


def test_modules_to_save_must_exist(model):
    with pytest.raises(ValueError, match="modules_to_save: 'score'.*roberta, classifier"):
        inject(model, LoraConfig(modules_to_save=("score",)))


def test_something_that_is_not_a_linear_is_refused_by_name(model):
    with pytest.raises(TypeError, match="LayerNorm matches|'LayerNorm' matches .*LayerNorm"):
        inject(model, LoraConfig(target_modules=("LayerNorm",)))


def test_a_subclass_of_linear_is_refused():
    """MultiheadAttention reads out_proj's weight and never calls it: an adapter there would do nothing."""
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(TypeError, match="out_proj"):
        inject(attention, LoraConfig(target_modules=("out_proj",)))


def test_injecting_twice_is_refused(model, config):
    inject(model, config)
    with pytest.raises(RuntimeError, match="adapter already"):
        inject(model, config)


def test_only_adapter_and_head_train(model, config):
    inject(model, config)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name.startswith("classifier.") or ".lora_" in name), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mode_dtype_and_device_stay(config, training, dtype):
    model = tiny_roberta().to(dtype).train(training)
    inject(model, config)
    for layer in lora_layers(model).values():
        assert layer.training == training
        assert layer.weight.dtype == dtype
        assert layer.lora_A.device == layer.weight.device


def test_a_start_depends_on_seed_and_name_alone(config):
    first, second, third, other = (tiny_roberta(seed=seed) for seed in (0, 1, 2, 3))
    inject(first, config, seed=5)
    torch.rand(100)
    inject(second, dataclasses.replace(config, target_modules=("value", "key", "query")), seed=5)
    with torch.device("meta"):  # torch's default device
        inject(third.to(torch.bfloat16), config, seed=5)
    inject(other, config, seed=6)
    name = f"{LAYER}.1.attention.self.query"
    start = lora_layers(first)[name].lora_A
    assert torch.equal(start, lora_layers(second)[name].lora_A)
    assert torch.equal(start, lora_layers(third)[name].lora_A)
    assert not torch.equal(start, lora_layers(other)[name].lora_A)
    assert not torch.equal(start, lora_layers(first)[f"{LAYER}.0.attention.self.query"].lora_A)


def test_a_linear_in_two_places_gets_one_adapter():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.ModuleDict({"query": shared}), "b": nn.ModuleDict({"query": shared})})
    inject(model, LoraConfig(r=2, target_modules=("query",)))
    assert isinstance(model["a"]["query"], LoRALinear)
    assert model["a"]["query"] is model["b"]["query"]


def test_patterns_give_layers_their_own_rank_and_alpha(model):
    config = LoraConfig(
        r=2, lora_alpha=4, rank_pattern={r"1\.attention\.self\.query": 6}, alpha_pattern={"value": 8}
    )
    inject(model, config)
    layers = lora_layers(model)
    assert layers[f"{LAYER}.1.attention.self.query"].r == 6
    assert layers[f"{LAYER}.0.attention.self.query"].r == 2
    assert layers[f"{LAYER}.0.attention.self.value"].scaling == 4.0
    assert layers[f"{LAYER}.0.attention.self.query"].scaling == 2.0
    eject(model)
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(ValueError, match=f"{field}: 'zero' matches no module of target_modules"):
            inject(model, dataclasses.replace(config, **{field: {"zero": 3}}))


def test_eject_gives_back_the_plain_model_bit_for_bit(model, config, input_ids):
    before, state = model(input_ids).logits, copy.deepcopy(model.state_dict())
    weight = model.roberta.encoder.layer[0].attention.self.query.weight
    inject(model, config)
    randomise_adapter(model)
    assert not torch.equal(model(input_ids).logits, before)
    eject(model)
    assert torch.equal(model(input_ids).logits, before)
    assert model.state_dict().keys() == state.keys()
    assert type(model.roberta.encoder.layer[0].attention.self.query) is nn.Linear
    assert model.roberta.encoder.layer[0].attention.self.query.weight is weight
    assert not hasattr(model, "lora_config")
    inject(model, config)  # and it can be injected again


def test_ejecting_nothing_is_refused(model):
    with pytest.raises(RuntimeError, match="no adapter"):
        eject(model)


def test_an_error_while_layers_are_made_leaves_the_model_as_it_was(model, config):
    modules = list(model.modules())

    class Failing(LoRALinear):
        def __init__(self, linear, **settings):
            super().__init__(linear, **settings)
            if settings["r"] == 3:
                raise MemoryError

    with pytest.raises(MemoryError):
        inject(model, dataclasses.replace(config, rank_pattern={"value": 3}), layer=Failing)
    assert list(model.modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_rank_above_both_sides_of_a_weight_is_refused_by_name(model, config):
    inject(model, dataclasses.replace(config, r=32))
    eject(model)
    with pytest.raises(ValueError, match=r"r: 33 is more than 32, .* roberta.encoder.layer.1.*value$"):
        inject(model, dataclasses.replace(config, rank_pattern={"1.attention.self.value": 33}))
    assert not hasattr(model, "lora_config")


def test_one_string_that_matches_nothing_is_explained(model, config):
    with pytest.raises(
        ValueError, match=r"'query' is a regular expression.*unlike \('query',\).*end with dense"
    ):
        inject(model, dataclasses.replace(config, target_modules="query"))
    with pytest.raises(ValueError, match=r"target_modules: 'q' matches no module"):
        inject(model, dataclasses.replace(config, target_modules=("q",)))


def test_what_was_injected_into_a_part_is_ejected_from_that_part(model, config):
    inject(model.roberta, dataclasses.replace(config, modules_to_save=()))
    with pytest.raises(RuntimeError, match="passed to inject"):
        eject(model)
    assert len(lora_layers(model)) == 4
    eject(model.roberta)


def test_a_pruned_linear_is_refused(model, config):
    prune.random_unstructured(model.roberta.encoder.layer[0].attention.self.query, "weight", 0.5)
    with pytest.raises(TypeError, match=r"query.*not a Parameter"):
        inject(model, config)


def test_a_linear_inside_a_module_that_stands_in_two_places_is_adapted_once(config):
    shared = nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)})
    model = nn.ModuleDict({"first": shared, "second": shared})
    inject(model, dataclasses.replace(config, modules_to_save=()))
    assert set(lora_layers(model)) == {"first.query", "first.value"}
    assert model["first"]["query"] is model["second"]["query"]
