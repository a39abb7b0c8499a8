"""A run as a plain transformers folder: no code of ours needed, the merged model's bits."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora import merge
from train import export
from train.config import Recipe
from train.job import run_job
from train.trained import load_trained

TEXTS = ["the striker scored twice", "shares fell as rates rose, " * 20]


@pytest.fixture(scope="module")
def run(hub_folder, csv_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    recipe = Recipe(
        model=str(hub_folder), data=str(csv_folder), epochs=1, batch_size=4, learning_rate=1e-2,
        max_length_tokens=16, validation_fraction=0.25, precision="fp32", device="cpu",
    )  # fmt: skip
    run_job("tiny", recipe, folder)
    return folder


@torch.no_grad()
def test_the_exported_logits_are_the_merged_models_bit_for_bit(run, tmp_path, capsys):
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    trained = load_trained(run)
    merge(trained.model)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape[1] == 16  # the length it was trained with
    assert torch.equal(plain(**batch).logits, trained.model(**batch).logits)
    assert not any("lora" in key for key in plain.state_dict())


@torch.no_grad()
def test_what_the_base_was_made_for_does_not_matter_to_the_export(run, hub_folder, tmp_path, monkeypatch):
    """A base for several labels at once, whose tokenizer pads on the left, where the head reads."""
    texts, trained = ["rates", TEXTS[1]], load_trained(run, text=True)
    merge(trained.model)
    alone = [trained.tokenizer(text, truncation=True, max_length=16, return_tensors="pt") for text in texts]
    wanted = torch.cat([trained.model(**each).logits for each in alone])

    def load(*args, **kwargs):
        found = load_trained(*args, **kwargs)
        found.model.config.problem_type = "multi_label_classification"
        return dataclasses.replace(
            found, tokenizer=AutoTokenizer.from_pretrained(hub_folder, padding_side="left")
        )

    monkeypatch.setattr(export, "load_trained", load)
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    assert not batch["attention_mask"].all()
    torch.testing.assert_close(plain(**batch).logits, wanted, rtol=0, atol=1e-5)  # float32, padded
    assert plain.config.problem_type == "single_label_classification"


def test_a_pipeline_uses_it_with_no_code_of_ours(run, tmp_path):
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    script = (
        "import sys, json\n"
        "from transformers import pipeline\n"
        "answers = pipeline('text-classification', sys.argv[1])(json.loads(sys.argv[2]), truncation=True)\n"
        "assert not {'lora', 'model', 'train'} & set(sys.modules)\n"
        "print(json.dumps(answers))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out"), json.dumps(TEXTS)],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout.splitlines()[-1])
    assert {answer["label"] for answer in answers} <= {"money", "sport", "tech"}


def test_wrong_folders_are_clear_errors(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments in (
        [str(run), str(tmp_path)],
        [str(run), str(tmp_path / "file")],
        ["nowhere", str(tmp_path / "x")],
    ):
        assert export.main(arguments) == 2
        assert capsys.readouterr().err.startswith("error: ")
