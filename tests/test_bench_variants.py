"""bench variants: rates selected on validation rows, paired tests, never run twice; and its statistics."""

import csv
import dataclasses
import itertools
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist, fmean

import pytest
import torch

from bench import grid, variants
from bench.grid import FOLDS, METHODS, MOST, SEEDS, START, Cell, Results, correct, train_all, train_method
from bench.paired import FULL, LORA, REFERENCES, compare
from bench.steps import make_model, memory_bytes
from bench.training import finish_run
from lora import LoraConfig
from lora.variants import VARIANTS
from train.bbc import read_bbc
from train.config import RECIPES, Recipe, load_recipe
from train.runs import CONFIG, PREDICTIONS, SUMMARY, RunError
from train.significance import holm, mcnemar, normal_interval, paired_interval, sign_flip

BY_NAME = {method.name: method for method in METHODS}
METHOD = BY_NAME[LORA]

# --- statistics ------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_normal():
    # By hand: mean 2, standard deviation 1, half width 1.96 / √3.
    mean, half_width = normal_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half_width == pytest.approx(1.959964 / math.sqrt(3), rel=1e-6)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (4, 9)])
def test_the_interval_of_a_paired_difference_is_agrestis_and_mins(only_first, only_second):
    # Their formula for a table of pairs: half a pair is added to each of its four cells.
    b, c, n = only_first + 0.5, only_second + 0.5, 100 + 2
    half_width = 1.959964 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    low, high = paired_interval(
        [1] * only_first + [-1] * only_second + [0] * (100 - only_first - only_second)
    )
    assert (low, high) == pytest.approx(((b - c) / n - half_width, (b - c) / n + half_width), rel=1e-6)
    assert low < (only_first - only_second) / 100 < high  # also where no article differs


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (3, 0), (1, 4), (5, 5), (2, 7)])
def test_mcnemars_p_is_the_share_of_coins_at_least_as_uneven(only_first, only_second):
    first = [True] * only_first + [False] * only_second + [True, False]
    second = [False] * only_first + [True] * only_second + [True, False]
    uneven = abs(only_first - only_second)
    coins = list(itertools.product((0, 1), repeat=only_first + only_second))
    as_uneven = sum(abs(2 * sum(toss) - len(toss)) >= uneven for toss in coins)
    assert mcnemar(first, second) == (only_first, only_second, pytest.approx(as_uneven / len(coins)))
    assert sign_flip([a - b for a, b in zip(first, second, strict=True)]) == mcnemar(first, second)[2]


@pytest.mark.parametrize("differences", [[], [0, 0], [3], [2, -1], [1, 1, 2, 3], [3, -2, 2, -1, 1, 0, -3]])
def test_the_sign_flip_test_counts_all_choices_of_signs(differences):
    signs = list(itertools.product((-1, 1), repeat=len(differences)))
    sums = [sum(s * d for s, d in zip(choice, differences, strict=True)) for choice in signs]
    as_far = sum(abs(each) >= abs(sum(differences)) for each in sums)
    assert sign_flip(differences) == as_far / len(signs)


def test_the_sign_flip_test_of_many_differences_is_nearly_normal():
    # Σ d = 41 and Σ d² = 1,401. Sums differ by 2, hence the continuity correction of 1. With 226 differences
    # the normal approximation is good to 1%.
    differences = [3] * 55 + [-3] * 45 + [2] * 65 + [-2] * 60 + [1]
    assert sign_flip(differences) == pytest.approx(2 * NormalDist().cdf(-40 / math.sqrt(1401)), rel=0.01)


def test_holm_multiplies_the_smallest_p_by_their_number_the_next_by_one_less():
    # By hand: 4·0.005, 3·0.01, 2·0.03, then 0.04, which may not be below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


