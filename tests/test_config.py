"""Recipes: read whole, checked whole, and a misspelt field names its neighbour."""

import sys
from pathlib import Path

import pytest

from train.cli import main
from train.config import RECIPES, Recipe, RecipeError, load_recipe, make_recipe, parse_setting
from train.runs import write_recipe

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))


def test_the_four_recipes_are_there():
    assert {"quickstart", "minilm-agnews", "roberta-base", "roberta-base-original"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads_and_survives_being_written(name, tmp_path):
    short, recipe = load_recipe(name)
    assert short == name
    (tmp_path / "copy.toml").write_text(recipe.to_toml())
    assert load_recipe(str(tmp_path / "copy.toml")) == ("copy", recipe)


def test_resuming_without_an_output_resumes_the_folder_whose_recipe_it_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    write_recipe(tmp_path / "runs" / "quickstart", "mine", Recipe(epochs=7))
    started = []
    monkeypatch.setattr("train.cli.run_job", lambda *given: started.append(given) or sys.exit(0))
    with pytest.raises(SystemExit):
        main(["--resume"])
    assert started == [("mine", Recipe(epochs=7), Path("runs/quickstart"), True)]


def test_the_original_settings_are_the_original_settings():
    _, recipe = load_recipe("roberta-base-original")
    wanted = {
        "epochs": 3, "batch_size": 16, "accumulation_steps": 2, "learning_rate": 5e-5, "weight_decay": 0.01,
        "label_smoothing": 0.1, "warmup_fraction": 0.1, "precision": "fp16", "max_length_tokens": 512, "r": 8,
        "lora_alpha": 16.0, "lora_dropout": 0.1, "target_modules": ("query", "value"),
    }  # fmt: skip
    assert {field: getattr(recipe, field) for field in wanted} == wanted


@pytest.mark.parametrize(
    ("setting", "parsed"),
    [
        ("epochs=2", ("epochs", 2)),
        ("learning_rate=1e-3", ("learning_rate", 1e-3)),
        ("use_rslora=true", ("use_rslora", True)),
        ("use_rslora=True", ("use_rslora", True)),
        ("init_lora_weights=pissa", ("init_lora_weights", "pissa")),
        ("init_lora_weights=true", ("init_lora_weights", True)),
        ("model=minilm", ("model", "minilm")),
        ("data=/a/folder", ("data", "/a/folder")),
        ("target_modules=query,value", ("target_modules", ["query", "value"])),
        ('target_modules=["key"]', ("target_modules", ["key"])),
        ('target_modules=".*query"', ("target_modules", ".*query")),
    ],
)
def test_settings_are_read_as_toml_or_as_text(setting, parsed):
    assert parse_setting(setting) == parsed
    make_recipe(dict([parsed]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
        ({"method": "lor"}, "method: 'lor': did you mean 'lora'"),
        ({"precision": "int8"}, "precision: 'int8'"),
        ({"epochs": 0}, "epochs: 0 is not at least 1"),
        ({"epochs": 1.5}, "epochs: 1.5 is not a whole number"),
        ({"epochs": True}, "epochs: True is not a whole number"),
        ({"learning_rate": 0}, "learning_rate: 0.0 is not above 0"),
        ({"learning_rate": float("nan")}, "learning_rate: nan is not a number"),
        ({"label_smoothing": 1.0}, "label_smoothing: 1.0 is not at least 0 and below 1"),
        ({"validation_fraction": 0}, "validation_fraction"),
        ({"lora_dropout": 1}, "lora_dropout"),
        ({"r": 0}, "^r: "),
        ({"target_modules": []}, "target_modules: empty"),
        ({"target_modules": 3}, "target_modules: 3"),
        ({"target_modules": "(query"}, "^target_modules: '.query' is not a regular expression"),
        ({"device": "tpu"}, "device: 'tpu'"),
        ({"use_rslora": "yes"}, "use_rslora: 'yes' is not true or false"),
        ({"init_lora_weights": "pisa"}, "init_lora_weights: 'pisa' is not one of True, 'pissa'"),
        ({"init_lora_weights": 1}, "init_lora_weights: 1 is not"),
        ({"use_dora": True, "peft_type": "VERA"}, "use_dora and peft_type: each chooses a variant"),
        ({"loraplus_lr_ratio": 0.5}, "loraplus_lr_ratio: 0.5 is not at least 1"),
        ({"data": ""}, "data: empty"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_bad_field_is_an_error_that_names_it(fields, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe(fields)


def test_a_misspelt_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'quickstart'"):
        load_recipe("quickstar")


def test_the_defaults_are_a_recipe():
    assert Recipe().lora_config().modules_to_save == ("classifier",)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "quikstart"], "did you mean 'quickstart'"),
        (["--recipe", "missing.toml"], "No such file"),
        (["--set", "epoch=3"], "did you mean 'epochs'"),
        (["--set", "epochs"], "not of the form key=value"),
        (["--model", ""], "model: empty"),
        (["--recipe", "tests"], "there is no recipe 'tests'; choose one of minilm-agnews, quickstart"),
        (["--set", "lr=0.1"], "--set 'lr': there is no such field; did you mean 'learning_rate'?"),
        (["--set", "rank=4"], "--set 'rank': there is no such field; did you mean 'r'?"),
        (["--set", "num_train_epochs=4"], "did you mean 'epochs'?"),
        (["--set", "epochs=0"], "--set epochs: 0 is not at least 1"),
        (["--set", "epochs", "=", "3"], "--set epochs: not of the form key=value"),
        (["--set", "=3"], "--set =3: not of the form key=value"),
        (["--set", "epochs=1", "r=4"], "r=4: not a flag; use --set r=4"),
        (["--no-such-flag"], "--no-such-flag: there is no such flag; choose one of --recipe"),
        (["--outptu", "x"], "--outptu: there is no such flag; did you mean '--output'?"),
        (["--epochs", "1"], "--epochs: there is no such flag; use --set epochs=1"),
        (["--lr=1e-3"], "--lr: there is no such flag; use --set learning_rate=1e-3"),
        (["-r", "4"], "-r: there is no such flag; use --set r=4"),
        (["--use-rslora"], "use --set use_rslora=true"),
        (["--target-modules", "query", "value"], "use --set target_modules=query,value"),
        (["--dataset", "my data"], "use --data 'my data'"),
        (["quickstart"], "quickstart: not a flag; use --recipe"),
        (["--set"], "argument --set: expected one argument"),
        (["--data", "tests/conftest.py"], "tests/conftest.py: this is a file; give the folder that contains"),
        (["--model", "tests/conftest.py"], "tests/conftest.py: this is a file; give the folder of a model"),
        (["--output", "Makefile/run"], "Makefile/run: Makefile is not a folder"),
        (["--set", "r=99999"], "r: 99,999 is more than 384, the largest rank of the weight of roberta"),
        (["--resume", "--output", "no/such/folder"], "no such folder"),
        (["--data", "no/such/folder/at/all"], "there is no such folder"),
        (["--model", "./nowhere"], "there is no such folder"),
        (["--model", "random:roberta-base"], "without a tokenizer"),
        (["--set", "device=cuda:99"], "there is no cuda:99 here"),
        (["--set", "max_length_tokens=4000"], "reads 512 at most"),
        (["--set", "loraplus_lr_ratio=16", "--set", "method=head"], "no lora_B trains here"),
        (["--set", "target_modules=q_proj"], "'q_proj' matches no module; names end with dense, key"),
    ],
)
def test_a_wrong_command_is_one_message_and_exit_code_2(flags, message, tmp_path, capsys, monkeypatch):
    try:
        monkeypatch.chdir(ROOT)
        code = main(["--output", str(tmp_path / "run"), *flags])
    except SystemExit as stop:  # argparse's own errors
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()
