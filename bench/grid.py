"""The training runs behind `bench variants` and `bench base`: methods, folds, learning rates, results.

A cell is one run of `python -m train` in its own process and in runs/variants. Its result (losses, cost, and
which test articles were classified correctly) is added to bench/results/cells.json when it ends. A cell with
a result there is not run again, also on another machine; a stopped run is resumed. On the CPU as many runs
as torch has threads, with one thread each, run at a time: faster than one after another on all threads.

bbc: cross-validation in FOLDS folds, so that each of its articles is a test article once. The articles of a
class, sorted by the hash of their text as for the prescribed split, are cut into FOLDS pieces. Another
dataset is trained on all of its training rows with each of SEEDS.

The learning rate of a method is selected on fold 0 or seed 0: the one with the lowest validation loss, among
rates at four per decade. The candidates are extended until the best one has a worse one on either side. A
rate with which training diverges counts as worse than all others.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import results_folder
from bench.steps import ALL_LINEAR
from bench.training import QUICK, DivergedError, finish_run
from lora.storage import write_atomically
from train.bbc import read_bbc
from train.data import load_news
from train.hardware import resolve_device
from train.predictions import read_predictions
from train.runs import RunError

RUNS = Path("runs/variants")
FOLDS = 5
SEEDS = (0, 1, 2)
START = 3  # candidate rates to begin with
MOST = 9  # candidate rates at most: two decades
# The same for all methods: whatever else a recipe has that changes the result, also the precision of products
# on a processor that has none in bf16. scaling = 16/r, or 16/√r (rsLoRA).
SETTINGS: dict[str, Any] = {
    "model": "minilm",
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "base_dropout": 0.1,
    "target_modules": ["query", "value"],
    "weight_decay": 0.01,
    "warmup_fraction": 0.1,
    "label_smoothing": 0.1,
    "max_gradient_norm": 1.0,
    "accumulation_steps": 1,
    "early_stopping_epochs": 0,
    "max_length_tokens": 128,
    "base_precision": "fp32",
    "precision": "bf16",
    "telemetry": False,
}
BBC: dict[str, Any] = {"epochs": 4, "batch_size": 16, "validation_fraction": 0.1}
LARGE: dict[str, Any] = {"epochs": 2, "batch_size": 32, "validation_fraction": 0.05}
KEPT = (
    "val_loss", "val_accuracy", "best_epoch", "test_accuracy", "trainable_parameters", "lora_parameters",
    "adapter_bytes", "train_seconds", "precision", "device",
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A row of the comparison: the recipe's fields, and the first rate on bbc in quarters of a decade.

    quarter: k stands for the learning rate 10^(k/4). on_all: compared on every dataset, not on bbc alone.
    """

    name: str
    fields: Mapping[str, Any] = field(hash=False)  # a dict has no hash
    quarter: int
    on_all: bool = False


def _lora(**fields: Any) -> dict[str, Any]:
    return {"method": "lora", "r": 8, **fields}


METHODS = (
    Method("full fine-tuning", {"method": "full"}, -17, on_all=True),
    Method("head only", {"method": "head"}, -8, on_all=True),
    Method("LoRA r=8", _lora(), -11, on_all=True),
    Method("LoRA r=1", _lora(r=1), -12),
    Method("LoRA r=64", _lora(r=64), -11),
    Method("LoRA r=8, all linear", _lora(target_modules=ALL_LINEAR), -12, on_all=True),
    Method("rsLoRA r=64", _lora(r=64, use_rslora=True), -14),
    Method("DoRA", _lora(use_dora=True), -11, on_all=True),
    Method("PiSSA", _lora(init_lora_weights="pissa"), -14, on_all=True),
    Method("MiLoRA", _lora(init_lora_weights="milora"), -13),
    Method("EVA", _lora(init_lora_weights="eva"), -13),
    Method("LoRA+", _lora(loraplus_lr_ratio=16), -15, on_all=True),
    Method("LoRA-FA", _lora(use_lora_fa=True), -12),
    Method("VeRA r=256", _lora(r=256, peft_type="VERA"), -8),
)


def rate(quarter: int) -> float:
    """The learning rate 10^(quarter/4), to three digits."""
    return float(f"{10 ** (quarter / 4):.2e}")


