"""Runs compared: the numbers against independent computations, shared texts, and what is refused."""

import csv
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import NEWS

from train import compare as command
from train import list_runs
from train.comparison import compare
from train.metrics import Scores
from train.predictions import Prediction, match, read_predictions, write_predictions
from train.runs import METRICS, PREDICTIONS, SUMMARY, write_recipe
from train.significance import mcnemar, wilson
from train.tables import excerpt

LABELS = tuple(sorted(NEWS))
TEXTS = {f"{text} 0": LABELS.index(label) for label, texts in NEWS.items() for text in texts}
SCRIPT = "<script>alert('x')</script>"


def write_run(folder, recipe, texts, seed=0, labels=LABELS, **changes):
    """A finished run that was not trained. texts: the class of each test text. seed: of its predictions."""
    folder.mkdir(parents=True)
    write_recipe(folder, "tiny", dataclasses.replace(recipe, **changes))
    truth = torch.tensor(list(texts.values()))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.nn.functional.one_hot(truth, len(labels)) + torch.randn(
        len(texts), len(labels), generator=generator
    )
    write_predictions(folder, list(texts), truth.tolist(), logits, labels)
    scores = Scores.of(truth.numpy(), logits.argmax(1).numpy(), len(labels))
    summary = {
        "recipe": "tiny", "method": changes.get("method", "lora"), "labels": list(labels),
        "test_accuracy": scores.accuracy, "test_macro_f1": scores.macro_f1,
        "test_confusion_matrix": scores.confusion.tolist(), "test_report": scores.report(labels),
        "val_accuracy": 0.5, "best_epoch": 1, "epochs": 2, "lora_parameters": 1024,
        "trainable_parameters": 2179 + seed, "total_parameters": 40000, "adapter_bytes": 9000 + seed,
        "train_seconds": 12.5, "examples_per_second": 8.0, "padding_fraction": 0.1,
        "peak_memory_bytes": 2**30, "device": "a CPU", "precision": "fp32",
    }  # fmt: skip
    (folder / SUMMARY).write_text(json.dumps(summary))
    lines = [
        {"step": 1, "epoch": 0.5, "loss": 1.1},
        {"step": 2, "epoch": 1.0, "val_accuracy": 0.5, "val_loss": 1.0},
    ]
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tiny_recipe, tmp_path):
    """Three runs on the nine test texts of the tiny data; the last has a name to escape."""
    changes = {"one": {}, "two": {"r": 4, "learning_rate": 0.010000001}, "<i>th|ree": {"method": "head"}}
    for seed, (name, change) in enumerate(changes.items()):
        write_run(tmp_path / name, tiny_recipe, TEXTS, seed, **change)
    return [tmp_path / name for name in changes]


def many(count, start=0):
    return {f"text {number}": number % 3 for number in range(start, start + count)}


def table(text, title):
    """The rows of the Markdown table under a title, as dicts."""
    lines = text.split(f"{title}\n", 1)[1].split("\n\n")[0].splitlines()
    header, _, *rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
        if line.startswith("|")
    ]
    return [dict(zip(header, row, strict=True)) for row in rows]


def strip_digests(folder):
    """What version 0.1.0 wrote."""
    rows = [row[:2] for row in csv.reader((folder / PREDICTIONS).open(newline=""))]
    with (folder / PREDICTIONS).open("w", newline="") as file:
        csv.writer(file).writerows(rows)


# --- numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("correct", "rows"), [(0, 9), (9, 9), (1, 2), (381, 406), (6900, 7600)])
def test_wilsons_bounds_solve_his_equation(correct, rows):
    """The bounds p are where the observed share is 1.96 standard errors of p away from p."""
    z, share = 1.959963984540054, correct / rows
    for p in wilson(correct, rows):
        # relative to the terms that cancel; float64 with a few operations
        assert (share - p) ** 2 == pytest.approx(z * z * p * (1 - p) / rows, rel=1e-9, abs=1e-15)
    low, high = wilson(correct, rows)
    assert 0 <= low <= share <= high <= 1
    assert low < high


