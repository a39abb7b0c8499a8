"""The playground without its page: numbers, knobs that leave no trace, several visitors, texts as text."""

import dataclasses
import json
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch

from lora.errors import UserError
from lora.storage import digest
from model import speed_up
from train import inference, predict
from train.anatomy.experiments import run_experiments
from train.anatomy.measure import decompose_bases, measure
from train.anatomy.run import load_run
from train.evaluate import evaluate
from train.hardware import autocast
from train.job import run_job
from train.playground import __main__ as command
from train.playground import page
from train.playground.served import LONGEST_TEXT, InputError, Knobs, Served
from train.runs import RunError
from train.trained import load_trained

TEXT = "the striker scored twice and the bank cut its forecast"
SCRIPT = "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'>${window.hit = 1}{{hit}}`"


@pytest.fixture(scope="module")
def folders(tiny_recipe, tmp_path_factory):
    """Runs from one start: two seeds, and a variant whose ΔW has no low rank."""
    recipe = dataclasses.replace(tiny_recipe, r=3, epochs=1, batch_size=8, learning_rate=3e-3)
    folder = tmp_path_factory.mktemp("runs")
    changes = {
        "one": {},
        "two": {"seed": 1},
        "dora": {"use_dora": True, "target_modules": ("query", "key")},
        "auto": {"precision": "auto"},
    }
    for name, change in changes.items():
        run_job(name, dataclasses.replace(recipe, **change), folder / name)
    return folder


@pytest.fixture(scope="module")
def shared(folders):
    """One served model for all tests, which is what must not matter."""
    return Served([folders / name for name in ("one", "two", "dora")])


def state_of(served):
    """A digest of every weight, buffer and setting between two requests."""
    with served._lock:
        return _state_of(served)


def _state_of(served):
    tensors = {name: tensor.detach() for name, tensor in served.model.state_dict().items()}
    settings = {"active": served.adapters.active, "adapters": list(served.adapters.names)}
    for run in served.runs:
        named = served.adapters[run]
        for name, module in (*named.layers.items(), *named.saved.items()):
            tensors |= {f"{run} {name} {key}": value for key, value in module.state_dict().items()}
        for name, layer in named.layers.items():
            numbers = {key: getattr(layer, key) for key in layer.watched_settings}
            hooks = len(layer._forward_pre_hooks)
            settings[f"{run} {name}"] = [numbers, layer.enabled, layer.merged, hooks]
    return digest(tensors, settings)


@pytest.fixture
def served(shared):
    """The served model, compared bit for bit with what it was before the test."""
    before, outputs = state_of(shared), shared.classify("one", TEXT, Knobs())
    yield shared
    assert state_of(shared) == before
    assert shared.classify("one", TEXT, Knobs()) == outputs


def test_probabilities_are_those_of_predict(served, folders, capsys):
    # train.predict chooses the precision by the hardware, as a recipe does by default
    assert predict.main([str(folders / "auto"), TEXT, "--json"]) == 0
    found = Served([folders / "auto"]).classify("auto", TEXT, Knobs())
    assert found["adapter"] == found["knobs"] != found["base"]
    by_label = {label: round(p, 6) for label, p in zip(found["labels"], found["adapter"], strict=True)}
    assert by_label == json.loads(capsys.readouterr().out)["probabilities"]
    for name in served.runs:
        alone = probabilities_alone(folders / name, [TEXT], served.precision)
        assert served.classify(name, TEXT, Knobs())["adapter"] == alone


@torch.inference_mode()
def probabilities_alone(folder, texts, precision, row=0):
    """The probabilities of a row of this batch of texts, by a model that has only this run."""
    trained = load_trained(folder)
    speed_up(trained.model, precision)
    rows = trained.tokenizer(
        texts, truncation=True, max_length=trained.max_length_tokens, padding=True, return_tensors="pt"
    )
    with autocast(torch.device("cpu"), precision):
        logits = trained.model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    return torch.softmax(logits.float(), dim=1)[row].tolist()


