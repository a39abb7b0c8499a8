"""A run's folder: the names of its files, which folders can be used, and what is recorded in one.

adapter/               the adapter in PEFT's format (method = lora)
weights.safetensors    the trained weights (method = full or head)
config.toml            the recipe
metrics.jsonl          one line per logged step and epoch
checkpoint/            the last two checkpoints
test_predictions.csv   label and prediction of each test article
figures/               learning curves, confusion matrix, classification report
summary.json           the results; written last, so its presence marks a finished run
"""

from __future__ import annotations

import fcntl
import json
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora.errors import UserError
from train.config import Recipe, make_recipe

ADAPTER = "adapter"
WEIGHTS = "weights.safetensors"
CONFIG = "config.toml"
METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint"
PREDICTIONS = "test_predictions.csv"
FIGURES = "figures"
SUMMARY = "summary.json"
_LOCK = ".lock"


class RunError(UserError, RuntimeError):
    """A run's folder that cannot be used. The message says what is wrong and what to do."""


def run_recipe(folder: Path) -> Recipe:
    """The recipe of the run in `folder`. Raises RunError."""
    try:
        fields = tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))
        fields.pop("compile", None)  # an option that runs of version 0.1.0 recorded
        return make_recipe(fields)
    except FileNotFoundError:
        raise RunError(f"{folder}: not a run (there is no {CONFIG})") from None
    except ValueError as error:
        raise RunError(f"{folder / CONFIG}: {error}") from error


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of the finished run in `folder`. Raises RunError."""
    check_finished(folder)
    try:
        summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(
            f"{folder / SUMMARY}: damaged; remove it, and `python -m train --resume` writes it again"
        ) from error
    return summary


def check_finished(folder: Path) -> None:
    """Raises RunError if there is no such folder, or if the run in it is not finished."""
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no such folder")
    if (folder / CONFIG).is_file() and not (folder / SUMMARY).is_file():
        command = f"python -m train --resume --output {shlex.quote(str(folder))}"
        raise RunError(f"{folder}: the run is not finished; `{command}` continues it")


def prepare_folder(folder: Path, recipe: Recipe, resume: bool) -> bool:
    """Checks that `recipe` can be run or resumed in `folder`. Returns whether the run is finished already.

    Raises RunError.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: not a folder")
    # Names with a leading dot are the lock, and temporary files of a write that was killed.
    names = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.is_dir() else set()
    if not resume:
        if names:
            found = (
                "a finished run" if SUMMARY in names else "an unfinished run" if CONFIG in names else "files"
            )
            raise RunError(
                f"{folder}: it holds {found} already; --resume continues a run, --output DIR starts another"
            )
        return False
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder, so there is no run to resume; omit --resume to start one")
    if names and CONFIG not in names:
        raise RunError(f"{folder}: it holds files but no {CONFIG}, so there is no run to resume")
    if names and run_recipe(folder) != recipe:
        before, now = run_recipe(folder).to_toml().splitlines(), recipe.to_toml().splitlines()
        changed = [f"{old} there, {new} now" for old, new in zip(before, now, strict=True) if old != new]
        raise RunError(f"{folder}: cannot resume with another recipe: {'; '.join(changed)}")
    return SUMMARY in names


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Creates `folder` and locks it against other runs. The lock ends with the process, however it ends.

    Raises RunError if another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder}: another run is writing to it at this moment") from None
        yield


def check_log(path: Path, lines: int) -> None:
    """Raises RunError unless the log has the first `lines` lines, which a checkpoint relies on."""
    found = path.read_bytes().splitlines()[:lines] if path.is_file() else []
    try:
        intact = len([json.loads(line) for line in found]) == lines
    except ValueError:
        intact = False
    if not intact:
        raise RunError(f"{path}: damaged: the checkpoint was taken after {lines} lines, and some are missing")
