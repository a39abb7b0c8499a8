"""bench accuracy: tuned by validation, compared in pairs, never run twice; and its statistics."""

import csv
import json
import math

import pytest

from bench import accuracy
from bench.accuracy import QUERY_VALUE, Mode
from train.runs import PREDICTIONS, SUMMARY
from train.significance import mean_and_interval


def test_the_interval_is_students():
    # By hand: mean 2, standard deviation 1, t(2) = 4.303, half width 4.303 / √3.
    mean, half_width = mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half_width == pytest.approx(4.303 / math.sqrt(3), rel=1e-12)
    with pytest.raises(ValueError, match="not 1"):
        mean_and_interval([1.0])


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs that are finished without training: `trained` lists them, `summaries` says how they went."""
    monkeypatch.setattr(accuracy, "RUNS", tmp_path)
    trained = []

    def train(command, **_):
        settings = dict(word.split("=", 1) for word in command if "=" in word)
        folder = tmp_path.parent / command[command.index("--output") + 1]
        folder.mkdir(parents=True)
        rate, seed = float(settings["learning_rate"]), int(settings["seed"])
        examples = settings.get("max_train_examples")
        trained.append((settings["method"], settings.get("r"), rate, seed, examples))
        # The lowest validation loss at the second candidate, the best test accuracy at the first. On a
        # part of the data the next higher rate does better.
        best = {"full": 6e-5}.get(settings["method"].strip('"'), 2e-3)
        lowest = best if examples is None else 1.9 * best
        right = 8 if rate < best else 6 + seed % 2
        with (folder / PREDICTIONS).open("w", newline="") as file:
            csv.writer(file).writerows(
                [("label", "prediction"), *([("a", "a")] * right), *([("a", "b")] * (10 - right))]
            )
        summary = {
            "val_loss": abs(math.log(rate / lowest)), "val_accuracy": 0.5, "test_accuracy": right / 10,
            "trainable_parameters": 10, "lora_parameters": 5, "train_seconds": 60.0,
            "peak_memory_bytes": 2**30, "precision": "bf16", "device": "a CPU",
            "train_examples": 100 * int(settings["epochs"]),
        }  # fmt: skip
        (folder / SUMMARY).write_text(json.dumps(summary))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr("bench.training.subprocess.run", train)
    return trained


def test_rates_are_chosen_by_validation_and_no_cell_is_run_twice(runs):
    lora = [Mode("lora", r, QUERY_VALUE) for r in (1, 8)]
    found = accuracy._data_set("bbc", lora, quick=False)
    assert {row["name"]: row["learning_rate"] for row in found["rows"]} == {
        "full": 6e-5, "head only": 2e-3, "LoRA r=1, query, value": 2e-3, "LoRA r=8, query, value": 2e-3,
    }  # fmt: skip
    assert sum(row["chosen"] for row in found["tuning"]) == 3 * 2  # as a trial and as a finalist
    # 4 candidates for 3 modes, of which the chosen one is a cell; 2 more seeds for 3, and 3 seeds of r = 1
    assert len(runs) == len(set(runs)) == 3 * 4 + 3 * 2 + 3
    again = accuracy._data_set("bbc", lora, quick=False)
    assert again == found
    assert len(runs) == 21


def test_on_a_large_data_set_rates_are_tried_on_a_part_of_it(runs):
    found = accuracy._data_set("large", [Mode("lora", 8, QUERY_VALUE)], quick=False)
    trials = [run for run in runs if run[-1] is not None]
    assert len(trials) == 3 * 4
    # A cell is on all of it, so no trial is one; two finalists for each of 3 modes, one of them a cell.
    assert len(runs) == 3 * 4 + 3 * 2 + 3 * 2
    assert (found["tried_on"], found["train_articles"]) == (4500, 100)
    assert [row["learning_rate"] for row in found["rows"]] == [6e-5, 2e-3, 2e-3]


def test_a_row_has_its_seeds_mean_interval_and_pairs(runs):
    result = {
        "sets": [accuracy._data_set("bbc", [Mode("lora", 8, QUERY_VALUE)], quick=False)],
        "settings": accuracy.SETTINGS, "candidate_rates": accuracy.RATES,
        "precision": "bf16", "device": "a CPU",
    }  # fmt: skip
    full, _, lora = result["sets"][0]["rows"]
    assert full["test_accuracy"] == lora["test_accuracy"] == [0.6, 0.7, 0.6]
    assert "against_full" not in full
    assert lora["against_full"] == [{"only_this": 0, "only_full": 0, "p": 1.0}] * 3
    assert "63.33 ± 14.34" in accuracy.table(result)
    assert "none differs" in " ".join(accuracy.table(result).split())
