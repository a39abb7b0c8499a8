"""One epoch by the original project's procedure and by ours: same rows, model, precision and batch size.

The original notebook pads every article to the longest of each 1,000 rows that it tokenises together, and
trains with transformers' Trainer and PEFT, 16 rows per batch, 2 batches per step. Here a batch holds
articles of similar length and is padded to its longest.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset

from bench.baselines import with_peft
from bench.tables import prose
from lora import inject
from lora.errors import UserError
from model import load_base, speed_up
from train.batches import Encoded, encode
from train.command import CHECKOUT
from train.config import Recipe, load_recipe
from train.data import load_news
from train.hardware import resolve_device, resolve_precision
from train.loop import Trainer
from train.tables import markdown

MODEL = "random:roberta-base"


def run(quick: bool, data: str | None = None) -> dict[str, Any]:
    """Trains on 512 rows of AG News from `data`, by default of bbc; each twice, so that drift shows.

    Raises UserError if PEFT or accelerate is not installed.
    """
    for package in ("peft", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"original: {package} is not installed; `make bench-original` in {CHECKOUT} installs it"
            )
    device = resolve_device("auto")
    precision = resolve_precision("auto", device)
    # The settings are the original's; the precision is this machine's, for both.
    recipe = load_recipe("roberta-base-original", {"epochs": 1, "precision": precision, "telemetry": False})[
        1
    ]
    tokenizer = load_base("minilm", num_labels=2)[1]  # random:roberta-base has none
    rows, classes = _rows(data or "bbc", 32 if quick else 512)
    encoded = encode(rows, tokenizer, recipe.max_length_tokens)
    ours, theirs = [], []
    # In the order A B B A, so that drift of the machine affects both alike.
    for name in ("ours", "original") if quick else ("ours", "original", "original", "ours"):
        print(f"original: an epoch of {name}", file=sys.stderr)
        if name == "ours":
            ours.append(_ours(recipe, encoded, classes, device, precision))
        else:
            theirs.append(_original(recipe, rows, tokenizer, classes, device, precision))
    result: dict[str, Any] = {
        "model": MODEL,
        "data": Path(data or "bbc").name,
        "rows": len(rows),
        "precision": precision,
        "seed": recipe.seed,
        "tokens": int(encoded.lengths.sum()),
    }
    for name, runs in (("original", theirs), ("ours", ours)):
        result[name] = {**runs[0], "seconds_each": [run["seconds"] for run in runs]}
    return result


def table(result: dict[str, Any]) -> str:
    """Two rows: the original and ours."""
    lines = [["", "seconds per epoch", "tokens computed", "of them padding"]]
    for name, key in (("the original: transformers' Trainer, PEFT", "original"), ("here", "ours")):
        row = result[key]
        padding = 1 - result["tokens"] / row["computed_tokens"]
        each = " and ".join(f"{seconds:.1f}" for seconds in row["seconds_each"])
        lines.append([name, each, f"{row['computed_tokens']:,}", f"{padding:.1%}"])
    theirs, ours = (statistics.mean(result[key]["seconds_each"]) for key in ("original", "ours"))
    words = (
        f"{result['rows']} articles of {result['data']}, {result['tokens']:,} tokens; {result['model']},"
        f" {result['precision']}; {result['device']}. An epoch here is"
        f" {theirs / ours:.1f} times as fast."
    )
    return "\n\n".join([prose(words), markdown(lines)])


def _rows(data: str, count: int) -> tuple[Dataset, int]:
    """The first rows of the training split after a shuffle with seed 0, at most `count`; how many classes."""
    news = load_news(data, validation_fraction=0.05, seed=0, max_train_examples=0)
    rows = news.train.shuffle(seed=0)
    return rows.select(range(min(count, len(rows)))), len(news.labels)


def _ours(
    recipe: Recipe, encoded: Encoded, classes: int, device: torch.device, precision: str
) -> dict[str, float]:
    model, _ = load_base(MODEL, num_labels=classes)
    inject(model, recipe.lora_config())
    model.to(device)
    speed_up(model, precision)
    # Two validation rows, because the loop validates after each epoch.
    few = Encoded(encoded.tokens, encoded.offsets[:3], encoded.labels[:2])
    pad = model.config.pad_token_id
    trainer = Trainer(model, recipe, encoded, few, pad, device, precision)
    started = time.perf_counter()
    for _ in trainer.epochs():
        pass
    return {"seconds": time.perf_counter() - started, "computed_tokens": trainer.state.padded_tokens}


def _original(
    recipe: Recipe, rows: Dataset, tokenizer: Any, classes: int, device: torch.device, precision: str
) -> dict[str, float]:
    import transformers

    def tokenise(batch: dict[str, list[str]]) -> Any:
        return tokenizer(batch["text"], truncation=True, max_length=recipe.max_length_tokens, padding=True)

    datasets.utils.logging.disable_progress_bar()
    padded = rows.map(tokenise, batched=True, batch_size=1000, load_from_cache_file=False)
    padded = padded.select_columns(["input_ids", "attention_mask", "label"]).rename_column("label", "labels")
    model = with_peft(load_base(MODEL, num_labels=classes)[0], recipe.lora_config())
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=recipe.batch_size,
            gradient_accumulation_steps=recipe.accumulation_steps,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            warmup_steps=recipe.warmup_fraction,  # a value below 1 is a share of the steps
            label_smoothing_factor=recipe.label_smoothing,
            lr_scheduler_type="cosine",
            seed=recipe.seed,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            use_cpu=device.type == "cpu",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = transformers.Trainer(model=model, args=settings, train_dataset=padded)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "computed_tokens": sum(map(len, padded["input_ids"]))}
