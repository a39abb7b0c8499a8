"""A run from start to end: data, model, training, the test split, and the files in the run's folder."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from lora import LoRALinear, ParameterCount, check_layer, count_parameters
from lora.fingerprint import config_fields
from lora.inject import layer_class
from lora.modules import train_only
from lora.storage import digest, remove_unfinished, write_atomically
from model import HEAD, load_base, longest_text, speed_up
from train.adapter import inject_adapter, quantise_base
from train.batches import Encoded, encode, tokenizer_digest
from train.checkpoint import base_tensors, list_checkpoints, load_last_checkpoint, save_checkpoint
from train.config import Recipe, RecipeError
from train.console import Console, SilentConsole
from train.data import DataError, News, load_news
from train.distributed import World, join_world, local_rank
from train.hardware import device_name, resolve_device, resolve_precision, set_deterministic
from train.inference import predict_logits
from train.layers import layer_digest, load_layer
from train.loop import Trainer, TrainingError
from train.metrics import Scores
from train.predictions import write_predictions
from train.run_figures import draw_all
from train.runs import (
    ADAPTER,
    CHECKPOINT,
    CONFIG,
    FIGURES,
    METRICS,
    SUMMARY,
    RunError,
    locked,
    log_digest,
    prepare_folder,
    read_log,
    read_summary,
    run_recipe,
    write_recipe,
)
from train.signals import InterruptedRunError, deferred_signals
from train.summary import make_summary
from train.trained import save_trained


@dataclass(frozen=True)
class Result:
    """A run's summary, and whether the run had been finished before."""

    summary: dict[str, Any]
    was_finished: bool = False


def run_job(name: str, recipe: Recipe, folder: Path, resume: bool = False) -> Result:
    """Trains by `recipe` and writes everything to `folder`. `resume` continues from the last checkpoint.

    Processes started by torchrun share the work; the first one alone writes.

    Raises UserError (RunError, DataError, ModelError, RecipeError, CheckpointError, TrainingError),
    InterruptedRunError.
    """
    recipe = recipe.with_absolute_paths()
    if prepare_folder(folder, recipe, resume):
        return Result(read_summary(folder), was_finished=True)
    device = resolve_device(recipe.device, local_rank())
    precision = resolve_precision(recipe.precision, device)
    set_deterministic(recipe, device)

    # As recorded, since checkpoints of earlier versions are identified by a recipe with relative paths.
    recorded = run_recipe(folder) if resume and (folder / CONFIG).is_file() else recipe
    news = load_news(recipe.data, recipe.validation_fraction, recipe.seed, recipe.max_train_examples)
    model, tokenizer, counts = _make_model(recipe, news)
    identity = {
        "recipe": recorded.to_toml(),
        "data": news.digest(),
        "base model": digest(base_tensors(model), {}),
        # The fingerprint of an adapter omits dropout, and the recipe sets all dropout but this one.
        "config of the base model": json.dumps(
            {**config_fields(model), "classifier_dropout": model.config.classifier_dropout}, sort_keys=True
        ),
        "tokenizer": tokenizer_digest(tokenizer),
        "precision": precision,
    }
    if recipe.layer:
        identity["layer class"] = layer_digest(recipe.layer)
    speed_up(model.to(device), precision)

    with join_world(device) as world, locked(folder) if world.is_main else contextlib.nullcontext():
        if world.is_main:
            prepare_folder(folder, recipe, resume)  # again, because another run may have taken the lock first
            for each in (folder, folder / ADAPTER):
                remove_unfinished(each)
            write_recipe(folder, name, recorded)
        train, validation, test = (
            _encode_once(split, tokenizer, recipe.max_length_tokens, world)
            for split in (news.train, news.validation, news.test)
        )
        pad = tokenizer.pad_token_id
        trainer = Trainer(model, recipe, train, validation, pad, device, precision, world)
        resumed = resume and load_last_checkpoint(folder / CHECKPOINT, trainer, identity)
        state = trainer.state
        if state.log_lines and log_digest(folder / METRICS, state.log_lines) != state.log_digest:
            raise RunError(
                f"{folder / METRICS}: damaged: its first {state.log_lines} lines are not those that the"
                " checkpoint was taken with"
            )
        total = recipe.epochs * len(train)
        console = (
            Console(folder / METRICS, total, state.examples, state.log_lines)
            if world.is_main
            else SilentConsole()
        )
        with closing(console):
            stored = f" in {recipe.base_precision}" if recipe.base_precision != "fp32" else ""
            processes = f", {world.size} processes" if world.size > 1 else ""
            console.say(
                f"{name}: {recipe.model}{stored} on {recipe.data}, {recipe.method}, {precision} on"
                f" {device_name(device)}{processes}\n"
                f"{len(train)} training, {len(validation)} validation, {len(test)} test texts,"
                f" {len(news.labels)} classes\n{counts}"
            )
            own = load_layer(recipe.layer)
            for problem in check_layer(own).problems if own else ():
                console.say(f"{recipe.layer}: not so: {problem}")
            if resume:
                where = f"after step {state.step}" if resumed else "at step 0: there is no checkpoint yet"
                console.say(f"resuming {where}")
            _train(trainer, console, folder, identity)

        trainer.restore_best()
        # The test split is used only here: after training, by the epoch that validation chose.
        logits = predict_logits(model, test, 2 * recipe.batch_size, pad, device, precision, world)
        summary = {}
        if world.is_main:
            summary = _save_results(
                name, trainer, tokenizer, counts, news.labels, news.test["text"], test.labels, logits, folder
            )
        world.barrier()
        return Result(summary)