def test_scores_are_those_of_evaluate_and_of_the_anatomy(served, folders):
    run = load_run(folders / "one")
    test_set = inference.TestSplit.of(run.trained, run.recipe)
    test_set.prepare(run.trained.model)
    whole = inference.score(test_set.logits(run.trained.model), test_set.rows.labels)
    facts = run_experiments(run.trained.model, test_set, whole, lambda message: None)

    def accuracy(knobs):
        *_, (rows, scores) = served.score("one", knobs, "test")
        assert rows == scores.confusion.sum() == len(test_set.rows)
        return scores

    expected = evaluate(folders / "one", None)["scores"]
    assert accuracy(Knobs()).confusion.tolist() == expected.confusion.tolist()
    for row in facts["scaled"]:
        assert accuracy(Knobs(scale=row["factor"])).accuracy == row["accuracy"]
    for row in facts["truncated"]:
        assert accuracy(Knobs(rank=row["rank"])).accuracy == row["accuracy"]
    for block, row in facts["only_block"].items():
        on = tuple(name for name in run.layers if f".layer.{block}." in name)
        assert accuracy(Knobs(layers=on)).accuracy == row["accuracy"]
    assert len({row["accuracy"] for row in facts["scaled"]}) > 1  # otherwise this compares nothing


def test_spectra_and_sizes_are_those_of_the_anatomy(served, folders):
    run = load_run(folders / "two")
    facts = measure(run, decompose_bases(run))
    assert served.runs["two"].spectra == {name: layer["singular_values"] for name, layer in facts.items()}
    assert served.runs["two"].sizes == {name: layer["delta_over_weight"] for name, layer in facts.items()}
    assert served.runs["two"].rank == 3


def test_the_sample_is_scored_batch_by_batch(served):
    found = list(served.score("one", Knobs(scale=0.5)))
    assert [int(scores.confusion.sum()) for _, scores in found] == [4, 8, 9]
    assert {rows for rows, _ in found} == {9}


def message_of(function, *values):
    with pytest.raises(InputError) as error:
        function(*values)
    return str(error.value)


def random_work(served, seed, operations):
    """Operations of one visitor, and their results."""
    rng = random.Random(seed)
    found = []
    for _ in range(operations):
        name = rng.choice(["one", "two", "dora"])
        layers = list(served.runs[name].layers)
        on = tuple(sorted(rng.sample(layers, rng.randrange(len(layers)))))
        low_rank = name != "dora"
        knobs = Knobs(
            rng.choice([-1, 0, 0.5, 2]) if low_rank else 1,
            rng.choice([None, 0, 1, 2]) if low_rank else None,
            rng.choice([None, on]),
        )
        work = {
            "classify": lambda name=name, knobs=knobs: served.classify(name, TEXT, knobs),
            "influence": lambda name=name, knobs=knobs: served.influence(name, TEXT[:12], knobs),
            "score": lambda name=name, knobs=knobs: [s.accuracy for _, s in served.score(name, knobs)],
            "mix": lambda scale=knobs.scale: served.mix(TEXT, {"one": scale, "two": 1.0}),
            "merge": lambda name=name: served.merge_and_unmerge(name, TEXT)["merged"],
            "error": lambda name=name, on=on: message_of(served.classify, name, TEXT, Knobs(2, -1, on)),
        }
        found.append(rng.choice(list(work.values()))())
    return found


def test_visitors_at_once_get_what_each_gets_alone(served):
    """And the fixture shows that the model is the same afterwards, bit for bit."""
    alone = [random_work(served, seed, 20) for seed in range(4)]
    with ThreadPoolExecutor(4) as visitors:
        together = list(visitors.map(lambda seed: random_work(served, seed, 20), range(4)))
    assert together == alone


