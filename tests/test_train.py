"""Whole runs on a tiny model: what they leave, that they repeat, and that they go on where they stopped."""

import csv
import dataclasses
import hashlib
import json
import os
import shutil
import signal

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import content

from lora import inject, read_adapter
from lora.files import CONFIG_FILE, TENSOR_FILE
from lora.modules import train_only
from lora.storage import digest
from model import HEAD, load_base
from train import evaluate, predict, runs
from train.batches import encode
from train.checkpoint import CheckpointError, list_checkpoints
from train.cli import main
from train.config import Recipe
from train.data import load_news
from train.job import run_job
from train.loop import Trainer, TrainingError
from train.metrics import Scores
from train.run_figures import draw_all
from train.runs import RunError
from train.signals import InterruptedRunError
from train.trained import load_trained, save_trained


@pytest.fixture(scope="session")
def recipe(tiny_recipe):
    return dataclasses.replace(
        tiny_recipe, epochs=3, base_dropout=0.02, log_every_steps=2, checkpoint_every_steps=5
    )


@pytest.fixture(scope="session")
def run(recipe, tmp_path_factory):
    """A finished run: its folder and summary."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.job.draw_all", draw_all)
        return folder, run_job("tiny", recipe, folder).summary


def test_a_run_leaves_what_the_readme_says(run, recipe):
    folder, summary = run
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {
        "summary.json", "metrics.jsonl", "config.toml", "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors", "figures/curves.png", "figures/confusion_matrix.png",
        "figures/classification_report.png",
    } <= names  # fmt: skip
    assert list_checkpoints(folder / "checkpoint")
    assert {
        "recipe", "model", "data", "seed", "precision", "device", "test_accuracy", "test_macro_f1",
        "test_confusion_matrix", "val_accuracy", "best_epoch", "lora_parameters", "head_parameters",
        "trainable_parameters", "total_parameters", "adapter_bytes", "train_seconds", "examples_per_second",
        "tokens_per_second", "padding_fraction", "peak_memory_bytes", "versions",
    } <= summary.keys()  # fmt: skip
    assert summary["precision"] == "fp32"
    assert np.sum(summary["test_confusion_matrix"]) == 9
    assert (folder / "config.toml").read_text() == f"# recipe: tiny\n{recipe.to_toml()}"


def test_the_predictions_are_those_of_the_test_texts(run, recipe):
    folder, summary = run
    test = load_news(recipe.data, recipe.validation_fraction, recipe.seed).test
    with (folder / "test_predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    digests = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in test["text"]]
    assert [row["digest"] for row in rows] == digests
    labels = summary["labels"]
    assert [labels.index(row["label"]) for row in rows] == test["label"][:]
    confusion = np.zeros((3, 3), int)
    for row in rows:
        probabilities = [float(row[f"p({label})"]) for label in labels]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)  # three, with six digits each
        assert labels[int(np.argmax(probabilities))] == row["prediction"]
        confusion[labels.index(row["label"]), labels.index(row["prediction"])] += 1
    assert confusion.tolist() == summary["test_confusion_matrix"]


def test_the_loss_falls_and_the_news_is_learnt(run):
    folder, summary = run
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # Validation's: the loss of four rows under dropout says more of the rows than of the model.
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert summary["test_accuracy"] > 0.8
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    assert steps[-1] == summary["steps"] == 3 * 7  # 27 rows in batches of 4


def test_the_learning_rate_warms_up_then_follows_a_cosine(run):
    folder, _ = run
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    warm, total = 2, 21
    for step, rate in rates.items():
        done = step - 1  # before this step
        cosine = 0.5 * (1 + np.cos(np.pi * (done - warm) / (total - warm)))
        expected = 1e-2 * (done / warm if done < warm else cosine)
        assert rate == pytest.approx(expected, rel=1e-12, abs=1e-15)  # float64 arithmetic


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(run, recipe, tmp_path):
    torch.rand(5)  # nothing drawn before matters
    run_job("tiny", recipe, tmp_path / "again")
    assert content(tmp_path / "again") == content(run[0])
    run_job("tiny", dataclasses.replace(recipe, seed=1), tmp_path / "other")
    assert content(tmp_path / "other")[0] != content(run[0])[0]


@pytest.mark.parametrize("stop_after", [1, 5, 7, 13])
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_was_not(
    run, recipe, tmp_path, monkeypatch, stop_after
):
    step, steps = Trainer._step, 0

    def stopping(trainer, group):
        nonlocal steps
        steps += 1
        if steps == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, group)

    monkeypatch.setattr(Trainer, "_step", stopping)
    with pytest.raises(InterruptedRunError) as stop:
        run_job("tiny", recipe, tmp_path / "run")
    assert stop.value.signal == signal.SIGTERM
    monkeypatch.undo()
    run_job("tiny", recipe, tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == content(run[0])


def test_a_crash_is_made_up_for_also_if_the_last_checkpoint_is_damaged(run, recipe, tmp_path, monkeypatch):
    step, steps = Trainer._step, 0

    def crashing(trainer, group):
        nonlocal steps
        steps += 1
        if steps == 13:  # three steps and a log line after the last checkpoint
            raise MemoryError
        return step(trainer, group)

    monkeypatch.setattr(Trainer, "_step", crashing)
    with pytest.raises(MemoryError):
        run_job("tiny", recipe, tmp_path / "run")
    monkeypatch.undo()
    older, newest = list_checkpoints(tmp_path / "run" / "checkpoint")
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"damaged.*remove it to resume from {older.name}"):
        run_job("tiny", recipe, tmp_path / "run", resume=True)
    newest.unlink()
    unfinished = [
        tmp_path / "run" / ".weights.safetensors.0123abcd",
        older.with_name(f".{older.name}.0123abcd"),
    ]
    for path in unfinished:
        path.touch()  # left by a write that was killed
    run_job("tiny", recipe, tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == content(run[0])
    assert not any(path.exists() for path in unfinished)
    (last,) = list_checkpoints(tmp_path / "run" / "checkpoint")
    assert last.stem == "00000021"  # of a finished run, the last one alone


def test_resuming_says_what_does_not_fit(run, recipe, tmp_path, capsys):
    folder, _ = run
    assert run_job("tiny", recipe, folder, resume=True).was_finished
    with pytest.raises(RunError, match="epochs = 3 there, epochs = 4 now"):
        run_job("tiny", dataclasses.replace(recipe, epochs=4), folder, resume=True)
    with pytest.raises(RunError, match="it holds a finished run already"):
        run_job("tiny", recipe, folder)
    with pytest.raises(RunError, match="no such folder"):
        run_job("tiny", recipe, tmp_path / "nowhere", resume=True)
    (tmp_path / "empty").mkdir()
    run_job("tiny", dataclasses.replace(recipe, epochs=1), tmp_path / "empty", resume=True)
    assert "resuming at step 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("metrics.jsonl", lambda path: path.unlink(), "not those that the checkpoint was taken with"),
        (
            "metrics.jsonl",
            lambda path: path.write_text('{"cut\n'),
            "not those that the checkpoint was taken with",
        ),
        ("config.toml", lambda path: path.write_text("epochs = "), "config.toml"),
        ("config.toml", lambda path: path.unlink(), "no config.toml"),
        ("checkpoint/00000021.safetensors", lambda path: path.write_bytes(b""), "damaged"),
    ],
)
def test_a_damaged_folder_is_not_taken_for_a_new_one(run, recipe, tmp_path, name, damage, message):
    shutil.copytree(run[0], tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    damage(tmp_path / "run" / name)
    with pytest.raises((RunError, CheckpointError), match=message):
        run_job("tiny", recipe, tmp_path / "run", resume=True)


@pytest.fixture(scope="session")
def head_run(recipe, tmp_path_factory):
    """The folder of a finished run that trained the head alone."""
    folder = tmp_path_factory.mktemp("run") / "head"
    run_job("tiny", dataclasses.replace(recipe, method="head", epochs=1), folder)
    return folder


@pytest.mark.parametrize("method", ["full", "head"])
def test_the_baselines_train_by_the_same_loop_and_load_again(recipe, tmp_path, method):
    other = dataclasses.replace(recipe, method=method, learning_rate=5e-3, epochs=2)
    summary = run_job("tiny", other, tmp_path / "run").summary
    assert summary["lora_parameters"] == 0
    assert summary["head_parameters"] == 32 * 32 + 32 + 32 * 3 + 3
    everything = summary["trainable_parameters"] == summary["total_parameters"]
    assert everything == (method == "full")
    result = evaluate.evaluate(tmp_path / "run", None)
    assert result["scores"].confusion.tolist() == summary["test_confusion_matrix"]


def make_trainer(recipe):
    from lora import inject
    from model import load_base

    news = load_news(recipe.data, recipe.validation_fraction, recipe.seed)
    model, tokenizer = load_base(recipe.model, num_labels=3, dropout=recipe.base_dropout)
    inject(model, recipe.lora_config())
    rows, validation = (encode(split, tokenizer, 16) for split in (news.train, news.validation))
    return Trainer(model, recipe, rows, validation, tokenizer.pad_token_id, torch.device("cpu"), "fp32")


def test_accumulated_batches_give_the_gradient_of_one_big_batch(recipe):
    """27 rows as 4 x 8, the last group and its last batch short, against one batch of all 27."""
    still = dataclasses.replace(recipe, base_dropout=0.0, lora_dropout=0.0, max_gradient_norm=0.0, epochs=1)
    gradients = []
    for batch_size, accumulation in ((27, 1), (8, 4), (4, 8)):
        trainer = make_trainer(
            dataclasses.replace(still, batch_size=batch_size, accumulation_steps=accumulation)
        )
        assert trainer.steps_per_epoch == 1
        norms = []
        step = trainer._step
        trainer._step = lambda group, step=step, norms=norms: norms.append(step(group)) or norms[-1]
        list(trainer.epochs())
        gradients.append(float(norms[0]))
    # float32 sums in another order
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-5)
    assert gradients[0] == pytest.approx(gradients[2], rel=1e-5)


def test_early_stopping_and_the_best_epoch(recipe, tmp_path):
    hopeless = dataclasses.replace(recipe, learning_rate=1e-12, epochs=6, early_stopping_epochs=2)
    summary = run_job("tiny", hopeless, tmp_path / "run").summary
    assert summary["epochs"] <= summary["best_epoch"] + 2 < 6
    assert summary["val_loss"] == min(row["val_loss"] for row in summary["history"])


def test_the_best_epochs_weights_are_the_ones_saved(recipe, tmp_path, monkeypatch):
    seen = {}
    finish = Trainer._finish_epoch

    def spy(trainer):
        result = finish(trainer)
        name = next(iter(trainer.trainable))
        seen[trainer.state.epoch] = (result["val_loss"], trainer.trainable[name].detach().clone(), name)
        return result

    monkeypatch.setattr(Trainer, "_finish_epoch", spy)
    wild = dataclasses.replace(recipe, learning_rate=0.3, epochs=4)
    summary = run_job("tiny", wild, tmp_path / "run").summary
    best = min(seen, key=lambda epoch: seen[epoch][0])
    assert summary["best_epoch"] == best
    _, weight, name = seen[best]
    assert torch.equal(read_adapter(tmp_path / "run" / "adapter").tensors[name], weight)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(recipe, tmp_path):
    wild = dataclasses.replace(recipe, learning_rate=1e30, max_gradient_norm=0.0)
    message = r"step \d+: the loss or its gradient is not finite, among the rows \d+, .*no checkpoint"
    with pytest.raises(TrainingError, match=message):
        run_job("tiny", wild, tmp_path / "run")
    assert not list_checkpoints(tmp_path / "run" / "checkpoint")


def spoil(monkeypatch, step, factor):
    """Multiplies the loss of one step, of one batch each, by something that is not finite."""
    loss, steps = Trainer._loss, 0

    def spoilt(trainer, batch):
        nonlocal steps
        steps += 1
        return loss(trainer, batch) * (factor if steps == step else 1)

    monkeypatch.setattr(Trainer, "_loss", spoilt)


def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(recipe, tmp_path, monkeypatch):
    """Step 9 is spoilt; checkpoints are due after steps 5, 7 (an epoch's end) and 10."""
    spoil(monkeypatch, step=9, factor=float("nan"))
    with pytest.raises(TrainingError, match=r"step 9: .*last good checkpoint is .*00000007"):
        run_job("tiny", dataclasses.replace(recipe, log_every_steps=100), tmp_path / "run")
    monkeypatch.undo()
    run_job("tiny", dataclasses.replace(recipe, log_every_steps=100), tmp_path / "run", resume=True)


def test_float16_skips_what_overflows_and_counts_it(recipe, tmp_path, monkeypatch):
    half = dataclasses.replace(recipe, precision="fp16")  # whose first scale is too large: some steps skip
    undisturbed = run_job("tiny", half, tmp_path / "undisturbed").summary
    spoil(monkeypatch, step=15, factor=float("inf"))
    summary = run_job("tiny", half, tmp_path / "run").summary
    assert summary["skipped_steps"] == undisturbed["skipped_steps"] + 1
    assert summary["precision"] == "fp16"
    assert np.isfinite(summary["val_loss"])


def test_what_float16_skips_has_no_part_in_the_logged_loss(recipe, tmp_path, monkeypatch):
    half = dataclasses.replace(recipe, precision="fp16", log_every_steps=2)
    spoil(monkeypatch, step=17, factor=float("inf"))
    spoil(monkeypatch, step=18, factor=float("inf"))
    spoil(monkeypatch, step=20, factor=float("inf"))
    run_job("tiny", half, tmp_path / "run")
    lines = {}
    for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        lines[line["step"]] = line
    assert lines[18]["loss"] is None  # steps 17 and 18 skipped, both
    assert 0.5 < lines[20]["loss"] / lines[16]["loss"] < 2  # of step 19 alone, and not half of it


@pytest.mark.parametrize(
    "place", ["transformers.RobertaForSequenceClassification.forward", "torch.Tensor.backward"]
)
def test_memory_that_does_not_suffice_is_an_error_that_says_what_to_lower(
    recipe, tmp_path, monkeypatch, place
):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(place, full)
    with pytest.raises(TrainingError, match=r"4 rows x \d+ tokens.*batch_size.*gradient_checkpointing"):
        run_job("tiny", recipe, tmp_path / "run")


def test_a_validation_that_is_not_finite_is_an_error_that_says_so(recipe, tmp_path, monkeypatch):
    def not_finite(_model, rows, *_):
        return torch.full((len(rows), 4), float("nan"))

    monkeypatch.setattr("train.loop.predict_logits", not_finite)
    with pytest.raises(TrainingError, match=r"step 7: the validation loss is not finite"):
        run_job("tiny", recipe, tmp_path / "run")


def test_checkpointed_gradients_train_the_same_adapter(run, recipe, tmp_path):
    run_job("tiny", dataclasses.replace(recipe, gradient_checkpointing=True), tmp_path / "run")
    weights = [
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        for folder in (run[0], tmp_path / "run")
    ]
    assert weights[0] == weights[1]


def test_evaluate_repeats_the_summary(run, capsys, csv_folder):
    folder, summary = run
    assert evaluate.main([str(folder)]) == 0
    assert f"accuracy {summary['test_accuracy']:.4f}" in capsys.readouterr().out
    assert evaluate.main([str(folder / "adapter"), "--data", str(csv_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["confusion_matrix"] == summary["test_confusion_matrix"]


def test_evaluate_scores_several_runs_in_one_call(run, head_run, capsys, tmp_path):
    both, accuracy = [str(run[0]), str(head_run)], run[1]["test_accuracy"]
    assert evaluate.main(both) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["accuracy", "95%", "interval", "macro", "F1", "rows", "data"]
    assert [row.split()[0] for row in rows] == both
    assert rows[0].split()[1] == f"{accuracy:.4f}"
    assert evaluate.main([*both, "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert [first["run"], second["run"]] == both
    assert (first["accuracy"], first["rows"]) == (accuracy, 9)
    assert evaluate.main([*both, str(tmp_path / "nowhere")]) == 2  # before any run is scored
    out, err = capsys.readouterr()
    assert out == ""
    assert "nowhere: there is no such folder" in err


def test_evaluate_reads_the_test_split_alone_and_refuses_other_classes(run, csv_folder, tmp_path, capsys):
    lines = (csv_folder / "test.csv").read_text().splitlines(keepends=True)
    (tmp_path / "test.csv").write_text("".join(lines))
    (tmp_path / "classes.txt").write_text("tech\nsport\nmoney\n")  # in another order than the model's
    assert evaluate.main([str(run[0]), "--data", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["accuracy"], found["rows"]) == (run[1]["test_accuracy"], len(lines) - 1)
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "test.csv").write_text("text,label\na,x\nb,y\nc,x\nd,y\n")
    assert evaluate.main([str(run[0]), "--data", str(tmp_path)]) == 2
    assert "its classes are x, y; the model knows money, sport, tech" in capsys.readouterr().err
    assert evaluate.main(["nowhere"]) == 2
    assert "nowhere: there is no such folder" in capsys.readouterr().err


def test_predict_gives_a_line_a_text(run, capsys, monkeypatch):
    import io

    folder, _ = run
    texts = ["the striker scored twice", "", "shares fell as rates rose"] * 30
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(texts) + "\n"))
    assert predict.main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 90
    assert [line.split("\t")[0] for line in lines[:3]] == ["sport", "", "money"]
    assert len({*lines[0::3]}) == len({*lines[2::3]}) == 1  # whichever batch it fell into
    latin = io.TextIOWrapper(io.BytesIO(b"the striker scored twice\ncaf\xe9\n"), encoding="latin-1")
    monkeypatch.setattr("sys.stdin", latin)
    assert predict.main([str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == lines[:1]  # what precedes the line is answered
    assert "stdin:2: the line is not UTF-8" in err
    assert predict.main([str(folder / "adapter"), "--json", "the team lost the final match"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["label"] == "sport"
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("arguments", [["no/such/run", "text"], ["RUN", " "], ["EMPTY", "text"]])
def test_predict_says_what_is_wrong(run, tmp_path, capsys, arguments):
    places = {"RUN": str(run[0]), "EMPTY": str(tmp_path)}
    assert predict.main([places.get(word, word) for word in arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_labels_and_length_travel_with_the_adapter(run, recipe):
    trained = load_trained(run[0] / "adapter")
    assert trained.labels == ("money", "sport", "tech")
    assert trained.max_length_tokens == recipe.max_length_tokens


def test_the_command_ends_with_what_to_try_next(recipe, tmp_path, capsys):
    (tmp_path / "tiny.toml").write_text(recipe.to_toml())
    folder = tmp_path / "run"
    assert main(["--recipe", str(tmp_path / "tiny.toml"), "--output", str(folder), "--set", "epochs=1"]) == 0
    out, err = capsys.readouterr()
    assert "test accuracy" in out
    assert f"python -m train.predict {folder}" in out
    assert "epoch 1  step 7" in err


def test_scores_against_hand_counts():
    scores = Scores.of(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 1]), 4)
    assert scores.confusion.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert scores.accuracy == 3 / 6
    assert scores.precision.tolist() == [1, 1 / 3, 0, 0]
    assert scores.recall.tolist() == [2 / 3, 1 / 2, 0, 0]
    assert scores.f1.tolist() == [2 * 2 / 5, 2 * 1 / 5, 0, 0]
    assert scores.macro_f1 == pytest.approx(0.4, rel=1e-15)  # of three classes: the fourth does not occur


def test_the_real_tokenizer_and_news_train_through_the_roberta_base_recipe(ag_news_folder, tmp_path):
    """A folder in the hub's layout: random weights, and roberta-base's own tokenizer files."""
    from transformers import RobertaConfig, RobertaModel

    tokenizer = ag_news_folder.parent / "roberta-base-tokenizer"
    if not tokenizer.is_dir():
        pytest.skip("no roberta-base tokenizer beside AG_NEWS_DIR")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **shape)
    RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "base" / name).write_bytes((tokenizer / name).read_bytes())
    folder = tmp_path / "run"
    assert main(
        ["--recipe", "roberta-base", "--model", str(tmp_path / "base"), "--data", str(ag_news_folder),
         "--output", str(folder), "--set", "epochs=1", "--set", "max_train_examples=256",
         "--set", "max_length_tokens=48"]
    ) == 0  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert np.sum(summary["test_confusion_matrix"]) == 7600
    assert summary["labels"] == ["World", "Sports", "Business", "Sci/Tech"]
    assert predict.main([str(folder), "Stocks fell."]) == 0


def rewrite_weights(path, change, keep_digest=False):
    with safetensors.safe_open(path, framework="pt") as file:
        note = json.loads(file.metadata()["run"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, note)
    if not keep_digest:
        note["digest"] = digest(tensors, note)
    safetensors.torch.save_file(tensors, path, {"run": json.dumps(note)})


BIAS = "classifier.out_proj.bias"


@pytest.mark.parametrize(
    ("change", "keep_digest", "message"),
    [
        (lambda tensors, _: tensors[BIAS].add_(1), True, "the digest does not match"),
        (lambda tensors, _: tensors.update({BIAS: torch.zeros(1)}), False, "do not match the model"),
        (lambda tensors, _: tensors.update(unknown=torch.zeros(1)), False, "do not match the model"),
        (lambda tensors, _: tensors.pop(BIAS), False, "have changed since training"),
        (lambda _, note: note.update(frozen=""), False, "have changed since training"),
        (lambda _, note: note.pop("frozen"), True, "the digest does not match"),
    ],
)
def test_weights_of_a_run_that_is_not_lora_are_verified(head_run, tmp_path, change, keep_digest, message):
    folder = tmp_path / "run"
    shutil.copytree(head_run, folder)
    load_trained(folder)
    rewrite_weights(folder / runs.WEIGHTS, change, keep_digest)
    with pytest.raises(RunError, match=message):
        load_trained(folder)


@pytest.mark.parametrize("method", ["lora", "head"])
def test_a_random_base_is_drawn_from_the_runs_seed_again(tmp_path, method):
    recipe = Recipe(model="random:minilm", method=method, seed=3)
    model = load_base(recipe.model, num_labels=2, seed=3)[0]
    if method == "lora":
        inject(model, recipe.lora_config())
    else:
        train_only(model, HEAD)
    save_trained(model, tmp_path, recipe, ("a", "b"))
    loaded = load_trained(tmp_path).model
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


def test_an_adapters_folder_of_a_run_that_is_not_finished_is_not_taken_for_a_result(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    (tmp_path / "run" / runs.SUMMARY).unlink()
    with pytest.raises(RunError, match="not finished"):
        load_trained(tmp_path / "run")


def test_the_adapters_bytes_are_those_of_its_two_files(run, recipe, tmp_path):
    shutil.copytree(run[0] / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / ".adapter_model.safetensors.left").write_bytes(b"of a kill")
    trained = load_trained(run[0])
    assert save_trained(trained.model, tmp_path, recipe, trained.labels) == sum(
        (tmp_path / "adapter" / name).stat().st_size for name in (CONFIG_FILE, TENSOR_FILE)
    )
