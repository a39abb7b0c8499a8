"""Files, flags, streams and disks as they should not be: never a silent error, never a traceback."""

import dataclasses
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import StopsAtOnce, content, randomise_adapter, tiny_roberta, write_hub_folder
from datasets import Dataset
from torch import nn

from lora import AdapterError, LoraConfig, inject, load_adapter, read_adapter, save_adapter
from lora.files import CONFIG_FILE, TENSOR_FILE
from lora.peft_format import from_peft
from lora.storage import digest
from model import load_base
from model.minilm import minilm_tokenizer
from train import export, predict
from train.batches import encode
from train.checkpoint import CheckpointError
from train.cli import main
from train.config import RecipeError, load_recipe
from train.data import DataError, load_news
from train.job import run_job
from train.metrics import Scores
from train.run_figures import draw_all
from train.runs import RunError, run_recipe
from train.signals import InterruptedRunError
from train.trained import Trained, load_trained

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    return dataclasses.replace(tiny_recipe, epochs=2, log_every_steps=2)


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("robust") / "run"
    run_job("tiny", recipe, folder)
    return folder


@pytest.fixture
def folder(model, config, tmp_path):
    """An adapter's folder, saved from `model`, which keeps the adapter."""
    inject(model, config)
    randomise_adapter(model)
    save_adapter(model, tmp_path / "adapter", base="tiny")
    return tmp_path / "adapter"


# --- adapter folders ---------------------------------------------------------------------------------


def test_a_tensor_under_two_keys_is_refused(folder):
    tensors = safetensors.torch.load_file(folder / TENSOR_FILE)
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    tensors[key.removesuffix(".weight")] = tensors[key] + 1
    safetensors.torch.save_file(tensors, folder / TENSOR_FILE)
    with pytest.raises(AdapterError, match="in the file twice"):
        read_adapter(folder)


def test_a_base_with_other_weights_outside_the_adapted_layers_is_refused(folder):
    for part in (
        "embeddings.word_embeddings",
        "encoder.layer.1.output.dense",
        "encoder.layer.0.output.LayerNorm",
    ):
        base = tiny_roberta()
        nn.init.normal_(base.roberta.get_submodule(part).weight)
        with pytest.raises(AdapterError, match="outside the adapted layers"):
            load_adapter(base, folder)
        load_adapter(base, folder, check_base=False)
    load_adapter(tiny_roberta(), folder)


@pytest.mark.parametrize("vocab_size", [300, 3000])  # hashed as it is, and by checksums
def test_one_changed_weight_anywhere_in_the_base_is_another_base(config, tmp_path, vocab_size):
    model = tiny_roberta(vocab_size=vocab_size)
    inject(model, config)
    save_adapter(model, tmp_path, base="tiny")
    words = tiny_roberta(vocab_size=vocab_size)
    words.roberta.embeddings.word_embeddings.weight.data[[7, 99]] = (
        words.roberta.embeddings.word_embeddings.weight.data[[99, 7]]
    )
    for change in (
        lambda base: base.embeddings.word_embeddings.weight.data[299, 31].add_(1e-3),
        lambda base: base.encoder.layer[1].output.dense.weight.data[5, 3].add_(1e-3),
        lambda base: base.embeddings.position_embeddings.weight.data[7].neg_(),
    ):
        base = tiny_roberta(vocab_size=vocab_size)
        change(base.roberta)
        for other in (base, words):
            with pytest.raises(AdapterError, match="outside the adapted layers"):
                load_adapter(other, tmp_path)
    load_adapter(tiny_roberta(vocab_size=vocab_size).to(torch.bfloat16), tmp_path)