@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_exception_in_the_model_leaves_it_unchanged(served, monkeypatch, call):
    """call: the forward of a request that fails, such as the one while merged."""
    forward, knobs = type(served.model).forward, Knobs(-1, 1, tuple(served.runs["one"].layers)[:1])
    requests = {
        "classify": lambda: served.classify("one", f"{call} {TEXT}", knobs),  # a text not seen before
        "influence": lambda: served.influence("one", TEXT, knobs),
        "excitation": lambda: served.excitation("one", TEXT),
        "score": lambda: list(served.score("one", knobs)),
        "mix": lambda: served.mix(TEXT, {"one": 2.0}),
        "merge": lambda: served.merge_and_unmerge("one", TEXT),
    }
    calls = {"excitation": 1, "mix": 1, "merge": 2}
    for name, request in requests.items():
        if call > calls.get(name, 3):
            continue
        left = [call]

        def failing(*values, left=left, **named):
            left[0] -= 1
            if not left[0]:
                raise MemoryError("no memory")
            return forward(served.model, *values, **named)

        with monkeypatch.context() as patch:
            patch.setattr(served.model, "forward", failing)
            with pytest.raises(MemoryError):
                request()
        assert left == [0], name
        assert served.adapters.active is None
        assert served.adapters.names == ("one", "two", "dora")


def test_influence_is_the_change_of_the_log_odds_when_a_token_is_masked(served, folders):
    trained = load_trained(folders / "one")
    pieces, label = served.influence("one", TEXT, Knobs())
    read = "".join(TEXT[start:end] for start, end, _ in pieces)
    assert read
    assert TEXT.replace(" ", "").startswith(read.replace(" ", ""))
    encoded = trained.tokenizer(TEXT, truncation=True, max_length=16, return_offsets_mapping=True)
    shown = [at for at, (start, end) in enumerate(encoded["offset_mapping"]) if end > start]
    assert [encoded["offset_mapping"][at] for at in shown] == [(start, end) for start, end, _ in pieces]
    rows = torch.tensor([encoded["input_ids"]] * 2)
    rows[1, shown[2]] = trained.tokenizer.mask_token_id
    with torch.inference_mode():
        odds = torch.logit(trained.model(rows).logits.double().softmax(1))[:, trained.labels.index(label)]
    assert pieces[2][2] == pytest.approx(float(odds[0] - odds[1]), abs=1e-5)  # float32 logits of a few units


def test_long_texts_are_divided_into_few_pieces(served, monkeypatch):
    monkeypatch.setattr("train.playground.served._PIECES", 5)
    pieces, _ = served.influence("one", TEXT, Knobs())
    assert len(pieces) == 5
    assert pieces[0][0] == 0
    assert all(end <= start for (_, end, _), (start, _, _) in pairwise(pieces))


def test_excitation_is_the_norm_of_a_times_the_input(served, folders):
    trained = load_trained(folders / "one")
    tokens, norms = served.excitation("one", TEXT)
    assert tokens[0] == "<s>"
    name = "roberta.encoder.layer.0.attention.self.value"
    ids = trained.tokenizer(TEXT, truncation=True, max_length=trained.max_length_tokens, return_tensors="pt")
    x = trained.model.roberta.embeddings(ids["input_ids"])[0]
    expected = (x @ trained.model.get_submodule(name).lora_A.T).norm(dim=1)
    assert torch.allclose(torch.tensor(norms[name]), expected, rtol=1e-5)  # float32, sums of 32 products
    assert norms.keys() == served.runs["one"].layers.keys()
    with pytest.raises(InputError, match="DoRALinear is not scaling·B·A"):
        served.excitation("dora", TEXT)