@dataclass(frozen=True)
class Cell:
    """One training run. part: the fold of bbc, or the seed of another dataset."""

    data: str
    method: Method
    quarter: int
    part: int
    shrunk: bool = False  # with the fields of QUICK

    @property
    def key(self) -> str:
        name = self.method.name.replace("=", "").replace(",", "").replace(" ", "-")
        part = f"fold{self.part}" if self.data == "bbc" else f"seed{self.part}"
        return f"{Path(self.data).name}/{name}/{rate(self.quarter):g}/{part}"

    def settings(self) -> dict[str, Any]:
        """The recipe's fields."""
        fields = {**SETTINGS, **(BBC if self.data == "bbc" else LARGE), **self.method.fields}
        data = str(RUNS / f"fold{self.part}") if self.data == "bbc" else self.data
        fields |= {"data": data, "learning_rate": rate(self.quarter), "seed": self.part}
        return fields | (QUICK if self.shrunk else {})

    def run(self) -> dict[str, Any]:
        """Trains, and returns the result, or {"diverged": message}. Raises RunError as finish_run does."""
        folder = RUNS / ("quick" if self.shrunk else "whole") / self.key
        try:
            summary = finish_run("quickstart", self.settings(), folder, threads=1)
        except DivergedError as error:
            return {"diverged": str(error)}
        bits = "".join("1" if row.correct else "0" for row in read_predictions(folder))
        return {
            **{name: summary[name] for name in KEPT},
            "train_articles": summary["train_examples"] // summary["epochs"],
            "correct": f"{int('1' + bits, 2):x}",  # the leading 1 keeps the zeros after it
        }


def correct(result: Mapping[str, Any]) -> list[bool]:
    """Whether each test article was classified correctly, in the order of the data."""
    return [bit == "1" for bit in f"{int(result['correct'], 16):b}"[1:]]