@pytest.mark.parametrize(("before", "after"), [({"factor": 2.0}, {"factor": 4.0}), ([1, 2], [2, 1])])
def test_nested_fields_and_lists_of_the_config_are_compared(config, tmp_path, before, after):
    model, other = tiny_roberta(), tiny_roberta()
    model.config.scales, other.config.scales = before, after
    inject(model, config)
    save_adapter(model, tmp_path, base="tiny")
    with pytest.raises(AdapterError, match=r"with scales(.factor)? = "):
        load_adapter(other, tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("num_attention_heads", 4), ("layer_norm_eps", 1e-3), ("hidden_act", "relu")]
)
def test_a_base_with_another_config_is_refused_by_field(folder, field, value):
    base = tiny_roberta()
    setattr(base.config, field, value)
    with pytest.raises(AdapterError, match=f"with {field} = "):
        load_adapter(base, folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (CONFIG_FILE, "[" * 100_000, "damaged"),
        (CONFIG_FILE, {"lora_alpha": 10**400}, "lora_alpha"),
        (CONFIG_FILE, {"r": 10**400}, "not the config|r:"),
        (CONFIG_FILE, {"rank_pattern": {"(?i)query": 2}}, "not a regular expression"),
        (CONFIG_FILE, {"target_modules": "a{99999999999999999999}"}, "not a regular expression"),
        (CONFIG_FILE, {"target_modules": r"(\w+\w+)+\.(x|y)"}, "very long to match"),
        (CONFIG_FILE, {"target_modules": "(a|aa)+$"}, "very long to match"),
        (CONFIG_FILE, {"alpha_pattern": {"(a*)*b": 1.0}}, "very long to match"),
        (CONFIG_FILE, {"target_modules": ".*.*.*.*.*.*x"}, "very long to match"),
        (CONFIG_FILE, {"target_modules": ".?" * 30 + "x"}, "very long to match"),
        (CONFIG_FILE, {"target_modules": "(?:.|..|...)" * 14 + "x"}, "very long to match"),
        (CONFIG_FILE, {"rank_pattern": {"(?!" + ".?" * 26 + "x)": 2}}, "very long to match"),
    ],
)
def test_crafted_configs_are_errors(folder, name, text, message):
    if isinstance(text, dict):
        text = json.dumps({**json.loads((folder / name).read_text()), **text})
    (folder / name).write_text(text)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tiny_roberta(), folder)


def test_a_key_that_is_twice_in_a_config_is_an_error(folder):
    text = (folder / CONFIG_FILE).read_text()
    (folder / CONFIG_FILE).write_text(text.replace('"lora_alpha": 8', '"lora_alpha": 8, "lora_alpha": 16'))
    with pytest.raises(AdapterError, match="a key is in it twice"):
        read_adapter(folder)


def test_a_rank_beyond_any_model_is_an_error_without_a_note_too(folder):
    safetensors.torch.save_file(safetensors.torch.load_file(folder / TENSOR_FILE), folder / TENSOR_FILE)
    fields = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**fields, "r": 10**400}))
    with pytest.raises(AdapterError, match=r"r: a rank is at least 1 and below 2³¹"):
        load_adapter(tiny_roberta(), folder)


def test_a_head_that_is_no_matrix_is_an_error(folder):
    tensors = safetensors.torch.load_file(folder / TENSOR_FILE)
    tensors["base_model.model.classifier.out_proj.weight"] = torch.zeros(())
    safetensors.torch.save_file(tensors, folder / TENSOR_FILE)
    with pytest.raises(AdapterError, match="no classification head"):
        load_trained(folder)


def test_usual_regular_expressions_are_accepted():
    for pattern in (
        r".*\.(query|value)", r"(.*\.)?query", r"layer\.\d+\.attention\.self\.query", "(?i).*QUERY",
        r"(?:.*?(?:roberta|bert).*?(?:self|attn).*?(?:query|value).*?)|(?:\bmodel\.layers\.[\d]{1,}\.q)",
    ):  # fmt: skip
        fields = {"peft_type": "LORA", "target_modules": pattern}
        assert from_peft(fields).target_modules == pattern


@pytest.mark.parametrize(
    "note",
    [
        {"config": 1},
        {"metadata": {}},
        [],
        {"fingerprint": {}, "config": {}},
        {"fingerprint": {"adapted": {}, "rest": 5, "config": {}}, "config": {}, "metadata": {}},
    ],
)
def test_a_note_of_another_format_is_an_error(folder, note):
    tensors = safetensors.torch.load_file(folder / TENSOR_FILE)
    if isinstance(note, dict):
        names = {_name(key): tensor for key, tensor in tensors.items()}
        note = {**note, "digest": digest(names, note)}
    safetensors.torch.save_file(tensors, folder / TENSOR_FILE, {"lora": json.dumps(note)})
    with pytest.raises(AdapterError, match="damaged"):
        read_adapter(folder)