def test_a_mixture_is_one_forward_in_which_each_run_is_itself(served, folders):
    found = served.mix(TEXT, {"one": 0.0, "two": 1.0})
    assert list(found["runs"]) == ["one", "two", "dora"]
    for row, name in enumerate(("one", "two", "dora")):
        # bit for bit in the same row of a batch of the same shape, as Adapters.rows promises: with some
        # processors' kernels the rounding depends on the row
        alone = probabilities_alone(folders / name, [TEXT] * 4, served.precision, row)
        assert found["runs"][name] == alone
    assert found["sum"] == pytest.approx(found["runs"]["two"], abs=1e-6)  # B is rounded once more
    opposite = served.mix(TEXT, {"one": -1.0})["sum"]
    assert opposite == pytest.approx(served.classify("one", TEXT, Knobs(-1))["knobs"], abs=1e-6)
    assert served.mix(TEXT, {})["sum"] is None
    with pytest.raises(InputError, match="weights: not a mapping"):
        served.mix(TEXT, ["one"])


def test_merging_changes_the_weights_and_unmerging_restores_them(served):
    found = served.merge_and_unmerge("dora", TEXT)
    assert found["digest_before"] == found["digest_after"] != found["digest_merged"]
    assert 0 <= found["largest_difference"] < 1e-5  # float32
    assert found["unmerged"] == served.classify("dora", TEXT, Knobs())["adapter"]


def test_a_variant_without_low_rank_says_why_scale_and_rank_are_off(served):
    run = served.runs["dora"]
    assert (
        run.off == "the update of a DoRALinear is not scaling·B·A, so it has no scale and no rank to change"
    )
    for knobs in (Knobs(0.5), Knobs(rank=1)):
        with pytest.raises(InputError, match="no scale and no rank"):
            served.classify("dora", TEXT, knobs)
    with pytest.raises(InputError, match="no scale and no rank"):
        served.mix(TEXT, {"dora": 1.0})
    found = served.classify("dora", TEXT, Knobs(layers=()))
    assert found["knobs"] == found["base"]


@pytest.mark.parametrize(
    ("name", "text", "knobs", "message"),
    [
        ("three", TEXT, Knobs(), "run: 'three' is not one of one, two, dora"),
        ("one", "", Knobs(), "the text is empty"),
        ("one", " \n\t", Knobs(), "the text is empty"),
        ("one", "x" * (LONGEST_TEXT + 1), Knobs(), "1,048,577 characters; the limit is 1,048,576"),
        ("one", "a\ud800", Knobs(), "lone surrogate"),
        ("one", 5, Knobs(), "not a string"),
        (["one"], TEXT, Knobs(), "run: "),
        ("one", TEXT, Knobs(float("nan")), "scale: nan"),
        ("one", TEXT, Knobs("2"), "scale: '2'"),
        ("one", TEXT, Knobs(rank=-1), "rank: -1"),
        ("one", TEXT, Knobs(rank=True), "rank: True"),
        ("one", TEXT, Knobs(layers=("nowhere",)), "layers: nowhere is not one of roberta"),
    ],
)
def test_what_cannot_be_used_is_an_error_that_says_why(served, name, text, knobs, message):
    with pytest.raises(InputError) as error:
        served.classify(name, text, knobs)
    assert message in str(error.value)


def test_a_long_text_is_read_as_far_as_the_model_reads(served, folders):
    text = TEXT * 1000
    alone = probabilities_alone(folders / "one", [text], served.precision)
    assert served.classify("one", text, Knobs())["adapter"] == alone
    assert len(served._read(text)) < 1000
    assert len(served._read(text.replace(" ", "\n"))) < 1000
    assert served._read("x" * 5000) == "x" * 5000
    assert len(page.show_tokens(*served.influence("one", "x" * 100_000, Knobs()), "x" * 100_000)) < 2000


def test_long_work_ends_with_the_server(served, monkeypatch):
    work = served.score("one", Knobs())
    next(work)
    monkeypatch.setattr(served, "ended", threading.Event())
    served.ended.set()
    with pytest.raises(InputError, match="the server has ended"):
        next(work)
    with pytest.raises(InputError, match="part: 'foo' is not sample or test"):
        next(served.score("one", Knobs(), "foo"))