def _make_model(recipe: Recipe, news: News) -> tuple[PreTrainedModel, Any, ParameterCount]:
    """The model with its trainable parameters set, its tokenizer, and its parameter count."""
    model, tokenizer = load_base(
        recipe.model,
        num_labels=len(news.labels),
        labels=news.labels,
        dropout=recipe.base_dropout,
        seed=recipe.seed,
    )
    if tokenizer is None:
        raise DataError(f"{recipe.model} comes without a tokenizer, so it cannot be trained on text")
    longest = longest_text(model.config)
    if recipe.max_length_tokens > longest:
        raise RunError(
            f"max_length_tokens: {recipe.max_length_tokens}, and {recipe.model} reads {longest} at most"
        )
    if recipe.method != "lora" and (recipe.layer or layer_class(recipe.lora_config()) is not LoRALinear):
        what = repr(recipe.layer) if recipe.layer else "a variant of LoRA"
        raise RecipeError(f"method: {recipe.method!r} trains no LoRA layer, and the recipe asks for {what}")
    quantise_base(model, recipe.base_precision)
    if recipe.method == "lora":
        inject_adapter(model, recipe, tokenizer, lambda: news.train)
    elif recipe.method == "head":
        train_only(model, HEAD)
    if recipe.loraplus_lr_ratio != 1 and not any(
        name.endswith("lora_B") and p.requires_grad for name, p in model.named_parameters()
    ):
        raise RecipeError("loraplus_lr_ratio: it is the learning rate of lora_B, and no lora_B trains here")
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model, tokenizer, count_parameters(model, head=HEAD)


def _encode_once(split: Dataset, tokenizer: Any, max_length_tokens: int, world: World) -> Encoded:
    """Tokenised by the first process; the others read its cache."""
    if not world.is_main:
        world.barrier()
    encoded = encode(split, tokenizer, max_length_tokens)
    if world.is_main:
        world.barrier()
    return encoded


def _train(
    trainer: Trainer, console: Console | SilentConsole, folder: Path, identity: dict[str, str]
) -> None:
    """Trains to the end, with a log line and a checkpoint where they are due.

    Raises InterruptedRunError after the checkpoint that a signal asked for, TrainingError.
    """
    state, world = trainer.state, trainer.world

    def checkpoint() -> None:
        trainer.check_finite()
        if world.is_main:
            console.sync()
            state.log_lines = console.lines
            state.log_digest = log_digest(folder / METRICS, console.lines)
            save_checkpoint(folder / CHECKPOINT, trainer, identity)

    with deferred_signals(world.size) as received:

        def first_signal() -> int:
            return world.max_over_processes(received[0] if received else 0)

        try:
            for line in trainer.epochs():
                console.step(state.examples, line)
                stop = first_signal()
                epoch_ended = state.step_in_epoch == 0
                if epoch_ended or state.step % trainer.recipe.checkpoint_every_steps == 0 or stop:
                    checkpoint()
                if stop:
                    raise InterruptedRunError(stop)
            if stop := first_signal():  # during the last checkpoint
                raise InterruptedRunError(stop)
        except TrainingError as error:
            saved = list_checkpoints(folder / CHECKPOINT)
            last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
            raise TrainingError(f"{error}; {last}") from error


def _save_results(
    name: str, trainer: Trainer, tokenizer: Any, counts: ParameterCount, labels: tuple[str, ...],
    texts: Sequence[str], truth: np.ndarray, logits: Tensor, folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """Writes the trained weights, the test predictions, the summary, which it returns, and the figures.

    The figures come last, so that a failure to draw them, which is a warning, does not cost the run.

    texts, truth: the test split and its class indices, (rows,). logits: (rows, classes).
    """
    predicted = logits.argmax(1).numpy()
    scores = Scores.of(truth, predicted, len(labels))
    trained_bytes = save_trained(trainer.model, folder, trainer.recipe, labels, tokenizer)
    write_predictions(folder, texts, truth.tolist(), logits, labels)
    summary = make_summary(name, trainer, counts, scores, labels, trained_bytes)
    write_atomically(folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    for older in list_checkpoints(folder / CHECKPOINT)[:-1]:
        older.unlink()
    try:
        draw_all(folder / FIGURES, name, read_log(folder / METRICS), scores, labels)
    except Exception as error:
        warnings.warn(f"{folder / FIGURES}: not drawn: {error!r}", stacklevel=2)
    return summary
