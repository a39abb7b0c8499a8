"""A run from start to end: data, model, training, the test split, and what is left in the folder."""

from __future__ import annotations

import json
import platform
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from lora import Ledger, count_parameters, inject
from lora.files import write_atomically
from lora.parameters import train_only
from model import HEAD, load_base, speed_up
from train.batches import encode
from train.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, save_checkpoint
from train.config import Recipe
from train.console import Console
from train.data import DataError, load_news
from train.figures import draw_all
from train.hardware import (
    device_name,
    peak_memory_bytes,
    resolve_device,
    resolve_precision,
    set_deterministic,
)
from train.loop import Trainer, predict_logits
from train.metrics import Scores
from train.runs import CONFIG, SUMMARY, RunError, run_recipe, save_trained

CHECKPOINT = "checkpoint"
METRICS = "metrics.jsonl"


class InterruptedRunError(Exception):
    """A signal stopped the run after a step and a checkpoint; `signal` is its number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number


@dataclass(frozen=True)
class Result:
    """What a run left: its summary, and whether it had been finished before."""

    summary: dict[str, Any]
    was_finished: bool = False


def run_job(name: str, recipe: Recipe, folder: Path, resume: bool = False) -> Result:
    """Trains by `recipe` and leaves everything in `folder`; `resume` goes on from its last checkpoint.

    Raises RunError, DataError, ModelError, RecipeError, CheckpointError, TrainingError, InterruptedRunError.
    """
    if _prepare_folder(folder, recipe, resume):
        return Result(json.loads((folder / SUMMARY).read_text()), was_finished=True)
    device = resolve_device(recipe.device)
    precision = resolve_precision(recipe.precision, device)
    set_deterministic(recipe, device)

    news = load_news(recipe.data, recipe.validation_fraction, recipe.seed, recipe.max_train_examples)
    model, tokenizer = load_base(
        recipe.model,
        num_labels=len(news.labels),
        labels=news.labels,
        dropout=recipe.base_dropout,
        seed=recipe.seed,
    )
    if tokenizer is None:
        raise DataError(f"{recipe.model} comes with no tokenizer, so there is no training it on text")
    longest = model.config.max_position_embeddings - model.config.pad_token_id - 1
    if recipe.max_length_tokens > longest:
        raise RunError(
            f"max_length_tokens: {recipe.max_length_tokens}, and {recipe.model} reads {longest} at most"
        )
    ledger = _choose_what_trains(model, recipe)
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    speed_up(model.to(device), precision)
    splits = {
        part: encode(getattr(news, part), tokenizer, recipe.max_length_tokens)
        for part in ("train", "validation")
    }
    pad = tokenizer.pad_token_id
    trainer = Trainer(model, recipe, splits["train"], splits["validation"], pad, device, precision)
    identity = {"recipe": recipe.to_toml(), "data": news.digest(), "precision": precision}

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG, recipe.to_toml().encode())
    resumed = _restore(trainer, folder / CHECKPOINT, identity) if resume else False
    total = recipe.epochs * len(splits["train"])
    console = Console(folder / METRICS, total, trainer.state.examples, trainer.state.log_lines)
    try:
        console.say(
            f"{name}: {recipe.model} on {recipe.data}, {recipe.method}, {precision} on {device_name(device)}"
        )
        sizes = (
            f"{len(news.train)} training, {len(news.validation)} validation, {len(news.test)} test articles"
        )
        console.say(f"{sizes}, {len(news.labels)} classes\n{ledger}")
        if resume:
            where = f"after step {trainer.state.step}" if resumed else "at step 0: there is no checkpoint yet"
            console.say(f"resuming {where}")
        _train(trainer, console, folder, identity)
    finally:
        console.close()

    trainer.restore_best()
    trained_bytes = save_trained(model, folder, recipe, news.labels)
    # The one reading of the test split: after training, by the epoch that validation chose.
    test = encode(news.test, tokenizer, recipe.max_length_tokens)
    logits = predict_logits(model, test, 2 * recipe.batch_size, pad, device, precision)
    scores = Scores.of(test.labels, logits.argmax(1).numpy(), len(news.labels))
    summary = _summary(name, trainer, ledger, scores, news.labels, trained_bytes)
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    draw_all(folder / "figures", trainer.state.history, lines, scores, news.labels)
    # Last of all: a folder with a summary is a finished run.
    write_atomically(folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    return Result(summary)


def _prepare_folder(folder: Path, recipe: Recipe, resume: bool) -> bool:
    """Refuses a folder that cannot be used; whether the run in it is finished."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: not a folder")
    if not resume:
        if folder.is_dir() and any(folder.iterdir()):
            what = "a finished run's files" if (folder / SUMMARY).is_file() else "files"
            raise RunError(
                f"{folder}: there are {what} in it already; "
                "--resume goes on with a run, --output DIR starts another"
            )
        return False
    if not folder.is_dir():
        raise RunError(
            f"{folder}: no such folder, so there is no run to resume; leave out --resume to start one"
        )
    if (folder / CONFIG).is_file() and run_recipe(folder) != recipe:
        before, now = run_recipe(folder).to_toml().splitlines(), recipe.to_toml().splitlines()
        changed = [f"{old} there, {new} now" for old, new in zip(before, now, strict=True) if old != new]
        raise RunError(f"{folder}: cannot resume with another recipe: {'; '.join(changed)}")
    return (folder / SUMMARY).is_file()