ODD_TEXTS = ["\x00\x01\x1b[31m\u202e\x7f", SCRIPT, "word " * (LONGEST_TEXT // 5), "👩\u200d🚀 ﷽ ä" * 50]


@pytest.mark.parametrize("text", ODD_TEXTS, ids=["control", "script", "1 MB", "emoji"])
def test_any_other_text_is_classified_and_shown_as_text(served, text):
    found = served.classify("one", text, Knobs())
    assert sum(found["adapter"]) == pytest.approx(1, abs=1e-5)
    shown = page.show_tokens(*served.influence("one", text, Knobs()), text)
    assert page.show_probabilities(found, text)
    assert len(shown) < 20_000
    assert "<script" not in shown
    assert "<img" not in shown
    # gradio's HTML component fills in ${} and {{}}; a browser does not show control characters
    assert not set("{}$`\x00\x01\x1b\u202e\x7f") & set(shown)


def test_the_visible_form_of_a_text():
    assert page.visible("a\x00b\u202ec\n<b>") == "a[U+0000]b[U+202E]c\n&lt;b&gt;"
    assert page.visible("${1}") == "&#36;&#123;1&#125;"
    assert page.visible("no\t change, ö 中") == "no\t change, ö 中"


def test_knobs_in_words(served):
    run = served.runs["one"]
    first, *others = run.layers
    assert page.describe(run, Knobs()) == "one, scale 1"
    assert page.describe(run, Knobs(-1, 2, tuple(others))) == "one, scale -1, rank 2, without 0 query"
    assert page.describe(run, Knobs(layers=(first,))) == "one, scale 1, only 0 query"
    assert page.describe(run, Knobs(layers=())) == "one, scale 1, only the base"


def test_examples_are_the_classes_and_the_hardest_mistakes(served):
    examples = served.runs["one"].examples
    assert [each.label for each in examples if not each.wrong] == ["money", "sport", "tech"]
    wrong = [each for each in examples if each.wrong]
    assert wrong
    assert [each.probability for each in wrong] == sorted((each.probability for each in wrong), reverse=True)
    for each in wrong:
        found = served.classify("one", each.text, Knobs())
        assert max(found["adapter"]) == pytest.approx(each.probability, abs=1e-6)  # six digits in the file
        assert found["labels"][found["adapter"].index(max(found["adapter"]))] == each.wrong != each.label


def test_runs_that_cannot_be_served_are_refused(folders, tiny_recipe, tmp_path):
    layer = tmp_path / "layer.py"
    layer.write_text("from lora import LoRALinear\n\n\nclass Own(LoRALinear):\n    pass\n")
    changes = {
        "full": {"method": "full"},
        "shorter": {"max_length_tokens": 12, "layer": f"{layer}:Own"},
    }
    for name, change in changes.items():
        run_job(name, dataclasses.replace(tiny_recipe, epochs=1, batch_size=36, **change), tmp_path / name)
    (tmp_path / "other" / "one").mkdir(parents=True)
    for message, runs in {
        "full: its method is full or head, so it has no adapter": [tmp_path / "full"],
        "nowhere: there is no such folder": [tmp_path / "nowhere"],
        "one: another run is called one too": [folders / "one", folders / "one"],
        "other/one: neither a run": [tmp_path / "other" / "one"],
        "one/adapter: not a run": [folders / "one" / "adapter"],
    }.items():
        with pytest.raises(RunError) as error:
            Served(runs)
        assert message in str(error.value)
    # Runs of other lengths and layer classes can be served together. Each reads a text as far as in training.
    both = Served([folders / "one", tmp_path / "shorter"])
    assert (
        type(both.adapters["shorter"].layers["roberta.encoder.layer.0.attention.self.query"]).__name__
        == "Own"
    )
    assert [both.classify(name, TEXT * 3, Knobs())["tokens"] for name in both.runs] == [16, 12]


def test_without_gradio_the_command_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "train.playground.app", raising=False)
    assert command.main([]) == 2
    assert capsys.readouterr().err == (
        "error: gradio is not installed here; `make play` installs it and starts the page\n"
    )
    assert issubclass(InputError, UserError)