def _name(key):
    name = key.removeprefix("base_model.model.")
    return name.removesuffix(".weight") if ".lora_" in name else name


def test_a_dtype_that_no_one_computes_in_is_an_error(folder):
    tensors = safetensors.torch.load_file(folder / TENSOR_FILE)
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    safetensors.torch.save_file(tensors, folder / TENSOR_FILE)
    with pytest.raises(AdapterError, match="float8_e4m3fn, which is not supported"):
        read_adapter(folder)


def test_tied_modules_to_save_are_saved_and_loaded(tmp_path):
    def build():
        model = nn.ModuleDict({"body": nn.Linear(4, 4), "one": nn.Linear(4, 2), "two": nn.Linear(4, 2)})
        model["two"].weight = model["one"].weight
        return model

    config = LoraConfig(r=2, target_modules=("body",), modules_to_save=("one", "two"))
    torch.manual_seed(0)
    model = build()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject(model, config)
    nn.init.normal_(model["one"].weight)
    save_adapter(model, tmp_path / "a", base="tied")
    other = build()
    other.load_state_dict(base)
    load_adapter(other, tmp_path / "a")
    assert torch.equal(other["one"].weight, model["one"].weight)
    assert other["two"].weight is other["one"].weight


def test_files_honour_the_umask(model, config, tmp_path):
    inject(model, config)
    before = os.umask(0o077)
    try:
        save_adapter(model, tmp_path / "a", base="tiny")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").iterdir()}
    assert modes == {0o600}


# --- data --------------------------------------------------------------------------------------------


def write_ag(folder, train, test, classes=None):
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in (("train", train), ("test", test)):
        rows = [f'"{number}","Title {number}","Text {i}"' for i, number in enumerate(numbers)]
        (folder / f"{name}.csv").write_text("\n".join(rows) + "\n")
    if classes:
        (folder / "classes.txt").write_text(classes)
    return str(folder)


def test_class_numbers_with_a_gap_keep_their_numbers(tmp_path):
    news = load_news(write_ag(tmp_path, [1, 2, 4, 5] * 3, [5, 4, 2, 1]), 0.3, 0)
    assert news.labels == ("1", "2", "4", "5")
    for split in (news.train, news.validation, news.test):
        for text, label in zip(split["text"], split["label"], strict=True):
            assert text.startswith(f"Title {news.labels[label]} ")
    with pytest.raises(DataError, match=r"test.csv:2: class '3' is not one of 1, 2, 4, 5"):
        load_news(write_ag(tmp_path, [1, 2, 4, 5] * 3, [1, 3]), 0.3, 0)


