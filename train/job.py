"""A run from start to end: data, model, training, the test split, and what is left in the folder."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora import Ledger, count_parameters, inject
from lora.files import tensor_bytes, write_atomically
from lora.parameters import train_only
from lora.tree import lora_layers
from model import HEAD, load_base, speed_up
from train.batches import Encoded, encode
from train.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, save_checkpoint
from train.config import Recipe, RecipeError
from train.console import Console, Silence
from train.data import DataError, News, load_news
from train.distributed import World, join_world, local_rank
from train.figures import draw_all
from train.hardware import (
    device_name,
    peak_memory_bytes,
    resolve_device,
    resolve_precision,
    set_deterministic,
)
from train.loop import Trainer, TrainingError, predict_logits
from train.metrics import Scores
from train.runs import CONFIG, SUMMARY, RunError, run_recipe, save_trained

CHECKPOINT = "checkpoint"
METRICS = "metrics.jsonl"
PREDICTIONS = "test_predictions.csv"
LOCK = ".lock"
_ECHO_SECONDS = 5


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

    Started by torchrun, the processes share the work, and the first one alone writes.

    Raises RunError, DataError, ModelError, RecipeError, CheckpointError, TrainingError, InterruptedRunError.
    """
    if _prepare_folder(folder, recipe, resume):
        try:
            return Result(json.loads((folder / SUMMARY).read_text()), was_finished=True)
        except ValueError as error:
            raise RunError(f"{folder / SUMMARY}: damaged; remove it, and --resume writes it anew") from error
    device = resolve_device(recipe.device, local_rank())
    precision = resolve_precision(recipe.precision, device)
    set_deterministic(recipe, device)

    news = load_news(recipe.data, recipe.validation_fraction, recipe.seed, recipe.max_train_examples)
    model, tokenizer, ledger = _make_model(recipe, news)
    identity = {
        "recipe": recipe.to_toml(),
        "data": news.digest(),
        "base model": _weights_digest(model),
        "precision": precision,
    }
    speed_up(model.to(device), precision)

    with join_world(device) as world, _locked(folder, world):
        if world.main:
            _prepare_folder(folder, recipe, resume)  # again: another run may have been quicker to the lock
            write_atomically(folder / CONFIG, recipe.to_toml().encode())
        train, validation, test = (
            _encode_once(split, tokenizer, recipe.max_length_tokens, world)
            for split in (news.train, news.validation, news.test)
        )
        pad = tokenizer.pad_token_id
        trainer = Trainer(model, recipe, train, validation, pad, device, precision, world)
        resumed = _restore(trainer, folder / CHECKPOINT, identity) if resume else False
        state = trainer.state
        _check_log(folder / METRICS, state.log_lines)
        total = recipe.epochs * len(train)
        console = (
            Console(folder / METRICS, total, state.examples, state.log_lines) if world.main else Silence()
        )
        with closing(console):
            processes = f", {world.size} processes" if world.size > 1 else ""
            place = f"{precision} on {device_name(device)}{processes}"
            console.say(f"{name}: {recipe.model} on {recipe.data}, {recipe.method}, {place}")
            sizes = f"{len(train)} training, {len(validation)} validation, {len(test)} test articles"
            console.say(f"{sizes}, {len(news.labels)} classes\n{ledger}")
            if resume:
                where = f"after step {state.step}" if resumed else "at step 0: there is no checkpoint yet"
                console.say(f"resuming {where}")
            _train(trainer, console, folder, identity)

        trainer.restore_best()
        # The one use of the test split: after training, by the epoch that validation chose.
        logits = predict_logits(model, test, 2 * recipe.batch_size, pad, device, precision, world)
        summary = (
            _leave(name, trainer, ledger, news.labels, test.labels, logits, folder) if world.main else {}
        )
        world.wait()
        return Result(summary)


def _make_model(recipe: Recipe, news: News) -> tuple[PreTrainedModel, Any, Ledger]:
    """The model with what trains marked, its tokenizer, and its parameters counted."""
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
    return model, tokenizer, ledger