# --- the grid ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (1, range(3)),  # the middle one of the first candidates
        (-2, range(-3, 3)),
        (4, range(6)),
        (-100, range(-6, 3)),  # never interior
        (100, range(9)),
    ],
)
def test_rates_are_added_until_the_best_is_interior_or_there_are_most(best, tried):
    finished = []

    def finish(cell):
        finished.append(cell)
        return {"val_loss": abs(cell.quarter - METHOD.quarter - best)}

    trained = train_method("bbc", METHOD, finish)
    assert [cell.quarter - METHOD.quarter for cell in trained.sweep] == list(tried)
    assert START <= len(tried) <= MOST
    assert trained.interior == (min(tried) < best < max(tried))
    assert {cell.part for cell in trained.sweep} == {0}
    selected = min(max(best, min(tried)), max(tried)) + METHOD.quarter
    assert [(cell.quarter, cell.part) for cell in trained.chosen] == [
        (selected, fold) for fold in range(FOLDS)
    ]
    assert len(set(finished)) == len(finished) == len(tried) + FOLDS - 1


def test_another_dataset_begins_around_the_rate_selected_on_bbc():
    best = {"bbc": METHOD.quarter + 4, "news": METHOD.quarter + 3}
    trained = train_method("news", METHOD, lambda cell: {"val_loss": abs(cell.quarter - best[cell.data])})
    # 3, 4 and 5, and then 2, because the first one was the best
    assert [cell.quarter - METHOD.quarter for cell in trained.sweep] == [2, 3, 4, 5]
    assert [(cell.quarter, cell.part) for cell in trained.chosen] == [(best["news"], seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """The folds of bbc in a folder of their own: the texts of each one's training and test part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "RUNS", tmp_path_factory.mktemp("runs"))
        grid.write_folds()
        yield [
            [
                [row["text"] for row in csv.DictReader((grid.RUNS / f"fold{fold}" / name).open(newline=""))]
                for name in ("train.csv", "test.csv")
            ]
            for fold in range(FOLDS)
        ]


def test_every_article_is_a_test_article_of_one_fold_and_a_training_article_of_the_others(folds):
    parts = read_bbc()[0]
    articles = sorted(text for texts, _ in parts.values() for text in texts)
    assert sorted(text for _, test in folds for text in test) == articles
    for train, test in folds:
        assert sorted(train + test) == articles
    assert set(parts["test"][0]) <= set(folds[0][1])


def test_the_articles_used_to_select_rates_are_training_articles_of_the_first_fold(folds):
    used = grid.used_to_select()
    tested = [text for _, test in folds for text in test]
    articles = {text for text, was_used in zip(tested, used, strict=True) if was_used}
    assert len(articles) == round(0.1 * len(folds[0][0]))
    assert articles <= set(folds[0][0])


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs that are finished without training, and listed: the best rate is the second candidate."""
    monkeypatch.setattr(grid, "RUNS", tmp_path)
    monkeypatch.setattr(grid, "_digest", str)
    monkeypatch.setattr(grid, "write_folds", lambda: None)
    trained = []

    def train(command, **_):
        settings = dict(word.split("=", 1) for word in command if "=" in word)
        folder = tmp_path.parent / command[command.index("--output") + 1]
        folder.mkdir(parents=True)
        seed, learning_rate = int(settings["seed"]), float(settings["learning_rate"])
        method = settings["method"].strip('"')
        trained.append((settings["data"], method, learning_rate, seed))
        best = grid.rate(BY_NAME[FULL if method == "full" else LORA].quarter + 1)
        right = {"full": 7, "lora": 4}[method] + seed
        with (folder / PREDICTIONS).open("w", newline="") as file:
            rows = [("a", "b")] * (10 - right) + [("a", "a")] * right
            csv.writer(file).writerows([("label", "prediction"), *rows])
        summary = dict.fromkeys(grid.KEPT, 0) | {
            "val_loss": abs(math.log(learning_rate / best)), "val_accuracy": 0.5, "test_accuracy": right / 10,
            "trainable_parameters": 10, "lora_parameters": 5 * (method == "lora"), "adapter_bytes": 40,
            "train_seconds": 3600.0, "precision": "bf16", "device": "a CPU, 1 thread",
            "train_examples": 100 * int(settings["epochs"]), "epochs": int(settings["epochs"]),
        }  # fmt: skip
        (folder / SUMMARY).write_text(json.dumps(summary))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr("bench.training.subprocess.run", train)
    return trained


PAIR = (BY_NAME[FULL], BY_NAME[LORA])


def test_a_finished_cell_is_not_run_again(runs, tmp_path):
    path = tmp_path / "cells.json"
    first = train_all("news", PAIR, Results(path))
    # those of bbc too, for the first rates
    assert len(runs) == len(set(runs)) == 2 * (START + FOLDS - 1) + 2 * (START + len(SEEDS) - 1)
    shutil.rmtree(tmp_path / "whole")
    assert train_all("news", PAIR, Results(path)) == first  # from the file alone
    assert len(runs) == 24
    cell = Cell("news", METHOD, METHOD.quarter + 1, 2)
    assert correct(Results(path).finish(cell)) == [False] * 4 + [True] * 6
    found = compare("news", first, REFERENCES)
    assert (found["runs"], found["hours"]) == (10, 10.0)
    assert [row["learning_rate"] for row in found["rows"]] == [1e-4, 3.16e-3]


def test_a_run_keeps_the_results_that_others_have_added_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "RUNS", tmp_path)
    results = Results(tmp_path / "cells.json")
    first, second, third = (Cell("news", METHOD, METHOD.quarter, seed) for seed in SEEDS)

    def run(cell):
        if cell is first:
            results.finish(second)
            results.finish(third)
        return {"part": cell.part}

    monkeypatch.setattr(Cell, "run", run)
    results.finish(first)
    assert json.loads((tmp_path / "cells.json").read_text())["cells"] == {
        cell.key: {"part": cell.part} for cell in (first, second, third)
    }


def test_a_cell_that_another_process_has_finished_meanwhile_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "RUNS", tmp_path)
    early, late = Results(tmp_path / "cells.json"), Results(tmp_path / "cells.json")
    cell = Cell("news", METHOD, METHOD.quarter, 0)
    monkeypatch.setattr(Cell, "run", lambda cell: {"by": "early"})
    early.finish(cell)
    monkeypatch.setattr(Cell, "run", lambda cell: {"by": "late"})
    assert late.finish(cell) == {"by": "early"}