class Results:
    """The results of cells by key, in a JSON file to which one is added whenever a run ends.

    The file also has what a key does not: the settings of all, the fields of each method, and a digest of
    each dataset. Several processes may add to it, each with cells of its own. Raises RunError if the file is
    of other settings.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = self._read()

    def _read(self) -> dict[str, Any]:
        settings = {"all": SETTINGS, "bbc": BBC, "large": LARGE}
        found = json.loads(self._path.read_text()) if self._path.is_file() else {"settings": settings}
        if found["settings"] != settings:
            raise RunError(f"{self._path}: measured with other settings; remove it to measure again")
        return {"settings": settings, "methods": {}, "data": {}, "cells": {}, **found}

    def identify(self, data: str, methods: Sequence[Method]) -> None:
        """Records what `data` and `methods` are. Raises RunError if the results are of others so named."""
        fields = {method.name: json.loads(json.dumps(method.fields)) for method in methods}
        self._agree("methods", fields)
        self._agree("data", {Path(data).name: _digest(data)})

    def _agree(self, kind: str, described: Mapping[str, Any]) -> None:
        for name, description in described.items():
            if self._file[kind].setdefault(name, description) != description:
                raise RunError(f"{self._path}: its results are of another {name}; remove them")

    def finish(self, cell: Cell) -> dict[str, Any]:
        """The result of the cell, which is run if it has none. Raises RunError as finish_run does."""
        if cell.key not in self._file["cells"]:
            self._file["cells"] |= self._read()["cells"]  # what other processes have added
        if cell.key not in self._file["cells"]:
            self._add(cell, cell.run())
        result: dict[str, Any] = self._file["cells"][cell.key]
        return result

    def _add(self, cell: Cell, result: dict[str, Any]) -> None:
        for folder in (self._path.parent, RUNS):
            folder.mkdir(parents=True, exist_ok=True)
        with (RUNS / "cells.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # against other threads too: each has opened the file itself
            now = self._read()
            for kind in ("methods", "data"):
                self._agree(kind, now[kind])
                now[kind] |= self._file[kind]
            now["cells"] = dict(sorted({cell.key: result, **now["cells"]}.items()))
            write_atomically(self._path, (json.dumps(now, indent=1) + "\n").encode())
            self._file = now


def open_results(quick: bool) -> Results:
    """The results of the device, or those of quick runs. Raises RunError as Results does."""
    folder = RUNS / "quick" if quick else results_folder(resolve_device("auto"))
    return Results(folder / "cells.json")


def _digest(data: str) -> str:
    if data != "bbc":
        return load_news(data, LARGE["validation_fraction"], seed=0).digest()
    names = [RUNS / f"fold{fold}" / name for fold in range(FOLDS) for name in ("test.csv", "train.csv")]
    return hashlib.sha256(b"".join(name.read_bytes() for name in names)).hexdigest()


@dataclass(frozen=True)
class Trained:
    """The cells of a method on a dataset. sweep: of fold or seed 0, by rate. chosen: all folds or seeds."""

    method: Method
    sweep: dict[Cell, dict[str, Any]]
    chosen: dict[Cell, dict[str, Any]]

    @property
    def quarter(self) -> int:
        """The selected rate."""
        return next(iter(self.chosen)).quarter

    @property
    def interior(self) -> bool:
        """Whether a lower and a higher rate than the selected one were tried."""
        quarters = [cell.quarter for cell in self.sweep]
        return min(quarters) < self.quarter < max(quarters)

    def correct(self) -> list[int]:
        """How often each test article was classified correctly, 0 or 1 on bbc, else up to all seeds."""
        parts = [correct(result) for result in self.chosen.values()]
        if next(iter(self.chosen)).data == "bbc":
            return [int(bit) for part in parts for bit in part]
        return [sum(bits) for bits in zip(*parts, strict=True)]


def train_method(
    data: str,
    method: Method,
    finish: Callable[[Cell], dict[str, Any]],
    shrunk: bool = False,
    quarter: int | None = None,
) -> Trained:
    """Selects the method's rate on fold or seed 0, unless `quarter` is given, and trains on all of them.

    On another dataset the candidates begin around the rate that is selected on bbc. A rate with which
    training diverges on another fold or with another seed is not selected. Raises RunError if none is left.
    """
    first = method.quarter if quarter is None else quarter
    if data != "bbc" and not shrunk and quarter is None:
        first = train_method("bbc", method, finish).quarter - START // 2
    fixed = shrunk or quarter is not None
    last = first + (1 if fixed else START)
    sweep: dict[int, dict[str, Any]] = {}
    while True:
        for candidate in range(first, last):
            if candidate not in sweep:
                sweep[candidate] = finish(Cell(data, method, candidate, 0, shrunk))
        best = min(sweep, key=lambda candidate: sweep[candidate].get("val_loss", math.inf))
        if not (fixed or len(sweep) >= MOST or first < best < last - 1):
            first, last = (first - 1, last) if best == first else (first, last + 1)
            continue
        tried = {Cell(data, method, candidate, 0, shrunk): sweep[candidate] for candidate in sorted(sweep)}
        cells = [Cell(data, method, best, part, shrunk) for part in parts_of(data)]
        chosen = {cell: tried[cell] if cell in tried else finish(cell) for cell in cells}
        diverged = next((result for result in chosen.values() if "diverged" in result), None)
        if diverged is None:
            return Trained(method, tried, chosen)
        if fixed or "diverged" in sweep[best]:
            raise RunError(f"{cells[0].key}: training diverges at every rate: {diverged['diverged']}")
        sweep[best] = diverged


def parts_of(data: str) -> Sequence[int]:
    """The folds of bbc, or the seeds of another dataset."""
    return range(FOLDS) if data == "bbc" else SEEDS


def train_all(
    data: str, methods: Sequence[Method], results: Results, shrunk: bool = False, quarter: int | None = None
) -> list[Trained]:
    """Trains every method on `data` as `train_method` does, side by side on the CPU.

    Raises RunError if a cell fails, after the cells that run at that time. Ctrl-C stops these too; they are
    resumed.
    """
    write_folds()  # also for another dataset, whose first rates depend on bbc
    results.identify(data, methods)
    stopped = threading.Event()
    failed: list[RunError] = []
    rates = 1 if shrunk or quarter is not None else START
    planned = len(methods) * (rates + len(parts_of(data)) - 1)
    with tqdm(total=planned, desc=Path(data).name, unit="run") as progress:

        def finish(cell: Cell) -> dict[str, Any]:
            if stopped.is_set():
                raise RunError("stopped")
            try:
                result = results.finish(cell)
            except RunError as error:
                failed.append(error)
                stopped.set()
                raise
            if cell.data == data:  # and not of bbc, for the first rates on another dataset
                progress.total = max(progress.total, progress.n + 1)  # more rates than START
                progress.update()
            return result

        at_once = torch.get_num_threads() if resolve_device("auto").type == "cpu" else 1
        pool = ThreadPoolExecutor(at_once)
        try:
            return list(pool.map(lambda m: train_method(data, m, finish, shrunk, quarter), methods))
        except RunError as error:
            raise (failed or [error])[0] from None
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)


def write_folds() -> None:
    """Writes each fold of bbc to RUNS as a folder of CSV files, `text,label`."""
    parts, labels = read_bbc()
    by_label: dict[int, list[str]] = {}
    for texts, classes in parts.values():
        for text, label in zip(texts, classes, strict=True):
            by_label.setdefault(label, []).append(text)
    folds: list[list[tuple[str, str]]] = [[] for _ in range(FOLDS)]
    for label, texts in by_label.items():
        texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
        for number, text in enumerate(texts):
            folds[number * FOLDS // len(texts)].append((text, labels[label]))
    for number, test in enumerate(folds):
        folder = RUNS / f"fold{number}"
        train = [row for other in folds if other is not test for row in other]
        for name, rows in (("train.csv", train), ("test.csv", test)):
            file = io.StringIO()
            csv.writer(file, lineterminator="\n").writerows([("text", "label"), *rows])
            contents = file.getvalue().encode()
            if not (folder / name).is_file() or (folder / name).read_bytes() != contents:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / name, contents)


def used_to_select() -> list[bool]:
    """Whether each test article of bbc, fold by fold, is a validation article of fold 0.

    On these the learning rates are selected.
    """
    write_folds()
    folds = [
        load_news(str(RUNS / f"fold{fold}"), BBC["validation_fraction"], seed=0) for fold in range(FOLDS)
    ]
    used = set(folds[0].validation["text"])
    return [text in used for fold in folds for text in fold.test["text"]]
