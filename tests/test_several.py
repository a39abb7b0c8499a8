"""Several adapters from the command line: answers in one pass are those of each alone; sums are adapters."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import randomise_adapter

from lora import LoraConfig, LoRALinear, inject, save_adapter
from lora.adapted import lora_layers
from model import load_base
from train import combine, evaluate, export, predict
from train.batches import tokenizer_digest
from train.config import Recipe
from train.layers import layer_digest, load_layer
from train.trained import load_trained

NEWS = ("money", "sport", "tech")
TEXTS = ["the striker scored twice", "shares fell as rates rose, " * 20, "chips power the new computer"]
HEAD = ("classifier",)
DOUBLED = """
from lora import LoRALinear

class Doubled(LoRALinear):
    def __init__(self, linear, **settings):
        super().__init__(linear, **settings)
        self.scaling *= 2
"""


def write_adapter(folder, source, labels, config, max_length_tokens=16, seed=1, layer="", base=""):
    """An adapter's folder as training leaves it; nothing is trained. base: recorded in place of `source`."""
    model, tokenizer = load_base(source, len(labels), seed=seed)
    inject(model, config, seed, layer=load_layer(layer))
    randomise_adapter(model, seed)
    metadata = {
        "labels": labels, "max_length_tokens": max_length_tokens, "seed": seed,
        "tokenizer": tokenizer_digest(tokenizer),
    }  # fmt: skip
    metadata |= {"layer": layer_digest(layer)} if layer else {}
    save_adapter(model, folder, base=base or source, task_type="SEQ_CLS", metadata=metadata)
    return folder


@pytest.fixture(scope="module")
def place(hub_folder, tmp_path_factory):
    """A folder with adapters of other ranks, targets, variants, classes and lengths on one base."""
    folder, base = tmp_path_factory.mktemp("several"), str(hub_folder)
    plain = LoraConfig(r=4, lora_alpha=8, modules_to_save=HEAD)
    write_adapter(folder / "news", base, NEWS, plain)
    write_adapter(folder / "more", base, NEWS, LoraConfig(r=2, modules_to_save=HEAD), seed=2)
    tone = LoraConfig(r=2, target_modules=("value", "attention.output.dense"), modules_to_save=HEAD)
    write_adapter(folder / "tone", base, ("bad", "good"), tone, max_length_tokens=6, seed=3)
    dora = LoraConfig(r=2, target_modules=("query",), modules_to_save=HEAD, use_dora=True)
    write_adapter(folder / "dora", base, tuple("abcde"), dora, max_length_tokens=10, seed=4)
    (folder / "mine.py").write_text(DOUBLED)
    own = Recipe(model=base, layer=f"{folder / 'mine.py'}:Doubled")
    for name, recipe in (("own", own), ("full", Recipe(model=base, method="full"))):  # finished runs
        (folder / name).mkdir()
        (folder / name / "config.toml").write_text(recipe.to_toml())
        (folder / name / "summary.json").write_text("{}")
    write_adapter(folder / "own" / "adapter", base, ("x", "y"), plain, seed=5, layer=own.layer)
    (folder / "full" / "weights.safetensors").write_bytes(b"")
    write_adapter(folder / "elsewhere", base, NEWS, plain, base="another-model")
    return folder