def test_no_rows_leave_the_accuracy_open():
    assert wilson(0, 0) == (0, 1)


def test_mcnemar_of_many_texts_is_the_sum_of_binomials():
    """Exactly, as one division of whole numbers, where a float power of two would overflow."""
    first = [True] * 1450 + [False] * 1550
    second = [not value for value in first]
    tail = sum(math.comb(3000, k) for k in range(1451))
    assert mcnemar(first, second) == (1450, 1550, 2 * tail / 2**3000)


def test_the_printed_numbers_are_those_of_the_files(tiny_recipe, tmp_path, capsys):
    """Computed here from the CSV files alone, by digest; the runs have their texts in different orders."""
    texts = many(300)
    shuffled = dict(sorted(texts.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest()))
    folders = [write_run(tmp_path / name, tiny_recipe, order, seed) for name, order, seed in
               (("a", texts, 0), ("b", shuffled, 1), ("c", texts, 2))]  # fmt: skip
    assert command.main([*map(str, folders), "--figure", str(tmp_path / "curves.svg")]) == 0
    out = capsys.readouterr().out
    correct = {}
    for folder in folders:
        with (folder / PREDICTIONS).open(newline="") as file:
            correct[folder.name] = {
                row["digest"]: row["label"] == row["prediction"] for row in csv.DictReader(file)
            }
    for row in table(out, "Accuracy"):
        hits = sum(correct[row["run"]].values())
        assert row["test accuracy"] == f"{hits / 300:.4f}"
        low, high = (float(bound) for bound in row["95% interval"].split("-"))
        assert (low, high) == pytest.approx(wilson(hits, 300), abs=5e-5)  # printed with four digits
    pairs = table(out, "McNemar's paired test")
    assert [(row["first run"], row["second run"]) for row in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    for row in pairs:
        first, second = correct[row["first run"]], correct[row["second run"]]
        only_first = sum(first[digest] and not second[digest] for digest in first)
        only_second = sum(second[digest] and not first[digest] for digest in first)
        differ, fewer = only_first + only_second, min(only_first, only_second)
        p = min(1, 2 * sum(math.comb(differ, k) for k in range(fewer + 1)) / 2**differ)
        assert row["shared texts"] == "300"
        assert (row["only first correct"], row["only second correct"]) == (str(only_first), str(only_second))
        assert float(row["p"]) == pytest.approx(p, rel=5e-4)  # printed with four digits
        assert row["difference"] == f"{(sum(second.values()) - sum(first.values())) / 300:+.4f}"
    assert "Bonferroni's level is 0.05/3" in out
    cost = table(out, "Cost")
    assert [row["trained parameters"] for row in cost] == ["2,179", "2,180", "2,181"]
    assert cost[0]["saved"] == "0.01 MB"
    assert (cost[0]["training, s"], cost[0]["texts/s"]) == ("12.5", "8.0")
    assert cost[0]["peak memory, MiB"] == "1,024"
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")


def test_an_excerpt_is_one_line_cut_after_a_word():
    assert excerpt("a\tb\n\x1bc", 9) == "a b c"
    assert excerpt("one two three", 10) == "one two …"
    assert excerpt("题 新闻新闻新闻新闻", 6) == "题 新闻新闻 …"


# --- which texts are the same ------------------------------------------------------------------------


def rows(*texts):
    """Predictions of texts given as "digest label prediction"."""
    return [Prediction(label, prediction, digest) for digest, label, prediction in map(str.split, texts)]


def test_texts_are_matched_by_digest_and_class_as_often_as_they_occur():
    ours = rows("d1 a a", "d1 a b", "d2 a a", "d3 b b")
    theirs = rows("d3 a a", "d1 a b", "d4 a a", "d1 a a", "d1 a a")
    (first, second), by_position = match([ours, theirs])
    assert not by_position
    assert len(first) == 4
    assert len(second) == 5
    assert first.keys() & second.keys() == {("d1", "a", 0), ("d1", "a", 1)}  # d3 has another class there


def test_positions_are_no_keys_where_known_digests_differ():
    """The rows of bbc are ordered by class, so other texts may have the same classes one by one."""
    first, second, old = rows("d1 a a", "d2 a b"), rows("d2 a a", "d1 a a"), [Prediction("a", "a")] * 2
    assert match([first, old])[1]
    matched, by_position = match([first, second, old])
    assert not by_position
    assert matched[0].keys() == matched[1].keys() == {("d1", "a", 0), ("d2", "a", 0)}
    assert not matched[2]


def test_only_shared_texts_are_tested_and_their_number_is_named(tiny_recipe, tmp_path, capsys):
    folders = [
        write_run(tmp_path / "a", tiny_recipe, many(100)),
        write_run(tmp_path / "b", tiny_recipe, many(60, start=80), seed=1),
        write_run(tmp_path / "c", tiny_recipe, many(10, start=900), seed=2),
        write_run(tmp_path / "d", tiny_recipe, many(100), seed=3, labels=("x", "y", "z")),
    ]
    assert command.main([*map(str, folders)]) == 0
    out = capsys.readouterr().out
    (pair,) = table(out, "McNemar's paired test")
    assert (pair["first run"], pair["second run"], pair["shared texts"]) == ("a", "b", "20")
    assert "a and b were not tested on the same texts: 100 and 60, of which 20 are shared. The test" in out
    assert "a and c were not tested on the same texts: 100 and 10, of which 0 are shared." in out
    assert "of which 0 are shared; 100 others are in both, with different true classes." in out
    settings = {row["setting"]: row for row in table(out, "Settings that differ")}
    assert settings["classes"]["a"] == "money, sport, tech"
    assert settings["classes"]["d"] == "x, y, z"
    assert command.main([str(folders[0]), str(folders[2])]) == 0
    out = capsys.readouterr().out
    assert "No runs can be compared in pairs." in out
    assert "All settings are equal." in out
    assert "Test texts with different predictions: 0." in out
    assert len(table(out, "Accuracy")) == 2


def test_runs_without_digests_are_matched_by_position_if_their_classes_allow_it(runs, tiny_recipe, tmp_path):
    before = compare(runs[:2])
    strip_digests(runs[1])
    after = compare(runs[:2])
    assert after.tables[2].rows == before.tables[2].rows
    assert any("matched by their position" in note for note in after.tables[2].notes)
    assert [change.text for change in before.changes]
    assert {change.text for change in after.changes} == {change.text for change in before.changes}
    other = write_run(tmp_path / "other", tiny_recipe, dict(reversed(TEXTS.items())))
    result = compare([other, runs[1]])
    assert result.tables[2].rows == []
    assert any("left out" in note and "--resume" in note for note in result.tables[2].notes)
    (runs[1] / PREDICTIONS).unlink()
    assert f"two has no {PREDICTIONS}." in compare(runs[:2]).tables[2].notes


# --- what is shown -----------------------------------------------------------------------------------


def test_settings_that_differ_and_changed_predictions(runs, capsys):
    assert command.main([*map(str, runs)]) == 0
    out = capsys.readouterr().out
    settings = {row["setting"]: row for row in table(out, "Settings that differ")}
    assert settings["method"] == {"setting": "method", "one": "lora", "two": "lora", r"<i>th\|ree": "head"}
    assert list(settings["r"].values()) == ["r", "8", "4", "-"]
    assert (settings["learning_rate"]["one"], settings["learning_rate"]["two"]) == ("0.01", "0.010000001")
    assert "seed" not in settings
    predicted = [{row.digest: row for row in read_predictions(folder)} for folder in runs]
    changed = {
        digest
        for digest in predicted[0]
        if len({by_digest[digest].prediction for by_digest in predicted}) > 1
    }
    digests = {hashlib.sha256(text.encode()).hexdigest()[:16]: text for text in TEXTS}
    shown = table(out, "Changed predictions")
    assert {row["text"] for row in shown} == {digests[digest] for digest in changed}
    spreads = []
    for row in shown:
        (digest,) = (digest for digest, text in digests.items() if text == row["text"])
        found = [by_digest[digest] for by_digest in predicted]
        assert row["true class"] == found[0].label
        assert row["two"] == f"{found[1].prediction} {found[1].probabilities[found[1].prediction]:.2f}"
        values = [each.probabilities[each.label] for each in found]
        spreads.append(max(values) - min(values))
    assert spreads == sorted(spreads, reverse=True)
    assert (runs[0] / "figures" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_without_the_data_digests_are_shown(tiny_recipe, tmp_path, capsys):
    folders = [
        write_run(tmp_path / f"run {seed}", tiny_recipe, TEXTS, seed, data="./gone") for seed in (0, 1)
    ]
    assert command.main([*map(str, folders)]) == 0
    out = capsys.readouterr().out
    assert "The texts of ./gone cannot be loaded (./gone: there is no such folder)." in out
    digests = {hashlib.sha256(text.encode()).hexdigest()[:16] for text in TEXTS}
    shown = table(out, "Changed predictions")
    assert shown
    assert {row["text"] for row in shown} <= digests


@pytest.fixture
def page(tiny_recipe, tmp_path):
    """A page about runs, classes and texts that contain markup, control characters and long words."""
    data = tmp_path / "data"
    data.mkdir()
    texts = {f"{SCRIPT} \x1b[31m {'long' * 200} 新闻 {n}": f"<b>{'ab'[n % 2]}</b> & |" for n in range(8)}
    for split in ("train", "test"):
        with (data / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *texts.items()])
    labels = tuple(sorted(set(texts.values())))
    classes = {text: labels.index(label) for text, label in texts.items()}
    folders = [
        write_run(tmp_path / name, tiny_recipe, classes, seed, labels, data=str(data))
        for seed, name in enumerate(("<i>one", f"with a space {'x' * 100}"))
    ]
    assert command.main([*map(str, folders), "--html", str(tmp_path / "a page.html")]) == 0
    return tmp_path / "a page.html"


def test_the_page_escapes_what_users_wrote_and_loads_nothing(page):
    text = page.read_text()
    assert "\x1b" not in text
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<i>" not in text
    assert "<b>a</b> &" not in text
    assert "&lt;b&gt;a&lt;/b&gt; &amp; |" in text
    assert text.count("data:image/png;base64,") == 2
    assert not re.findall(r"(?:src|srcset|href)=\"(?!data:)", text)
    assert not (page.parent / "<i>one" / "figures").exists()  # the figure is in the page alone


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_in_a_browser(page, tmp_path):
    """Nothing is wider than a phone, and each scheme has its figure."""
    shots = Path(os.environ.get("SCREENSHOTS", tmp_path))
    with Browser(tmp_path / "profile") as browser:
        for width, scheme in ((1200, "light"), (400, "dark")):
            browser.show(width, 900, scheme)
            browser.open(page.as_uri())
            assert browser.ask("document.documentElement.scrollWidth") <= width
            light = browser.ask(
                "document.images[0].decode().then("
                "() => document.images[0].currentSrc === document.images[0].src)"
            )
            assert light == (scheme == "light")
            browser.screenshot(shots / f"compare-{width}-{scheme}.png")


# --- what is refused ---------------------------------------------------------------------------------


def edit(path, change):
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (None, ["one"], "one: a comparison needs two or more runs"),
        (None, ["one", "two", "./one"], "one: given 2 times"),
        (None, ["one", "nowhere"], "nowhere: there is no such folder"),
        (None, ["one", "."], "not a run"),
        (lambda run: (run / SUMMARY).unlink(), ["one", "two"], "two: the run is not finished; `"),
        (lambda run: edit(run / SUMMARY, lambda _: "{"), ["one", "two"], "summary.json: damaged"),
        (
            lambda run: edit(run / SUMMARY, lambda text: text.replace("12.5", '"x"')),
            ["one", "two"],
            "summary.json: damaged: train_seconds is missing or of another type",
        ),
        (
            lambda run: edit(run / SUMMARY, lambda text: re.sub(r'(matrix": \[\[).*?\]', r"\g<1>1]", text)),
            ["one", "two"],
            "damaged: test_confusion_matrix",
        ),
        (lambda run: edit(run / PREDICTIONS, lambda text: text + "x\n"), ["one", "two"], "a row has 1"),
        (lambda run: edit(run / PREDICTIONS, lambda text: "a" + text), ["one", "two"], "its columns are not"),
        (
            lambda run: edit(run / PREDICTIONS, lambda text: text[: text[:-1].rindex("\n") + 1]),
            ["one", "two"],
            "are not of one run",
        ),
        (lambda run: edit(run / METRICS, lambda text: text + "{\n"), ["one", "two"], "jsonl: damaged"),
        (None, ["one", "two", "--html", "one/summary.json"], "the name must end in .html or .htm"),
        (None, ["one", "two", "--html", "no/page.html"], "there is no folder no"),
        (None, ["one", "two", "--figure", "curves.bmp"], "the name must end in .png or .svg or .pdf"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(runs, tmp_path, monkeypatch, capsys, damage, arguments, message):
    if damage:
        damage(runs[1])
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert command.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


# --- the list of runs --------------------------------------------------------------------------------


def test_runs_are_listed_with_their_state(runs, tmp_path, capsys):
    (runs[1] / SUMMARY).unlink()
    shutil.copytree(runs[0], tmp_path / "damaged")
    (tmp_path / "damaged" / SUMMARY).write_text("{")
    (tmp_path / "no run").mkdir()
    assert list_runs.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    found = {row["run"]: row for row in table("\n" + out, "")}
    states = {name: row["state"] for name, row in found.items()}
    assert states == {
        "one": "finished", "two": "unfinished", r"<i>th\|ree": "finished", "damaged": "damaged"
    }  # fmt: skip
    summary = json.loads((runs[0] / SUMMARY).read_text())
    assert found["one"]["test accuracy"] == f"{summary['test_accuracy']:.4f}"
    assert (found["one"]["r"], found["one"]["targets"], found["one"]["time"]) == ("8", "query, value", "12 s")
    assert (found[r"<i>th\|ree"]["r"], found["two"]["r"], found["two"]["time"]) == ("-", "4", "-")
    assert f"{tmp_path / 'damaged' / SUMMARY}: damaged" in out


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nowhere", "nowhere: there is no such folder"),
        ("empty", "it contains no run\n"),
        ("one", "a run itself"),
    ],
)
def test_a_folder_without_runs_is_an_error(runs, tmp_path, monkeypatch, capsys, folder, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert list_runs.main([folder]) == 2
    assert message in capsys.readouterr().err


def test_neither_command_imports_transformers(runs):
    """Its import takes longer than the whole comparison, the texts of changed predictions included."""
    code = (
        "import runpy, sys, train.compare\n"
        "assert train.compare.main(sys.argv[1:3]) == 0\n"
        "sys.argv[1:] = sys.argv[3:]\n"
        "try: runpy.run_module('train.runs', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "sys.exit('transformers' in sys.modules)"
    )
    words = [sys.executable, "-c", code, *map(str, runs[:2]), str(runs[0].parent)]
    root = Path(__file__).parent.parent
    done = subprocess.run(words, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert table(done.stdout, "Changed predictions")
    assert "finished" in done.stdout