def test_results_of_other_settings_are_refused(runs, tmp_path, monkeypatch):
    path = tmp_path / "cells.json"
    Results(path).finish(Cell("news", METHOD, METHOD.quarter, 0))
    monkeypatch.setitem(grid.LARGE, "epochs", 9)
    with pytest.raises(RunError, match="cells.json: measured with other settings; remove it"):
        Results(path)


def test_results_of_another_method_or_other_data_of_the_same_name_are_refused(runs, tmp_path, monkeypatch):
    path = tmp_path / "cells.json"
    (once,) = train_all("a/news", [METHOD], Results(path), quarter=METHOD.quarter)
    assert [cell.quarter for cell in once.chosen] == [METHOD.quarter] * len(SEEDS)
    assert len(runs) == len(SEEDS)  # the rate is given, so no other one is tried
    with pytest.raises(RunError, match="cells.json: its results are of another news; remove them"):
        train_all("b/news", [METHOD], Results(path))
    other = dataclasses.replace(METHOD, fields={**METHOD.fields, "r": 9})
    with pytest.raises(RunError, match="cells.json: its results are of another LoRA r=8; remove them"):
        train_all("a/news", [other], Results(path))
    assert len(runs) == len(SEEDS)


def test_a_cell_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "RUNS", tmp_path)
    failed = type(
        "Done", (), {"returncode": 2, "stderr": "a warning\nerror: ./news: there is no such folder\n"}
    )
    monkeypatch.setattr("bench.training.subprocess.run", lambda *_, **__: failed)
    monkeypatch.setattr(grid, "_digest", str)
    with pytest.raises(RunError, match="bbc/LoRA-r8/0.00178/fold0: error: ./news: there is no such folder"):
        train_all("./news", PAIR[1:], Results(tmp_path / "cells.json"))
    assert not (tmp_path / "cells.json").exists()


def test_a_run_that_is_killed_says_so(tmp_path, monkeypatch):
    killed = type("Done", (), {"returncode": -9, "stderr": "a warning\n"})
    monkeypatch.setattr("bench.training.subprocess.run", lambda *_, **__: killed)
    with pytest.raises(RunError, match="exit code -9 a warning"):
        finish_run("quickstart", {"epochs": 2}, tmp_path)


