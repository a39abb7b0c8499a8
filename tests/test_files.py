"""An adapter's folder: PEFT's format, strict to load, whole or not at all to save."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch
from conftest import randomise_adapter, tiny_roberta
from torch import nn

from lora import (
    AdapterError,
    LoraConfig,
    LoRALinear,
    eject,
    inject,
    load_adapter,
    merge,
    merged,
    read_adapter,
    save_adapter,
)  # fmt: skip
from lora.files import CONFIG_FILE, TENSOR_FILE, _from_peft_key, _to_peft_key
from lora.storage import read_tensors, write_tensors


@pytest.fixture
def adapted(model, config):
    inject(model, config)
    randomise_adapter(model)
    with torch.no_grad():
        model.classifier.out_proj.bias.add_(0.5)
    return model


@pytest.fixture
def folder(adapted, tmp_path):
    save_adapter(adapted, tmp_path / "adapter", base="tiny")
    return tmp_path / "adapter"


def rewrite(folder, change):
    """Rewrites the tensors as PEFT would: no metadata, so that the change itself is what is looked at."""
    tensors = safetensors.torch.load_file(folder / TENSOR_FILE)
    safetensors.torch.save_file(change(tensors) or tensors, folder / TENSOR_FILE)


def reconfigure(folder, **changes):
    fields = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**fields, **changes}))


def test_what_is_loaded_prints_as_a_short_table_without_tensors(folder):
    text = repr(load_adapter(tiny_roberta(), folder))
    assert str(read_adapter(folder)) == text
    lines = text.splitlines()
    assert lines[0].startswith("LoRA adapter of 'tiny': r=4, lora_alpha=8, target_modules=('query', 'value')")
    assert "roberta.encoder.layer.*.attention.self.query.lora_A  (4, 32)  x 2" in lines
    assert len(lines) == 1 + 2 * 2 + 4  # A and B of query and value, and the head's four tensors
    assert "tensor(" not in text


@torch.no_grad()
@pytest.mark.parametrize("save_merged", [False, True])
def test_what_is_loaded_computes_what_was_saved_bit_for_bit(adapted, tmp_path, input_ids, save_merged):
    logits = adapted(input_ids).logits
    if save_merged:
        merge(adapted)
    save_adapter(adapted, tmp_path / "a", base="tiny")
    fresh = tiny_roberta()
    load_adapter(fresh, tmp_path / "a")
    assert not torch.equal(tiny_roberta()(input_ids).logits, logits)
    assert torch.equal(fresh(input_ids).logits, logits)


def test_the_keys_are_pefts(folder):
    keys = set(safetensors.torch.load_file(folder / TENSOR_FILE))
    layer = "base_model.model.roberta.encoder.layer.0.attention.self.query"
    assert {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"} <= keys
    assert "base_model.model.classifier.out_proj.bias" in keys
    assert len(keys) == 2 * 2 * 2 + 4
    fields = json.loads((folder / CONFIG_FILE).read_text())
    assert fields["peft_type"] == "LORA"
    assert (fields["r"], fields["target_modules"], fields["modules_to_save"]) == (
        4,
        ["query", "value"],
        ["classifier"],
    )


def test_the_same_adapter_gives_the_same_bytes_merged_or_not(adapted, tmp_path):
    save_adapter(adapted, tmp_path / "a", base="tiny", metadata={"labels": ["x"], "b": 1, "a": 2})
    with merged(adapted):
        save_adapter(adapted, tmp_path / "b", base="tiny", metadata={"a": 2, "b": 1, "labels": ["x"]})
    for name in (CONFIG_FILE, TENSOR_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert read_adapter(tmp_path / "a").metadata == {"labels": ["x"], "a": 2, "b": 1}
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [CONFIG_FILE, TENSOR_FILE]


def on(part, change):
    """Changes the tensors whose keys hold `part`."""
    return lambda tensors: {key: change(t) if part in key else t for key, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: v for k, v in t.items() if "1.attention.self.query.lora_A" not in k},
            "missing.*1.*lora_A",
        ),
        (lambda t: {**t, "base_model.model.score.weight": torch.zeros(2)}, "no place.*score.weight"),
        (on("lora_A", lambda t: t[:, :-1].contiguous()), r"lora_A is \(4, 31\).*\(4, 32\)"),
        (on("out_proj.bias", lambda t: t[:-1]), r"out_proj.bias is \(2,\)"),
        (on("lora_B", torch.Tensor.double), "lora_B is torch.float64"),
        (on("lora_B", torch.Tensor.int), "lora_B is torch.int32"),
        (on("lora_B", lambda t: t * float("nan")), "lora_B is not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_errors_that_name_the_key(folder, change, message):
    rewrite(folder, change)
    fresh = tiny_roberta()
    with pytest.raises(AdapterError, match=message):
        load_adapter(fresh, folder)
    assert not any(isinstance(module, LoRALinear) for module in fresh.modules())
    assert all(parameter.requires_grad for parameter in fresh.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_qalora": True}, "use_qalora: True"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias: 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "peft_type: 'IA3'"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"some_new_field": {"on": 1}}, "some_new_field"),
        ({"some_new_number": 0.5}, "some_new_number"),
        ({"r": 0}, "r: a rank is at least 1"),
        ({"target_modules": None}, "target_modules: missing"),
        ({"target_modules": ["nothing"]}, "match nothing"),
        ({"target_modules": ["LayerNorm"]}, "not a Linear"),
    ],
)
def test_a_config_that_would_change_the_outputs_is_refused_by_name(folder, changes, message):
    rewrite(folder, lambda tensors: None)
    reconfigure(folder, **changes)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tiny_roberta(), folder)


@torch.no_grad()
def test_fields_that_change_nothing_are_ignored(folder, adapted, input_ids):
    rewrite(folder, lambda tensors: None)
    reconfigure(
        folder, use_dora=False, lora_bias=False, layers_to_transform=None, megatron_core="megatron.core",
        eva_config=None, some_new_field=None, another=[], qalora_group_size=16, peft_version="0.99",
        revision="main", modules_to_save=["classifier", "score"], loftq_config={},
        target_modules=["query", "value", "q_proj"],
    )  # fmt: skip
    fresh = tiny_roberta()
    load_adapter(fresh, folder)
    assert torch.equal(fresh(input_ids).logits, adapted(input_ids).logits)


def test_another_base_model_is_an_error_that_check_base_overrides(folder):
    with pytest.raises(AdapterError, match="trained on 'tiny' with other weights"):
        load_adapter(tiny_roberta(seed=9), folder)
    load_adapter(tiny_roberta(seed=9), folder, check_base=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_dtype_is_the_same_base(folder, dtype):
    load_adapter(tiny_roberta().to(dtype), folder)


def test_without_a_fingerprint_another_name_is_a_warning(folder):
    rewrite(folder, lambda tensors: None)
    fresh = tiny_roberta()
    fresh.config.name_or_path = "other"
    with pytest.warns(UserWarning, match="'tiny'.*'other'"):
        load_adapter(fresh, folder)


def test_loading_over_an_adapter_is_refused(adapted, folder):
    with pytest.raises(RuntimeError, match="adapter already"):
        load_adapter(adapted, folder)


def test_a_config_from_another_adapter_is_noticed(folder):
    reconfigure(folder, lora_alpha=99)
    with pytest.raises(AdapterError, match="not the config that is stored in"):
        read_adapter(folder)


def test_a_folder_written_before_a_setting_existed_loads(adapted, folder):
    tensors, note = read_tensors(folder / TENSOR_FILE, "lora", _from_peft_key)
    settings = ("use_dora", "use_lora_fa", "init_lora_weights", "peft_type", "save_projection")
    for name in settings:
        del note["config"][name]
    write_tensors(folder / TENSOR_FILE, tensors, "lora", note, _to_peft_key)
    assert read_adapter(folder).config == adapted.lora_config
    for field, value in (("a_setting_of_tomorrow", 1), ("target_modules", "(a*)*"), ("r", 0)):
        changed = {**note, "config": {**note["config"], field: value}}
        write_tensors(folder / TENSOR_FILE, tensors, "lora", changed, _to_peft_key)
        with pytest.raises(AdapterError, match=f"the config in its note: .*{field}"):
            read_adapter(folder)


def test_a_renamed_base_is_fine(folder):
    reconfigure(folder, base_model_name_or_path="/moved/here")
    assert read_adapter(folder).base == "/moved/here"


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        read_adapter(folder)


def test_a_pickle_is_not_read(folder):
    (folder / TENSOR_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="pickle"):
        read_adapter(folder)


def test_an_adapter_that_is_not_finite_is_not_saved(adapted, folder):
    before = (folder / TENSOR_FILE).read_bytes()
    with torch.no_grad():
        adapted.classifier.dense.bias[0] = float("nan")
    with pytest.raises(ValueError, match="classifier.dense.bias is not finite"):
        save_adapter(adapted, folder, base="tiny")
    assert (folder / TENSOR_FILE).read_bytes() == before


def test_saving_without_an_adapter_is_an_error(model, tmp_path):
    with pytest.raises(RuntimeError, match="no adapter"):
        save_adapter(model, tmp_path, base="tiny")


@pytest.mark.parametrize("crash_at", range(6))
def test_a_crash_while_saving_leaves_the_old_adapter_or_the_new_one(
    adapted, config, folder, monkeypatch, crash_at
):
    """Whatever call to the file system the crash comes before."""
    import pathlib

    old = read_adapter(folder)
    newer = tiny_roberta()
    inject(newer, dataclasses.replace(config, lora_alpha=32), seed=8)
    calls = 0

    def counted(original):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > crash_at:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr("lora.files.os.fsync", counted(__import__("os").fsync))
    monkeypatch.setattr(pathlib.Path, "replace", counted(pathlib.Path.replace))
    with pytest.raises(KeyboardInterrupt):
        save_adapter(newer, folder, base="tiny")
    monkeypatch.undo()
    found = read_adapter(folder)
    assert found.config.lora_alpha in (old.config.lora_alpha, 32)
    load_adapter(tiny_roberta(), folder)


@torch.no_grad()
def test_the_first_of_two_patterns_wins_after_a_save_too(model, config, input_ids, tmp_path):
    patterns = {r"layer\.1\.attention\.self\.query": 64, r"attention\.self\.query": 4}
    assert list(patterns) != sorted(patterns)
    inject(model, dataclasses.replace(config, alpha_pattern=patterns, rank_pattern={"value": 1, "query": 2}))
    randomise_adapter(model)
    save_adapter(model, tmp_path, base="tiny")
    fresh = tiny_roberta()
    adapter = load_adapter(fresh, tmp_path)
    assert list(adapter.config.alpha_pattern.items()) == list(patterns.items())
    assert list(adapter.config.rank_pattern) == ["value", "query"]
    assert torch.equal(fresh(input_ids).logits, model(input_ids).logits)


def test_metadata_comes_back_as_json_has_it(adapted, tmp_path):
    labels = {number: f"class {number}" for number in range(11)}  # as strings they sort otherwise
    save_adapter(adapted, tmp_path, base="tiny", metadata={"id2label": labels})
    assert read_adapter(tmp_path).metadata["id2label"] == {str(n): name for n, name in labels.items()}


def test_another_tools_metadata_is_an_error_that_says_so(folder):
    tensors = safetensors.torch.load_file(folder / TENSOR_FILE)
    safetensors.torch.save_file(tensors, folder / TENSOR_FILE, {"lora": "true"})
    with pytest.raises(AdapterError, match="not a JSON object"):
        read_adapter(folder)


class Twice(nn.Module):
    """A Linear and a normalisation, each shared under two names; the latter counts batches in int64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.ModuleDict({"query": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
        self.second = nn.ModuleDict({"value": self.first["query"], "norm": self.first["norm"]})

    def forward(self, x):
        for part in (self.first, self.second):
            x = part["norm"](next(iter(part.values()))(x))
        return x


@torch.no_grad()
def test_what_stands_in_two_places_is_saved_once_and_loaded_into_both(tmp_path):
    model, x = Twice(), torch.randn(8, 4)
    linear = model.first["query"]
    # Its first name is first.query, though "value" is the first pattern.
    config = LoraConfig(
        r=2, target_modules=("value", "query"), rank_pattern={"value": 3}, modules_to_save=("norm",)
    )
    inject(model, config)
    randomise_adapter(model)
    model.train()(x)  # counts a batch
    save_adapter(model, tmp_path, base="twice")
    loaded = Twice()
    adapter = load_adapter(loaded, tmp_path)
    assert len(adapter.tensors) == 2 + 5
    assert adapter.tensors["first.query.lora_A"].shape == (2, 4)
    assert loaded.first["query"] is loaded.second["value"]
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    eject(model)
    assert model.first["query"] is model.second["value"]
    assert model.first["query"].weight is linear.weight


@torch.no_grad()
def test_a_target_inside_a_part_that_stands_in_two_places_loads_again(tmp_path):
    def make():
        torch.manual_seed(0)
        part = nn.ModuleDict({"query": nn.Linear(4, 4)})
        return nn.ModuleDict({"first": part, "second": part})

    model, loaded = make(), make()
    inject(model, LoraConfig(r=2, target_modules=r"second\.query"))
    randomise_adapter(model)
    save_adapter(model, tmp_path, base="parts")
    load_adapter(loaded, tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(loaded["second"]["query"](x), model["second"]["query"](x))