def _leave(
    name: str, trainer: Trainer, ledger: Ledger, labels: tuple[str, ...], truth: np.ndarray, logits: Tensor,
    folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """Saves what was trained, what it says of the test split, the figures and the summary; the summary."""
    predicted = logits.argmax(1).numpy()
    scores = Scores.of(truth, predicted, len(labels))
    trained_bytes = save_trained(trainer.model, folder, trainer.recipe, labels)
    _save_predictions(folder / PREDICTIONS, truth, predicted, labels)
    summary = _summary(name, trainer, ledger, scores, labels, trained_bytes)
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    draw_all(folder / "figures", trainer.state.history, lines, scores, labels)
    # Last of all: a folder with a summary is a finished run.
    write_atomically(folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def _save_predictions(path: Path, truth: np.ndarray, predicted: np.ndarray, labels: tuple[str, ...]) -> None:
    """A row a test article, in the data's order: what paired tests between runs need."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("label", "prediction"))
    rows.writerows((labels[i], labels[j]) for i, j in zip(truth, predicted, strict=True))
    write_atomically(path, text.getvalue().encode())


def _encode_once(split: Dataset, tokenizer: Any, max_length_tokens: int, world: World) -> Encoded:
    """Tokenised by the first process; the others read what it left in the cache."""
    if not world.main:
        world.wait()
    encoded = encode(split, tokenizer, max_length_tokens)
    if world.main:
        world.wait()
    return encoded


@contextmanager
def _locked(folder: Path, world: World) -> Iterator[None]:
    """Keeps every other run out of `folder`; the lock goes with the process, however it ends."""
    if not world.main:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder}: another run is writing to it at this moment") from None
        yield


def _weights_digest(model: nn.Module) -> str:
    """sha256 of every weight before training: the base model, and the starts drawn from the seed."""
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sha.update(name.encode())
        sha.update(tensor_bytes(parameter))
    return sha.hexdigest()


def _prepare_folder(folder: Path, recipe: Recipe, resume: bool) -> bool:
    """Refuses a folder that cannot be used; whether the run in it is finished."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: not a folder")
    # Not the lock, nor what a kill in the middle of a write left: both begin with a dot.
    inside = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.is_dir() else set()
    if not resume:
        if inside:
            what = (
                "a finished run"
                if SUMMARY in inside
                else "an unfinished run"
                if CONFIG in inside
                else "files"
            )
            raise RunError(
                f"{folder}: it holds {what} already; --resume goes on with a run, --output DIR starts another"
            )
        return False
    if not folder.is_dir():
        raise RunError(
            f"{folder}: no such folder, so there is no run to resume; leave out --resume to start one"
        )
    if inside and CONFIG not in inside:
        raise RunError(f"{folder}: there are files in it but no {CONFIG}, so this is no run to resume")
    if inside and run_recipe(folder) != recipe:
        before, now = run_recipe(folder).to_toml().splitlines(), recipe.to_toml().splitlines()
        changed = [f"{old} there, {new} now" for old, new in zip(before, now, strict=True) if old != new]
        raise RunError(f"{folder}: cannot resume with another recipe: {'; '.join(changed)}")
    return SUMMARY in inside


def _choose_what_trains(model: nn.Module, recipe: Recipe) -> Ledger:
    if recipe.method == "lora":
        try:
            inject(model, recipe.lora_config(), seed=recipe.seed)
        except (TypeError, ValueError, RuntimeError) as error:  # a pattern, or a rank beyond all memory
            raise RecipeError(str(error)) from error
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
        if state["identity"].get(what) != now:
            raise CheckpointError(
                f"{paths[-1]}: cannot resume: the {what} is not the one that it was taken with"
            )
    trainer.restore(tensors, state["trainer"])
    return True


def _check_log(path: Path, lines: int) -> None:
    """Refuses to go on after a log that has lost lines which the checkpoint counts on."""
    found = path.read_bytes().splitlines()[:lines] if path.is_file() else []
    try:
        intact = len([json.loads(line) for line in found]) == lines
    except ValueError:
        intact = False
    if not intact:
        raise RunError(
            f"{path}: damaged: the checkpoint was taken after {lines} lines, and they are not all there"
        )


def _train(trainer: Trainer, console: Console | Silence, folder: Path, identity: dict[str, str]) -> None:
    state, world = trainer.state, trainer.world

    def checkpoint() -> None:
        trainer.check_finite()
        if world.main:
            console.sync()
            state.log_lines = console.lines
            note = {"identity": identity, "trainer": trainer.settings()}
            save_checkpoint(folder / CHECKPOINT, state.step, trainer.tensors(), note)

    with _stop_signals(world) as received:
        try:
            for line in trainer.epochs():
                console.step(state.examples, line)
                stop = world.any(received[0] if received else 0)
                epoch_ended = state.step_in_epoch == 0
                if epoch_ended or state.step % trainer.recipe.checkpoint_every_steps == 0 or stop:
                    checkpoint()
                if stop:
                    raise InterruptedRunError(stop)
        except TrainingError as error:
            saved = list_checkpoints(folder / CHECKPOINT)
            last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
            raise TrainingError(f"{error}; {last}") from error


@contextmanager
def _stop_signals(world: World) -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM lands in the list, for the loop to look at; a second one acts at once.

    torchrun passes a Ctrl-C on that its processes got already, so among several the second one counts
    only after a while.
    """
    received: list[int] = []
    first_at = 0.0
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: object) -> None:
        nonlocal first_at
        if not received:
            received.append(number)
            first_at = time.monotonic()
        elif world.size == 1 or time.monotonic() - first_at > _ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

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
        "skipped_steps": state.skipped_steps,
        "history": state.history,
        "lora_parameters": ledger.lora,
        "head_parameters": ledger.head,
        "trainable_parameters": ledger.trainable,
        "total_parameters": ledger.total,
        "adapted_layers": list(lora_layers(trainer.model)) if recipe.method == "lora" else [],
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