def test_a_rate_that_diverges_is_worse_than_all_others(tmp_path, monkeypatch):
    def run(command, **_):
        line = "error: step 9: the loss or its gradient is not finite, among the training rows 1, 2."
        return type("Done", (), {"returncode": 2, "stderr": f"{line}\n"})

    monkeypatch.setattr("bench.training.subprocess.run", run)
    monkeypatch.setattr(grid, "RUNS", tmp_path)
    result = Cell("bbc", METHOD, METHOD.quarter, 0).run()
    assert "step 9: the loss or its gradient is not finite" in result["diverged"]

    def finish(cell):
        return (
            result if cell.quarter > METHOD.quarter else {"val_loss": 0.1 * (METHOD.quarter - cell.quarter)}
        )

    trained = train_method("bbc", METHOD, finish)
    assert (trained.quarter, trained.interior) == (METHOD.quarter, True)
    # Where the best rate diverges on another fold, the next one is selected.
    fails = Cell("bbc", METHOD, METHOD.quarter, 3)
    trained = train_method("bbc", METHOD, lambda cell: result if cell == fails else finish(cell))
    assert (trained.quarter, trained.interior) == (METHOD.quarter - 1, True)
    with pytest.raises(RunError, match="diverges at every rate: .*step 9"):
        train_method("bbc", METHOD, lambda cell: result)


def test_the_settings_of_the_grid_do_not_depend_on_a_recipe():
    settings = Cell("bbc", METHOD, METHOD.quarter, 0).settings()
    recipes = [load_recipe(path.stem, settings)[1] for path in sorted(RECIPES.glob("*.toml"))]
    free = ("checkpoint_every_steps", "log_every_steps", "gradient_checkpointing", "deterministic")
    fixed = {field.name: getattr(Recipe(), field.name) for field in dataclasses.fields(Recipe)}
    variants = {"layer", "use_rslora", "loraplus_lr_ratio", *(name for name, _, _ in VARIANTS)}
    assert set(fixed) - set(settings) <= {*free, *variants, "device", "max_train_examples"}
    for recipe in recipes:
        for name in fixed:
            if name not in free:
                assert getattr(recipe, name) == getattr(recipes[0], name), name


def test_two_processes_add_to_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "RUNS", tmp_path)
    monkeypatch.setattr(Cell, "run", lambda cell: {"part": cell.part})

    def add(parts):
        results = Results(tmp_path / "cells.json")  # as in a process of its own: the lock is of the open file
        for part in parts:
            results.finish(Cell("news", METHOD, METHOD.quarter, part))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(add, (range(0, 60, 2), range(1, 60, 2))))
    cells = json.loads((tmp_path / "cells.json").read_text())["cells"]
    assert sorted(cell["part"] for cell in cells.values()) == list(range(60))


def test_a_run_of_other_settings_is_not_taken_for_this_one(tmp_path):
    (tmp_path / CONFIG).write_text(load_recipe("quickstart", {"epochs": 2})[1].to_toml())
    (tmp_path / SUMMARY).write_text('{"test_accuracy": 1.0}')
    assert finish_run("quickstart", {"epochs": 2}, tmp_path) == {"test_accuracy": 1.0}
    with pytest.raises(RunError, match="other settings; remove it"):
        finish_run("quickstart", {"epochs": 3}, tmp_path)


# --- comparisons -------------------------------------------------------------------------------------------


def test_seeds_are_averaged_for_each_article(runs, tmp_path):
    results = Results(tmp_path / "cells.json")
    full, lora = compare("news", train_all("news", PAIR, results), REFERENCES)["rows"]
    # full is right on the last 7, 8, 9 of 10 articles by seed, LoRA on the last 4, 5, 6
    assert (full["accuracy"], lora["accuracy"]) == (pytest.approx(0.8), pytest.approx(0.5))
    assert lora["by_part"] == [0.4, 0.5, 0.6]
    pair = lora["against"][FULL]
    differences = [0, -1, -2, -3, -2, -1, 0, 0, 0, 0]
    assert pair["difference"] == pytest.approx(fmean(differences) / 3)
    assert (pair["low"], pair["high"]) == paired_interval([d / 3 for d in differences])
    assert pair["p"] == pair["p_corrected"] == sign_flip(differences) == 2 / 2**5
    assert full["against"][LORA]["difference"] == -pair["difference"]