def test_an_empty_line_between_class_names_shifts_no_class(tmp_path):
    with pytest.raises(DataError, match=r"classes.txt:2: an empty line; line n names class n"):
        load_news(write_ag(tmp_path, [1, 2, 3] * 3, [1, 2, 3], "one\n\ntwo\nthree\n"), 0.3, 0)
    assert load_news(write_ag(tmp_path, [1, 2] * 3, [1], "one\ntwo\n\n"), 0.3, 0).labels == ("one", "two")


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x0c", "\x1c"])
def test_characters_that_python_takes_for_line_ends_are_text(tmp_path, separator):
    rows = [f"one{separator}two {i},{'ab'[i % 2]}" for i in range(8)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    news = load_news(str(tmp_path), 0.3, 0)
    assert set(news.test["text"]) == {row.split(",")[0] for row in rows}
    (tmp_path / "test.csv").write_text("text,label\n" + "\n".join([*rows, "no label,"]) + "\n")
    with pytest.raises(DataError, match=r"test.csv:10: the label is empty"):
        load_news(str(tmp_path), 0.3, 0)


def test_a_text_of_a_megabyte_is_read(tmp_path):
    rows = [f"{'long ' * 200_000}{i},{'ab'[i % 2]}" for i in range(4)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    assert len(load_news(str(tmp_path), 0.5, 0).test["text"][0]) > 900_000


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "swap"])
def test_a_damaged_token_cache_is_made_again(tmp_path, monkeypatch, damage):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    tokenizer = minilm_tokenizer()
    split = Dataset.from_dict({"text": ["a first text", "another one"], "label": [0, 1]})
    first = encode(split, tokenizer, 16)
    (cache,) = tmp_path.rglob("*.safetensors")
    data = bytearray(cache.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    elif damage == "swap":
        encode(Dataset.from_dict({"text": ["a third"], "label": [0]}), tokenizer, 16)
        data = bytearray(next(p for p in tmp_path.rglob("*.safetensors") if p != cache).read_bytes())
    cache.write_bytes(data[: {"cut": 50, "empty": 0}.get(damage)])
    again = encode(split, tokenizer, 16)
    assert np.array_equal(first.tokens, again.tokens)
    assert np.array_equal(first.offsets, again.offsets)


def test_without_space_for_the_cache_tokens_are_not_cached(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.batches.write_tensors", full)
    split = Dataset.from_dict({"text": ["a text"], "label": [0]})
    assert len(encode(split, minilm_tokenizer(), 16)) == 1


# --- runs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(recipe, tmp_path_factory):
    """A run that was stopped after its first epoch, on a base folder of its own."""
    place = tmp_path_factory.mktemp("stopped")
    base = write_hub_folder(place / "base")
    own = dataclasses.replace(recipe, model=str(base))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.job.deferred_signals", StopsAtOnce)
        with pytest.raises(InterruptedRunError):
            run_job("tiny", own, place / "run")
    return place


def _set_config(**fields):
    def change(base, _data):
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, **fields}))

    return change