@pytest.fixture(autouse=True)
def in_place(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(predict, "resolve_precision", lambda *_: "fp32")


def stdin(monkeypatch, lines):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def printed(capsys, *arguments):
    assert predict.main(list(arguments)) == 0
    return capsys.readouterr().out.splitlines()


def objects(lines):
    return [json.loads(line) if line else None for line in lines]


ALL = ("news", "tone", "dora", "own")
FLAGS = [word for name in ALL for word in ("--adapter", f"{name}={name}")]


def test_each_adapter_answers_as_it_does_alone(monkeypatch, capsys):
    """Each truncates a text to its own length. Padding and the batch change the rounding, 1e-6 of a logit."""
    lines = [TEXTS[0], "", *TEXTS[1:]] * 5  # several batches
    stdin(monkeypatch, lines)
    together = objects(printed(capsys, *FLAGS, "--json"))
    assert len(together) == len(ALL) * len(lines)
    for position, name in enumerate(ALL):
        stdin(monkeypatch, lines)
        alone = objects(printed(capsys, name, "--json"))
        for one, several in zip(alone, together[position :: len(ALL)], strict=True):
            if one is None:
                assert several is None
                continue
            assert several.pop("adapter") == name
            assert several["text"] == one["text"]
            assert several["label"] == one["label"]
            assert several["probabilities"] == pytest.approx(one["probabilities"], abs=1e-5)
    tone = load_trained(Path("tone"))
    batch = tone.tokenizer(TEXTS[1], truncation=True, max_length=6, return_tensors="pt")
    expected = tone.model(**batch).logits.detach().softmax(1)[0].tolist()
    assert list(together[2 * len(ALL) + 1]["probabilities"].values()) == pytest.approx(expected, abs=1e-5)


def test_the_lines_begin_with_the_name(capsys):
    lines = printed(capsys, "--adapter", "topics=news", "--adapter", "tone=tone", "--", *TEXTS)
    alone = [printed(capsys, name, *TEXTS) for name in ("news", "tone")]
    expected = [
        row for pair in zip(*alone, strict=True) for row in zip(("topics", "tone"), pair, strict=True)
    ]
    assert lines == ["\t".join(row) for row in expected]
    assert lines == printed(
        capsys, TEXTS[0], "--adapter", "topics=news", *TEXTS[1:], "--adapter", "tone=tone"
    )


def test_a_json_line_may_name_its_adapter(monkeypatch, capsys):
    rows = [
        {"text": TEXTS[0], "adapter": "tone"},
        {"text": TEXTS[2]},
        {"text": TEXTS[0], "adapter": None, "id": 7},
    ]
    stdin(
        monkeypatch, [json.dumps(rows[0]), *map(json.dumps, rows[1:]), "", '{"text": " ", "adapter": "dora"}']
    )
    lines = printed(capsys, *FLAGS, "--jsonl")
    assert [line.partition("\t")[0] for line in lines] == ["tone", *ALL, *ALL, *[""] * len(ALL), ""]
    assert lines[0] == lines[6]


FEW = ["--adapter", "news=news", "--adapter", "tone=tone"]


@pytest.mark.parametrize(
    ("arguments", "lines", "message"),
    [
        (["--adapter", "news", "a"], (), "--adapter news: not of the form NAME=RUN"),
        (["--adapter", "=news", "a"], (), "not of the form NAME=RUN"),
        (["--adapter", "news=", "a"], (), "not of the form NAME=RUN"),
        ([*FEW, "--adapter", "tone=dora", "a"], (), "--adapter tone=dora: the name 'tone' is given twice"),
        ([*FEW, "--adapter", "x=none", "a"], (), "none: there is no such folder"),
        ([*FEW, "--adapter", "x=full", "a"], (), "full: its method is full or head, so it has no adapter"),
        ([*FEW, "--adapter", "x=own/adapter", "a"], (), "trained with a layer class of its own; name the"),
        ([*FEW, "--adapter", "x=elsewhere", "a"], (), "its base is another-model, and that of news is /"),
        ([*FEW, " "], (), "TEXT must not be empty"),
        ([*FEW, "caf\udce9"], (), "a TEXT is not UTF-8"),
        ([*FEW, "--jsonl", "a"], (), "give --adapter, and no TEXT"),
        (["news", "--jsonl"], (), "give --adapter, and no TEXT"),
        ([*FEW, "--jsonl"], ['{"text": "a"}', "a"], "stdin:2: not JSON: "),
        ([*FEW, "--jsonl"], ["[" * 100_000], "stdin:1: not JSON: "),
        ([*FEW, "--jsonl"], ["", '"a"'], 'stdin:2: not a JSON object with a "text"'),
        ([*FEW, "--jsonl"], ['{"adapter": "tone"}'], 'stdin:1: not a JSON object with a "text"'),
        ([*FEW, "--jsonl"], [r'{"text": "\ud800"}'], 'stdin:1: not a JSON object with a "text" in UTF-8'),
        (
            [*FEW, "--jsonl"], ['{"text": "a"}', '{"text": "a", "adapter": "mood"}'],
            "stdin:2: no adapter is called 'mood'; there are news, tone",
        ),
        ([*FEW, "--jsonl"], ['{"text": "a", "adapter": ["tone"]}'], "stdin:1: no adapter is called ['tone']"),
    ],
)  # fmt: skip
def test_predict_says_what_is_wrong_with_several(arguments, lines, message, monkeypatch, capsys):
    stdin(monkeypatch, lines)
    assert predict.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_without_a_run_or_an_adapter_the_run_is_asked_for(capsys):
    with pytest.raises(SystemExit) as stop:
        predict.main(["--json"])
    assert stop.value.code == 2
    assert "required: RUN" in capsys.readouterr().err


def test_random_weights_of_another_seed_are_another_base(place, tmp_path, capsys):
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        config = LoraConfig(r=1, modules_to_save=HEAD)
        model = str(load_trained(place / "news").model.config.name_or_path)
        write_adapter(folder, model, NEWS, config, seed=seed, base="random:minilm")
    assert (
        combine.main([f"{tmp_path / '0'}:1", f"{tmp_path / '1'}:1", "--output", str(tmp_path / "sum")]) == 2
    )
    assert "1: its base is random:minilm, seed 1, and that of" in capsys.readouterr().err


# --- combine -------------------------------------------------------------------------------------------


def deltas(folder):
    return {
        name: layer.delta_weight() for name, layer in lora_layers(load_trained(Path(folder)).model).items()
    }


def test_a_sum_is_an_adapter_that_every_command_takes(place, csv_folder, tmp_path, capsys):
    out = str(tmp_path / "sums" / "sum")
    assert combine.main(["news:0.5", "more:-0.25", "--output", out]) == 0
    captured = capsys.readouterr()
    size = sum(path.stat().st_size for path in (tmp_path / "sums" / "sum").iterdir())
    assert captured.out == f"{out}: rank 6 on 4 layers, {size / 1e6:.2f} MB, classes money, sport, tech\n"
    assert captured.err == ""
    news, more = deltas("news"), deltas("more")
    for name, delta in deltas(out).items():
        torch.testing.assert_close(delta, 0.5 * news[name] - 0.25 * more[name], rtol=0, atol=1e-6)

    first, trained = load_trained(Path("news")), load_trained(Path(out))
    assert (trained.labels, trained.max_length_tokens) == (first.labels, first.max_length_tokens)
    assert torch.equal(trained.model.classifier.out_proj.weight, first.model.classifier.out_proj.weight)
    assert evaluate.main([out, "--data", str(csv_folder)]) == 0
    assert export.main([out, str(tmp_path / "plain")]) == 0
    assert predict.main(["--adapter", f"sum={out}", "--adapter", "news=news", TEXTS[0]]) == 0
    assert predict.main([out, TEXTS[0]]) == 0


def test_one_weight_scales_and_a_layer_of_its_own_becomes_plain(tmp_path):
    for run in ("news", "own"):
        assert combine.main([f"{run}:-1", "--output", str(tmp_path / run)]) == 0
        delta = deltas(run)
        for name, opposite in deltas(tmp_path / run).items():
            torch.testing.assert_close(opposite, -delta[name], rtol=0, atol=1e-6)
    layers = lora_layers(load_trained(tmp_path / "own").model)
    assert {type(layer) for layer in layers.values()} == {LoRALinear}


def test_a_cut_and_other_classes_are_reported(tmp_path, capsys):
    out = tmp_path / "sum"
    assert combine.main(["news:1", "--rank", "2", "tone:2", "--output", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.err == "note: tone has other classes, bad, good; the new adapter has those of news\n"
    found = re.fullmatch(
        r".*: rank 2 on 6 layers, .*\nlost by the cut to rank 2, as a share of the norm of ΔW: (.*)% in "
        r"(.*), the most, and (.*)% in the median layer\n",
        captured.out,
    )
    news, tone, cut = deltas("news"), deltas("tone"), deltas(out)
    lost = {}
    for name, delta in cut.items():
        whole = news.get(name, torch.zeros_like(delta)) + 2 * tone.get(name, torch.zeros_like(delta))
        lost[name] = 100 * float((whole - delta).norm() / whole.norm())
    assert found[2] == max(lost, key=lost.get)
    expected = max(lost.values()), sorted(lost.values())[2:4]
    assert float(found[1]) == pytest.approx(expected[0], abs=0.06)  # one digit is printed
    assert float(found[3]) == pytest.approx(sum(expected[1]) / 2, abs=0.06)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["news:x"], "news:x: not of the form RUN:WEIGHT with a number"),
        (["news"], "news: not of the form RUN:WEIGHT with a number"),
        ([":1"], ":1: not of the form RUN:WEIGHT with a number"),
        (["news:1", "news/:2"], "news/:2: news/ is given twice"),
        (["news:nan"], "the weight of 'news' is nan, which is not finite"),
        (["news:1e300"], "not finite"),
        (["news:1", "none:1"], "none: there is no such folder"),
        (["news:1", "full:1"], "full: its method is full or head, so it has no adapter"),
        (["news:1", "dora:1"], "'dora' cannot be added up: ΔW of a DoRALinear is not scaling·B·A"),
        (["news:1", "elsewhere:1"], "elsewhere: its base is another-model, and that of news is /"),
        (["news:1", "--rank", "0"], "rank: 0 is not at least 1"),
    ],
)
def test_combine_says_what_is_wrong(arguments, message, tmp_path, capsys):
    assert combine.main([*arguments, "--output", str(tmp_path / "sum")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "sum").exists()


def test_a_combination_that_cannot_be_written_leaves_nothing(place, capsys, monkeypatch):
    def fail(_adapters, _name, folder, *_):
        folder.mkdir()
        (folder / "part").touch()
        raise OSError("no space left")

    monkeypatch.setattr("lora.Adapters.save", fail)
    assert combine.main(["news:1", "--output", "sum"]) == 2
    assert "no space left" in capsys.readouterr().err
    assert not (place / "sum").exists()


def test_nothing_is_overwritten(place, capsys):
    before = {path: path.read_bytes() for path in (place / "tone").iterdir()}
    assert combine.main(["news:1", "--output", "tone"]) == 2
    assert "tone: not an empty folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (place / "tone").iterdir()} == before