def _choose_what_trains(model: nn.Module, recipe: Recipe) -> Ledger:
    if recipe.method == "lora":
        inject(model, recipe.lora_config(), seed=recipe.seed)
    elif recipe.method == "head":
        train_only(model, HEAD)
    return count_parameters(model, head=HEAD)


def _restore(trainer: Trainer, folder: Path, identity: dict[str, str]) -> bool:
    """Loads the last checkpoint; whether there was one."""
    paths = list_checkpoints(folder)
    if not paths:
        return False
    try:
        tensors, state = load_checkpoint(paths[-1])
    except CheckpointError as error:
        older = f"; remove it to resume from {paths[-2].name}" if len(paths) > 1 else ""
        raise CheckpointError(f"{error}{older}") from error
    for what, now in identity.items():
        if state["identity"][what] != now:
            raise CheckpointError(
                f"{paths[-1]}: cannot resume: the {what} is not the one that it was taken with"
            )
    trainer.restore(tensors, state["trainer"])
    return True


def _train(trainer: Trainer, console: Console, folder: Path, identity: dict[str, str]) -> None:
    state = trainer.state

    def checkpoint() -> None:
        console.sync()
        state.log_lines = console.lines
        note = {"identity": identity, "trainer": trainer.settings()}
        save_checkpoint(folder / CHECKPOINT, state.step, trainer.tensors(), note)

    with _stop_signals() as stop:
        for line in trainer.epochs():
            console.step(state.examples, line)
            epoch_ended = state.step_in_epoch == 0
            if epoch_ended or state.step % trainer.recipe.checkpoint_every_steps == 0 or stop:
                checkpoint()
            if stop:
                raise InterruptedRunError(stop[0])


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM lands in the list, for the loop to look at; a second one acts at once."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: object) -> None:
        received.append(number)
        for other in before:
            signal.signal(other, signal.SIG_DFL)

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summary(
    name: str, trainer: Trainer, ledger: Ledger, scores: Scores, labels: tuple[str, ...], trained_bytes: int
) -> dict[str, Any]:
    recipe, state = trainer.recipe, trainer.state
    return {
        "recipe": name,
        "model": recipe.model,
        "data": recipe.data,
        "method": recipe.method,
        "seed": recipe.seed,
        "precision": trainer.precision,
        "device": device_name(trainer.device),
        "labels": list(labels),
        "test_accuracy": scores.accuracy,
        "test_macro_f1": scores.macro_f1,
        "test_confusion_matrix": scores.confusion.tolist(),
        "test_report": scores.report(labels),
        "val_accuracy": state.best_accuracy,
        "val_loss": state.best_loss,
        "best_epoch": state.best_epoch,
        "epochs": state.epoch,
        "steps": state.step,
        "history": state.history,
        "lora_parameters": ledger.lora,
        "head_parameters": ledger.head,
        "trainable_parameters": ledger.trainable,
        "total_parameters": ledger.total,
        "adapter_bytes": trained_bytes,
        "train_examples": state.examples,
        "train_seconds": state.seconds,
        "examples_per_second": state.examples / state.seconds,
        "tokens_per_second": state.tokens / state.seconds,
        "padding_fraction": 1 - state.tokens / state.padded_tokens,
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
        "versions": {
            "python": platform.python_version(),
            **{
                package: version(package)
                for package in ("torch", "transformers", "tokenizers", "datasets", "numpy")
            },
        },
    }