def _swap_words(base, _data):
    vocabulary = json.loads((base / "vocab.json").read_text())
    first, second = [word for word, index in vocabulary.items() if 20 < index < 23][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (base / "vocab.json").write_text(json.dumps(vocabulary))


def _drop_merge(base, _data):
    lines = (base / "merges.txt").read_text().splitlines()
    (base / "merges.txt").write_text("\n".join(lines[:-1]) + "\n")


def test_a_base_with_other_settings_of_its_interface_loads_as_usual(hub_folder, tmp_path):
    """Tuples in place of outputs, chunks that round differently, padding that moves the first token."""
    base = shutil.copytree(hub_folder, tmp_path / "base")
    _set_config(return_dict=False, chunk_size_feed_forward=2)(base, None)
    (base / "tokenizer_config.json").write_text(json.dumps({"padding_side": "left"}))
    texts = ["the striker scored twice", "rates"]
    expected, found = (
        predict._probabilities(
            {"": Trained(*load_base(str(folder), 3), ("a", "b", "c"), 16)},
            None,
            [("", text) for text in texts],
            torch.device("cpu"),
            "fp32",
        )
        for folder in (hub_folder, base)
    )
    assert torch.equal(torch.stack(found), torch.stack(expected))


def _truncate_left(base, _data):
    (base / "tokenizer_config.json").write_text(json.dumps({"truncation_side": "left"}))


def _change_weight(name):
    def change(base, _data):
        tensors = safetensors.torch.load_file(base / "model.safetensors")
        key = next(key for key in tensors if key.endswith(name))
        tensors[key] = tensors[key] + 1e-3
        safetensors.torch.save_file(tensors, base / "model.safetensors", {"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set_config(num_attention_heads=4), "config of the base model"),
        (_set_config(classifier_dropout=0.5), "config of the base model"),
        (_truncate_left, "tokenizer"),
        (_swap_words, "tokenizer"),
        (_drop_merge, "tokenizer"),
        (_change_weight("word_embeddings.weight"), "base model"),
        (_change_weight("LayerNorm.bias"), "base model"),
        (_change_weight("query.weight"), "base model"),
    ],
)
def test_another_base_is_not_resumed(stopped, tmp_path, change, message):
    shutil.copytree(stopped / "run", tmp_path / "run")
    shutil.copytree(stopped / "base", tmp_path / "kept")
    recipe = run_recipe(tmp_path / "run")
    change(stopped / "base", None)  # in place, because the recipe contains the path
    try:
        with pytest.raises(CheckpointError, match=f"the {message} differs from that of the checkpoint"):
            run_job("tiny", recipe, tmp_path / "run", resume=True)
    finally:
        shutil.rmtree(stopped / "base")
        shutil.copytree(tmp_path / "kept", stopped / "base")


@pytest.mark.parametrize("damage", ["newline", "digit", "number"])
def test_a_log_short_of_its_newline_is_mended_and_an_altered_one_refused(stopped, tmp_path, damage):
    shutil.copytree(stopped / "run", tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    data = path.read_bytes()
    if damage == "newline":
        path.write_bytes(data.rstrip(b"\n"))
        assert run_job("tiny", run_recipe(tmp_path / "run"), tmp_path / "run", resume=True).summary
        assert all(isinstance(json.loads(line), dict) for line in path.read_bytes().splitlines())
        return
    lines = data.splitlines(keepends=True)
    lines[0] = lines[0].replace(b"1", b"2", 1) if damage == "digit" else b"1\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(RunError, match=r"metrics.jsonl: damaged"):
        run_job("tiny", run_recipe(tmp_path / "run"), tmp_path / "run", resume=True)


def test_many_classes_and_dollar_signs_are_drawn_in_little_memory(tmp_path):
    labels = tuple(f"$x_{i}$" for i in range(430))
    scores = Scores.of(np.arange(430), np.roll(np.arange(430), 1), 430)
    history = [{"epoch": 1, "val_accuracy": 0.0, "val_loss": 1.0}]
    draw_all(tmp_path, "$run$", history, scores, labels)
    few = Scores.of(np.arange(2), np.arange(2), 2)
    draw_all(tmp_path, "$run$", history, few, ("$5_$10$", "a_$b$"))
    assert all(path.stat().st_size < 2e6 for path in tmp_path.iterdir())


def test_a_figure_that_fails_does_not_cost_the_run(recipe, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError("no memory for a figure")

    monkeypatch.setattr("train.job.draw_all", fail)
    with pytest.warns(UserWarning, match="not drawn"):
        run_job("tiny", dataclasses.replace(recipe, epochs=1), tmp_path / "run")
    assert load_trained(tmp_path / "run").labels


def test_an_emoji_in_a_path_survives_in_the_recipe(recipe, tmp_path):
    place = tmp_path / 'news 😀 "x"'
    shutil.copytree(recipe.data, place)
    run_job("tiny", dataclasses.replace(recipe, data=str(place), epochs=1), tmp_path / "run")
    assert run_recipe(tmp_path / "run").data == str(place)
    assert load_trained(tmp_path / "run")


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("transformers.PreTrainedModel", safetensors.SafetensorError),
        ("transformers.PreTrainedTokenizerBase", Exception),  # what tokenizers raises
    ],
)
def test_an_export_that_fails_leaves_nothing_and_can_be_repeated(
    run, tmp_path, monkeypatch, capsys, part, kind
):
    with monkeypatch.context() as patch:

        def full(self, folder, **_):
            (Path(folder) / "model.safetensors").write_bytes(b"part")
            raise kind("I/O error: No space left on device")

        patch.setattr(f"{part}.save_pretrained", full)
        assert export.main([str(run), str(tmp_path / "out")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").stat().st_mode & 0o077 == 0o777 & ~_umask() & 0o077


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("summary.json", "{}", "summary.json: damaged"),
        ("summary.json", "[" * 100_000, "summary.json: damaged"),
        ("summary.json", "1", "summary.json: damaged"),
        ("summary.json", {"test_accuracy": None}, "summary.json: damaged: test_accuracy is"),
        ("summary.json", {"test_report": [{"label": "a"}]}, "summary.json: damaged: f1 is"),
        ("summary.json", {"test_confusion_matrix": [1]}, "summary.json: damaged"),
        ("summary.json", {"test_report": []}, "summary.json: damaged: its report is not"),
        ("summary.json", {"labels": []}, "summary.json: damaged: its scores are not"),
        ("summary.json", {"train_seconds": float("inf")}, "summary.json: damaged: Infinity is not"),
        ("config.toml", "x = " + "[" * 50_000, "config.toml"),
        ("config.toml", b"# recipe: \xff\n", "config.toml"),
    ],
)
def test_damaged_run_folders_are_errors(run, recipe, tmp_path, capsys, name, text, message):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / name
    if isinstance(text, dict):
        text = json.dumps({**json.loads(path.read_text()), **text})
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["--resume", "--output", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(RunError, match=message):
        run_job("tiny", recipe, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "setting",
    [
        "device=7", "device=cuda:٣", "lora_alpha=1e308", "learning_rate=" + "9" * 400, "epochs=" + "9" * 400,
        "device=cuda:00", "seed=" + "9" * 5000, "r=" + "[" * 50_000, "r=99999",
        "target_modules=" + json.dumps("a{99999999999999999999}"),
        "batch_size=" + "9" * 30, "lora_alpha=" + "9" * 400, "model=\udcff",
    ],
)  # fmt: skip
def test_flags_out_of_range_are_one_short_message(setting, tmp_path, capsys):
    assert main(["--output", str(tmp_path / "run"), "--set", setting]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.encode(errors="replace")) < 600
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("name", ["a\nb", "\x01", "\udcff"])
def test_a_recipe_name_that_config_toml_cannot_record_is_an_error(recipe, tmp_path, name):
    path = tmp_path / f"{name}.toml"
    path.write_text(recipe.to_toml())
    with pytest.raises(RecipeError, match="characters that cannot be printed; rename it"):
        load_recipe(str(path))


def test_a_recipe_name_of_300_characters_is_an_error():
    with pytest.raises(RecipeError, match="File name too long"):
        load_recipe("x" * 300)


# --- streams -----------------------------------------------------------------------------------------


def start(*words, **options):
    """Starts `python -m train.…` as a user would, in the C locale with ASCII streams."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", *words], env=environment, **{**streams, **options})


def test_odd_streams(run, recipe, tmp_path):
    """One line on stderr and exit code 2, or a clean end if only the reader has gone."""
    (tmp_path / "tiny.toml").write_text(dataclasses.replace(recipe, epochs=1).to_toml())
    (tmp_path / "utf8").write_bytes("\ufeffémigré £5\r\n".encode())  # as some programs on Windows write it
    (tmp_path / "latin1").write_bytes(b"caf\xe9\n")
    read, write = os.pipe()
    os.close(read)
    with (
        (tmp_path / "utf8").open("rb") as utf8,
        (tmp_path / "latin1").open() as latin1,
        Path("/dev/full").open("w") as full,
        os.fdopen(write, "w") as gone,
    ):
        training = ("train", "--recipe", str(tmp_path / "tiny.toml"), "--output", str(tmp_path / "run"))
        started = {
            "utf8": start("train.predict", str(run), "--json", stdin=utf8),
            "not utf8": start("train.predict", str(run), stdin=latin1),
            "full": start("train.runs", str(run.parent), stdout=full),
            "no reader": start("train.runs", str(run.parent), stdout=gone),
            "no reader of the log": start(*training, stdout=gone, stderr=gone),
        }
        outputs = {name: process.communicate(timeout=120) for name, process in started.items()}
    codes = {name: process.returncode for name, process in started.items()}
    assert codes == {"utf8": 0, "not utf8": 2, "full": 2, "no reader": 0, "no reader of the log": 0}
    assert json.loads(outputs["utf8"][0])["text"] == "émigré £5"
    for name, words in (("not utf8", b"not UTF-8"), ("full", b"No space left")):
        assert words in outputs[name][1]
        assert outputs[name][1].count(b"\n") == 1
    assert outputs["no reader"][1] == b""
    assert content(tmp_path / "run")[1]["test_accuracy"] >= 0


def test_arguments_and_a_closed_stdin(run, monkeypatch, capsys):
    assert predict.main([str(run), "caf\udce9"]) == 2
    assert "not UTF-8" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", None)
    assert predict.main([str(run)]) == 2
    assert "stdin is closed" in capsys.readouterr().err