def test_on_bbc_all_articles_are_compared_once(folds):
    sizes = [len(test) for _, test in folds]
    wrong = {FULL: 40, "head only": 100, LORA: 30}  # the first articles

    def finish(cell):
        bits = "".join(
            "01"[sum(sizes[: cell.part]) + i >= wrong[cell.method.name]] for i in range(sizes[cell.part])
        )
        return dict.fromkeys((*grid.KEPT, "train_articles"), 0) | {
            "val_loss": abs(cell.quarter - cell.method.quarter - 1), "correct": f"{int('1' + bits, 2):x}",
            "precision": "bf16", "device": "a CPU",
        }  # fmt: skip

    found = compare("bbc", [train_method("bbc", BY_NAME[name], finish) for name in wrong], REFERENCES)
    assert [row["name"] for row in found["rows"]] == list(wrong)
    assert found["test_articles"] == 2045
    full, head, lora = found["rows"]
    assert full["accuracy"] == 1 - 40 / 2045
    used = grid.used_to_select()
    assert full["accuracy_unused"] == fmean(i >= 40 for i in range(2045) if not used[i])
    assert head["against"][LORA]["difference"] == pytest.approx(-70 / 2045)
    p = {
        name: mcnemar([False] * wrong[name], [i >= 30 for i in range(wrong[name])])[2]
        for name in (FULL, "head only")
    }
    assert head["against"][LORA]["p"] == p["head only"]
    # three comparisons: head with LoRA, head with full, and full with LoRA, which two rows have
    against_full = mcnemar([False] * 100, [i >= 40 for i in range(100)])[2]
    assert head["against"][LORA]["p_corrected"] == 3 * p["head only"]
    assert head["against"][FULL]["p_corrected"] == 2 * against_full
    assert full["against"][LORA]["p_corrected"] == p[FULL] == 2 / 2**10
    assert lora["against"][FULL]["p_corrected"] == p[FULL]
    assert set(lora["against"]) == {FULL}


@pytest.fixture(scope="module")
def cost():
    return variants.measure_steps(PAIR, quick=True)


@pytest.fixture
def result(runs, cost, tmp_path):
    results = Results(tmp_path / "cells.json")
    return {"sets": [compare("news", train_all("news", PAIR, results), REFERENCES)], "cost": cost}


def test_sentences_claim_a_difference_only_where_p_is_below_the_level(result):
    (found,) = result["sets"]
    lora = found["rows"][1]
    lora["against"][FULL]["p_corrected"] = 0.06
    none = "On news, compared with full fine-tuning, no method differs significantly."
    assert variants.difference_from(found, FULL) == none
    lora["against"][FULL]["p_corrected"] = 0.04
    assert variants.difference_from(found, FULL) == (
        "On news, compared with full fine-tuning, significantly less accurate: LoRA r=8 (-30.00)."
    )
    lora["by_part"] = [0.4, 0.5, 0.95]  # better than full fine-tuning with one of the seeds
    assert variants.difference_from(found, FULL) == none
    lora["against"][FULL]["difference"] *= -1
    lora["by_part"] = [0.91, 0.92, 0.95]
    assert "significantly more accurate: LoRA r=8 (+30.00)" in variants.difference_from(found, FULL)


def test_the_conclusions_name_rates_at_the_edge(result):
    (found,) = result["sets"]
    assert "Each selected rate had a worse one on either side." in variants.conclusions(found)
    found["rows"][1]["interior"] = False
    text = " ".join(variants.conclusions(found))
    assert "the best for LoRA r=8, so a better one may exist" in text
    assert "10 runs of one thread each, which trained for 10.0 hours, added up." in text


def test_the_conclusions_name_rates_at_which_training_fails(result):
    (found,) = result["sets"]
    lora = found["rows"][1]
    for tried in (*found["rows"][0]["sweep"], *lora["sweep"]):
        tried["loss"] = 1.0
    assert "Training fails" not in " ".join(variants.conclusions(found))
    others = [tried for tried in lora["sweep"] if tried["learning_rate"] != lora["learning_rate"]]
    others[0]["loss"], others[-1]["loss"] = 2.1, None
    names = "; ".join(f"LoRA r=8 at {others[i]['learning_rate']:g}" for i in (0, -1))
    assert f"times that at the selected rate: {names}." in " ".join(variants.conclusions(found))


def test_tables_and_figures_are_made_from_the_json_alone(result, tmp_path):
    result = json.loads(json.dumps(result))
    text = variants.table(result)
    assert "80.00 (" in text
    assert "-30.00 (" in text
    assert "LoRA r=8" in variants.short_table(result)
    assert FULL not in variants.short_table(result)  # it is no variant of LoRA
    variants.figures(result, tmp_path)
    assert (tmp_path / "variants.png").read_bytes().startswith(b"\x89PNG")


def test_a_cheaper_variant_is_named_where_the_interval_excludes_a_loss_of_the_margin(result):
    result = json.loads(json.dumps(result))  # its costs are shared with other tests
    (found,) = result["sets"]
    lora = found["rows"][1]
    thin = {
        **lora,
        "name": "thin",
        "trainable_parameters": 0.5 * lora["trainable_parameters"],
        "against": {LORA: {"difference": -0.004, "low": -0.009, "high": 0, "p_corrected": 0.06}},
    }
    found["rows"].append(thin)
    step = result["cost"]["methods"]["thin"] = dict(result["cost"]["methods"][LORA])

    def named():
        text = " ".join(variants.short_table(result).split())
        return text.partition("1 point less accurate on the datasets that it was trained on: ")[2]

    end = f"interval from -0.90 on {found['data']}"
    assert named() == f"thin (0.50 of the trained parameters; {end})."
    other = json.loads(json.dumps(found))  # another dataset, on which the interval begins higher
    other["data"], other["rows"][-1]["against"][LORA]["low"] = "other", -0.008
    result["sets"].append(other)
    assert named() == f"thin (0.50 of the trained parameters; {end})."
    thin["against"][LORA]["low"] = -0.011
    assert named() == "none."
    thin["against"][LORA]["low"] = -0.009
    step["held_bytes"] *= 1.2  # more memory instead
    assert named() == "none."


def test_all_methods_with_the_highest_accuracy_are_named(result):
    (found,) = result["sets"]
    lora = found["rows"][1]
    found["rows"].append({**lora, "name": "as good"})
    text = " ".join(variants.conclusions(found))
    assert "all weights is 50.00%. Minus that of full fine-tuning, in points: LoRA r=8 -30.00 (" in text
    assert "; as good -30.00 (" in text


def test_methods_with_equal_layers_are_measured_once():
    methods = [BY_NAME[name] for name in (LORA, "EVA", "LoRA+", "rsLoRA r=64")]
    measured = variants.measure_steps(methods, quick=True)["methods"]
    assert [step["measured_as"] for step in measured.values()] == [LORA, LORA, LORA, "rsLoRA r=64"]
    assert [step["scaling"] for step in measured.values()] == [2, 2, 2, 2]  # 16/8 and 16/√64
    # rank 64 instead of 8 has 7·73,728 more parameters, with a copy, a gradient and two moments each
    assert measured["rsLoRA r=64"]["held_bytes"] > measured[LORA]["held_bytes"] + 4 * 3 * 7 * 73_728


def test_frozen_matrices_of_a_variant_are_weights():
    def weights(**settings):
        config = LoraConfig(
            r=8, target_modules=("query", "value"), modules_to_save=("classifier",), **settings
        )
        model = make_model("lora", "random:minilm", 2, 8, "fp32", torch.device("cpu"), config)
        return memory_bytes(model)["weights"]

    assert weights(init_lora_weights="pissa") - weights() == 4 * 73_728  # A₀ and B₀, float32
